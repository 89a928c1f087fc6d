// Points in a buffer between the rule and the prox.
#pragma once

#include "stored.h"

BREGMAN_BEGIN

// Where the rows of a tile begin, from its first: `outer` times `inner` of them.
struct Rows {
  int64_t outer, inner, outer_stride, inner_stride;

  int64_t at(int64_t base, int64_t r) const { return base + (r / inner) * outer_stride + (r % inner) * inner_stride; }
};

// The points of rows of n columns, and their prox scales, for arrays of any dtype, masked or not: those that a mask
// leaves out are zero. Where a metric is to be searched, adds to the columns' sums of squares (loops.h).
template <class T>
void advance_any(const Stored<T>& stored, int64_t base, const Rows& rows, int64_t n, const Step<compute_t<T>>& step,
                 compute_t<T>* z, compute_t<T>* scales, compute_t<T>* squares = nullptr) {
  using C = compute_t<T>;
  const auto advance = squares ? step.rule.advance_squares : step.rule.advance_points;
  const bool whole = !Stored<T>::kNarrow && stored.mask == nullptr;
  // What lies behind a row is asked for if it is visited next, else a row further on, if there is one.
  const bool onwards = rows.inner_stride == n || rows.inner * rows.outer == 1;
  const int64_t rows_ahead = onwards ? 0 : ceil_div(kAhead<C>, n);
  const int64_t ahead = onwards ? kAhead<C> : rows_ahead * rows.inner_stride;
  // Rows that lie side by side are converted at once.
  const int64_t most = rows.inner_stride == n ? std::max<int64_t>(1, kBuffer / n) : 1;
  for (int64_t r = 0, count; r < rows.outer * rows.inner; r += count, z += count * n, scales += count * n) {
    const int64_t left = rows.inner - r % rows.inner, begin = rows.at(base, r);
    if constexpr (!Stored<T>::kNarrow)
      if (whole) {
        const bool last = left <= rows_ahead;
        count = last ? left : left - rows_ahead;
        advance(stored.at(begin), count, rows.inner_stride, n, last ? 0 : ahead, step, z, scales, squares);
        continue;
      }
    count = std::min(most, left);
    auto run = [&](const Arrays<C>& a, int64_t j, int64_t m, const flag_t<C>* keep) {
      advance(a, count, n, m / count, 0, step, z + j, scales + j, squares ? squares + j : nullptr);
      if (keep == nullptr) return;
      clear_masked(z + j, m, keep);
      if (step.rule.paired) clear_masked(scales + j, m, keep);
    };
    stored.advance(begin, count * n, run, /*reads_param=*/squares != nullptr);
  }
}
// The new parameters from n points, with the numbers of their groups if there are any; returns how many are non-zero.
template <class T>
int32_t finish_any(const Stored<T>& stored, int64_t begin, int64_t n, const Step<compute_t<T>>& step,
                   const compute_t<T>* z, const compute_t<T>* scales, const compute_t<T>* numbers = nullptr) {
  using C = compute_t<T>;
  const auto finish = numbers ? step.rule.finish_groups : step.rule.finish_points;
  return stored.template store<Visit::second>(begin, n, false, [&](const Arrays<C>& a, int64_t j, int64_t m, bool) {
    return finish(a, m, step, z + j, scales + j, numbers ? numbers + j : nullptr);
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
BREGMAN_LOOP void add_products(const C* __restrict__ z, const C* __restrict__ p, int64_t rows, int64_t columns,
                               double* __restrict__ squares, double* __restrict__ products) {
  for (int64_t r = 0; r < rows; ++r, z += columns, p += columns) {
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) {
      const Sums terms = half_space_terms(z[j], p[j]);
      squares[j] += terms.a;
      products[j] += terms.b;
    }
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
