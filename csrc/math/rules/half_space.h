// The second phase of HSPG (Chen et al., 2020): m <- momentum m + g, z = p - lr m; groups take the half-space step
// (half_space.h), and parameters without groups become z.
#pragma once

#include "../point.h"

BREGMAN_BEGIN

struct HalfSpace : Rule {
  static constexpr int kStateSlots = 1;
  static constexpr bool kReadsParam = true;
  static constexpr bool kHalfSpace = true;
  static constexpr const char* kSlotNames = "momentum_buffer";
  static constexpr const char* kHyperNames = "lr momentum epsilon";
  template <class C>
  struct Hyper {
    C lr, momentum, epsilon;
  };

  template <class C>
  BREGMAN_HD static void update(C grad, C, C* state, const Hyper<C>& h) {
    state[0] = state[0] * h.momentum + grad;
  }

  template <class C>
  BREGMAN_HD static Point<C> point(C, C param, const C* state, const Hyper<C>& h) {
    return {param - state[0] * h.lr, param};
  }

  template <class C>
  BREGMAN_HD static C finish(C q, C, const C*, const Hyper<C>&) {
    return q;
  }
};

BREGMAN_END
