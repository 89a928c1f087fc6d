// Points in a buffer between the rule and the prox.
#pragma once

#include "stored.h"

BREGMAN_BEGIN

// Where the rows of a tile begin, from its first: `outer` times `inner` of them.
struct Rows {
  int64_t outer, inner, outer_stride, inner_stride;

  int64_t at(int64_t base, int64_t r) const { return base + (r / inner) * outer_stride + (r % inner) * inner_stride; }
};

// The points of `rows` rows of n columns, and their prox scales, for arrays of any dtype, masked or not: those that a mask
// leaves out are zero.
template <class T>
void advance_any(const Stored<T>& stored, int64_t base, const Rows& rows, int64_t n, const Step<compute_t<T>>& step,
                 compute_t<T>* z, compute_t<T>* scales) {
  using C = compute_t<T>;
  if constexpr (!stored.kNarrow)
    if (stored.mask == nullptr) {
      for (int64_t r = 0; r < rows.outer; ++r, base += rows.outer_stride, z += rows.inner * n, scales += rows.inner * n)
        step.rule.advance_points(stored.at(base), rows.inner, rows.inner_stride, n, step, z, scales);
      return;
    }
  for (int64_t r = 0; r < rows.outer * rows.inner; ++r, z += n, scales += n) {
    const int64_t begin = rows.at(base, r);
    stored.advance(begin, n, [&](const Arrays<C>& a, int64_t j, int64_t m, const flag_t<C>* keep) {
      step.rule.advance_points(a, 1, 0, m, step, z + j, scales + j);
      if (keep == nullptr) return;
      clear_masked(z + j, m, keep);
      if (step.rule.paired()) clear_masked(scales + j, m, keep);
    });
  }
}
// The new parameters from n prox points; returns how many are non-zero.
template <class T>
int32_t finish_any(const Stored<T>& stored, int64_t begin, int64_t n, const Step<compute_t<T>>& step,
                   const compute_t<T>* q) {
  using C = compute_t<T>;
  return stored.template store<Visit::second>(begin, n, false, [&](const Arrays<C>& a, int64_t j, int64_t m) {
    return step.rule.finish_points(a, m, step, q + j);
  });
}

template <class Elementwise, class C>
BREGMAN_LOOP void prox_points(C* __restrict__ z, int64_t n, C scale, const Penalty<C> k) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) z[j] = Elementwise::prox(z[j], scale, k);
}
template <class Elementwise, class C>
BREGMAN_LOOP void prox_each(C* __restrict__ z, int64_t n, const C* __restrict__ scales, const Penalty<C> k) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) z[j] = Elementwise::prox(z[j], scales[j], k);
}

// The elementwise prox of points in a buffer.
template <class C>
void prox_buffer(C* z, C* scales, int64_t n, const Step<C>& step) {
  switch (PenaltyKind(step.elementwise.kind)) {
#define X(Functor, name) \
  case PenaltyKind::name: \
    if (step.rule.metric) return prox_each<Functor, C>(z, n, scales, step.elementwise); \
    return prox_points<Functor, C>(z, n, step.scale, step.elementwise);
    BREGMAN_PENALTIES(X)
#undef X
  }
}

template <class C>
BREGMAN_LOOP void add_squares(const C* __restrict__ z, int64_t rows, int64_t columns, double* __restrict__ sums) {
  for (int64_t r = 0; r < rows; ++r, z += columns) {
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) sums[j] = add_square(sums[j], z[j]);
  }
}

BREGMAN_END
