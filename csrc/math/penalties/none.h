// No penalty: the identity.
#pragma once

#include "../penalty.h"

BREGMAN_BEGIN

struct NoPenalty {
  static constexpr const char* kParameterNames = "";

  template <class C>
  BREGMAN_HD static C prox(C x, C, const Penalty<C>&) {
    return x;
  }
};

BREGMAN_END
