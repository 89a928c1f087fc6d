// lam x on x >= 0, infinite elsewhere: one-sided soft threshold.
#pragma once

#include "../penalty.h"

BREGMAN_BEGIN

struct NonnegL1 {
  static constexpr const char* kParameterNames = "lam";
  static constexpr bool kHomogeneous = true;

  template <class C>
  BREGMAN_HD static C prox(C x, C scale, const Penalty<C>& k) {
    C threshold = scale * k.a;
    return select(x <= threshold, C(0), x - threshold);  // a NaN fails the comparison and stays
  }
};

BREGMAN_END
