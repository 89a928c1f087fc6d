// What the prox of groups needs of points in a buffer: isotropic or in a diagonal metric.
#pragma once

#include "../math/curved.h"
#include "grouped.h"

BREGMAN_BEGIN

// What the next tile will read, asked for while this one is searched, which reads no memory: a line of each array at a
// time (16-bit ones twice), at the pace at which memory delivers them. The last tile asks for what is behind the
// arrays: these are addresses, not pointers.
class Ahead {
 public:
  static constexpr int64_t kEvery = 4;  // rows that are searched meanwhile (ProxAdam, groups out: 2 to 16 take 6% more)

  // `rows` rows of n columns, from element `begin` on: of one level.
  template <class T>
  Ahead(const Stored<T>& stored, int64_t begin, int64_t rows, int64_t n, int64_t row_stride)
      : rows_(rows), columns_(n), row_stride_(row_stride), step_(kLine<compute_t<T>>) {
    add(stored.grad, begin);
    for (const auto* slot : {stored.state.slot0, stored.state.slot1, stored.state.slot2})
      if (slot) add(slot, begin);
    if (stored.master) add(stored.master, begin);
    add(stored.param, begin);
  }
  BREGMAN_HD void fetch() {
    if (rows_ == 0) return;
    for (int k = 0; k < streams_; ++k)
      __builtin_prefetch(reinterpret_cast<const void*>(at_[k] + uintptr_t(column_ * size_[k])), 0, 2);
    column_ += step_;
    if (column_ < columns_) return;
    column_ = 0;
    --rows_;
    for (int k = 0; k < streams_; ++k) at_[k] += uintptr_t(row_stride_ * size_[k]);
  }

 private:
  static constexpr int kMost = 6;
  template <class T>
  void add(const T* array, int64_t begin) {
    size_[streams_] = int64_t(sizeof(T));
    at_[streams_++] = reinterpret_cast<uintptr_t>(array) + uintptr_t(begin) * sizeof(T);
  }

  uintptr_t at_[kMost];
  int64_t size_[kMost];
  int64_t rows_, columns_, row_stride_, step_, column_ = 0;
  int streams_ = 0;
};

// Points in rows of columns; a long run of one group is folded into such rows, and a last one.
template <class C>
struct Matrix {
  C* z;
  const C* scales;
  int64_t rows, columns;
};

// What pairs of sums are made of: of points, their scales, and a number per column.
struct CurveTerms {
  template <class C>
  BREGMAN_HD Sums operator()(C z, C scale, C rho) const { return curve_terms(z, scale, rho); }
};
struct GainTerms {
  template <class C>
  BREGMAN_HD Sums operator()(C z, C scale, C rho) const { return gain_terms(z, scale, rho); }
};

template <class Terms, class C>
BREGMAN_LOOP void add_pairs(const Matrix<C>& m, const Terms terms, const C* __restrict__ numbers,
                            double* __restrict__ a, double* __restrict__ b) {
  for (int64_t r = 0; r < m.rows; ++r) {
    const C* __restrict__ z = m.z + r * m.columns;
    const C* __restrict__ scales = m.scales + r * m.columns;
#pragma GCC ivdep
    for (int64_t j = 0; j < m.columns; ++j) {
      const Sums pair = terms(z[j], scales[j], numbers[j]);
      a[j] += pair.a;
      b[j] += pair.b;
    }
  }
}

// The sums of a step of the root, a few rows of them.
template <class C>
BREGMAN_LOOP void add_moments(const Matrix<C>& m, const Line<C> line, const C* __restrict__ norms, C* __restrict__ a,
                              C* __restrict__ b, C* __restrict__ c) {
  for (int64_t r = 0; r < m.rows; ++r) {
    const C* __restrict__ z = m.z + r * m.columns;
    const C* __restrict__ scales = m.scales + r * m.columns;
#pragma GCC ivdep
    for (int64_t j = 0; j < m.columns; ++j) {
      const Moments<C> terms = root_terms(z[j], scales[j], norms[j], line);
      a[j] += terms.a;
      b[j] += terms.b;
      c[j] += terms.c;
    }
  }
}
template <class C>
BREGMAN_LOOP void move_up(const C* __restrict__ few, int64_t n, double* __restrict__ sums) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) sums[j] += double(few[j]);
}

// Numbers of a vector register, as a type: sums over many rows stay in registers, where GCC would store them.
template <class C>
struct Wide {
#if defined(BREGMAN_AVX512)
  static constexpr int kBytes = 64;
#elif defined(BREGMAN_FMA)
  static constexpr int kBytes = 32;
#else
  static constexpr int kBytes = 16;
#endif
  typedef C type __attribute__((vector_size(kBytes)));
  static constexpr int64_t kCount = kBytes / int64_t(sizeof(C));
  BREGMAN_HD static type load(const C* from) {
    type value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  BREGMAN_HD static void store(C* to, const type& value) { std::memcpy(to, &value, sizeof(value)); }
};

// The same for lines without slope, at norms other than zero, with the sums of all rows in registers: of two vectors at
// a time, which are a memory line of float in AVX2.
template <class C>
BREGMAN_LOOP void add_level_moments(const Matrix<C>& m, C level, const C* __restrict__ norms, C* __restrict__ a,
                                    C* __restrict__ b, C* __restrict__ c, Ahead& ahead) {
  using W = Wide<C>;
  using V = typename W::type;
  int64_t j = 0;
  auto take = [&](auto side) {
    constexpr int kSide = side.value;
    for (; j + kSide * W::kCount <= m.columns; j += kSide * W::kCount) {
      Moments<V> sums[kSide] = {};
      V t[kSide];
      for (int s = 0; s < kSide; ++s) t[s] = W::load(norms + j + s * W::kCount);
      const C *z = m.z + j, *scales = m.scales + j;
      for (int64_t r = 0; r < m.rows; ++r, z += m.columns, scales += m.columns) {
        if (r % Ahead::kEvery == 0) ahead.fetch();
        for (int s = 0; s < kSide; ++s) {
          const int64_t i = s * W::kCount;
          const Moments<V> terms = level_terms(W::load(z + i), W::load(scales + i), t[s], level);
          sums[s] = {sums[s].a + terms.a, sums[s].b + terms.b, sums[s].c + terms.c};
        }
      }
      for (int s = 0; s < kSide; ++s) {
        const int64_t i = j + s * W::kCount;
        W::store(a + i, sums[s].a);
        W::store(b + i, sums[s].b);
        W::store(c + i, sums[s].c);
      }
    }
  };
  take(std::integral_constant<int, 2>());
  take(std::integral_constant<int, 1>());
  for (; j < m.columns; ++j)
    for (int64_t r = 0; r < m.rows; ++r) {
      const auto terms = level_terms(m.z[r * m.columns + j], m.scales[r * m.columns + j], norms[j], level);
      a[j] += terms.a;
      b[j] += terms.b;
      c[j] += terms.c;
    }
}

// Points in a buffer: `count` groups of `row` neighbouring columns in each row. A search finds a number for every
// group, which `numbers` repeats for every column.
template <class C>
class BufferedGroups {
 public:
  static constexpr int64_t kFold = 64;  // columns of a folded run: few sums to add up, its rows are long enough

  BufferedGroups(Scratch& scratch, C* z, const C* scales, int64_t rows, int64_t row, int64_t count)
      : folds(rows == 1 && count == 1), columns(folds ? kFold : row * count), z_(z), scales_(scales),
        elements_(rows * row * count), count_(count), row_(folds ? kFold : row) {
    sums_ = scratch.get<double>(0, 3 * columns);
    totals_ = scratch.get<double>(1, 4 * count);
    group_ = scratch.get<C>(2, count);
    spread_ = scratch.get<C>(3, (folds ? kBuffer : columns) + kSpread);
    search_ = scratch.get<Search>(6, count);
    few_ = scratch.get<C>(7, 3 * columns);
  }

  const bool folds;  // one run of one group, taken as rows of kFold columns
  const int64_t columns;

  // Where the squares of the old parameters are to be added, for each column.
  C* squares() const {
    std::fill_n(few_, columns, C(0));
    return few_;
  }

  // Isotropic: all elements have the same scale.
  void shrink(C scale, const Penalty<C>& k) {
    clear();
    for_parts([&](const Matrix<C>& m) { add_squares<C>(m.z, m.rows, m.columns, sums_); });
    total(1);
    radial_factors(totals_, count_, scale, k, group_);
  }

  // In the metric of the scales, from the sums of squares.
  void shrink_in_metric(const Line<C>& line, Ahead ahead) {
    double* norms = totals_ + 3 * count_;
    clear();
    move_up(few_, columns, sums_);
    total(1);
    for (int64_t g = 0; g < count_; ++g) {
      norms[g] = root_start<C>(totals_[g]);
      search_[g] = Search::begun;
    }
    int64_t left = count_;
    for (int step = 0; step < kRootSteps && left; ++step) {
      visit_root(norms, line, ahead);
      for (int64_t g = 0; g < count_; ++g) {
        if (search_[g] == Search::settled) continue;
        const Moments<double> sums{totals_[g], totals_[count_ + g], totals_[2 * count_ + g]};
        norms[g] = root_step<C>(double(group_[g]), sums, search_[g]);
        left -= search_[g] == Search::settled;
      }
    }
    for (int64_t g = 0; g < count_; ++g) group_[g] = root_rho(norms[g], line);
  }

  // The same along a curve.
  void shrink_along(const Penalty<C>& k, C weight) {
    double *rho = totals_ + 3 * count_, *gain = totals_ + 2 * count_;
    for (int64_t g = 0; g < count_; ++g) rho[g] = 0;
    for (int pass = 0; pass < kCurvePasses; ++pass) {
      if (pass == 0 || pass + 1 == kCurvePasses) visit(rho, GainTerms());
      else visit(rho, CurveTerms());
      bool moves = false;
      for (int64_t g = 0; g < count_; ++g) {
        rho[g] = group_curve(pass, rho[g], sums(g), k, weight, gain[g]);
        moves |= C(rho[g]) != group_[g];
      }
      if (!moves && pass + 2 < kCurvePasses) pass = kCurvePasses - 2;  // the decision is next
    }
    for (int64_t g = 0; g < count_; ++g) group_[g] = C(rho[g]);
  }

  // What was found, for n columns: those of a row of the tile, or kBuffer elements of a folded run.
  const C* numbers() const {
    if (folds) std::fill_n(spread_, std::min(elements_, kBuffer), group_[0]);
    else spread(group_, row_, count_, spread_);
    return spread_;
  }

 private:
  template <class F>
  void for_parts(const F& f) const {
    const int64_t rows = elements_ / columns, rest = elements_ - rows * columns;
    f(Matrix<C>{z_, scales_, rows, columns});
    if (rest) f(Matrix<C>{z_ + rows * columns, scales_ + rows * columns, 1, rest});
  }
  void clear() {
    for (int64_t j = 0; j < 3 * columns; ++j) sums_[j] = 0;
  }
  void set(const double* numbers) {
    for (int64_t g = 0; g < count_; ++g) group_[g] = C(numbers[g]);
    spread(group_, row_, count_, spread_);
    clear();
  }
  void total(int how_many) {
    for (int m = 0; m < how_many; ++m)
      if (folds) totals_[m] = sum_lanes<kFold>(sums_ + m * columns);
      else sum_rows(sums_ + m * columns, row_, count_, totals_ + m * count_);
  }
  // The sums of each group, of terms that depend on a number of its own.
  template <class Terms>
  void visit(const double* numbers, const Terms& terms) {
    set(numbers);
    for_parts([&](const Matrix<C>& m) { add_pairs(m, terms, spread_, sums_, sums_ + columns); });
    total(2);
  }
  // The sums of a step from the norms, a few rows of type C at a time.
  void visit_root(const double* norms, const Line<C>& line, Ahead& ahead) {
    constexpr int64_t kFew = 64;
    set(norms);
    bool level = line.slope == C(0);
    for (int64_t g = 0; g < count_; ++g) level &= group_[g] > positive_scale(C(0));
    C *a = few_, *b = few_ + columns, *c = few_ + 2 * columns;
    for_parts([&](const Matrix<C>& m) {
      for (int64_t r = 0; r < m.rows; r += kFew) {
        const Matrix<C> part{m.z + r * m.columns, m.scales + r * m.columns, std::min(kFew, m.rows - r), m.columns};
        for (int64_t j = 0; j < 3 * columns; ++j) few_[j] = C(0);
        if (!level) add_moments(part, line, spread_, a, b, c);
        else add_level_moments(part, line.level, spread_, a, b, c, ahead);
        move_up(few_, 3 * columns, sums_);
      }
    });
    total(3);
  }
  Sums sums(int64_t g) const { return {totals_[g], totals_[count_ + g]}; }

  C* z_;
  const C* scales_;
  int64_t elements_, count_, row_;
  double *sums_, *totals_;
  C *group_, *spread_;
  Search* search_;
  C* few_;
};

BREGMAN_END
