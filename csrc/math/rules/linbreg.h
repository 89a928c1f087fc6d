// Linearized Bregman iteration (Bungert et al., JMLR 2022, algorithm 1): v <- v - lr g, p = prox(delta v).
#pragma once

#include "../point.h"

BREGMAN_BEGIN

struct LinBreg : Rule {
  static constexpr int kStateSlots = 1;
  static constexpr bool kReadsParam = false;  // p is a function of the dual
  static constexpr const char* kSlotNames = "dual";
  static constexpr const char* kHyperNames = "lr delta";
  template <class C>
  struct Hyper {
    C lr, delta;
  };

  template <class C>
  BREGMAN_HD static void update(C grad, C, C* state, const Hyper<C>& h) {
    state[0] = state[0] - grad * h.lr;
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
