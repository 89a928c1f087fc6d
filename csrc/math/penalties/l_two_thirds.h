// lam |x|^(2/3).
#pragma once

#include "../penalty.h"
#include "../power.h"

BREGMAN_BEGIN

struct LTwoThirds {
  static constexpr const char* kParameterNames = "lam";

  template <class C>
  BREGMAN_HD static C prox(C x, C scale, const Penalty<C>& k) {
    return power_prox<3>(x, scale * k.a);
  }

  template <class C>
  BREGMAN_HD static Curve curve(const Penalty<C>& k, double t) {
    return power_curve<3>(t, double(k.a));
  }
};

BREGMAN_END
