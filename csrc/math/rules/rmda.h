// Regularized modernized dual averaging (Huang and Lee, ICLR 2022): V <- V + gain g,
// q = prox(x0 - V / sqrt(t)) with scale alpha / sqrt(t), p <- (1 - momentum) p + momentum q.
#pragma once

#include "../point.h"

BREGMAN_BEGIN

struct RMDA : Rule {
  static constexpr int kStateSlots = 2;
  static constexpr int kFixedSlots = 1;
  static constexpr bool kReadsParam = true;
  static constexpr const char* kSlotNames = "start gradient_sum";
  static constexpr const char* kHyperNames = "gain inverse_root scale keep momentum";
  template <class C>
  struct Hyper {
    C gain, inverse_root, scale, keep, momentum;
  };

  template <class C>
  BREGMAN_HD static void update(C grad, C, C* state, const Hyper<C>& h) {
    state[1] = state[1] + grad * h.gain;
  }

  template <class C>
  BREGMAN_HD static Point<C> point(C, C, const C* state, const Hyper<C>& h) {
    return {state[0] - state[1] * h.inverse_root, h.scale};
  }

  template <class C>
  BREGMAN_HD static C finish(C q, C param, const C*, const Hyper<C>& h) {
    return param * h.keep + q * h.momentum;  // momentum 1: exactly q
  }
};

BREGMAN_END
