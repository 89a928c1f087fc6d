// Split linearized Bregman iteration (DessiLBI, Fu et al., TPAMI 2022): the parameter w is coupled to a sparse twin
// Gamma = kappa prox_J(z), which is never stored:
//   w <- w - kappa lr (g + c),  z <- z + lr c,  with c = (w - Gamma) / mu  of the old w and z.
#pragma once

#include "../point.h"

BREGMAN_BEGIN

struct SplitLBI : Rule {
  static constexpr int kStateSlots = 1;
  static constexpr bool kReadsParam = true;
  static constexpr bool kLate = true;
  static constexpr const char* kSlotNames = "dual";
  static constexpr const char* kHyperNames = "lr rate kappa mu weight_decay";
  template <class C>
  struct Hyper {
    C lr, rate, kappa, mu, weight_decay;
  };

  template <class C>
  BREGMAN_HD static Point<C> point(C, C, const C* state, const Hyper<C>&) {
    return {state[0], C(1)};
  }

  template <class C>
  BREGMAN_HD static C finish(C q, C grad, C param, C* state, const Hyper<C>& h) {
    const C coupling = (param - q * h.kappa) / h.mu;
    state[0] = state[0] + coupling * h.lr;
    return param - (grad + param * h.weight_decay + coupling) * h.rate;
  }
};

BREGMAN_END
