// Regularized adaptive momentum dual averaging (Huang and Lee, NeurIPS 2024): V <- V + gain g,
// U <- U + gain g^2, P = cbrt(U) + eps, q = prox(x0 - V / P) with scale alpha / P, p <- (1 - momentum) p + momentum q.
// Completing the square makes the subproblem this prox in the metric P, so it is solved exactly.
#pragma once

#include "../point.h"

BREGMAN_BEGIN

struct RAMDA : Rule {
  static constexpr int kStateSlots = 3;
  static constexpr int kFixedSlots = 1;
  static constexpr bool kReadsParam = true;
  static constexpr bool kMetric = true;
  static constexpr const char* kSlotNames = "start gradient_sum square_sum";
  static constexpr const char* kHyperNames = "gain alpha eps keep momentum";
  template <class C>
  struct Hyper {
    C gain, alpha, eps, keep, momentum;
  };

  template <class C>
  BREGMAN_HD static void update(C grad, C, C* state, const Hyper<C>& h) {
    state[1] = state[1] + grad * h.gain;
    state[2] = state[2] + grad * grad * h.gain;
  }

  template <class C>
  BREGMAN_HD static Point<C> point(C, C, const C* state, const Hyper<C>& h) {
    const C inverse = C(1) / (cube_root(state[2]) + h.eps);
    return {state[0] - state[1] * inverse, h.alpha * inverse};
  }

  template <class C>
  BREGMAN_HD static C finish(C q, C param, const C*, const Hyper<C>& h) {
    return param * h.keep + q * h.momentum;  // momentum 1: exactly q
  }
};

BREGMAN_END
