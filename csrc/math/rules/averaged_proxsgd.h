// ProxSGD of Yang et al. (ICLR 2020): a unit step in the metric tau = sqrt(second moment) + eps, then
// averaging: q = prox(p - m / tau) with scale 1 / tau, p <- p + step (q - p).
#pragma once

#include "../point.h"

BREGMAN_BEGIN

struct AveragedProxSGD : Rule {
  static constexpr int kStateSlots = 2;
  static constexpr bool kReadsParam = true;
  static constexpr bool kMetric = true;
  static constexpr const char* kSlotNames = "exp_avg exp_avg_sq";
  static constexpr const char* kHyperNames = "decay gain beta one_minus_beta root_correction eps keep step";
  template <class C>
  struct Hyper {
    C decay, gain, beta, one_minus_beta, root_correction, eps, keep, step;
  };

  template <class C>
  BREGMAN_HD static void update(C grad, C, C* state, const Hyper<C>& h) {
    state[0] = state[0] * h.decay + grad * h.gain;
    state[1] = state[1] * h.beta + grad * grad * h.one_minus_beta;
  }

  template <class C>
  BREGMAN_HD static Point<C> point(C, C param, const C* state, const Hyper<C>& h) {
    const C inverse = C(1) / (square_root(state[1]) * h.root_correction + h.eps);
    return {param - state[0] * inverse, inverse};
  }

  template <class C>
  BREGMAN_HD static C finish(C q, C param, const C*, const Hyper<C>& h) {
    return param * h.keep + q * h.step;  // step 1: exactly q
  }
};

BREGMAN_END
