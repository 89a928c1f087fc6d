// The group prox in a diagonal metric: each element of a group has a prox scale s_i of its own.
//
// For a penalty with slope phi'(t) = level - slope t, slope <= 0 (l1, elastic net), and t the norm of the result,
// z_i = x_i / (1 + rho s_i) with rho = phi'(t) / t, and t is the root of
//   g(t) = sum_i x_i^2 / (t (1 - slope s_i) + level s_i)^2 = 1.
// h = g^(-1/2) is increasing and concave. Newton's step on h = 1 never ends right of the root, and Halley's, with the
// second derivative, takes its place near it. A search from 0 asks first whether g(0) <= 1, which makes the group zero,
// and else goes on from ||x||, which is right of the root; one that is led below 0 begins there again, or if the group is
// known not to be zero at a smaller norm. All ends within 7 steps (3,000 groups for each of 5 ranges of scales, up to 8
// decades, of 1 to 4,608 elements, some within 1e-4 of being zero; 2026-11-26); a scale for all needs 3. A group with
// scales in two clusters, 4 decades apart or more, that is nearly zero may need more: what is then left of it is off by up
// to a quarter of itself, mostly 1e-7 of ||x||.
//
// An optimizer's groups move little in a step: its search begins at the norm of the old parameter and mostly ends after 1
// or 2 steps. With r_i = t rest_i q_i, all in [0, 1], a step of relative length e leaves |h''^2 / 4h'^2 - h''' / 6h'| e^3,
// at most 0.45 e^3 (as few r near 1 as others near 0), so that a group settles as soon as that is less than half an ulp,
// whatever others of its tile do.
#pragma once

#include <utility>

#include "penalty_list.h"

BREGMAN_BEGIN

constexpr int kRootSteps = 8;

// The line of a penalty that has one: a functor says so with a member `line`.
template <class Functor, class C>
BREGMAN_HD auto line_of(const Penalty<C>& k, Line<C>& line, int) -> decltype(Functor::line(k), true) {
  line = Functor::line(k);
  return true;
}
template <class Functor, class C>
BREGMAN_HD bool line_of(const Penalty<C>&, Line<C>&, long) {
  return false;
}
// Whether a penalty has a curve (curved.h).
template <class Functor, class C>
BREGMAN_HD constexpr auto has_curve(int) -> decltype(Functor::curve(std::declval<Penalty<C>>(), 0.0), true) {
  return true;
}
template <class Functor, class C>
BREGMAN_HD constexpr bool has_curve(long) {
  return false;
}
// Whether the penalty has a line; the group's weight belongs to it. In a metric those with a curve go along it: where
// their line falls, long steps are not convex.
template <class C>
BREGMAN_HD bool line_of(const Penalty<C>& k, C weight, bool metric, Line<C>& line) {
  bool known = false;
  switch (PenaltyKind(k.kind)) {
#define X(Functor, name) \
  case PenaltyKind::name: \
    known = line_of<Functor>(k, line, 0) && !(metric && has_curve<Functor, C>(0)); \
    break;
    BREGMAN_PENALTIES(X)
#undef X
  }
  line.level *= weight;
  line.slope *= weight;
  return known;
}

// Sums over a group, in float64: the square of a float is exact there.
struct Sums {
  double a, b;
};

// A scale of zero (lr = 0) as a number to divide by, and to multiply an infinite rho with.
template <class C>
BREGMAN_HD C positive_scale(C scale) {
  const C least = sizeof(C) == 8 ? C(1e-75) : C(1e-30);
  return select(scale < least, least, scale);
}

// Sums of u^2, u v and v^2, where u = x / (t rest + level s) and v = r u. At t = 0, where r is 0, v is x.
template <class C>
struct Moments {
  C a, b, c;
};

// What an element adds to those of a step from t. They are of type C: a few of them, relatively exact to its rounding,
// are added up before others are in float64, as conversions cost more than all the rest. Without a scale (lr = 0) or
// level an element meets a number to divide by.
template <class C>
BREGMAN_HD Moments<C> root_terms(C x, C scale, C t, const Line<C>& line) {
  const C along = t * (C(1) - line.slope * scale);
  const C q = C(1) / positive_scale(along + line.level * scale), u = x * q;
  const C v = select(t > C(0), u * (along * q), x);
  return {u * u, u * v, v * v};
}

// The same for a line without slope and t > 0, of a number or a vector of them: a third of the work.
template <class V, class C>
BREGMAN_HD Moments<V> level_terms(V x, V scale, V t, C level) {
  const V q = C(1) / (t + level * scale), u = x * q, r = t * q, square = u * u, fall = r * square;
  return {square, fall, r * fall};
}

// Where the search begins, from the sum of squares of the old parameter: its norm, or 0 where that is not finite.
template <class C>
BREGMAN_HD double root_start(double squares) {
  const double t = double(C(square_root(squares)));
  return t - t == 0 ? t : 0;
}

// How far the search for a group's norm is. Alive: the group is known not to be zero.
enum class Search : int8_t { begun, alive, settled };

// The norm after a step from t, a number of type C.
template <class C>
BREGMAN_HD double root_step(double t, const Moments<double>& sums, Search& search) {
  constexpr double kLeast = sizeof(C) == 8 ? 0x1p-18 : 0x1p-8, kFar = 1e9, kMost = sizeof(C) == 8 ? 1e150 : 1e37;
  double next;
  if (!(t > 0)) {
    search = sums.a > 1 ? Search::alive : Search::settled;
    if (!(sums.a > 1)) return sums.a - sums.a;  // zero; NaN stays
    next = square_root(sums.c > 0 ? sums.c : 1e-46);  // a float's square may be too small for one
    if (!(next <= kMost)) search = Search::settled;  // an infinite element
    return next;
  }
  const double root = square_root(sums.a), newton = t * sums.a * (root - 1) / sums.b;
  const double bend = 1.5 * (root - 1) * (sums.a * sums.c / (sums.b * sums.b) - 1);
  next = t + newton;
  if (sums.a == 0 || sums.b == 0 || next <= 0) return search == Search::alive ? t / 16 : 0;
  if (!(sums.a <= kMost)) next = sums.a > kMost ? (t * kFar < kMost ? t * kFar : kMost) : sums.a;  // too far left to tell
  else if (absolute(bend) <= 0.5 && t + newton / (1 - bend) > 0) next = t + newton / (1 - bend);
  if (!(absolute(next - t) > kLeast * t)) search = Search::settled;
  return next;
}

// rho; infinite for a zero group.
template <class C>
BREGMAN_HD C root_rho(double t, const Line<C>& line) {
  const double pull = line.level == C(0) ? 0 : double(line.level) / t, rho = pull - double(line.slope);
  return C(rho < 0 ? 0 : rho);
}

template <class C>
BREGMAN_HD C shrink_weighted(C x, C scale, C rho) {
  return x / (C(1) + rho * positive_scale(scale));
}

BREGMAN_END
