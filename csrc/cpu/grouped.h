// Groups, without a buffer of points. Each is visited twice: once to advance its state and sum the squares of its prox
// points, once to shrink by the factor that follows. Points are not kept in between: the second visit computes them
// again from the state, which the caches still hold, or in strips, which memory does.
#pragma once

#include "../math/radial.h"
#include "points.h"

BREGMAN_BEGIN

// Rows are too far apart for the processor to foresee, and asking for a whole one at once would stall: the loops ask for
// the next one, or so many short ones on, a line at a time.
template <class T>
void advance_columns(const Stored<T>& stored, int64_t base, const Rows& rows, int64_t n, const Step<compute_t<T>>& step,
                     const FusedLoops<compute_t<T>>& loops, double* sums) {
  using C = compute_t<T>;
  constexpr int64_t kSide = 4, kBlock = 512;  // rows, and columns: their sums stay in L1
  const bool sides = !Stored<T>::kNarrow && loops.advance_four;
  const int64_t stride = rows.inner_stride;
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t m = std::min(kBlock, n - j), few = std::min(rows.inner, ceil_div(kAhead<C>, m));
    for (int64_t outer = 0; outer < rows.outer; ++outer) {
      int64_t begin = base + outer * rows.outer_stride + j;
      for (int64_t r = 0, side; r < rows.inner; r += side, begin += side * stride) {
        side = sides && r + kSide <= rows.inner ? kSide : 1;
        const int64_t next = std::max(side, few);
        // Behind the last row come the next columns.
        const int64_t ahead = next * stride + (r + next < rows.inner ? 0 : m - rows.inner * stride);
        if constexpr (!Stored<T>::kNarrow)
          if (side == kSide) {
            loops.advance_four(stored.at(begin), stride, m, ahead, step, sums + j);
            continue;
          }
        auto run = [&](const Arrays<C>& a, int64_t i, int64_t count, auto) {
          if (loops.advance_pairs) return loops.advance_pairs(a, 1, 0, count, step, sums + j + i, sums + n + j + i);
          loops.advance_row(a, 0, count, ahead, step, sums + j + i);
        };
        stored.advance(begin, m, run, /*reads_param=*/false, ahead);
      }
    }
  }
}

template <int kCount = kLanes>
double sum_lanes(double* lanes) {
  for (int half = kCount / 2; half > 0; half /= 2)
    for (int m = 0; m < half; ++m) lanes[m] += lanes[m + half];
  return lanes[0];
}

// totals[m] = the sum of `row` neighbours, for `count` groups, in an order that depends on `row` alone: of every fourth
// one, of these four, and of the rest.
inline void sum_rows(const double* __restrict__ values, int64_t row, int64_t count, double* __restrict__ totals) {
  typedef double Four __attribute__((vector_size(32)));
#if defined(__clang__)
#define BREGMAN_PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
  typedef int64_t Places __attribute__((vector_size(32)));
#define BREGMAN_PICK(x, y, ...) __builtin_shuffle(x, y, Places{__VA_ARGS__})
#endif
  if (row == 1) {
    std::copy_n(values, count, totals);
    return;
  }
  const int64_t whole = row / 4 * 4;
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) {
    const double* const from = values + m * row;
    const double* const group[] = {from, from + row, from + 2 * row, from + 3 * row};
    Four sums[4] = {};
    for (int64_t c = 0; c < whole; c += 4)
      for (int g = 0; g < 4; ++g) {
        Four four;
        std::memcpy(&four, group[g] + c, sizeof(four));
        sums[g] += four;
      }
    auto fold = [](const Four& x, const Four& y, Four& pairs) {
      pairs = BREGMAN_PICK(x, y, 0, 4, 2, 6) + BREGMAN_PICK(x, y, 1, 5, 3, 7);
    };
    Four first, last;
    fold(sums[0], sums[1], first);
    fold(sums[2], sums[3], last);
    Four total = BREGMAN_PICK(first, last, 0, 1, 4, 5) + BREGMAN_PICK(first, last, 2, 3, 6, 7);
    for (int64_t c = whole; c < row; ++c) total += Four{group[0][c], group[1][c], group[2][c], group[3][c]};
    std::memcpy(totals + m, &total, sizeof(total));
  }
#undef BREGMAN_PICK
  for (; m < count; ++m) {
    const double* const from = values + m * row;
    double sums[4] = {};
    for (int64_t c = 0; c < whole; ++c) sums[c % 4] += from[c];
    double total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int64_t c = whole; c < row; ++c) total += from[c];
    totals[m] = total;
  }
}

inline void add_numbers(const double* __restrict__ values, int64_t n, double* __restrict__ sums) {
  for (int64_t j = 0; j < n; ++j) sums[j] += values[j];
}

template <class Scalar, class C>
void radial_factors(const double* __restrict__ totals, int64_t count, C scale, const Penalty<C> k,
                    C* __restrict__ factor) {
#pragma GCC ivdep
  for (int64_t m = 0; m < count; ++m) factor[m] = radial_factor<Scalar>(C(square_root(totals[m])), scale, k);
}

template <class C>
void radial_factors(const double* totals, int64_t count, C scale, const Penalty<C>& k, C* factor) {
  switch (PenaltyKind(k.kind)) {
#define X(Functor, name) \
  case PenaltyKind::name: \
    return radial_factors<Functor>(totals, count, scale, k, factor);
    BREGMAN_PENALTIES(X)
#undef X
  }
}

// Repeats each group's factor for its `row` columns. Writes up to kSpread - 1 elements too many.
constexpr int64_t kSpread = 16;
template <class C>
void spread(const C* __restrict__ factor, int64_t row, int64_t count, C* __restrict__ columns) {
  auto repeat = [](C value, C* to) {  // whole vectors: the next group overwrites the surplus
    for (int64_t lane = 0; lane < kSpread; ++lane) to[lane] = value;
  };
  if (row <= kSpread) {
    for (int64_t m = 0; m < count; ++m) repeat(factor[m], columns + m * row);
    return;
  }
  for (int64_t m = 0; m < count; ++m)
    for (int64_t c = 0; c < row; c += kSpread) repeat(factor[m], columns + m * row + c);
}

// Groups of one tensor, or a strip of it: rows of contiguous columns, `row` of them per group.
template <class T>
struct TileOf {
  using C = compute_t<T>;
  const TensorRecord& t;
  const Step<C>& step;
  const Stored<T> stored;
  const int64_t row, rows, inner, row_stride, r0_stride;
  Scratch& scratch = thread_scratch();

  TileOf(const TensorRecord& record, const void* grad, const Step<C>& step, int64_t strip = 0)
      : t(record), step(step), stored(record, grad, step.rule), row(t.layout.r2),
        rows(strip ? strip : t.layout.rows()), inner(strip ? strip : t.layout.r1), row_stride(t.layout.g2 * row),
        r0_stride(t.layout.g1 * inner * row_stride) {}

  int64_t offset(int64_t base, int64_t r) const { return all_rows().at(base, r); }
  Rows all_rows() const { return {rows / inner, inner, r0_stride, row_stride}; }

  bool any_nonzero(int64_t base) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < row; ++c)
        if (nonzero(stored.param[offset(base, r) + c])) return true;
    return false;
  }
};

// The groups that one strip of a tensor sees to, out of all.
struct Share {
  int64_t begin, count;
  Share(const TensorRecord& t, int64_t strip)
      : begin(t.layout.g2 * strip / strips_of(t)), count(t.layout.g2 * (strip + 1) / strips_of(t) - begin) {}
};

// Those whose points are computed again on the second visit.
template <class T>
struct Groups : TileOf<T> {
  using C = compute_t<T>;
  using Base = TileOf<T>;
  using Base::all_rows, Base::inner, Base::offset, Base::r0_stride, Base::row, Base::row_stride, Base::rows,
      Base::scratch, Base::step, Base::stored, Base::t;
  const FusedLoops<C>& loops;
  const C scale;
  const int64_t per_group;  // sums, 1 or 2: the first ones of all groups lie together, then the second ones
  const bool stream;
  const Phase phase;
  double* const column_sums;  // where strips leave those of their columns
  double* const group_sums;   // where phases leave those of groups, or without a budget what follows from them
  const int64_t groups;
  const Sharing* const sharing;

  Groups(const PlanView& plan, const Item& item, const void* grad, const Step<C>& step, const FusedLoops<C>& loops,
         Phase phase)
      : Base(plan.records()[item.tensor], grad, step, plan.records()[item.tensor].strip_rows ? item.count : 0),
        loops(loops), scale(step.scale * C(t.weight)), per_group(plan.header().group_sums),
        stream(streams<T>(plan, t, step.rule)), phase(phase), column_sums(plan.numbers(t)),
        group_sums(plan.group_numbers(t)), groups(t.layout.groups()),
        sharing(plan.header().budgets ? plan.sharing() + item.tensor : nullptr) {}

  // What the last visit asks to know of groups, their factors or pulls, from their sums; second ones lie `stride` behind.
  void find_numbers(int64_t count, const double* sums, int64_t stride, C* found) const {
    if (per_group == 2) {
      for (int64_t m = 0; m < count; ++m) {
        const double squares = sums[m];
        const double rate = sharing ? envelope_rate(squares, sharing->decay, sharing->eta)
                                    : half_space_rate(square_root(squares), step.radial, C(t.weight));
        found[m] = half_space_pull({squares, sums[stride + m]}, rate, step.lr, step.epsilon);
      }
    } else if (sharing) {
      for (int64_t m = 0; m < count; ++m) found[m] = C(envelope_factor(sums[m], sharing->decay, sharing->eta));
    } else {
      radial_factors(sums, count, scale, step.radial, found);
    }
  }

  // Where there is a mask, points that it leaves out must not be summed: calls f(points, old parameters, j, m) for all n
  // neighbours.
  template <class F>
  void masked_points(int64_t begin, int64_t n, const F& f) const {
    alignas(64) C z[kBuffer], old[kBuffer];
    for (int64_t j = 0; j < n; j += kBuffer) {
      const int64_t m = std::min(kBuffer, n - j);
      advance_any(stored, begin + j, {1, 1, 0, 0}, m, step, z, old);
      if (step.elementwise.kind != 0) prox_buffer<C>(z, old, m, step);
      f(z, old, j, m);
    }
  }
  // Second sums lie `stride` behind the first ones.
  void add_terms(const C* z, const C* old, int64_t count, int64_t n, double* sums, int64_t stride) const {
    if (per_group == 2) add_products(z, old, count, n, sums, sums + stride);
    else add_squares(z, count, n, sums);
  }

  void advance_one(int64_t begin, int64_t n, double* lanes) const {
    if (t.mask == nullptr)
      return stored.advance(begin, n, [&](const Arrays<C>& a, int64_t, int64_t m, auto) {
        if (per_group == 1) return loops.advance_run(a, m, step, lanes);
        const int64_t count = m / kLanes, whole = count * kLanes;
        loops.advance_pairs(a, count, kLanes, kLanes, step, lanes, lanes + kLanes);
        loops.advance_pairs(a.from(whole), 1, 0, m - whole, step, lanes, lanes + kLanes);
      });
    masked_points(begin, n, [&](const C* z, const C* old, int64_t, int64_t m) {
      const int64_t count = m / kLanes, whole = count * kLanes;
      add_terms(z, old, count, kLanes, lanes, kLanes);
      add_terms(z + whole, old + whole, 1, m - whole, lanes, kLanes);
    });
  }
  void advance_tile(int64_t base, int64_t n, double* sums) const {
    std::fill_n(sums, per_group * n, 0.0);
    if (t.mask == nullptr) return advance_columns(stored, base, all_rows(), n, step, loops, sums);
    for (int64_t r = 0; r < rows; ++r)
      masked_points(offset(base, r), n, [&](const C* z, const C* old, int64_t j, int64_t m) {
        add_terms(z, old, 1, m, sums + j, n);
      });
  }

  // The rest of rows of n columns.
  int32_t finish(int64_t base, int64_t n, const Numbers<C>& numbers, int64_t ahead) const {
    auto lines = [](int64_t elements) { return elements % kLine<T> == 0; };
    const bool past = stream && lines(base) && lines(n) && (rows == 1 || (lines(row_stride) && lines(r0_stride)));
    int32_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t begin = offset(base, r);
      auto finish = [&](const Arrays<C>& a, int64_t j, int64_t m, bool past) {
        return loops.finish_block[past](a, m, ahead, step, numbers.from(j));
      };
      count += stored.template store<Visit::second>(begin, n, past, finish);
    }
    return count;
  }

  // Neighbouring groups, from number `first` of the tensor, that are one long run each.
  int32_t run_long(int64_t base, int64_t first, int64_t count, int32_t* alive) const {
    int32_t nonzeros = 0;
    for (int64_t m = 0; m < count; ++m, base += row) {
      double lanes[2 * kLanes] = {};
      double totals[2] = {};
      if (phase != Phase::scale) {
        advance_one(base, row, lanes);
        for (int64_t i = 0; i < per_group; ++i) totals[i] = sum_lanes(lanes + i * kLanes);
      }
      if (phase == Phase::norms) {
        for (int64_t i = 0; i < per_group; ++i) group_sums[i * groups + first + m] = totals[i];
        continue;
      }
      C number;
      if (phase == Phase::scale) find_numbers(1, group_sums + first + m, groups, &number);
      else find_numbers(1, totals, 1, &number);
      alignas(64) C numbers[kPart];
      std::fill_n(numbers, kPart, number);
      const int32_t found = finish(base, row, {numbers, true}, 0);
      nonzeros += found;
      if (alive != nullptr) *alive += found > 0;
    }
    return nonzeros;
  }

  // `count` groups of short or scattered runs: columns side by side, then the few columns of each group.
  int32_t run_columns(int64_t base, int64_t first, int64_t count, int32_t* alive) const {
    const int64_t columns = count * row;
    C* number = scratch.template get<C>(2, count);
    C* spread_number = row == 1 ? number : scratch.template get<C>(3, columns + kSpread);
    const bool kept = phase != Phase::whole;  // sums, from one visit to the next
    double* totals = kept ? group_sums + first : scratch.template get<double>(1, per_group * count);
    const int64_t stride = kept ? groups : count;
    if (phase != Phase::scale) {
      double* sums = scratch.template get<double>(0, per_group * columns);
      advance_tile(base, columns, sums);
      for (int64_t i = 0; i < per_group; ++i) sum_rows(sums + i * columns, row, count, totals + i * stride);
      if (phase == Phase::norms) return 0;
    }
    find_numbers(count, totals, stride, number);
    if (row > 1) spread(number, row, count, spread_number);
    const int32_t nonzeros = finish(base, columns, {spread_number, false}, 0);
    if (alive != nullptr)
      for (int64_t m = 0; m < count; ++m)
        *alive += (number[m] != C(0) || step.rule.reads_param) && this->any_nonzero(base + m * row);
    return nonzeros;
  }

  // What was found of `count` groups from number `first` on, from what strips or phases left.
  C* numbers_of(int64_t first, int64_t count) const {
    C* number = scratch.template get<C>(2, count);
    if (sharing) find_numbers(count, group_sums + first, groups, number);
    else for (int64_t m = 0; m < count; ++m) number[m] = C(group_sums[first + m]);
    return number;
  }

  // A strip: its sums; its share of the groups' sums over all strips, and without a budget what follows from them; the
  // rest of its own rows.
  int32_t run_strip(int64_t strip) const {
    const int64_t columns = row_stride, base = strip * t.strip_rows * columns;
    if (phase == Phase::whole || phase == Phase::norms) {
      advance_tile(base, columns, column_sums + strip * per_group * columns);
      return 0;
    }
    if (phase == Phase::sum_strips) {
      const Share part(t, strip);
      double* sums = scratch.template get<double>(0, part.count * row);
      double* totals = scratch.template get<double>(1, per_group * part.count);
      for (int64_t i = 0; i < per_group; ++i) {
        std::fill_n(sums, part.count * row, 0.0);
        for (int64_t s = 0; s < strips_of(t); ++s)
          add_numbers(column_sums + (s * per_group + i) * columns + part.begin * row, part.count * row, sums);
        sum_rows(sums, row, part.count, sharing ? group_sums + i * groups + part.begin : totals + i * part.count);
      }
      if (sharing) return 0;
      C* number = scratch.template get<C>(2, part.count);
      find_numbers(part.count, totals, part.count, number);
      for (int64_t m = 0; m < part.count; ++m) group_sums[part.begin + m] = double(number[m]);
      return 0;
    }
    C* spread_number = scratch.template get<C>(3, columns + kSpread);
    spread(numbers_of(0, groups), row, groups, spread_number);
    return finish(base, columns, {spread_number, false}, kAhead<C>);
  }

  // The non-zero ones of a strip's share of the groups, row by row of the tensor.
  int32_t count_alive(int64_t strip) const {
    const Share part(t, strip);
    const C* number = numbers_of(part.begin, part.count);
    char* zero = scratch.template get<char>(0, part.count);  // as far as is known
    int64_t left = 0, alive = 0;
    for (int64_t m = 0; m < part.count; ++m)
      left += zero[m] = step.rule.reads_param || number[m] != C(0);
    for (int64_t r = 0; r < t.layout.rows() && alive < left; ++r) {
      const T* cells = stored.param + r * row_stride + part.begin * row;
      for (int64_t m = 0; m < part.count; ++m)
        for (int64_t c = 0; c < row && zero[m]; ++c)
          if (nonzero(cells[m * row + c])) zero[m] = 0, ++alive;
    }
    return int32_t(alive);
  }
};

template <class Groups>
void run_tile(const Groups& groups, const Item& item, int32_t* counts) {
  constexpr int64_t kBatch = 2048;  // contiguous elements at a time: all scratch stays in L1
  constexpr int64_t kWhole = 16;    // a batch of so many groups ends with a memory line, if it begins with one
  constexpr int64_t kLong = 64;     // from here on a group is its own loop
  static_assert(kBatch / kLong >= kWhole);
  const GroupLayout& g = groups.t.layout;
  const int64_t slab = item.begin / g.g2;
  const int64_t base = (slab / g.g1) * g.r0 * groups.r0_stride + (slab % g.g1) * g.r1 * groups.row_stride +
                       (item.begin % g.g2) * g.r2;
  int32_t count = 0, alive = 0;
  int32_t* count_alive = counts == nullptr ? nullptr : &alive;
  if (groups.rows == 1 && g.r2 >= kLong) {
    count = groups.run_long(base, item.begin, item.count, count_alive);
  } else {
    const int64_t batch = groups.rows > 1 ? item.count : kBatch / g.r2 / kWhole * kWhole;
    for (int64_t m = 0; m < item.count; m += batch)
      count += groups.run_columns(base + m * g.r2, item.begin + m, item.count - m < batch ? item.count - m : batch,
                                  count_alive);
  }
  if (counts == nullptr) return;
  counts[0] = count;  // after the first of two phases nothing yet
  counts[1] = alive;
}

template <class T>
void run_grouped(const PlanView& plan, const Item& item, const void* grad, const Step<compute_t<T>>& step,
                 const FusedLoops<compute_t<T>>& loops, Phase phase, int32_t* counts) {
  const Groups<T> groups(plan, item, grad, step, loops, phase);
  const int64_t strip_rows = groups.t.strip_rows;
  if (phase == Phase::norms && item.begin == 0)  // one of the tensor's items says it for all
    plan.sharing()[item.tensor].decay =
        budget_decay(groups.per_group == 2 ? 1 : double(step.scale), step.radial, groups.t.weight);
  if (strip_rows == 0) {
    run_tile(groups, item, counts);
  } else if (phase == Phase::count_strips) {
    counts[1] = groups.count_alive(item.begin / strip_rows);
  } else {
    const int32_t count = groups.run_strip(item.begin / strip_rows);
    if (counts != nullptr) counts[0] = count;
  }
}

BREGMAN_END
