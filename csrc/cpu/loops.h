// The loops of a rule, and the table that everything else calls them through: dtypes, masks, groups and their proxes
// are compiled once, not once per rule. No loop switches by the penalty, which would stop its vectorisation: those in
// common use are part of the rule's loops, others run in loops of their own, between points and the rest (points.h).
#pragma once

#include "../math/envelope.h"
#include "arrays.h"

BREGMAN_BEGIN

// Functions of their own: inlined, GCC 12 moves parts of these loops out and does not vectorise a sixth of them.
#define BREGMAN_LOOP __attribute__((noinline))

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
struct Loops;

// The scalars of a step: those that all rules have, and the rule's own, which its loops know.
template <class C>
struct Step {
  static constexpr size_t kBytes = 192;
  const Loops<C>& rule;
  Penalty<C> elementwise, radial;
  C scale;        // the prox scale, where it is the same for all elements
  C lr, epsilon;  // of half-space steps
  alignas(C) unsigned char scalars[kBytes];

  Step(const Loops<C>& rule, const StepArgs& args);

  template <class Rule>
  Scalars<Rule, C> of() const {
    Scalars<Rule, C> k;
    std::memcpy(&k, scalars, sizeof(k));
    return k;
  }
};

// Copies to the beginning of a memory line, whole lines past the caches. A plain store to a line that nobody reads
// fetches it first: on ResNet-18 shapes that is a fifth of LinBreg's traffic (20 bytes per parameter instead of 16).
BREGMAN_HD void stream_lines(void* to, const void* from, int64_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  const int64_t whole = bytes / 64 * 64;
#if defined(BREGMAN_AVX512)
  for (int64_t i = 0; i < whole; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
#elif defined(BREGMAN_FMA)
  for (int64_t i = 0; i < whole; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
#elif defined(__SSE2__)
  for (int64_t i = 0; i < whole; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
#else
  std::memcpy(target, source, size_t(whole));
#endif
  if (whole < bytes) std::memcpy(target + whole, source + whole, size_t(bytes - whole));
}

// Calls visit(begin, m) for parts of n elements. Visits are to be inlined: the loops of whole parts have a fixed length.
#define BREGMAN_VISIT __attribute__((always_inline))
template <class F>
BREGMAN_HD void in_parts(int64_t n, const F& visit) {
  int64_t begin = 0;
  for (; begin + kPart <= n; begin += kPart) visit(begin, kPart);
  if (begin < n) visit(begin, n - begin);
}

// The whole step on n neighbouring elements; returns how many are non-zero.
template <bool kStream, class Rule, class Elementwise, class C>
BREGMAN_LOOP int32_t separable_block(const Arrays<C>& arrays, int64_t n, const Step<C>& step) {
  const Arrays<C> a = arrays;
  const auto k = step.template of<Rule>();
  const int64_t ahead = n > kAhead<C> ? kAhead<C> : 0;  // small tensors: behind them lies something else
  int32_t count = 0;
  in_parts(n, [&](int64_t begin, int64_t m) BREGMAN_VISIT {
    fetch_ahead<Rule, true, !kStream>(a, begin, m, ahead);
    alignas(64) C streamed[kPart];
    C* const out = kStream ? streamed : a.param + begin;
#pragma GCC ivdep
    for (int64_t j = 0; j < m; ++j) {
      C s[kMaxSlots];
      const C q = prox_point<Rule, Elementwise>(a, begin + j, k, s);
      count += finish_element(a, begin + j, k, q, s, out[j]);
    }
    if constexpr (kStream) stream_lines(a.param + begin, streamed, m * int64_t(sizeof(C)));
  });
  return count;
}

// First visit of n neighbours of one group. Element j adds to lanes[j % kLanes], an order that depends on n alone.
constexpr int kLanes = 32;
template <class Rule, class Elementwise, class C>
BREGMAN_LOOP void advance_run(const Arrays<C>& arrays, int64_t n, const Step<C>& step, double* __restrict__ lanes) {
  const Arrays<C> a = arrays;
  const auto k = step.template of<Rule>();
  double sums[kLanes];
  for (int m = 0; m < kLanes; ++m) sums[m] = lanes[m];
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    fetch_ahead<Rule, true, false>(a, j, kLanes, kAhead<C>);
    C q[kLanes];
#pragma GCC ivdep
    for (int m = 0; m < kLanes; ++m) {
      C s[kMaxSlots];
      q[m] = prox_point<Rule, Elementwise>(a, j + m, k, s);
    }
    for (int m = 0; m < kLanes; ++m) sums[m] = add_square(sums[m], q[m]);
  }
  const int64_t rest = n - j;
#pragma GCC ivdep
  for (int64_t m = 0; m < rest; ++m) {
    C s[kMaxSlots];
    sums[m] = add_square(sums[m], prox_point<Rule, Elementwise>(a, j + m, k, s));
  }
  for (int m = 0; m < kLanes; ++m) lanes[m] = sums[m];
}

// First visit of kRows rows of n columns, each of which has a sum of its own. `ahead` here and below: see fetch_ahead.
template <int kRows, class Rule, class Elementwise, class C>
BREGMAN_LOOP void advance_rows(const Arrays<C>& arrays, int64_t stride, int64_t n, int64_t ahead, const Step<C>& step,
                               double* __restrict__ sums) {
  const Arrays<C> a = arrays;
  const auto k = step.template of<Rule>();
  in_parts(n, [&](int64_t begin, int64_t m) BREGMAN_VISIT {
    for (int r = 0; r < kRows; ++r) fetch_ahead<Rule, true, false>(a, r * stride + begin, m, ahead);
#pragma GCC ivdep
    for (int64_t j = 0; j < m; ++j) {
      double sum = sums[begin + j];
      for (int r = 0; r < kRows; ++r) {
        C s[kMaxSlots];
        sum = add_square(sum, prox_point<Rule, Elementwise>(a, r * stride + begin + j, k, s));
      }
      sums[begin + j] = sum;
    }
  });
}

// The same for half-space steps, where a column has two sums.
template <class Rule, class C>
BREGMAN_LOOP void advance_pairs(const Arrays<C>& arrays, int64_t rows, int64_t stride, int64_t n, const Step<C>& step,
                                double* __restrict__ squares, double* __restrict__ products) {
  const Arrays<C> a = arrays;
  const auto k = step.template of<Rule>();
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      C s[kMaxSlots];
      const Point<C> p = point_of<true>(a, r * stride + j, k, s);
      const Sums terms = half_space_terms(p.z, p.scale);
      squares[j] += terms.a;
      products[j] += terms.b;
    }
  }
}

// The prox point of an element, from what is known of its group: a factor, rho in a metric, the pull of a half-space.
template <class Rule, class C>
BREGMAN_HD C group_prox(C z, C scale, C number) {
  if constexpr (Rule::kMetric) return shrink_weighted(z, scale, number);
  else if constexpr (Rule::kHalfSpace) return half_space(z, scale, number);
  else return z * number;
}

// What is known of the groups of neighbouring elements, one by one; or of the group of all, kPart times.
template <class C>
struct Numbers {
  const C* first;
  bool same;

  BREGMAN_HD const C* at(int64_t i) const { return same ? first : first + i; }
  BREGMAN_HD Numbers from(int64_t i) const { return {at(i), same}; }
};

// Second visit of n neighbours: their prox points, by what is known of their groups, and the rest; returns how many are
// non-zero.
template <bool kStream, class Rule, class Elementwise, class C>
BREGMAN_LOOP int32_t finish_block(const Arrays<C>& arrays, int64_t n, int64_t ahead, const Step<C>& step,
                                  const Numbers<C>& numbers) {
  const Arrays<C> a = arrays;
  const auto k = step.template of<Rule>();
  int32_t count = 0;
  in_parts(n, [&](int64_t begin, int64_t m) BREGMAN_VISIT {
    fetch_ahead<Rule, false, !kStream>(a, begin, m, ahead);
    alignas(64) C streamed[kPart];
    C* const out = kStream ? streamed : a.param + begin;
    const C* __restrict__ const number = numbers.at(begin);
#pragma GCC ivdep
    for (int64_t j = 0; j < m; ++j) {
      C s[kMaxSlots];
      const Point<C> p = point_of<false>(a, begin + j, k, s);
      const C q = group_prox<Rule>(Elementwise::prox(p.z, p.scale, k.elementwise), p.scale, number[j]);
      count += finish_element(a, begin + j, k, q, s, out[j]);
    }
    if constexpr (kStream) stream_lines(a.param + begin, streamed, m * int64_t(sizeof(C)));
  });
  return count;
}

// Advances the state of `rows` rows of n columns and writes their points, and their prox scales where these differ.
// kSquares: adds the squares of the old parameters to those of each column, in type C: a search begins there.
template <bool kSquares, class Rule, class C>
BREGMAN_LOOP void advance_points(const Arrays<C>& arrays, int64_t rows, int64_t stride, int64_t n, int64_t ahead,
                                 const Step<C>& step, C* __restrict__ z, C* __restrict__ scales,
                                 C* __restrict__ squares) {
  const Arrays<C> a = arrays;
  const auto k = step.template of<Rule>();
  for (int64_t r = 0; r < rows; ++r, z += n, scales += n)
    in_parts(n, [&](int64_t begin, int64_t m) BREGMAN_VISIT {
      fetch_ahead<Rule, true, kSquares>(a, r * stride + begin, m, ahead);
#pragma GCC ivdep
      for (int64_t j = begin; j < begin + m; ++j) {
        C s[kMaxSlots];
        const Point<C> p = point_of<true>(a, r * stride + j, k, s);
        z[j] = p.z;
        if constexpr (kPaired<Rule>) scales[j] = p.scale;
        if constexpr (kSquares) squares[j] += a.param[r * stride + j] * a.param[r * stride + j];
      }
    });
}

// The new parameters from n points, as they are or with the prox of their groups; returns how many are non-zero.
template <bool kGroups, class Rule, class C>
BREGMAN_LOOP int32_t finish_points(const Arrays<C>& arrays, int64_t n, const Step<C>& step, const C* __restrict__ z,
                                   const C* __restrict__ scales, const C* __restrict__ numbers) {
  const Arrays<C> a = arrays;
  const auto k = step.template of<Rule>();
  int32_t count = 0;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    C s[kMaxSlots];
    load_state<Rule>(a, j, s);
    C q = z[j];
    if constexpr (kGroups) q = group_prox<Rule>(q, Rule::kMetric ? scales[j] : C(0), numbers[j]);
    count += finish_element(a, j, k, q, s, a.param[j]);
  }
  return count;
}

// The loops of a rule with an elementwise penalty; null are those for groups that it does not need.
template <class C>
struct FusedLoops {
  int32_t (*separable_block[2])(const Arrays<C>&, int64_t, const Step<C>&);  // [1]: past the caches
  void (*advance_run)(const Arrays<C>&, int64_t, const Step<C>&, double*);
  void (*advance_row)(const Arrays<C>&, int64_t, int64_t, int64_t, const Step<C>&, double*);
  void (*advance_four)(const Arrays<C>&, int64_t, int64_t, int64_t, const Step<C>&, double*);  // or null
  void (*advance_pairs)(const Arrays<C>&, int64_t, int64_t, int64_t, const Step<C>&, double*, double*);
  int32_t (*finish_block[2])(const Arrays<C>&, int64_t, int64_t, const Step<C>&, const Numbers<C>&);
};
template <class Rule, class Elementwise, class C>
constexpr FusedLoops<C> fused_loops() {
  FusedLoops<C> loops{};
  loops.separable_block[0] = separable_block<false, Rule, Elementwise, C>;
  if constexpr (!Rule::kMetric) loops.finish_block[0] = finish_block<false, Rule, Elementwise, C>;
  if constexpr (!Rule::kReadsParam) {
    loops.separable_block[1] = separable_block<true, Rule, Elementwise, C>;
    if constexpr (!Rule::kMetric) loops.finish_block[1] = finish_block<true, Rule, Elementwise, C>;
  }
  if constexpr (Rule::kHalfSpace) loops.advance_pairs = advance_pairs<Rule, C>;
  if constexpr (!kPaired<Rule>) {
    loops.advance_run = advance_run<Rule, Elementwise, C>;
    loops.advance_row = advance_rows<1, Rule, Elementwise, C>;
    if constexpr (Rule::kReadsParam + Rule::kStateSlots == 1)
      loops.advance_four = advance_rows<4, Rule, Elementwise, C>;
  }
  return loops;
}

template <class C>
struct Loops {
  int slots, fixed;
  bool reads_param, late, metric, paired;  // what the rule says of itself
  void (*prepare)(const StepArgs&, Step<C>&);
  void (*advance_points)(const Arrays<C>&, int64_t, int64_t, int64_t, int64_t, const Step<C>&, C*, C*, C*);
  void (*advance_squares)(const Arrays<C>&, int64_t, int64_t, int64_t, int64_t, const Step<C>&, C*, C*, C*);  // in a metric
  int32_t (*finish_points)(const Arrays<C>&, int64_t, const Step<C>&, const C*, const C*, const C*);  // not of half-space steps
  int32_t (*finish_groups)(const Arrays<C>&, int64_t, const Step<C>&, const C*, const C*, const C*);
  FusedLoops<C> none, l1;

  // Those with a penalty, if they are there.
  const FusedLoops<C>* fused(int elementwise) const {
    switch (PenaltyKind(elementwise)) {
      case PenaltyKind::none: return &none;
      case PenaltyKind::l1: return &l1;
      default: return nullptr;
    }
  }
};

template <class Rule, class C>
void prepare(const StepArgs& args, Step<C>& step) {
  const auto k = Scalars<Rule, C>::from(args.scalars, args.elementwise, args.radial);
  static_assert(sizeof(k) <= sizeof(step.scalars));
  std::memcpy(step.scalars, &k, sizeof(k));
  step.elementwise = k.elementwise;
  step.radial = k.radial;
  if constexpr (!kPaired<Rule>) step.scale = uniform_scale<Rule, C>(k.h);
  if constexpr (Rule::kHalfSpace) step.lr = k.h.lr, step.epsilon = k.h.epsilon;
}
template <class C>
Step<C>::Step(const Loops<C>& rule, const StepArgs& args) : rule(rule), scale(0), lr(0), epsilon(0) {
  rule.prepare(args, *this);
}

template <class Rule, class C>
constexpr Loops<C> loops() {
  static_assert(Rule::kStateSlots <= 3 && Rule::kStateSlots + Rule::kReadsParam <= kMaxSlots);  // arrays.h, plan.h
  Loops<C> all{};
  all.slots = Rule::kStateSlots, all.fixed = Rule::kFixedSlots;
  all.reads_param = Rule::kReadsParam, all.late = Rule::kLate, all.metric = Rule::kMetric, all.paired = kPaired<Rule>;
  all.prepare = prepare<Rule, C>;
  all.none = fused_loops<Rule, NoPenalty, C>();
  all.advance_points = advance_points<false, Rule, C>;
  if constexpr (!Rule::kHalfSpace) {  // no penalty on elements, and groups that make their points anew
    all.l1 = fused_loops<Rule, L1, C>();
    all.finish_points = finish_points<false, Rule, C>;
    all.finish_groups = finish_points<true, Rule, C>;
  }
  if constexpr (Rule::kMetric) all.advance_squares = advance_points<true, Rule, C>;
  return all;
}
template <class C>
const Loops<C>& loops_of(int rule) {
#define X(Functor, name) loops<Functor, C>(),
  static constexpr Loops<C> all[] = {BREGMAN_RULES(X)};
#undef X
  return all[rule];
}

BREGMAN_END
