// Adam with a prox in its diagonal metric (ProxGen, Yun et al., NeurIPS 2021; ProxSSI, Deleu and Bengio, 2021),
// with AMSGrad's largest second moment so far in place of the second moment:
// d = sqrt(v) root_correction + eps, p <- prox(p - rate m / d) with scale threshold / d; decoupled weight decay.
#pragma once

#include "../point.h"

BREGMAN_BEGIN

struct ProxAdamAMSGrad : Rule {
  static constexpr int kStateSlots = 3;
  static constexpr bool kReadsParam = true;
  static constexpr bool kMetric = true;
  static constexpr const char* kSlotNames = "exp_avg exp_avg_sq max_exp_avg_sq";
  static constexpr const char* kHyperNames =
      "beta1 one_minus_beta1 beta2 one_minus_beta2 decay_before rate root_correction eps decay_after threshold";
  template <class C>
  struct Hyper {
    C beta1, one_minus_beta1, beta2, one_minus_beta2, decay_before, rate, root_correction, eps, decay_after, threshold;
  };

  template <class C>
  BREGMAN_HD static void update(C grad, C, C* state, const Hyper<C>& h) {
    state[0] = state[0] * h.beta1 + grad * h.one_minus_beta1;
    state[1] = state[1] * h.beta2 + grad * grad * h.one_minus_beta2;
    state[2] = state[1] > state[2] ? state[1] : state[2];
  }

  template <class C>
  BREGMAN_HD static Point<C> point(C, C param, const C* state, const Hyper<C>& h) {
    const C inverse = C(1) / (square_root(state[2]) * h.root_correction + h.eps);
    return {(param * h.decay_before - state[0] * h.rate * inverse) * h.decay_after, h.threshold * inverse};
  }

  template <class C>
  BREGMAN_HD static C finish(C q, C, const C*, const Hyper<C>&) {
    return q;
  }
};

BREGMAN_END
