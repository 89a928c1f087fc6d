// Points in a buffer between the rule and the prox. A loop knows the rule or the penalty, never both, so that each of them
// costs a user's build a sum of loops and not a product.
#pragma once

#include "stored.h"

BREGMAN_BEGIN

// Where the rows of a tile begin, from its first: `outer` times `inner` of them.
struct Rows {
  int64_t outer, inner, outer_stride, inner_stride;

  int64_t at(int64_t base, int64_t r) const { return base + (r / inner) * outer_stride + (r % inner) * inner_stride; }
};

// Advances the state of `rows` rows of n columns and writes their points, and their prox scales where these differ.
template <class Rule, class C>
BREGMAN_LOOP void advance_points(const Arrays<Rule, C> a, int64_t rows, int64_t stride, int64_t n,
                                 const Scalars<Rule, C> k, C* __restrict__ z, C* __restrict__ scales) {
  for (int64_t r = 0; r < rows; ++r, z += n, scales += n) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      C s[kMaxSlots];
      const Point<C> p = point_of<true>(a, r * stride + j, k, s);
      z[j] = p.z;
      if constexpr (kPaired<Rule>) scales[j] = p.scale;
    }
  }
}

// The new parameters from n prox points; returns how many are non-zero.
template <class Rule, class C>
BREGMAN_LOOP int32_t finish_points(const Arrays<Rule, C> a, int64_t n, const Scalars<Rule, C> k,
                                   const C* __restrict__ q) {
  int32_t count = 0;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    C s[kMaxSlots];
    a.load_state(j, s);
    count += finish_element(a, j, k, q[j], s);
  }
  return count;
}

// Both for arrays of any dtype, masked or not: points that a mask leaves out are zero, and so are their scales.
template <class Rule, class T>
void advance_any(const Stored<Rule, T>& stored, int64_t base, const Rows& rows, int64_t n,
                 const Scalars<Rule, compute_t<T>>& k, compute_t<T>* z, compute_t<T>* scales) {
  using C = compute_t<T>;
  if constexpr (!stored.kNarrow)
    if (stored.mask == nullptr) {
      for (int64_t r = 0; r < rows.outer; ++r, base += rows.outer_stride, z += rows.inner * n, scales += rows.inner * n)
        advance_points(stored.at(base), rows.inner, rows.inner_stride, n, k, z, scales);
      return;
    }
  for (int64_t r = 0; r < rows.outer * rows.inner; ++r, z += n, scales += n) {
    const int64_t begin = rows.at(base, r);
    stored.advance(begin, n, [&](const Arrays<Rule, C>& a, int64_t j, int64_t m, const flag_t<C>* keep) {
      advance_points(a, 1, 0, m, k, z + j, scales + j);
      if (keep == nullptr) return;
      clear_masked(z + j, m, keep);
      if constexpr (kPaired<Rule>) clear_masked(scales + j, m, keep);
    });
  }
}
template <class Rule, class T>
int32_t finish_any(const Stored<Rule, T>& stored, int64_t begin, int64_t n, const Scalars<Rule, compute_t<T>>& k,
                   const compute_t<T>* q) {
  using C = compute_t<T>;
  return stored.template store<Visit::second>(begin, n, false, [&](const Arrays<Rule, C>& a, int64_t j, int64_t m) {
    return finish_points(a, m, k, q + j);
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
template <class Rule, class C>
void prox_buffer(C* z, C* scales, int64_t n, const Scalars<Rule, C>& k) {
  switch (PenaltyKind(k.elementwise.kind)) {
#define X(Functor, name) \
  case PenaltyKind::name: \
    if constexpr (Rule::kMetric) return prox_each<Functor, C>(z, n, scales, k.elementwise); \
    else return prox_points<Functor, C>(z, n, uniform_scale<Rule, C>(k.h), k.elementwise);
    BREGMAN_PENALTIES(X)
#undef X
  }
}

// Squares are summed in float64: the square of a float is exact there, fused or not.
template <class C>
BREGMAN_HD double add_square(double sum, C x) {
  const double value = double(x);
#if defined(BREGMAN_FMA)
  if constexpr (sizeof(C) == 4) return __builtin_fma(value, value, sum);
#endif
  return sum + value * value;
}

template <class C>
BREGMAN_LOOP void add_squares(const C* __restrict__ z, int64_t rows, int64_t columns, double* __restrict__ sums) {
  for (int64_t r = 0; r < rows; ++r, z += columns) {
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) sums[j] = add_square(sums[j], z[j]);
  }
}

BREGMAN_END
