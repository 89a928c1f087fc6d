// The CPU kernels. Included once per instruction set, each time in a namespace of its own (BREGMAN_ISA).
#pragma once

#include "buffered.h"

BREGMAN_BEGIN

// Elements without groups: a penalty in common use takes one loop, others points in a buffer.
template <class T>
int32_t run_separable(const PlanView& plan, const Item& item, const void* grad, const Step<compute_t<T>>& step) {
  using C = compute_t<T>;
  const TensorRecord& t = plan.records()[item.tensor];
  const Stored<T> stored(t, grad, step.rule);
  if (const FusedLoops<C>* loops = step.rule.fused(step.elementwise.kind)) {
    return stored.template store<Visit::only>(
        item.begin, item.count, streams<T>(plan, t, step.rule),
        [&](const Arrays<C>& a, int64_t, int64_t n, bool past) { return loops->separable_block[past](a, n, step); });
  }
  alignas(64) C z[kBuffer], scales[kBuffer];
  int32_t count = 0;
  for (int64_t j = 0; j < item.count; j += kBuffer) {
    const int64_t begin = item.begin + j, n = std::min(kBuffer, item.count - j);
    advance_any(stored, begin, {1, 1, 0, 0}, n, step, z, scales);
    prox_buffer(z, scales, n, step);
    count += finish_any(stored, begin, n, step, z, scales);
  }
  return count;
}

// Items [begin, end) of a plan of parameters of type T.
template <class T>
void run_typed(const PlanView& plan, const void* const* grads, const StepArgs& args, int32_t* counts, int64_t begin,
               int64_t end) {
  const Step<compute_t<T>> step(loops_of<compute_t<T>>(plan.header().rule), args);
  const auto* loops = step.rule.metric ? nullptr : step.rule.fused(args.elementwise);
  for (int64_t i = begin; i < end; ++i) {
    const Item& item = plan.items()[i];
    const void* grad = grads[item.tensor];
    int32_t* found = counts == nullptr ? nullptr : counts + 2 * i;
    if (plan.header().grouped) {
      if (loops) run_grouped<T>(plan, item, grad, step, *loops, args.phase, found);
      else run_points<T>(plan, item, grad, step, args.phase, found);
    } else {
      const int32_t count = run_separable<T>(plan, item, grad, step);
      if (found != nullptr) found[0] = count, found[1] = 0;
    }
  }
  stream_fence();
}

inline void run_items(const PlanView& plan, const void* const* grads, const StepArgs& args, int32_t* counts,
                      int64_t begin, int64_t end) {
  switch (DType(plan.header().dtype)) {
    case DType::f32: return run_typed<float>(plan, grads, args, counts, begin, end);
    case DType::f64: return run_typed<double>(plan, grads, args, counts, begin, end);
    case DType::bf16: return run_typed<bf16>(plan, grads, args, counts, begin, end);
    case DType::fp16: return run_typed<fp16>(plan, grads, args, counts, begin, end);
  }
}

BREGMAN_END
