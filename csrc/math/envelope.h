// The group envelope (WGSEF; bregman_cuda/regularizers/envelope.py): groups share a budget k. Its prox, for groups of
// norm n and decay c = prox scale * lam * d, is
//   x_G <- u / (u + c) x_G,   u(eta) = clip(eta n sqrt(c) - c, 0, 1),   sum of all u = k,
// and its slope, for the half-space step, c / u with c = lam d and u(eta) = min(eta n sqrt(c), 1); u = 1 for all where at
// most k groups are non-zero. The sum is piecewise linear and increasing in eta, and each piece gives its own root by one
// division: the search ends on the piece that holds it, exact up to rounding.
#pragma once

#include "half_space.h"

BREGMAN_BEGIN

// Sums over the groups with 0 <= u < 1: of slopes, and of offsets; and how many have u = 1.
struct Shares {
  double rise, decay, full;
};
BREGMAN_HD Shares plus(Shares x, Shares y) { return {x.rise + y.rise, x.decay + y.decay, x.full + y.full}; }

// Where u leaves 0 first and reaches 1 last, and how many groups are non-zero.
struct Span {
  double low, high, alive;
};
BREGMAN_HD Span plus(Span x, Span y) {
  return {x.low < y.low ? x.low : y.low, x.high > y.high ? x.high : y.high, x.alive + y.alive};
}

constexpr double kInfinite = 1e300;  // stands for an infinite norm, so that no inf - inf or inf / inf arises
// A NaN fills its group and leaves the others as if that group were zero.
BREGMAN_HD double finite_norm(double norm) { return norm != norm ? 0 : norm < kInfinite ? norm : kInfinite; }

// A group's share of the budget: u(eta) = clip(eta * slope - offset, 0, 1), or zero for a zero group, whose slope is < 0.
struct Rise {
  double slope, offset;

  BREGMAN_HD bool alive() const { return slope >= 0; }
  BREGMAN_HD double share(double eta) const { return alive() ? clamp(eta * slope - offset, 0.0, 1.0) : 0; }
};
// That of a group with this squared norm, or with this slope: in a prox, or in a half-space step.
template <bool kHalfSpace>
BREGMAN_HD Rise rise_from(double slope, double decay) {
  return {slope, kHalfSpace ? 0 : decay};
}
template <bool kHalfSpace>
BREGMAN_HD Rise rise_of(double squares, double decay) {
  const double norm = square_root(squares);
  return rise_from<kHalfSpace>(norm > 0 ? finite_norm(norm * square_root(decay)) : -1, decay);
}

// What the prox leaves of a group.
BREGMAN_HD double envelope_factor(double squares, double decay, double eta) {
  if (squares != squares) return squares;
  const double u = rise_of<false>(squares, decay).share(eta);
  return decay == 0 ? 1 : u / (u + decay);
}
// phi'(t) / t, for the half-space step.
BREGMAN_HD double envelope_rate(double squares, double decay, double eta) {
  if (squares != squares) return squares;
  return decay == 0 ? 0 : decay / rise_of<true>(squares, decay).share(eta);
}

// The eta at which the shares sum to k; infinite where at most k groups are non-zero.
// walk(none, f): the sum (`plus`) of f(rise) over all groups, beginning with `none`.
template <class Walk>
BREGMAN_HD double envelope_root(double k, Walk walk) {
  constexpr double kTiny = 4.9406564584124654e-324, kMost = 1.7976931348623157e308;
  const Span span = walk(Span{kMost, 0, 0}, [](const Rise& rise) {
    if (!(rise.slope > 0)) return Span{kMost, 0, rise.alive() ? 1.0 : 0.0};
    const double inverse = 1 / rise.slope;
    return Span{rise.offset * inverse, (1 + rise.offset) * inverse, 1};
  });
  if (span.alive <= k) return std::numeric_limits<double>::infinity();
  double low = span.low > kTiny ? span.low : kTiny, high = span.high < kMost ? span.high : kMost;
  double eta = square_root(low) * square_root(high);
  Shares known{-1, -1, -1};
  bool guessed = false;
  // Newton's step where the last one was a bisection: 6 to 20 turns in practice, and a hundred and thirty at most.
  for (int turn = 0; turn < 200; ++turn) {
    const Shares sums = walk(Shares{0, 0, 0}, [eta](const Rise& rise) {
      const double u = rise.alive() ? eta * rise.slope - rise.offset : -1;
      return u >= 1 ? Shares{0, 0, 1} : u >= 0 ? Shares{rise.slope, rise.offset, 0} : Shares{0, 0, 0};
    });
    // The guess lies on the piece that it came from: it is the root.
    if (guessed && sums.rise == known.rise && sums.decay == known.decay && sums.full == known.full) break;
    const double value = eta * sums.rise - sums.decay + sums.full;
    if (value == k) break;
    (value < k ? low : high) = eta;
    const double guess = (k - sums.full + sums.decay) / sums.rise;
    guessed = !guessed && guess > low && guess < high;
    known = sums;
    eta = guessed ? guess : high > 4 * low ? square_root(low) * square_root(high) : low + (high - low) / 2;
    if (!(low < eta && eta < high)) break;
  }
  return eta;
}

BREGMAN_END
