// The loop for separable penalties: the whole step in one pass.
#pragma once

#include "stored.h"

BREGMAN_BEGIN

// The whole step on n neighbouring elements; returns how many are non-zero.
template <class Rule, class Elementwise, class C>
BREGMAN_LOOP int32_t separable_block(const Arrays<Rule, C> a, int64_t n, const Scalars<Rule, C> k) {
  int32_t count = 0;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    C s[kMaxSlots];
    const C q = prox_point<true, Rule, Elementwise>(a, j, k, s);
    count += finish_element(a, j, k, q, s);
  }
  return count;
}

template <class Rule, class Elementwise, class T>
void run_separable(const PlanView& plan, const Item& item, const void* grad, const StepArgs& args, int32_t* counts) {
  using C = compute_t<T>;
  const TensorRecord& t = plan.records()[item.tensor];
  const auto k = Scalars<Rule, C>::from(args.scalars, args.elementwise, args.radial);
  const Stored<Rule, T> stored(t, grad);
  const bool stream = streams<Rule, T>(plan, t);
  const int32_t count = stored.template store<Visit::only>(
      item.begin, item.count, stream, [&](const Arrays<Rule, C>& a, int64_t, int64_t n) {
        return separable_block<Rule, Elementwise, C>(a, n, k);
      });
  if (stream) stream_fence();
  if (counts == nullptr) return;
  counts[0] = count;
  counts[1] = 0;
}

BREGMAN_END
