// The CPU loops. Included once per instruction set, each time in a namespace of its own (BREGMAN_ISA).
// The elementwise penalty is a template argument: a switch inside the loop would stop vectorisation.
#pragma once

#include <type_traits>

#include "../math/dtypes.h"
#include "../math/radial.h"
#include "../math/rule_list.h"
#include "../math/scalars.h"
#include "../plan/plan.h"
#include "step.h"

BREGMAN_BEGIN

constexpr int kBlock = 64;  // elements per mask word

template <class C>
using flag_t = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;

// The arrays of one tensor, and how one element is loaded and stored.
template <class Rule, class T>
struct Arrays {
  using C = compute_t<T>;
  static constexpr int kSlots = Rule::kStateSlots;
  static constexpr bool kMaster = Rule::kReadsParam && sizeof(T) == 2;
  T* __restrict__ param;
  const T* __restrict__ grad;
  C* __restrict__ slot0;
  C* __restrict__ slot1;
  C* __restrict__ slot2;
  C* __restrict__ master;

  Arrays(const TensorRecord& t, const void* grads)
      : param(static_cast<T*>(t.param)),
        grad(static_cast<const T*>(grads)),
        slot0(static_cast<C*>(t.state[0])),
        slot1(static_cast<C*>(t.state[1])),
        slot2(static_cast<C*>(t.state[2])),
        master(static_cast<C*>(t.state[kSlots])) {
    static_assert(kSlots + kMaster <= 3);
  }

  BREGMAN_HD void load_state(int64_t i, C* s) const {
    if constexpr (kSlots > 0) s[0] = slot0[i];
    if constexpr (kSlots > 1) s[1] = slot1[i];
    if constexpr (kSlots > 2) s[2] = slot2[i];
  }
  BREGMAN_HD void store_state(int64_t i, const C* s) const {
    if constexpr (kSlots > 0) slot0[i] = s[0];
    if constexpr (kSlots > 1) slot1[i] = s[1];
    if constexpr (kSlots > 2) slot2[i] = s[2];
  }
  BREGMAN_HD C load_param(int64_t i) const {
    if constexpr (kMaster) return master[i];
    if constexpr (Rule::kReadsParam) return widen(param[i]);
    return C(0);
  }
  BREGMAN_HD bool store_param(int64_t i, C value) const {
    T stored;
    narrow(value, stored);
    param[i] = stored;
    if constexpr (kMaster) master[i] = value;
    return nonzero(stored);
  }
};

template <class Rule, class Elementwise, class T, class C, bool kMasked>
BREGMAN_HD C point_and_prox(const Arrays<Rule, T>& a, int64_t i, const Scalars<Rule, C>& k, C* s,
                            const flag_t<C>* keep, int64_t j) {
  a.load_state(i, s);
  Point<C> p = Rule::point(widen(a.grad[i]) * k.grad_scale, a.load_param(i), s, k.h);
  if constexpr (kMasked) {
    p.z = select(keep[j] != 0, p.z, C(0));
    for (int m = 0; m < Rule::kStateSlots; ++m) s[m] = keep[j] ? s[m] : C(0);
  }
  a.store_state(i, s);
  return Elementwise::prox(p.z, p.scale, k.elementwise);
}

// Functions of their own: inlined, GCC 12 moves parts of these loops out and does not vectorise a sixth of them.
#define BREGMAN_LOOP __attribute__((noinline))

// The whole step on n neighbouring elements; returns how many are non-zero.
template <class Rule, class Elementwise, class T, bool kMasked>
BREGMAN_LOOP int32_t separable_block(const Arrays<Rule, T> a, int64_t begin, int64_t n,
                                     const Scalars<Rule, compute_t<T>> k, const flag_t<compute_t<T>>* keep) {
  using C = compute_t<T>;
  int32_t count = 0;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    int64_t i = begin + j;
    C s[kMaxSlots];
    C q = point_and_prox<Rule, Elementwise, T, C, kMasked>(a, i, k, s, keep, j);
    C value = Rule::finish(q, a.load_param(i), s, k.h);
    if constexpr (kMasked) value = select(keep[j] != 0, value, C(0));
    count += a.store_param(i, value);
  }
  return count;
}

// First half of a group step: state and pre-prox points, with the elementwise prox applied.
template <class Rule, class Elementwise, class T, bool kMasked>
BREGMAN_LOOP void points_block(const Arrays<Rule, T> a, int64_t begin, int64_t n,
                               const Scalars<Rule, compute_t<T>> k, compute_t<T>* __restrict__ z,
                               const flag_t<compute_t<T>>* keep) {
  using C = compute_t<T>;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    C s[kMaxSlots];
    z[j] = point_and_prox<Rule, Elementwise, T, C, kMasked>(a, begin + j, k, s, keep, j);
  }
}

// Second half: shrink by the group's factor, finish and store; returns how many are non-zero.
template <class Rule, class T, bool kMasked, class Factor>
BREGMAN_LOOP int32_t finish_block(const Arrays<Rule, T> a, int64_t begin, int64_t n,
                                  const Scalars<Rule, compute_t<T>> k, const compute_t<T>* __restrict__ z,
                                  const Factor factor, const flag_t<compute_t<T>>* keep) {
  using C = compute_t<T>;
  int32_t count = 0;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    int64_t i = begin + j;
    C s[kMaxSlots];
    a.load_state(i, s);
    C value = Rule::finish(z[j] * factor(j), a.load_param(i), s, k.h);
    if constexpr (kMasked) value = select(keep[j] != 0, value, C(0));
    count += a.store_param(i, value);
  }
  return count;
}

// Mask bits [offset, offset + n), n <= 64, one flag per element.
template <class F>
void expand_mask(const uint64_t* mask, int64_t offset, int64_t n, F* keep) {
  int shift = int(offset % kBlock);
  uint64_t bits = mask[offset / kBlock] >> shift;
  if (shift + n > kBlock) bits |= mask[offset / kBlock + 1] << (kBlock - shift);
  for (int64_t j = 0; j < kBlock; ++j) keep[j] = F((bits >> j) & 1);
}

// Calls f(start, length, keep) over [0, n): at once without a mask, in blocks with one.
template <class C, class F>
void for_blocks(const uint64_t* mask, int64_t offset, int64_t n, F f) {
  flag_t<C> keep[kBlock];
  for (int64_t j = 0; j < n; j += kBlock) {
    int64_t length = n - j < kBlock ? n - j : kBlock;
    expand_mask(mask, offset + j, length, keep);
    f(j, length, keep);
  }
}

// Whether parameters are written past the caches: nobody reads them in this step, and there are too many to stay.
constexpr int64_t kStreamBytes = 16 << 20;
template <class Rule, class T>
bool streams(const PlanView& plan, const TensorRecord& t) {
  return !Rule::kReadsParam && plan.header().elements * int64_t(sizeof(T)) >= kStreamBytes &&
         reinterpret_cast<uintptr_t>(t.param) % 64 == 0;
}

// Runs f with a tensor whose parameter elements [begin, begin + n), n <= kBuffer, go to a buffer, and streams them out.
constexpr int64_t kBuffer = 1024;
template <class Rule, class T, class F>
int32_t streamed(const Arrays<Rule, T>& a, int64_t begin, int64_t n, F f) {
  alignas(64) T buffer[kBuffer];
  Arrays<Rule, T> redirected = a;
  redirected.param = buffer - begin;
  const int32_t count = f(redirected);
  stream_copy(a.param + begin, buffer, n * int64_t(sizeof(T)));
  return count;
}

template <class Rule, class Elementwise, class T>
void run_separable(const PlanView& plan, const Item& item, const void* grad, const StepArgs& args, int32_t* counts) {
  using C = compute_t<T>;
  const TensorRecord& t = plan.records()[item.tensor];
  const auto k = Scalars<Rule, C>::from(args);
  Arrays<Rule, T> a(t, grad);
  int32_t count = 0;
  if (t.mask != nullptr) {
    for_blocks<C>(t.mask, item.begin, item.count, [&](int64_t j, int64_t n, const flag_t<C>* keep) {
      count += separable_block<Rule, Elementwise, T, true>(a, item.begin + j, n, k, keep);
    });
  } else if (streams<Rule, T>(plan, t)) {
    for (int64_t j = 0; j < item.count; j += kBuffer) {
      const int64_t begin = item.begin + j, n = item.count - j < kBuffer ? item.count - j : kBuffer;
      count += streamed(a, begin, n, [&](const Arrays<Rule, T>& to) {
        return separable_block<Rule, Elementwise, T, false>(to, begin, n, k, nullptr);
      });
    }
    stream_fence();
  } else {
    count = separable_block<Rule, Elementwise, T, false>(a, item.begin, item.count, k, nullptr);
  }
  if (counts == nullptr) return;
  counts[0] = count;
  counts[1] = 0;
}

// Sum of squares in float64, in an order that depends on n alone.
template <class C>
double sum_squares(const C* z, int64_t n) {
  constexpr int kLanes = 16;
  double lane[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int m = 0; m < kLanes; ++m) lane[m] += double(z[j + m]) * double(z[j + m]);
  for (int m = 0; j < n; ++m, ++j) lane[m] += double(z[j]) * double(z[j]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int m = 0; m < half; ++m) lane[m] += lane[m + half];
  return lane[0];
}

template <bool kAdd, class C>
void squares(const C* __restrict__ z, int64_t n, double* __restrict__ sums) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) sums[j] = (kAdd ? sums[j] : 0.0) + double(z[j]) * double(z[j]);
}

// totals[m] = the sum of `row` neighbours, for `count` groups.
inline void sum_rows(const double* __restrict__ values, int64_t row, int64_t count, double* __restrict__ totals) {
  for (int64_t m = 0; m < count; ++m) {
    double total = 0;
    for (int64_t c = 0; c < row; ++c) total += values[m * row + c];
    totals[m] = total;
  }
}

template <class Scalar, class C>
void radial_factors(const double* __restrict__ totals, int64_t count, C scale, const Penalty<C> k, C* __restrict__ factor) {
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

// The factor of element j: one for all, or one per column.
template <class C>
struct OneFactor {
  C factor;
  BREGMAN_HD C operator()(int64_t) const { return factor; }
  BREGMAN_HD OneFactor from(int64_t) const { return *this; }
};
template <class C>
struct ColumnFactors {
  const C* __restrict__ factors;
  BREGMAN_HD C operator()(int64_t j) const { return factors[j]; }
  BREGMAN_HD ColumnFactors from(int64_t j) const { return {factors + j}; }
};

// Repeats each group's factor for its `row` columns. Writes up to kSpread - 1 elements too many.
constexpr int64_t kSpread = 16;
template <class C>
void spread(const C* __restrict__ factor, int64_t row, int64_t count, C* __restrict__ columns) {
  for (int64_t m = 0; m < count; ++m)
    for (int64_t c = 0; c < row; c += kSpread)  // whole vectors: the surplus is overwritten by the next group
      for (int64_t lane = 0; lane < kSpread; ++lane) columns[m * row + c + lane] = factor[m];
}

// A tile of neighbouring groups: rows of contiguous columns, `row` of them per group.
template <class Rule, class Elementwise, class T>
struct GroupTile {
  using C = compute_t<T>;
  const TensorRecord& t;
  const Scalars<Rule, C> k;
  const Arrays<Rule, T> a;
  const C scale;
  const int64_t row, rows, inner, row_stride, r0_stride;
  const bool stream;
  Scratch& scratch = thread_scratch();

  GroupTile(const PlanView& plan, const TensorRecord& record, const void* grad, const StepArgs& args)
      : t(record), k(Scalars<Rule, C>::from(args)), a(record, grad), scale(uniform_scale<Rule, C>(k.h) * C(t.weight)),
        row(t.layout.r2), rows(t.layout.rows()), inner(t.layout.r1), row_stride(t.layout.g2 * row),
        r0_stride(t.layout.g1 * inner * row_stride),
        stream(streams<Rule, T>(plan, t) && rows == 1 && t.mask == nullptr && row * sizeof(T) % 16 == 0) {}

  int64_t offset(int64_t base, int64_t r) const { return base + (r / inner) * r0_stride + (r % inner) * row_stride; }

  // The halves of a group step touch memory in turns: each fetches what the other will need next, or the memory bus
  // would idle at every turn (measured: a third of the step on ResNet-18 shapes).
  static constexpr int64_t kStride = 256;  // elements between turns
  static constexpr int64_t kLine = 64 / sizeof(T);

  void fetch_outputs(int64_t begin, int64_t n) const {
    if (!Rule::kReadsParam && !stream)
      for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(a.param + begin + j, 1);
  }
  void fetch_inputs(int64_t begin, int64_t n) const {
    for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(a.grad + begin + j, 0, 2);
    for (int64_t j = 0; j < n; j += 64 / sizeof(C)) {
      if constexpr (Rule::kStateSlots > 0) __builtin_prefetch(a.slot0 + begin + j, 1, 2);
      if constexpr (Rule::kStateSlots > 1) __builtin_prefetch(a.slot1 + begin + j, 1, 2);
      if constexpr (Rule::kStateSlots > 2) __builtin_prefetch(a.slot2 + begin + j, 1, 2);
      if constexpr (Rule::kReadsParam) __builtin_prefetch(a.param + begin + j, 1, 2);
    }
  }

  void points(int64_t begin, int64_t n, C* z, int64_t next) const {
    for (int64_t j = 0; j < n; j += kStride) {
      const int64_t length = n - j < kStride ? n - j : kStride;
      fetch_outputs(begin + j, length);
      if (next >= 0) fetch_inputs(next + j, length);
      points_of(begin + j, length, z + j);
    }
  }
  template <class Factor>
  int32_t finish(int64_t begin, int64_t n, const C* z, Factor factor, int64_t next) const {
    int32_t count = 0;
    for (int64_t j = 0; j < n; j += kStride) {
      const int64_t length = n - j < kStride ? n - j : kStride;
      if (next >= 0) fetch_inputs(next + j, length);
      count += finish_of(begin + j, length, z + j, factor.from(j));
    }
    return count;
  }

  void points_of(int64_t begin, int64_t n, C* z) const {
    if (t.mask == nullptr) return points_block<Rule, Elementwise, T, false>(a, begin, n, k, z, nullptr);
    for_blocks<C>(t.mask, begin, n, [&](int64_t j, int64_t length, const flag_t<C>* keep) {
      points_block<Rule, Elementwise, T, true>(a, begin + j, length, k, z + j, keep);
    });
  }

  template <class Factor>
  int32_t finish_of(int64_t begin, int64_t n, const C* z, Factor factor) const {
    if (stream)
      return streamed(a, begin, n, [&](const Arrays<Rule, T>& to) {
        return finish_block<Rule, T, false>(to, begin, n, k, z, factor, nullptr);
      });
    if (t.mask == nullptr) return finish_block<Rule, T, false>(a, begin, n, k, z, factor, nullptr);
    int32_t count = 0;
    for_blocks<C>(t.mask, begin, n, [&](int64_t j, int64_t length, const flag_t<C>* keep) {
      count += finish_block<Rule, T, true>(a, begin + j, length, k, z + j, factor.from(j), keep);
    });
    return count;
  }

  // One long run, all of it a group: lanes within the group.
  int32_t run_long(int64_t base, int32_t* alive) {
    C* z = scratch.get<C>(0, row);
    points(base, row, z, -1);
    const double total = sum_squares(z, row);
    C factor;
    radial_factors(&total, 1, scale, k.radial, &factor);
    const int64_t next = base + 2 * row <= t.numel ? base + row : -1;
    const int32_t nonzeros = finish(base, row, z, OneFactor<C>{factor}, next);
    if (alive != nullptr) *alive += nonzeros > 0;
    return nonzeros;
  }

  // `count` groups of short or scattered runs: columns side by side, then the few columns of each group.
  int32_t run_columns(int64_t base, int64_t count, int32_t* alive) {
    const int64_t columns = count * row;
    C* z = scratch.get<C>(0, rows * columns);
    double* sums = scratch.get<double>(1, columns);
    double* totals = scratch.get<double>(2, count);
    C* factor = scratch.get<C>(3, count);
    C* spread_factor = scratch.get<C>(4, columns + kSpread);
    for (int64_t r = 0; r < rows; ++r) {
      points(offset(base, r), columns, z + r * columns, r + 1 < rows ? offset(base, r + 1) : -1);
      r == 0 ? squares<false>(z, columns, sums) : squares<true>(z + r * columns, columns, sums);
    }
    sum_rows(sums, row, count, totals);
    radial_factors(totals, count, scale, k.radial, factor);
    spread(factor, row, count, spread_factor);
    int32_t nonzeros = 0;
    const int64_t next = rows == 1 && base + 2 * columns <= t.numel ? base + columns : -1;
    for (int64_t r = 0; r < rows; ++r)
      nonzeros += finish(offset(base, r), columns, z + r * columns, ColumnFactors<C>{spread_factor}, next);
    if (alive != nullptr)
      for (int64_t m = 0; m < count; ++m) *alive += factor[m] != C(0) && any_nonzero(base + m * row);
    return nonzeros;
  }

  bool any_nonzero(int64_t base) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < row; ++c)
        if (nonzero(a.param[offset(base, r) + c])) return true;
    return false;
  }
};

template <class Rule, class Elementwise, class T>
void run_grouped(const PlanView& plan, const Item& item, const void* grad, const StepArgs& args, int32_t* counts) {
  constexpr int64_t kBatch = 2048;  // contiguous elements at a time: all scratch stays in L1
  constexpr int64_t kLong = 64;     // from here on a group is its own loop
  const TensorRecord& t = plan.records()[item.tensor];
  const GroupLayout& g = t.layout;
  GroupTile<Rule, Elementwise, T> tile(plan, t, grad, args);
  const int64_t slab = item.begin / g.g2;
  const int64_t base = (slab / g.g1) * g.r0 * tile.r0_stride + (slab % g.g1) * g.r1 * tile.row_stride +
                 (item.begin % g.g2) * g.r2;
  int32_t count = 0, groups = 0;
  int32_t* alive = counts == nullptr ? nullptr : &groups;
  if (tile.rows == 1 && g.r2 >= kLong) {
    for (int64_t m = 0; m < item.count; ++m) count += tile.run_long(base + m * g.r2, alive);
  } else {
    const int64_t batch = tile.rows > 1 ? item.count : kBatch / g.r2;
    for (int64_t m = 0; m < item.count; m += batch)
      count += tile.run_columns(base + m * g.r2, item.count - m < batch ? item.count - m : batch, alive);
  }
  if (tile.stream) stream_fence();
  if (counts == nullptr) return;
  counts[0] = count;
  counts[1] = groups;
}

using RunItem = void (*)(const PlanView&, const Item&, const void*, const StepArgs&, int32_t*);

template <class Rule, class T>
RunItem pick_penalty(const StepArgs& args, bool grouped) {
  switch (PenaltyKind(args.elementwise)) {
#define X(Functor, name) \
  case PenaltyKind::name: \
    return grouped ? run_grouped<Rule, Functor, T> : run_separable<Rule, Functor, T>;
    BREGMAN_PENALTIES(X)
#undef X
  }
  return nullptr;
}

template <class Rule>
RunItem pick_dtype(DType dtype, const StepArgs& args, bool grouped) {
  switch (dtype) {
    case DType::f32: return pick_penalty<Rule, float>(args, grouped);
    case DType::f64: return pick_penalty<Rule, double>(args, grouped);
    case DType::bf16: return pick_penalty<Rule, bf16>(args, grouped);
    case DType::fp16: return pick_penalty<Rule, fp16>(args, grouped);
  }
  return nullptr;
}

// Runs items [begin, end) of a plan.
inline void run_items(const PlanView& plan, const void* const* grads, const StepArgs& args, int32_t* counts,
                      int64_t begin, int64_t end) {
  const PlanHeader& header = plan.header();
  RunItem run = nullptr;
  switch (header.rule) {
#define X(Functor, name) \
  case rule_##name: \
    run = pick_dtype<Functor>(DType(header.dtype), args, header.grouped); \
    break;
    BREGMAN_RULES(X)
#undef X
  }
  for (int64_t i = begin; i < end; ++i) {
    const Item& item = plan.items()[i];
    run(plan, item, grads[item.tensor], args, counts == nullptr ? nullptr : counts + 2 * i);
  }
}

BREGMAN_END
