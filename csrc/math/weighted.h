// The group prox in a diagonal metric: each element of a group has a prox scale s_i of its own.
//
// For a penalty with slope phi'(t) = level - slope t (l1, elastic net, MCP below its knee) and t the norm of the result,
// z_i = x_i / (1 + rho s_i) with rho = phi'(t) / t, and t is the root of
//   g(t) = sum_i x_i^2 / (t (1 - slope s_i) + level s_i)^2 = 1.
// Newton's method on h = g^(-1/2) = 1, which is increasing and concave, climbs to the root from the left without
// overshooting; from the right it lands left of it, or below zero. At t = 0 the sum also tells whether the group is zero:
// g(0) <= 1. Where scales differ by decades it climbs slowly, and a Newton step on log g over log t, taken half, jumps
// ahead; near the root Halley's step, with the second derivative, takes its place.
//
// An optimizer's groups move little in a step: the search begins at the norm of the old parameter and takes 1 or 2 steps
// where from 0 it takes 4 to 6 (ProxAdam and RAMDA on the digits, 2026-11-26). With r_i = t rest_i q_i, all in [0, 1], a
// step of relative length e leaves |h''^2 / 4h'^2 - h''' / 6h'| e^3 <= 0.45 e^3 (the worst of all distributions of r; as
// few r near 1 as others near 0), so that a group settles as soon as that is less than half an ulp: its norm then depends
// on no other group of its tile.
#pragma once

#include "penalty_list.h"

BREGMAN_BEGIN

// At most: from a start that is far too large one step leads to 0, and the others climb.
template <class C>
constexpr int kRootSteps = sizeof(C) == 8 ? 7 : 6;

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
// Whether the penalty has a line; the group's weight belongs to it.
template <class C>
BREGMAN_HD bool line_of(const Penalty<C>& k, C weight, Line<C>& line) {
  bool known = false;
  switch (PenaltyKind(k.kind)) {
#define X(Functor, name) \
  case PenaltyKind::name: \
    known = line_of<Functor>(k, line, 0); \
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
struct Moments {
  double a, b, c;
};

// A scale of zero (lr = 0) as a number to divide by, and to multiply an infinite rho with.
template <class C>
BREGMAN_HD C positive_scale(C scale) {
  const C least = sizeof(C) == 8 ? C(1e-75) : C(1e-30);
  return select(scale < least, least, scale);
}

// 1 - slope s. Where slope s reaches 1 (MCP with a step beyond gamma) the problem is not convex, and this a compromise.
template <class C>
BREGMAN_HD C bent(C scale, const Line<C>& line) {
  const C rest = C(1) - line.slope * scale, least = C(0.0078125);
  return select(rest < least, least, rest);
}

// What an element adds to the sums of a step from t. Without a scale (lr = 0) or level it meets a number to divide by.
template <class C>
BREGMAN_HD Moments root_terms(C x, C scale, C t, const Line<C>& line) {
  const C rest = bent(scale, line);
  const C q = C(1) / positive_scale(t * rest + line.level * scale), u = x * q;
  const double square = double(u) * double(u), share = double(q * rest);
  return {square, square * share, square * share * share};
}

// Where the search begins, from the sum of squares of the old parameter: its norm, or 0 where that is not finite.
template <class C>
BREGMAN_HD double root_start(double squares) {
  const double t = double(C(square_root(squares)));
  return t - t == 0 ? t : 0;
}

// log2 x to 0.001 for x >= 1 and 2^x to 0.02% for 0 <= x <= 60, of bits and products alone: the same on every device,
// which the library's functions are not.
BREGMAN_HD float rough_log2(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const float whole = float(int32_t(bits >> 23) - 127);
  bits = (bits & 0x7fffff) | 0x3f800000;
  float u;
  __builtin_memcpy(&u, &bits, sizeof(u));
  u = u - 1;
  return whole + u * (1.4209f + u * (-0.5773f + u * 0.1564f));
}
BREGMAN_HD float rough_exp2(float x) {
  const int32_t whole = int32_t(x);
  const float u = x - float(whole);
  const uint32_t bits = uint32_t(whole + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return power * (1 + u * (0.6959f + u * (0.2249f + u * 0.0791f)));
}

// The norm after a step from t, where the terms are of C(t): 0 for a group without anything, or of which nothing is left
// so far; infinite for one with an infinite element.
BREGMAN_HD double root_step(double t, const Moments& sums) {
  if (sums.a - sums.a != 0 || sums.a == 0) return sums.a;
  const double root = square_root(sums.a), newton = sums.a * (root - 1) / sums.b;
  const double next = t + newton, bend = 1.5 * (root - 1) * (sums.a * sums.c / (sums.b * sums.b) - 1);
  if (!(next > 0)) return 0;
  if (absolute(bend) <= 0.5) return t + newton / (1 - bend);
  if (!(root > 1 && t > 0)) return next;  // right of the root, or where log t is not known
  const float exponent = rough_log2(float(sums.a)) * float(sums.a / (2 * t * sums.b));
  double far = t * double(rough_exp2(exponent < 60 ? exponent : 60));
  far = far < 1e12 * next ? far : 1e12 * next;
  return far > 4 * next ? square_root(next * far) : next;
}

// Whether the norm after a step is the root, to half an ulp of C.
template <class C>
BREGMAN_HD bool root_settles(double t, double next) {
  constexpr double least = sizeof(C) == 8 ? 0x1p-18 : 0x1p-8;
  return !(absolute(next - t) > least * t) || next - next != 0;
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
