// Proximal SGD with the heavy ball: m <- momentum m + g, p <- prox(p - lr m) with scale lr.
#pragma once

#include "../point.h"

BREGMAN_BEGIN

struct ProxSGDMomentum : Rule {
  static constexpr int kStateSlots = 1;
  static constexpr bool kReadsParam = true;
  static constexpr const char* kSlotNames = "momentum_buffer";
  static constexpr const char* kHyperNames = "lr momentum";
  template <class C>
  struct Hyper {
    C lr, momentum;
  };

  template <class C>
  BREGMAN_HD static void update(C grad, C, C* state, const Hyper<C>& h) {
    state[0] = state[0] * h.momentum + grad;
  }

  template <class C>
  BREGMAN_HD static Point<C> point(C, C param, const C* state, const Hyper<C>& h) {
    return {param - state[0] * h.lr, h.lr};
  }

  template <class C>
  BREGMAN_HD static C finish(C q, C, const C*, const Hyper<C>&) {
    return q;
  }
};

BREGMAN_END
