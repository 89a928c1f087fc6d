// The CPU loops. Included once per instruction set, each time in a namespace of its own (BREGMAN_ISA).
// The elementwise penalty is a template argument: a switch inside the loop would stop vectorisation.
#pragma once

#include "grouped.h"
#include "separable.h"

BREGMAN_BEGIN

// Below a group penalty, only the elementwise penalties in common use get loops of their own: every instance costs a
// user's build a second.
template <class Functor>
using below_groups =
    std::conditional_t<std::is_same_v<Functor, NoPenalty> || std::is_same_v<Functor, L1>, Functor, AnyPenalty>;

using RunItem = void (*)(const PlanView&, const Item&, const void*, const StepArgs&, int32_t*);

template <class Rule, class T>
RunItem pick_penalty(const StepArgs& args, bool grouped) {
  switch (PenaltyKind(args.elementwise)) {
#define X(Functor, name) \
  case PenaltyKind::name: \
    return grouped ? run_grouped<Rule, below_groups<Functor>, T> : run_separable<Rule, Functor, T>;
    BREGMAN_PENALTIES(X)
#undef X
  }
  return nullptr;
}

template <class Rule>
RunItem pick_dtype(DType dtype, const StepArgs& args, bool grouped) {
  switch (dtype) {
    case DType::f32: return pick_penalty<Rule, float>(args, grouped);
    case DType::f64: return pick_penalty<Rule, double>(args, grouped);
    case DType::bf16: return pick_penalty<Rule, bf16>(args, grouped);
    case DType::fp16: return pick_penalty<Rule, fp16>(args, grouped);
  }
  return nullptr;
}

// Runs items [begin, end) of a plan.
inline void run_items(const PlanView& plan, const void* const* grads, const StepArgs& args, int32_t* counts,
                      int64_t begin, int64_t end) {
  const PlanHeader& header = plan.header();
  RunItem run = nullptr;
  switch (header.rule) {
#define X(Functor, name) \
  case rule_##name: \
    run = pick_dtype<Functor>(DType(header.dtype), args, header.grouped); \
    break;
    BREGMAN_RULES(X)
#undef X
  }
  for (int64_t i = begin; i < end; ++i) {
    const Item& item = plan.items()[i];
    run(plan, item, grads[item.tensor], args, counts == nullptr ? nullptr : counts + 2 * i);
  }
}

BREGMAN_END
