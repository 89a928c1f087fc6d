// The parameters of a scalar penalty, in the order of its kParameterNames.
#pragma once

#include "hd.h"

BREGMAN_BEGIN

template <class C>
struct Penalty {
  int kind;  // position in penalty_list.h
  C a, b;
};

BREGMAN_END
