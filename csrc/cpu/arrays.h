// A run of one tensor as the CPU loops see it: arrays of the compute type. Of masks they know nothing: what a mask leaves
// out is cleared behind them (stored.h).
#pragma once

#include <algorithm>

#include "../math/dtypes.h"
#include "../math/rule_list.h"
#include "../math/scalars.h"
#include "step.h"

BREGMAN_BEGIN

template <class C>
struct Arrays {
  C* __restrict__ param;
  const C* __restrict__ grad;
  C* __restrict__ slot0;  // null from the first on that the rule does not have
  C* __restrict__ slot1;
  C* __restrict__ slot2;
  bool converted;  // gradients, and parameters that the rule does not read: they lie in buffers

  // The arrays from element i on, with others for parameter and gradient.
  Arrays with(C* params, const C* grads, int64_t i) const {
    auto from = [i](C* slot) { return slot ? slot + i : nullptr; };
    return {params, grads, from(slot0), from(slot1), from(slot2), converted};
  }
  Arrays from(int64_t i) const { return with(param + i, grad + i, i); }
};

template <class Rule, class C>
BREGMAN_HD void load_state(const Arrays<C>& a, int64_t i, C* s) {
  if constexpr (Rule::kStateSlots > 0) s[0] = a.slot0[i];
  if constexpr (Rule::kStateSlots > 1) s[1] = a.slot1[i];
  if constexpr (Rule::kStateSlots > 2) s[2] = a.slot2[i];
}
template <class Rule, class C>
BREGMAN_HD void store_state(const Arrays<C>& a, int64_t i, const C* s) {
  if constexpr (Rule::kStateSlots > 0 && Rule::kFixedSlots <= 0) a.slot0[i] = s[0];
  if constexpr (Rule::kStateSlots > 1 && Rule::kFixedSlots <= 1) a.slot1[i] = s[1];
  if constexpr (Rule::kStateSlots > 2 && Rule::kFixedSlots <= 2) a.slot2[i] = s[2];
}
template <class Rule, class C>
BREGMAN_HD C load_param(const Arrays<C>& a, int64_t i) {
  if constexpr (Rule::kReadsParam) return a.param[i];
  return C(0);
}

// The point of one element before any prox. The first visit advances the state.
template <bool kAdvance, class Rule, class C>
BREGMAN_HD Point<C> point_of(const Arrays<C>& a, int64_t i, const Scalars<Rule, C>& k, C* s) {
  const C grad = a.grad[i] * k.grad_scale, param = load_param<Rule>(a, i);
  load_state<Rule>(a, i, s);
  if constexpr (kAdvance && !Rule::kLate) {
    Rule::update(grad, param, s, k.h);
    store_state<Rule>(a, i, s);
  }
  return Rule::point(grad, param, s, k.h);
}

// The first visit's with the elementwise prox, before any group's factor.
template <class Rule, class Elementwise, class C>
BREGMAN_HD C prox_point(const Arrays<C>& a, int64_t i, const Scalars<Rule, C>& k, C* s) {
  const Point<C> p = point_of<true>(a, i, k, s);
  return Elementwise::prox(p.z, p.scale, k.elementwise);
}

// The new parameter from the prox point, stored in `out`; whether it is non-zero. `s` is the element's state.
template <class Rule, class C>
BREGMAN_HD bool finish_element(const Arrays<C>& a, int64_t i, const Scalars<Rule, C>& k, C q, C* s, C& out) {
  const C value = finish_rule<Rule, C>(q, a.grad[i] * k.grad_scale, load_param<Rule>(a, i), s, k.h);
  if constexpr (Rule::kLate) store_state<Rule>(a, i, s);
  out = value;
  return nonzero(value);
}

// Elements that loops visit at a time, and how many elements on memory is asked for meanwhile where arrays are visited
// from end to end: the processor's own prefetching falls short of memory by a sixth.
constexpr int64_t kPart = 64;
constexpr int64_t kAheadBytes = 2048;  // of half and twice as many groups along rows take 5% longer
template <class C>
constexpr int64_t kAhead = kAheadBytes / int64_t(sizeof(C));

// GCC deletes calls of functions that do nothing but prefetch, unless they have a statement like this empty one.
BREGMAN_HD void prefetch(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address));
  asm volatile("");
}

// Asks for what a visit of m elements, `ahead` of the i-th, will read, and with kParam for the parameters that it will
// write: a first visit, or a second one, to which a dual tells all (stored.h). 0: what is visited next is not known, or
// in the caches. Addresses, not pointers: the last ones lie behind the arrays.
template <class Rule, bool kFirst, bool kParam, class C>
BREGMAN_HD void fetch_ahead(const Arrays<C>& a, int64_t i, int64_t m, int64_t ahead) {
  if (ahead == 0) return;
  auto fetch = [=](const C* array) __attribute__((always_inline)) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(array) + uintptr_t(i + ahead) * sizeof(C);
    for (uintptr_t line = 0; line < uintptr_t(m) * sizeof(C); line += 64) prefetch(begin + line);
  };
  constexpr bool kAll = kFirst || Rule::kLate;
  constexpr int kSlots = kAll ? Rule::kStateSlots : std::min(Rule::kStateSlots, Rule::kFixedSlots + 1);
  if constexpr (kAll || kSlots == 0)
    if (!a.converted) fetch(a.grad);
  if constexpr (kParam || Rule::kReadsParam)
    if (Rule::kReadsParam || !a.converted) fetch(a.param);
  if constexpr (kSlots > 0) fetch(a.slot0);
  if constexpr (kSlots > 1) fetch(a.slot1);
  if constexpr (kSlots > 2) fetch(a.slot2);
}

BREGMAN_END
