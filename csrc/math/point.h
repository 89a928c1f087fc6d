// What a rule hands to the driver: the pre-prox point and its prox scale.
#pragma once

#include "hd.h"

BREGMAN_BEGIN

template <class C>
struct Point {
  C z;
  C scale;
};

// The prox scale of a rule whose metric is the identity: it depends on no element.
template <class Rule, class C>
BREGMAN_HD C uniform_scale(const typename Rule::template Hyper<C>& h) {
  C state[8] = {};
  return Rule::template point<C>(C(0), C(0), state, h).scale;
}

BREGMAN_END
