// Linearized Bregman iteration with momentum (Bungert et al., JMLR 2022, algorithm 2; and torch's convention):
// m <- momentum m + gain g, v <- v - rate m, p = prox(delta v).
#pragma once

#include "../point.h"

BREGMAN_BEGIN

struct LinBregMomentum : Rule {
  static constexpr int kStateSlots = 2;
  static constexpr bool kReadsParam = false;
  static constexpr const char* kSlotNames = "dual momentum_buffer";
  static constexpr const char* kHyperNames = "momentum gain rate delta";
  template <class C>
  struct Hyper {
    C momentum, gain, rate, delta;
  };

  template <class C>
  BREGMAN_HD static void update(C grad, C, C* state, const Hyper<C>& h) {
    state[1] = state[1] * h.momentum + grad * h.gain;
    state[0] = state[0] - state[1] * h.rate;
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
