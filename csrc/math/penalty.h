// The parameters of a scalar penalty, in the order of its kParameterNames.
#pragma once

#include "hd.h"

BREGMAN_BEGIN

template <class C>
struct Penalty {
  int kind;  // position in penalty_list.h
  C a, b;
};

// Whether phi(t x) = t phi(x) for t >= 0, which a functor says by a member of this name. Such a penalty may stand below
// group norms: its prox followed by that of the norm is the prox of both.
template <class Functor>
constexpr bool kHomogeneous = requires { requires Functor::kHomogeneous; };

// phi'(t) = level - slope t for t > 0, of penalties that are so: they have group proxes in a diagonal metric (weighted.h).
template <class C>
struct Line {
  C level, slope;
};

// Of the others, at t > 0: phi(t), phi'(t) / t, which must not increase, and -t times the derivative of that (curved.h).
struct Curve {
  double value, ratio, bend;
};

BREGMAN_END
