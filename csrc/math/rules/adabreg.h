// AdaBreg (Bungert et al., JMLR 2022, algorithm 3): Adam's direction in the dual, both moments bias-corrected.
#pragma once

#include "../point.h"

BREGMAN_BEGIN

struct AdaBreg : Rule {
  static constexpr int kStateSlots = 3;
  static constexpr bool kReadsParam = false;
  static constexpr const char* kSlotNames = "dual exp_avg exp_avg_sq";
  static constexpr const char* kHyperNames =
      "beta1 one_minus_beta1 beta2 one_minus_beta2 rate root_correction eps delta";
  template <class C>
  struct Hyper {
    C beta1, one_minus_beta1, beta2, one_minus_beta2, rate, root_correction, eps, delta;
  };

  template <class C>
  BREGMAN_HD static void update(C grad, C, C* state, const Hyper<C>& h) {
    state[1] = state[1] * h.beta1 + grad * h.one_minus_beta1;
    state[2] = state[2] * h.beta2 + grad * grad * h.one_minus_beta2;
    state[0] = state[0] - state[1] * h.rate / (square_root(state[2]) * h.root_correction + h.eps);
  }

  template <class C>
  BREGMAN_HD static Point<C> point(C, C, const C* state, const Hyper<C>& h) {
    return {state[0] * h.delta, h.delta};
  }

  template <class C>
  BREGMAN_HD static C finish(C q, C, const C*, const Hyper<C>&) {
    return q;
  }
};

BREGMAN_END
