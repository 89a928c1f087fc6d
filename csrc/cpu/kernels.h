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
    p.z = keep[j] ? p.z : C(0);
    for (int m = 0; m < Rule::kStateSlots; ++m) s[m] = keep[j] ? s[m] : C(0);
  }
  a.store_state(i, s);
  return Elementwise::prox(p.z, p.scale, k.elementwise);
}

// The whole step on n neighbouring elements; returns how many are non-zero.
template <class Rule, class Elementwise, class T, bool kMasked>
int32_t separable_block(const Arrays<Rule, T> a, int64_t begin, int64_t n, const Scalars<Rule, compute_t<T>> k,
                        const flag_t<compute_t<T>>* keep) {
  using C = compute_t<T>;
  int32_t count = 0;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    int64_t i = begin + j;
    C s[kMaxSlots];
    C q = point_and_prox<Rule, Elementwise, T, C, kMasked>(a, i, k, s, keep, j);
    C value = Rule::finish(q, a.load_param(i), s, k.h);
    if constexpr (kMasked) value = keep[j] ? value : C(0);
    count += a.store_param(i, value);
  }
  return count;
}

// First half of a group step: state and pre-prox points, with the elementwise prox applied.
template <class Rule, class Elementwise, class T, bool kMasked>
void points_block(const Arrays<Rule, T> a, int64_t begin, int64_t n, const Scalars<Rule, compute_t<T>> k,
                  compute_t<T>* __restrict__ z, const flag_t<compute_t<T>>* keep) {
  using C = compute_t<T>;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    C s[kMaxSlots];
    z[j] = point_and_prox<Rule, Elementwise, T, C, kMasked>(a, begin + j, k, s, keep, j);
  }
}

// Second half: shrink by the group's factor, finish, store, and flag the non-zeros.
template <class Rule, class T, bool kMasked>
int32_t finish_block(const Arrays<Rule, T> a, int64_t begin, int64_t n, const Scalars<Rule, compute_t<T>> k,
                     const compute_t<T>* __restrict__ z, const compute_t<T>* __restrict__ factor,
                     int32_t* __restrict__ alive, const flag_t<compute_t<T>>* keep) {
  using C = compute_t<T>;
  int32_t count = 0;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    int64_t i = begin + j;
    C s[kMaxSlots];
    a.load_state(i, s);
    C value = Rule::finish(z[j] * factor[j], a.load_param(i), s, k.h);
    if constexpr (kMasked) value = keep[j] ? value : C(0);
    int32_t one = a.store_param(i, value);
    alive[j] |= one;
    count += one;
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

template <class Rule, class Elementwise, class T>
void run_separable(const PlanView& plan, const Item& item, const void* grad, const StepArgs& args, int32_t* counts) {
  using C = compute_t<T>;
  const TensorRecord& t = plan.records()[item.tensor];
  const auto k = Scalars<Rule, C>::from(args);
  Arrays<Rule, T> a(t, grad);
  int32_t count = 0;
  if (t.mask == nullptr) {
    count = separable_block<Rule, Elementwise, T, false>(a, item.begin, item.count, k, nullptr);
  } else {
    for_blocks<C>(t.mask, item.begin, item.count, [&](int64_t j, int64_t n, const flag_t<C>* keep) {
      count += separable_block<Rule, Elementwise, T, true>(a, item.begin + j, n, k, keep);
    });
  }
  counts[0] = count;
  counts[1] = 0;
}

// Sum of squares in float64, in an order that depends on n alone.
template <class C>
double sum_squares(const C* z, int64_t n) {
  constexpr int kLanes = 8;
  double lane[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int m = 0; m < kLanes; ++m) lane[m] += double(z[j + m]) * double(z[j + m]);
  double tail = 0;
  for (; j < n; ++j) tail += double(z[j]) * double(z[j]);
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7])) + tail;
}

template <class C>
void add_squares(const C* __restrict__ z, int64_t n, double* __restrict__ sums) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) sums[j] += double(z[j]) * double(z[j]);
}

// A tile of neighbouring groups: rows of contiguous columns, R2 of them per group.
template <class Rule, class Elementwise, class T>
void run_grouped(const PlanView& plan, const Item& item, const void* grad, const StepArgs& args, int32_t* counts) {
  using C = compute_t<T>;
  const TensorRecord& t = plan.records()[item.tensor];
  const GroupLayout& g = t.layout;
  const auto k = Scalars<Rule, C>::from(args);
  Arrays<Rule, T> a(t, grad);
  const int64_t rows = g.rows(), columns = item.count * g.r2;
  const int64_t slab = item.begin / g.g2, first = item.begin % g.g2;
  const int64_t row_stride = g.g2 * g.r2, r0_stride = g.g1 * g.r1 * row_stride;
  const int64_t base = (slab / g.g1) * g.r0 * r0_stride + (slab % g.g1) * g.r1 * row_stride + first * g.r2;
  auto offset = [&](int64_t row) { return base + (row / g.r1) * r0_stride + (row % g.r1) * row_stride; };

  Scratch& scratch = thread_scratch();
  C* z = scratch.get<C>(0, rows * columns);
  double* sums = scratch.get<double>(1, columns);
  C* factor = scratch.get<C>(2, columns);
  int32_t* alive = scratch.get<int32_t>(3, columns);
  for (int64_t c = 0; c < columns; ++c) sums[c] = 0, alive[c] = 0;

  for (int64_t row = 0; row < rows; ++row) {
    C* zr = z + row * columns;
    if (t.mask == nullptr) {
      points_block<Rule, Elementwise, T, false>(a, offset(row), columns, k, zr, nullptr);
    } else {
      for_blocks<C>(t.mask, offset(row), columns, [&](int64_t j, int64_t n, const flag_t<C>* keep) {
        points_block<Rule, Elementwise, T, true>(a, offset(row) + j, n, k, zr + j, keep);
      });
    }
    if (rows > 1) add_squares(zr, columns, sums);
  }

  const C scale = uniform_scale<Rule, C>(k.h) * C(t.weight);
  for (int64_t m = 0; m < item.count; ++m) {
    double total = 0;
    if (rows == 1)
      total = sum_squares(z + m * g.r2, g.r2);
    else
      for (int64_t c = 0; c < g.r2; ++c) total += sums[m * g.r2 + c];
    C one = radial_factor(C(square_root(total)), scale, k.radial);
    for (int64_t c = 0; c < g.r2; ++c) factor[m * g.r2 + c] = one;
  }

  int32_t count = 0, groups = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const C* zr = z + row * columns;
    if (t.mask == nullptr) {
      count += finish_block<Rule, T, false>(a, offset(row), columns, k, zr, factor, alive, nullptr);
    } else {
      for_blocks<C>(t.mask, offset(row), columns, [&](int64_t j, int64_t n, const flag_t<C>* keep) {
        count += finish_block<Rule, T, true>(a, offset(row) + j, n, k, zr + j, factor + j, alive + j, keep);
      });
    }
  }
  for (int64_t m = 0; m < item.count; ++m) {
    int32_t any = 0;
    for (int64_t c = 0; c < g.r2; ++c) any |= alive[m * g.r2 + c];
    groups += any;
  }
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
  int32_t ignored[2];
  for (int64_t i = begin; i < end; ++i) {
    const Item& item = plan.items()[i];
    run(plan, item, grads[item.tensor], args, counts == nullptr ? ignored : counts + 2 * i);
  }
}

BREGMAN_END
