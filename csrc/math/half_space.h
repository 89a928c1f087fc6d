// The half-space step of a group (HSPG, Chen et al., 2020): from p, with z = p - lr m, the trial point is
// x = z - lr phi'(||p||) p / ||p||. It becomes the new group, or zero if it has left the half space in which p lies:
// <x, p> < epsilon ||p||^2. Groups at zero stay there.
#pragma once

#include "curved.h"

BREGMAN_BEGIN

// What an element adds: p^2 and z p.
template <class C>
BREGMAN_HD Sums half_space_terms(C z, C p) {
  return {double(p) * double(p), double(z) * double(p)};
}

// phi'(t) / t at t > 0, the norm of a group of this weight: from the penalty's line, if it has one, or from its curve.
template <class C>
BREGMAN_HD double half_space_rate(double norm, const Penalty<C>& k, C weight) {
  Line<C> line{};
  if (!line_of({k.kind, varying(k.a, C(norm)), varying(k.b, C(norm))}, weight, false, line))
    return norm != norm ? norm : curve_of(k, weight, norm).ratio;
  const double slope = double(line.level) - double(line.slope) * norm;
  return (slope > 0 ? slope : 0) / norm;
}

// The pull toward zero, lr phi'(||p||) / ||p||; negative for a group that becomes (or stays) zero.
template <class C>
BREGMAN_HD C half_space_pull(const Sums& sums, double rate, C lr, C epsilon) {
  if (sums.a == 0) return C(-1);
  const C pull = C(double(lr) * rate);
  const bool left = sums.b - double(pull) * sums.a < double(epsilon) * sums.a;  // not with NaN
  return left ? C(-1) : pull;
}

// The new element; NaN and Inf show in a group that becomes zero, too.
template <class C>
BREGMAN_HD C half_space(C z, C p, C pull) {
  return select(pull < C(0), z - z, z - p * pull);
}

BREGMAN_END
