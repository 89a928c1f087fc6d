// lam |x|: soft threshold.
#pragma once

#include "../penalty.h"

BREGMAN_BEGIN

struct L1 {
  static constexpr const char* kParameterNames = "lam";
  static constexpr bool kHomogeneous = true;

  template <class C>
  BREGMAN_HD static C prox(C x, C scale, const Penalty<C>& k) {
    C threshold = scale * k.a;
    return x - clamp(x, -threshold, threshold);  // identity minus projection: NaN stays NaN, zero stays zero
  }

  template <class C>
  BREGMAN_HD static Line<C> line(const Penalty<C>& k) {
    return {k.a, C(0)};
  }
};

BREGMAN_END
