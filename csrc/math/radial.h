// The group prox of any scalar penalty: shrink the group's norm, keep its direction.
#pragma once

#include "penalty_list.h"

BREGMAN_BEGIN

// The factor on a group of this norm. A zero group meets the smallest normal number instead, which gives factor 0,
// or 1 where the prox is the identity (lam = 0); an infinite norm gives 1; NaN stays NaN.
template <class Scalar, class C>
BREGMAN_HD C radial_factor(C norm, C scale, const Penalty<C>& k) {
  norm = select(norm == C(0), C(smallest_normal<C>::value), norm);
  C shrunk = Scalar::template prox<C>(norm, scale, k);
  return select(shrunk == norm, C(1), shrunk / norm);
}

// The same with the penalty chosen at run time.
struct AnyPenalty {
  template <class C>
  BREGMAN_HD static C prox(C x, C scale, const Penalty<C>& k) {
    return bregman::prox(x, scale, k);
  }
};

BREGMAN_END
