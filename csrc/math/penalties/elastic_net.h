// lam |x| + l2/2 x^2: soft threshold, then scaling.
#pragma once

#include "../penalty.h"

BREGMAN_BEGIN

struct ElasticNet {
  static constexpr const char* kParameterNames = "lam l2";

  template <class C>
  BREGMAN_HD static C prox(C x, C scale, const Penalty<C>& k) {
    C threshold = scale * k.a;
    return (x - clamp(x, -threshold, threshold)) / (C(1) + scale * k.b);
  }

  template <class C>
  BREGMAN_HD static Line<C> line(const Penalty<C>& k) {
    return {k.a, -k.b};
  }
};

BREGMAN_END
