// The loop for separable penalties: the whole step in one pass.
#pragma once

#include "arrays.h"

BREGMAN_BEGIN

// The whole step on n neighbouring elements; returns how many are non-zero.
template <class Rule, class Elementwise, class T, bool kMasked>
BREGMAN_LOOP int32_t separable_block(const Arrays<Rule, T> a, int64_t begin, int64_t n,
                                     const Scalars<Rule, compute_t<T>> k, const flag_t<compute_t<T>>* keep) {
  using C = compute_t<T>;
  int32_t count = 0;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    int64_t i = begin + j;
    C s[kMaxSlots];
    C q = prox_point<true, Rule, Elementwise, T, C, kMasked>(a, i, k, s, keep, j);
    count += finish_element<Rule, T, C, kMasked>(a, a, i, k, q, s, keep, j);
  }
  return count;
}

template <class Rule, class Elementwise, class T>
void run_separable(const PlanView& plan, const Item& item, const void* grad, const StepArgs& args, int32_t* counts) {
  using C = compute_t<T>;
  const TensorRecord& t = plan.records()[item.tensor];
  const auto k = Scalars<Rule, C>::from(args.scalars, args.elementwise, args.radial);
  Arrays<Rule, T> a(t, grad);
  int32_t count = 0;
  if (t.mask != nullptr) {
    for_blocks<C>(t.mask, item.begin, item.count, [&](int64_t j, int64_t n, const flag_t<C>* keep) {
      count += separable_block<Rule, Elementwise, T, true>(a, item.begin + j, n, k, keep);
    });
  } else if (streams<Rule, T>(plan, t)) {
    for (int64_t j = 0; j < item.count; j += kBuffer) {
      const int64_t begin = item.begin + j, n = item.count - j < kBuffer ? item.count - j : kBuffer;
      count += streamed(a, begin, n, [&](const Arrays<Rule, T>& to) {
        return separable_block<Rule, Elementwise, T, false>(to, begin, n, k, nullptr);
      });
    }
    stream_fence();
  } else {
    count = separable_block<Rule, Elementwise, T, false>(a, item.begin, item.count, k, nullptr);
  }
  if (counts == nullptr) return;
  counts[0] = count;
  counts[1] = 0;
}

BREGMAN_END
