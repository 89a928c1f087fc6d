// The CPU loops. Included once per instruction set, each time in a namespace of its own (BREGMAN_ISA).
// No loop switches by the penalty: that would stop its vectorisation.
#pragma once

#include "buffered.h"
#include "separable.h"

BREGMAN_BEGIN

using RunItem = void (*)(const PlanView&, const Item&, const void*, const StepArgs&, int32_t*);

// The elementwise penalties in common use are part of the rule's loops; others run in loops of their own (buffered.h).
template <class Rule, class T>
RunItem pick_penalty(const StepArgs& args, bool grouped) {
  const PenaltyKind kind = PenaltyKind(args.elementwise);
  if (grouped) {
    if constexpr (!kPaired<Rule>) {
      if (kind == PenaltyKind::none) return run_grouped<Rule, NoPenalty, T>;
      if (kind == PenaltyKind::l1) return run_grouped<Rule, L1, T>;
    }
    return run_grouped_buffered<Rule, T>;
  }
  if (kind == PenaltyKind::none) return run_separable<Rule, NoPenalty, T>;
  if (kind == PenaltyKind::l1) return run_separable<Rule, L1, T>;
  return run_separable_buffered<Rule, T>;
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
  for (int64_t n = begin; n < end; ++n) {
    // The second visit of strips goes backwards: caches hold what the first visit touched last.
    const int64_t i = args.phase == Phase::finish_strips ? end - 1 - (n - begin) : n;
    const Item& item = plan.items()[i];
    run(plan, item, grads[item.tensor], args, counts == nullptr ? nullptr : counts + 2 * i);
  }
}

BREGMAN_END
