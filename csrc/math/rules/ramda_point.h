// RAMDA that does not average (momentum 1): the parameter is the prox point, a function of the state, and is not read.
#pragma once

#include "ramda.h"

BREGMAN_BEGIN

struct RAMDAPoint : RAMDA {
  static constexpr bool kReadsParam = false;

  template <class C>
  BREGMAN_HD static C finish(C q, C, const C*, const Hyper<C>&) {
    return q;
  }
};

BREGMAN_END
