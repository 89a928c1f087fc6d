// A run of one tensor as the CPU loops see it: arrays of the compute type. Of masks they know nothing: what a mask leaves
// out is cleared behind them (stored.h).
#pragma once

#include "../math/dtypes.h"
#include "../math/radial.h"
#include "../math/rule_list.h"
#include "../math/scalars.h"
#include "step.h"

BREGMAN_BEGIN

// The arrays of a run, and how one element is loaded and stored.
template <class Rule, class C>
struct Arrays {
  C* __restrict__ param;
  const C* __restrict__ grad;
  C* __restrict__ slot0;
  C* __restrict__ slot1;
  C* __restrict__ slot2;

  // The arrays from element i on, with others for parameter and gradient.
  Arrays with(C* params, const C* grads, int64_t i) const {
    auto from = [i](C* slot, int number) { return number < Rule::kStateSlots ? slot + i : nullptr; };
    return {params, grads, from(slot0, 0), from(slot1, 1), from(slot2, 2)};
  }

  BREGMAN_HD void load_state(int64_t i, C* s) const {
    if constexpr (Rule::kStateSlots > 0) s[0] = slot0[i];
    if constexpr (Rule::kStateSlots > 1) s[1] = slot1[i];
    if constexpr (Rule::kStateSlots > 2) s[2] = slot2[i];
  }
  BREGMAN_HD void store_state(int64_t i, const C* s) const {
    if constexpr (Rule::kStateSlots > 0 && Rule::kFixedSlots <= 0) slot0[i] = s[0];
    if constexpr (Rule::kStateSlots > 1 && Rule::kFixedSlots <= 1) slot1[i] = s[1];
    if constexpr (Rule::kStateSlots > 2 && Rule::kFixedSlots <= 2) slot2[i] = s[2];
  }
  BREGMAN_HD C load_param(int64_t i) const {
    if constexpr (Rule::kReadsParam) return param[i];
    return C(0);
  }
};

// Functions of their own: inlined, GCC 12 moves parts of these loops out and does not vectorise a sixth of them.
#define BREGMAN_LOOP __attribute__((noinline))

// The point of one element before any prox. The first visit advances the state.
template <bool kAdvance, class Rule, class C>
BREGMAN_HD Point<C> point_of(const Arrays<Rule, C>& a, int64_t i, const Scalars<Rule, C>& k, C* s) {
  const C grad = a.grad[i] * k.grad_scale, param = a.load_param(i);
  a.load_state(i, s);
  if constexpr (kAdvance && !Rule::kLate) {
    Rule::update(grad, param, s, k.h);
    a.store_state(i, s);
  }
  return Rule::point(grad, param, s, k.h);
}

// The same with the elementwise prox, before any group's factor.
template <bool kAdvance, class Rule, class Elementwise, class C>
BREGMAN_HD C prox_point(const Arrays<Rule, C>& a, int64_t i, const Scalars<Rule, C>& k, C* s) {
  const Point<C> p = point_of<kAdvance>(a, i, k, s);
  return Elementwise::prox(p.z, p.scale, k.elementwise);
}

// The new parameter from the prox point, stored; whether it is non-zero. `s` is the element's state.
template <class Rule, class C>
BREGMAN_HD bool finish_element(const Arrays<Rule, C>& a, int64_t i, const Scalars<Rule, C>& k, C q, C* s) {
  const C value = finish_rule<Rule, C>(q, a.grad[i] * k.grad_scale, a.load_param(i), s, k.h);
  if constexpr (Rule::kLate) a.store_state(i, s);
  a.param[i] = value;
  return nonzero(value);
}

BREGMAN_END
