// lam [x != 0]: hard threshold at sqrt(2 scale lam).
#pragma once

#include "../penalty.h"

BREGMAN_BEGIN

struct L0 {
  static constexpr const char* kParameterNames = "lam";

  template <class C>
  BREGMAN_HD static C prox(C x, C scale, const Penalty<C>& k) {
    // x^2 <= 2 scale lam, without squares that overflow; 0/0 is a zero that stays, and NaN stays.
    C a = absolute(x);
    return select(a <= C(2) * (scale * k.a) / a, C(0), x);
  }

  template <class C>
  BREGMAN_HD static Curve curve(const Penalty<C>& k, double) {
    return {double(k.a), 0, 0};
  }
};

BREGMAN_END
