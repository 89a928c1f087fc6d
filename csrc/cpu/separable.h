// The loop for separable penalties: the whole step in one pass.
#pragma once

#include "stored.h"

BREGMAN_BEGIN

// The whole step on n neighbouring elements; returns how many are non-zero.
template <class Rule, class Elementwise, class C, bool kMasked>
BREGMAN_LOOP int32_t separable_block(const Arrays<Rule, C> a, int64_t n, const Scalars<Rule, C> k,
                                     const flag_t<C>* keep) {
  int32_t count = 0;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    C s[kMaxSlots];
    C q = prox_point<true, Rule, Elementwise, C, kMasked>(a, j, k, s, keep, j);
    count += finish_element<Rule, C, kMasked>(a, j, k, q, s, keep, j);
  }
  return count;
}

template <class Rule, class Elementwise, class T>
void run_separable(const PlanView& plan, const Item& item, const void* grad, const StepArgs& args, int32_t* counts) {
  using C = compute_t<T>;
  const TensorRecord& t = plan.records()[item.tensor];
  const auto k = Scalars<Rule, C>::from(args.scalars, args.elementwise, args.radial);
  const Stored<Rule, T> stored(t, grad);
  const bool stream = t.mask == nullptr && streams<Rule, T>(plan, t);
  const int32_t count = stored.template store<Visit::only>(
      item.begin, item.count, stream, [&](const Arrays<Rule, C>& a, int64_t j, int64_t n) {
        if (t.mask == nullptr) return separable_block<Rule, Elementwise, C, false>(a, n, k, nullptr);
        int32_t found = 0;
        for_blocks<C>(t.mask, item.begin + j, n, [&](int64_t i, int64_t length, const flag_t<C>* keep) {
          found += separable_block<Rule, Elementwise, C, true>(a.from(i), length, k, keep);
        });
        return found;
      });
  if (stream) stream_fence();
  if (counts == nullptr) return;
  counts[0] = count;
  counts[1] = 0;
}

BREGMAN_END
