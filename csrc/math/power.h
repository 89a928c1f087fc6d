// The prox of tau |x|^p for p = (K - 1) / K: K = 2 gives |x|^(1/2), K = 3 gives |x|^(2/3).
//
// A minimum z of tau z^p + (z - a)^2 / 2 at a = |x|, written as z = a w^K, solves w^(K+1) - w + q = 0 with
// q = p tau a^(-1 - 1/K); its root in (0, 1] beats z = 0 iff q is below a constant, where w^K = 2 / (K + 1).
#pragma once

#include "penalty.h"

BREGMAN_BEGIN

template <int K, class C>
BREGMAN_HD C power(C w) {
  return K == 2 ? w * w : w * w * w;
}

template <int K, class C>
BREGMAN_HD C power_prox(C x, C tau) {
  // Where the two minima are equally good: s^(1/K) (1 - s) at s = 2 / (K + 1).
  constexpr double crossing = K == 2 ? 0.27216552697590873 : 0.3968502629920499;
  constexpr double c2 = K == 2 ? 0.24 : 0.02, c3 = K == 2 ? 1.46 : 1.12;  // fitted, beside 1/K of the root's series
  C a = absolute(x);
  C q = tau / a * C((K - 1.0) / K) * inverse_root<K>(a);
  C w = C(1) - q * (C(1.0 / K) + q * (C(c2) + q * C(c3)));
  // Newton: two steps for fp32, three for fp64. Worst relative error over 1e5 values of q up to `crossing`, in long
  // double: 2.1e-3 before, then 9.4e-6, 2.0e-10, 2e-19 (K = 3) and 5.5e-4, 5.3e-7, 5.2e-13 (K = 2). From w = 1, the
  // usual start, it takes two steps more. The result is right to 5 ulps (K = 3) and 2.4 (K = 2), measured from the
  // threshold to 1e20 times it.
  for (int step = 0; step < (sizeof(C) == 8 ? 3 : 2); ++step) {
    C p = power<K>(w);
    w = w - ((p - C(1)) * w + q) / (C(K + 1) * p - C(1));
  }
  w = select(q > C(0), w, C(1));  // tau = 0; and q is NaN at NaN, and at zero and infinity, which stay as they are
  return select(q >= C(crossing), C(0), x * power<K>(w));
}

// p lam t^(p - 2) falls with t like t^(-1 - 1/K).
template <int K>
BREGMAN_HD Curve power_curve(double t, double lam) {
  const double y = inverse_root<K>(t), ratio = lam * ((K - 1.0) / K) * y / t;
  return {lam * t * y, ratio, ratio * (1 + 1.0 / K)};
}

BREGMAN_END
