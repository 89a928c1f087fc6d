// The group prox in a diagonal metric for penalties that bend: SCAD, l0, l1/2, l2/3.
//
// Of a group other than zero, z_i = x_i / (1 + rho s_i) with rho = w phi'(t) / t and t = ||z||. That falls as t grows,
// and t as rho does: from rho = 0, where z = x, the plain iteration climbs to the least root, which is the critical
// point of largest norm. Newton's step replaces it, but ends within a factor 4 of the plain one (of 2 to 16, tried on
// 60 groups a case, none was better everywhere). A last pass compares that point with zero, by their objectives.
//
// Relative error of the point after 5, 6 and 7 steps, the first from 0, worst of 300 groups of 1 to 4,608 elements for
// each of l1/2, l2/3 and SCAD, half of them within 20% of being zero (2026-11-26): scales alike 7e-16 (SCAD 4e-14);
// over 3 decades 3e-6, 6e-12, 4e-14; over 8 decades 4e-6, 1e-11, 3e-14. None of these had a third critical point. With
// scales in two clusters, 3 or 8 decades apart and unequally filled, two points may nearly meet: 2e-2, 6e-3, 8e-2 (but
// objectives within 1e-6 of zero's), and 9e-9 after 9 steps. Few groups need those, and walkers end when none moves.
// There 0 to 2% of the groups of l1/2 and l2/3 had a better critical point than that of largest norm, by up to 1% of
// zero's objective; and 2 to 5% of SCAD's, with scales beyond (a - 1) / w, where its problem is not convex, by up to 30%.
#pragma once

#include "weighted.h"

BREGMAN_BEGIN

constexpr int kCurveSteps = 9;

// The curve of a penalty that has one, at t.
template <class Functor, class C>
BREGMAN_HD auto curve_of(const Penalty<C>& k, double t, int) -> decltype(Functor::curve(k, t)) {
  return Functor::curve(k, t);
}
template <class Functor, class C>
BREGMAN_HD Curve curve_of(const Penalty<C>&, double, long) {
  return {0, 0, 0};
}
template <class C>
BREGMAN_HD Curve curve_of(Penalty<C> k, C weight, double t) {
  Curve curve{};
  k.a = varying(k.a, C(t));
  k.b = varying(k.b, C(t));
  weight = varying(weight, C(t));
  switch (PenaltyKind(k.kind)) {
#define X(Functor, name) \
  case PenaltyKind::name: \
    curve = curve_of<Functor>(k, t, 0); \
    break;
    BREGMAN_PENALTIES(X)
#undef X
  }
  return {double(weight) * curve.value, double(weight) * curve.ratio, double(weight) * curve.bend};
}

// What an element adds to the sums of a step from rho: z^2 and -z dz/drho.
template <class C>
BREGMAN_HD Sums curve_terms(C x, C scale, C rho) {
  scale = positive_scale(scale);
  const C q = C(1) / (C(1) + rho * scale), z = x * q;
  const double square = double(z) * double(z);
  return {square, square * double(scale * q)};
}

// What it adds to those of the decision: z^2 and z^2 / s.
template <class C>
BREGMAN_HD Sums gain_terms(C x, C scale, C rho) {
  const C z = x * (C(1) / (C(1) + rho * positive_scale(scale)));
  const double square = double(z) * double(z), wide = double(scale);
  return {square, square * (1 / (wide < 1e-300 ? 1e-300 : wide))};
}

BREGMAN_HD double positive_square(double square) { return square < 1e-300 ? 1e-300 : square; }

// rho after a step from it, where the terms are of C(rho).
template <class C>
BREGMAN_HD double curve_step(double rho, const Sums& sums, const Penalty<C>& k, C weight) {
  constexpr double most = sizeof(C) == 8 ? 1e58 : 1e22;  // what a scale of zero still takes for nothing
  if (sums.a - sums.a != 0) return sums.a > 0 ? 0 : sums.a;
  rho = double(C(rho));
  const double square = positive_square(sums.a);
  const Curve curve = curve_of(k, weight, square_root(square));
  const double fall = 1 - curve.bend * (sums.b / square);
  double next = rho + (curve.ratio - rho) / (fall < 0x1p-10 ? 0x1p-10 : fall);
  next = next < curve.ratio / 4 ? curve.ratio / 4 : next;
  next = next > curve.ratio * 4 ? curve.ratio * 4 : next;
  return next > most ? most : next;
}

// rho if its point is better than zero, or else infinity. phi(t) against (sum x^2 / s - sum (z - x)^2 / s) / 2, which is
// sum z^2 / (2 s) + rho t^2.
template <class C>
BREGMAN_HD double curve_decision(double rho, const Sums& sums, const Penalty<C>& k, C weight) {
  const double value = curve_of(k, weight, square_root(positive_square(sums.a))).value;
  const bool zero = value > 0 && value >= 0.5 * sums.b + double(C(rho)) * sums.a;  // not with NaN
  return zero ? std::numeric_limits<double>::infinity() : rho;
}

// Either, as one call.
template <class C>
BREGMAN_HD double group_curve(bool steps, double rho, const Sums& sums, const Penalty<C>& k, C weight) {
  return steps ? curve_step(rho, sums, k, weight) : curve_decision(rho, sums, k, weight);
}

BREGMAN_END
