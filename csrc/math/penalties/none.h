// No penalty: the identity.
#pragma once

#include "../penalty.h"

BREGMAN_BEGIN

struct NoPenalty {
  static constexpr const char* kParameterNames = "";
  static constexpr bool kHomogeneous = true;

  template <class C>
  BREGMAN_HD static C prox(C x, C, const Penalty<C>&) {
    return x;
  }

  template <class C>
  BREGMAN_HD static Line<C> line(const Penalty<C>&) {
    return {C(0), C(0)};
  }
};

BREGMAN_END
