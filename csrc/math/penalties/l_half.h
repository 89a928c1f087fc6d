// lam |x|^(1/2).
#pragma once

#include "../penalty.h"
#include "../power.h"

BREGMAN_BEGIN

struct LHalf {
  static constexpr const char* kParameterNames = "lam";

  template <class C>
  BREGMAN_HD static C prox(C x, C scale, const Penalty<C>& k) {
    return power_prox<2>(x, scale * k.a);
  }
};

BREGMAN_END
