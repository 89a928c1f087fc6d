// Everything of a step that is the same for all elements, in the compute type.
#pragma once

#include <cstring>

#include "penalty.h"
#include "point.h"

BREGMAN_BEGIN

template <class Rule, class C>
struct Scalars {
  using Hyper = typename Rule::template Hyper<C>;
  C grad_scale;
  Hyper h;
  Penalty<C> elementwise, radial;

  // From the layout of a StepArgs; whether to skip the step is the caller's business.
  BREGMAN_HD static Scalars from(const double* scalars, int elementwise, int radial) {
    constexpr int n = sizeof(Hyper) / sizeof(C);
    C values[n];
    for (int i = 0; i < n; ++i) values[i] = C(scalars[2 + i]);
    const double* k = scalars + 2 + n;
    Scalars s{C(scalars[1]), {}, {elementwise, C(k[0]), C(k[1])}, {radial, C(k[2]), C(k[3])}};
    memcpy(&s.h, values, sizeof(values));
    return s;
  }
};

// The decay of a tensor's groups that share a budget, from their prox scale (1 in half-space steps) and weight.
template <class C>
BREGMAN_HD double budget_decay(double scale, const Penalty<C>& radial, double weight) {
  const double lam = double(radial.a) < 1e300 ? double(radial.a) : 1e300;  // infinite in fp32 beyond 3.4e38
  const double decay = scale * lam * weight;
  return decay > 1e300 ? 1e300 : decay;
}

BREGMAN_END
