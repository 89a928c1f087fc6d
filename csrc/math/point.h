// A step of a rule is three functions of an element's gradient g, parameter p and state s:
//   update(g, p, s)  advances the state,
//   point(g, p, s)   gives the point before the prox, and the prox scale, from the advanced state (from g only without any),
//   finish(q, p, s)  gives the new parameter from the prox point q.
// A driver may ask for the point as often as it likes: group penalties need it for the norms and once more for the
// step, and it is cheaper to compute than to keep.
#pragma once

#include "hd.h"

BREGMAN_BEGIN

// What a rule says of itself, beside kStateSlots, kReadsParam, kSlotNames and kHyperNames; a rule redeclares what differs.
struct Rule {
  static constexpr int kFixedSlots = 0;       // so many slots, the first, are read and never written
  static constexpr bool kMetric = false;      // the prox scale differs from element to element: a diagonal metric
  static constexpr bool kLate = false;        // no update: finish(q, g, p, s), which knows the prox point, advances the state
  static constexpr bool kHalfSpace = false;   // the scale is the old parameter; groups take the half-space step
};

// Whether each element's scale has to be kept beside its point.
template <class R>
constexpr bool kPaired = R::kMetric || R::kHalfSpace;

// Sums that the step of a group is made of: its squared norm, and in a half-space step one more; in a metric they differ.
template <class R>
constexpr int kGroupSums = R::kMetric ? 0 : 1 + R::kHalfSpace;

template <class C>
struct Point {
  C z;
  C scale;
};

// The new parameter, and for a late rule the new state.
template <class Rule, class C>
BREGMAN_HD C finish_rule(C q, C grad, C param, C* state, const typename Rule::template Hyper<C>& h) {
  if constexpr (Rule::kLate) return Rule::finish(q, grad, param, state, h);
  else return Rule::finish(q, param, state, h);
}

// The prox scale of a rule whose metric is the identity: it depends on no element.
template <class Rule, class C>
BREGMAN_HD C uniform_scale(const typename Rule::template Hyper<C>& h) {
  C state[8] = {};
  return Rule::template point<C>(C(0), C(0), state, h).scale;
}

BREGMAN_END
