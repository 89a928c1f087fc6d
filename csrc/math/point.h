// A step of a rule is three functions of an element's gradient g, parameter p and state s:
//   update(g, p, s)  advances the state,
//   point(g, p, s)   gives the point before the prox, and the prox scale, from the advanced state,
//   finish(q, p, s)  gives the new parameter from the prox point q.
// A driver may ask for the point as often as it likes: group penalties need it for the norms and once more for the
// step, and it is cheaper to compute than to keep.
//
// kFixedSlots: so many slots, the first, are read and never written.
// kMetric: the prox scale differs from element to element (a diagonal metric).
// kLate: there is no update: finish(q, g, p, s), which knows the prox point, advances the state.
#pragma once

#include "hd.h"

BREGMAN_BEGIN

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
