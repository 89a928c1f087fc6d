// What a rule hands to the driver: the pre-prox point and its prox scale.
#pragma once

#include "hd.h"

BREGMAN_BEGIN

template <class C>
struct Point {
  C z;
  C scale;
};

BREGMAN_END
