// SplitLBI with momentum: m <- momentum m + d,  w <- w - kappa lr (m + outside c),  where d is the gradient with weight
// decay and `inside` times the coupling c (see splitlbi.h); Nesterov: momentum m + d in place of m. The toolbox couples
// outside of the buffer (inside = 0, outside = 1), the paper inside (1, 0).
#pragma once

#include "../point.h"

BREGMAN_BEGIN

struct SplitLBIMomentum : Rule {
  static constexpr int kStateSlots = 2;
  static constexpr bool kReadsParam = true;
  static constexpr bool kLate = true;
  static constexpr const char* kSlotNames = "dual momentum_buffer";
  static constexpr const char* kHyperNames = "lr rate kappa mu weight_decay momentum nesterov inside outside";
  template <class C>
  struct Hyper {
    C lr, rate, kappa, mu, weight_decay, momentum, nesterov, inside, outside;
  };

  template <class C>
  BREGMAN_HD static Point<C> point(C, C, const C* state, const Hyper<C>&) {
    return {state[0], C(1)};
  }

  template <class C>
  BREGMAN_HD static C finish(C q, C grad, C param, C* state, const Hyper<C>& h) {
    const C coupling = (param - q * h.kappa) / h.mu;
    const C direction = grad + param * h.weight_decay + coupling * h.inside;
    state[1] = state[1] * h.momentum + direction;
    state[0] = state[0] + coupling * h.lr;
    const C step = select(h.nesterov != C(0), state[1] * h.momentum + direction, state[1]);
    return param - (step + coupling * h.outside) * h.rate;
  }
};

BREGMAN_END
