// The shipped drivers (CPU, and CUDA on the emulation layer) against a plain loop over groups in double precision.
//   kernels_test cpu|cuda [rounds]
// What is under test is the walk over memory: layouts, odd sizes, misaligned views, masks, counts, guard bytes. The
// formulas come from the same functors (in double); Python tests hold those against references of their own.
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "check.h"
#include "drivers.h"
#include "math/dtypes.h"
#include "math/envelope.h"
#include "math/radial.h"
#include "math/rule_list.h"
#include "math/scalars.h"
#include "specs.h"

namespace {

// --- memory with guards ------------------------------------------------------------------------------------------
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kTail = 0;  // the allocation ends where the data does, and ASan is the guard
#else
constexpr size_t kTail = 64;
#endif
constexpr unsigned char kGuard = 0xa5;

size_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }
double rounding(DType dtype) {
  return dtype == DType::f64 ? 0x1p-53 : dtype == DType::f32 ? 0x1p-24 : dtype == DType::fp16 ? 0x1p-11 : 0x1p-8;
}

// `numel` elements that start `shift` elements after a 64-byte boundary: a misaligned view.
class Buffer {
 public:
  Buffer(DType dtype, int64_t numel, int64_t shift) : Buffer(size_of(dtype), numel, shift) { dtype_ = dtype; }
  Buffer(size_t element, int64_t numel, int64_t shift)
      : head_(64 + size_t(shift) * element), size_(head_ + size_t(numel) * element + kTail) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, size_)) std::abort();
    memory_.reset(static_cast<unsigned char*>(p));
    std::memset(p, kGuard, size_);
  }
  template <class T> T* data() const { return reinterpret_cast<T*>(memory_.get() + head_); }

  double get(int64_t i) const {
    switch (dtype_) {
      case DType::f32: return data<float>()[i];
      case DType::f64: return data<double>()[i];
      case DType::bf16: return widen(data<bf16>()[i]);
      case DType::fp16: return widen(data<fp16>()[i]);
    }
    return 0;
  }
  // Stores x rounded to the dtype and returns what is stored.
  double set(int64_t i, double x) const {
    switch (dtype_) {
      case DType::f32: data<float>()[i] = float(x); break;
      case DType::f64: data<double>()[i] = x; break;
      case DType::bf16: narrow(float(x), data<bf16>()[i]); break;
      case DType::fp16: narrow(float(x), data<fp16>()[i]); break;
    }
    return get(i);
  }
  bool intact() const {
    for (size_t i = 0; i < head_; ++i)
      if (memory_[i] != kGuard) return false;
    for (size_t i = size_ - kTail; i < size_; ++i)
      if (memory_[i] != kGuard) return false;
    return true;
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  size_t head_, size_;
  DType dtype_ = DType::f32;
  std::unique_ptr<unsigned char[], Free> memory_;
};

// --- values ------------------------------------------------------------------------------------------------------
double random_value(bool specials) {
  if (specials && g_random() % 64 == 0) return g_random() % 2 ? NAN : (g_random() % 2 ? INFINITY : -INFINITY);
  if (g_random() % 8 == 0) return g_random() % 2 ? 0.0 : -0.0;
  return std::ldexp(double(int(g_random() % 4096)) - 2048, -10);
}

// Multiples of 1/8 only, so that they are the same number in float and in double.
double random_scalar() { return double(1 + g_random() % 7) / 8; }

// --- one tensor: its buffers, and the double-precision copy that the oracle works on -------------------------------
struct RuleNeeds {
  int id, slots, hypers;
  bool reads_param, paired, half_space;
  int group_sums;
  const char* name;
};

struct TestTensor {
  TensorSpec spec;
  int64_t numel;
  int slots;
  Buffer param, grad, mask;
  std::vector<Buffer> state;  // and the master copy, where there is one
  std::vector<double> p, g, s[kMaxSlots], error_scale, first;  // first: the parameter as it was stored
  std::vector<char> keep;

  // `shift` says how far each view is misaligned at most.
  TestTensor(const TensorSpec& shape, const RuleNeeds& rule, DType dtype, bool masked, bool specials, unsigned shift)
      : spec(shape),
        numel(product(spec.sizes)),
        slots(rule.slots),
        param(dtype, numel, g_random() % (1 + shift)),
        grad(dtype, numel, g_random() % 9),
        mask(sizeof(uint64_t), (numel + 63) / 64, g_random() % 3),
        p(numel), g(numel), error_scale(numel), first(numel), keep(numel, 1) {
    const bool master = rule.reads_param && size_of(dtype) == 2;
    for (int k = 0; k < slots + master; ++k) state.emplace_back(wide(dtype), numel, g_random() % (1 + shift));
    for (auto& values : s) values.resize(numel);
    std::fill_n(mask.data<uint64_t>(), (numel + 63) / 64, 0);
    for (int64_t i = 0; i < numel; ++i) {
      g[i] = grad.set(i, random_value(specials));
      p[i] = first[i] = param.set(i, random_value(false));
      if (master) p[i] = state[slots].set(i, p[i] + 0x1p-14);  // bits that the parameter lacks
      for (int k = 0; k < slots; ++k) s[k][i] = state[k].set(i, std::abs(random_value(false)));  // a square is >= 0
      if (masked) keep[i] = g_random() % 3 != 0;
      mask.data<uint64_t>()[i / 64] |= uint64_t(keep[i]) << (i % 64);
    }
    spec.param = param.data<void>();
    spec.state.clear();
    for (const Buffer& slot : state) spec.state.push_back(slot.data<void>());
    spec.mask = masked ? mask.data<void>() : nullptr;
    spec.weight = random_scalar();
  }

  bool intact() const {
    bool all = param.intact() && grad.intact() && mask.intact();
    for (const Buffer& slot : state) all = all && slot.intact();
    return all;
  }
};

struct Step {
  std::vector<double> scalars;  // as StepArgs has them
  Penalty<double> elementwise, radial;
  bool jumps;  // the group prox does, so that values are not compared: bounds and races are what is looked for
};

#define X(Functor, name) +1
constexpr unsigned kPenalties = 0 BREGMAN_PENALTIES(X);
#undef X

// A prox that jumps makes a difference of any size out of one rounding; tests/test_kernels.py compares those bit by bit.
int random_penalty() {
  const int kind = int(g_random() % kPenalties);
  switch (PenaltyKind(kind)) {
    case PenaltyKind::l0:
    case PenaltyKind::l_half:
    case PenaltyKind::l_two_thirds:
    case PenaltyKind::mcp:
    case PenaltyKind::scad: return random_penalty();
    default: return kind;
  }
}

Step random_step(const RuleNeeds& rule, bool grouped) {
  Step step{};
  step.scalars.push_back(g_random() % 16 == 0);  // skip
  for (int i = 0; i < 1 + rule.hypers + 4; ++i) step.scalars.push_back(random_scalar());
  const double* last = &step.scalars[2 + rule.hypers];
  do step.elementwise = {random_penalty(), last[0], last[1]};
  while (grouped && !is_homogeneous(step.elementwise.kind));
  step.radial = {grouped ? random_penalty() : 0, last[2], last[3]};
  Line<double> line;
  if (rule.paired && !line_of(step.radial, 1.0, !rule.half_space, line)) step.radial.kind = int(PenaltyKind::l1);
  if (grouped && rule.paired && g_random() % 4 == 0) {
    constexpr PenaltyKind kBent[] = {PenaltyKind::l0, PenaltyKind::l_half, PenaltyKind::l_two_thirds, PenaltyKind::mcp,
                                     PenaltyKind::scad};
    step.radial.kind = int(kBent[g_random() % 5]);
    step.jumps = !rule.half_space;  // which asks for the slope alone
  }
  if (rule.half_space) step.elementwise.kind = int(PenaltyKind::none);
  return step;
}

// The eta at which shares of these rises sum to k, by bisection, where kernels take Newton's steps between breakpoints.
double bisected_eta(const std::vector<Rise>& rises, double k) {
  double low = 0, high = std::numeric_limits<double>::infinity();
  if (std::count_if(rises.begin(), rises.end(), [](const Rise& rise) { return rise.alive(); }) <= k) return high;
  for (int turn = 0; turn < 2200; ++turn) {
    const double middle = std::isinf(high) ? (low == 0 ? 1 : 2 * low) : low + (high - low) / 2;
    if (middle == low || middle == high) break;
    double sum = 0;
    for (const Rise& rise : rises) sum += rise.share(middle);
    (sum < k ? low : high) = middle;
  }
  return high;
}

// The plain loop. error_scale gets the magnitudes that rounding errors are relative to.
template <class Rule> void oracle(TestTensor& t, const Step& step) {
  typename Rule::template Hyper<double> h;
  std::memcpy(&h, &step.scalars[2], sizeof(h));
  std::vector<double> q(t.numel), scales(t.numel);
  std::vector<std::array<double, 8>> state(t.numel);
  for (int64_t i = 0; i < t.numel; ++i) {
    for (int m = 0; m < t.slots; ++m) state[i][m] = t.s[m][i];
    const double gradient = t.g[i] * step.scalars[1];
    if constexpr (!Rule::kLate) Rule::template update<double>(gradient, t.p[i], state[i].data(), h);
    Point<double> point = Rule::template point<double>(gradient, t.p[i], state[i].data(), h);
    if (!t.keep[i]) point.z = point.scale = 0, state[i].fill(0);
    t.error_scale[i] = 1 + std::abs(t.p[i]) + std::abs(t.s[0][i]) + (std::isfinite(point.z) ? std::abs(point.z) : 0);
    q[i] = prox(point.z, point.scale, step.elementwise);
    scales[i] = point.scale;
  }
  if (t.spec.group_dims >= 0) {
    const std::vector<int64_t> group = group_of_offset(t.spec);
    std::vector<double> squares(t.numel), sizes(t.numel);
    for (int64_t i = 0; i < t.numel; ++i) squares[group[i]] += q[i] * q[i], sizes[group[i]] += t.error_scale[i];
    for (int64_t i = 0; i < t.numel; ++i) t.error_scale[i] = sizes[group[i]];
    if constexpr (Rule::kHalfSpace) {
      std::vector<std::array<double, 2>> sums(t.numel);
      for (int64_t i = 0; i < t.numel; ++i) {
        const Sums one = half_space_terms(q[i], scales[i]);
        sums[group[i]][0] += one.a, sums[group[i]][1] += one.b;
      }
      const double decay = budget_decay(1, step.radial, t.spec.weight);
      std::vector<Rise> rises;
      for (int64_t g = 0; t.spec.budget && g < t.numel; ++g) rises.push_back(rise_of<true>(sums[g][0], decay));
      const double eta = bisected_eta(rises, double(t.spec.budget));
      double size = 0;
      for (int64_t i = 0; i < t.numel; ++i) size = std::max(size, t.error_scale[i]);
      for (int64_t i = 0; i < t.numel; ++i) {
        const auto [squares, along] = sums[group[i]];
        const double rate = t.spec.budget ? envelope_rate(squares, decay, eta)
                                          : half_space_rate(square_root(squares), step.radial, t.spec.weight);
        q[i] = half_space(q[i], scales[i], half_space_pull({squares, along}, rate, h.lr, h.epsilon));
        if (t.spec.budget) t.error_scale[i] = size;
      }
    } else if constexpr (Rule::kMetric) {
      Line<double> line{};
      CHECK(line_of(step.radial, t.spec.weight, true, line), "penalty %d has no line", step.radial.kind);
      std::vector<double> norms(t.numel);
      std::vector<Search> search(t.numel, Search::begun);
      for (int k = 0; k < kRootSteps; ++k) {  // from 0
        std::vector<Moments<double>> sums(t.numel, Moments<double>{0, 0, 0});
        for (int64_t i = 0; i < t.numel; ++i) {
          const Moments<double> one = root_terms(q[i], scales[i], norms[group[i]], line);
          Moments<double>& sum = sums[group[i]];
          sum = {sum.a + one.a, sum.b + one.b, sum.c + one.c};
        }
        for (int64_t g = 0; g < t.numel; ++g)
          if (search[g] != Search::settled) norms[g] = root_step<double>(norms[g], sums[g], search[g]);
      }
      for (int64_t i = 0; i < t.numel; ++i) q[i] = shrink_weighted(q[i], scales[i], root_rho(norms[group[i]], line));
    } else if (t.spec.budget) {
      const double decay = budget_decay(uniform_scale<Rule, double>(h), step.radial, t.spec.weight);
      std::vector<Rise> rises;
      for (int64_t g = 0; g < t.numel; ++g) rises.push_back(rise_of<false>(squares[g], decay));
      const double eta = bisected_eta(rises, double(t.spec.budget));
      double size = 0;
      for (int64_t i = 0; i < t.numel; ++i) size = std::max(size, t.error_scale[i]);
      for (int64_t i = 0; i < t.numel; ++i) {
        q[i] *= envelope_factor(squares[group[i]], decay, eta);
        t.error_scale[i] = size;
      }
    } else {
      const double scale = uniform_scale<Rule, double>(h) * t.spec.weight;
      for (int64_t i = 0; i < t.numel; ++i) q[i] *= radial_factor<AnyPenalty>(std::sqrt(squares[group[i]]), scale, step.radial);
    }
  }
  for (int64_t i = 0; i < t.numel; ++i) {
    t.p[i] = finish_rule<Rule, double>(q[i], t.g[i] * step.scalars[1], t.p[i], state[i].data(), h);
    if (!t.keep[i]) t.p[i] = 0, state[i].fill(0);
    for (int m = Rule::kFixedSlots; m < t.slots; ++m) t.s[m][i] = state[i][m];
  }
}

// --- comparison --------------------------------------------------------------------------------------------------
long g_elements = 0, g_zero_differs = 0;

bool close(double value, double expected, double tolerance) {
  if (std::isnan(expected) || std::isinf(expected)) return std::isnan(expected) ? std::isnan(value) : value == expected;
  return std::abs(value - expected) <= tolerance;
}

void compare(const TestTensor& t, DType dtype, bool skipped, const char* what) {
  const Buffer rounded(dtype, 1, 0);
  CHECK(t.intact(), "%s: guard bytes changed", what);
  for (int64_t i = 0; i < t.numel; ++i) {
    // At most sixteen roundings of the compute type, and one of the stored type (2^-25: half of a subnormal of fp16).
    const double tolerance = 16 * rounding(wide(dtype)) * t.error_scale[i], value = t.param.get(i);
    const double stored = rounding(dtype) * (std::abs(t.p[i]) + tolerance) + (size_of(dtype) == 2 ? 0x1p-25 : 0);
    const double expected_param = skipped ? t.first[i] : t.p[i];
    CHECK(close(value, expected_param, skipped ? 0 : tolerance + stored), "%s: param[%ld] of %ld is %g instead of %g",
          what, long(i), long(t.numel), value, expected_param);
    CHECK(t.keep[i] || skipped || value == 0, "%s: masked param[%ld] is %g", what, long(i), value);
    for (size_t k = 0; k < t.state.size(); ++k) {
      const double expected = int(k) < t.slots ? t.s[k][i] : t.p[i];
      CHECK(close(t.state[k].get(i), expected, tolerance), "%s: state %zu[%ld] of %ld is %g instead of %g", what, k,
            long(i), long(t.numel), t.state[k].get(i), expected);
    }
    ++g_elements;
    g_zero_differs += !skipped && (value == 0) != (rounded.set(0, t.p[i]) == 0);
  }
}

// Counts must agree with what was stored, exactly.
void compare_counts(const TestTensor& t, const PlanView& plan, int tensor, const int32_t* counts, const char* what) {
  const bool grouped = t.spec.group_dims >= 0;
  long elements = 0, groups = 0, counted_elements = 0, counted_groups = 0;
  std::vector<char> alive(t.numel);
  const std::vector<int64_t> group = group_of_offset(t.spec);
  for (int64_t i = 0; i < t.numel; ++i)
    if (t.param.get(i) != 0) ++elements, alive[grouped ? group[i] : 0] = 1;
  for (char one : alive) groups += grouped && one;
  for (int64_t i = 0; i < plan.header().items; ++i)
    if (plan.items()[i].tensor == tensor) counted_elements += counts[2 * i], counted_groups += counts[2 * i + 1];
  CHECK(elements == counted_elements && groups == counted_groups,
        "%s: counted %ld elements in %ld groups instead of %ld in %ld", what, counted_elements, counted_groups, elements,
        groups);
}

// --- one launch ----------------------------------------------------------------------------------------------------
TensorSpec random_shape(bool grouped) {
  if (g_random() % 8 == 0) {  // groups that keep all threads of a block busy, several of them
    const Dims sizes{pick({2, 3, 5}), pick({256, 300, 511})};
    return spec_of(sizes, dense_strides(sizes, in_order(2)), grouped ? int64_t(1 + g_random() % 2) : -1);
  }
  if (g_random() % 4) return random_spec(grouped);
  const Dims sizes{pick({0, 1, 7, 8, 9, 63, 64, 65, 255, 511, 513, 1100})};
  return spec_of(sizes, {1}, grouped ? int64_t(g_random() % 2) : -1);
}

void run_round(const Driver& driver, const RuleNeeds& rule, DType dtype, bool grouped, int count,
               void (*oracle)(TestTensor&, const Step&)) {
  Step step = random_step(rule, grouped);
  const bool specials = g_random() % 4 == 0, counting = g_random() % 4 != 0;
  const bool budgets = grouped && rule.group_sums && g_random() % 3 == 0;
  if (budgets) step.elementwise.kind = step.radial.kind = int(PenaltyKind::none);
  std::vector<TestTensor> tensors;
  std::vector<TensorSpec> specs;
  std::vector<const void*> grads;
  for (int n = 0; n < count; ++n) {
    const TensorSpec shape = count > kMaxGrads ? spec_of({n % 5}, {1}, grouped ? 1 : -1) : random_shape(grouped);
    tensors.emplace_back(shape, rule, dtype, g_random() % 2, specials, g_random() % 2 * 8);
    tensors.back().spec.budget = budgets ? pick({1, 2, 5, 1000}) : 0;
    specs.push_back(tensors.back().spec);
    grads.push_back(tensors.back().grad.data<void>());
  }
  const int slots = int(tensors[0].state.size());
  const Tuning tuning = driver.tuning(int64_t(size_of(dtype)), int64_t(size_of(wide(dtype))) * (1 + rule.paired));
  std::vector<char> memory = make_plan(specs, rule.id, dtype, slots, tuning, rule.group_sums);
  const PlanView plan{memory.data()};
  const Buffer counts(sizeof(int32_t), 2 * plan.header().items, 0);
  const bool skip = step.scalars[0] != 0, live = skip || g_random() % 2;  // who has the scalars on the host skips there
  driver.step(plan, grads.data(), {step.elementwise.kind, step.radial.kind, step.scalars.data(), live},
              counting ? counts.data<int32_t>() : nullptr);

  for (size_t i = 0; i < tensors.size(); ++i) {
    char what[128];
    std::snprintf(what, sizeof(what), "%s %s, dtype %d, tensor %zu, %s, penalties %d and %d", driver.name, rule.name,
                  int(dtype), i, grouped ? "grouped" : "separable", step.elementwise.kind, step.radial.kind);
    if (step.jumps && !skip) {
      CHECK(tensors[i].intact(), "%s: guard bytes changed", what);
    } else {
      if (!skip) oracle(tensors[i], step);
      compare(tensors[i], dtype, skip, what);
    }
    if (counting && !skip) compare_counts(tensors[i], plan, int(i), counts.data<int32_t>(), what);
  }
  CHECK(counts.intact(), "%s: guard bytes of the counts changed", rule.name);
}

template <class Rule> void run_rule(const Driver& driver, int id, const char* name, int rounds) {
  const RuleNeeds rule{id, Rule::kStateSlots, sizeof(typename Rule::template Hyper<double>) / sizeof(double),
                       Rule::kReadsParam, kPaired<Rule>, Rule::kHalfSpace, kGroupSums<Rule>, name};
  for (int round = 0; round < rounds; ++round)
    for (bool grouped : {false, true})
      for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::fp16})
        run_round(driver, rule, dtype, grouped, 1 + int(g_random() % 4), oracle<Rule>);
  // More tensors than gradient pointers fit a launch.
  if (id == 0)
    for (bool grouped : {false, true}) run_round(driver, rule, DType::f32, grouped, kMaxGrads + 5, oracle<Rule>);
}

}  // namespace

int main(int argc, char** argv) {
  const Driver* driver = argc > 1 ? find_driver(argv[1]) : nullptr;
  if (!driver) return std::fprintf(stderr, "usage: kernels_test cpu|cuda [rounds]\n"), 2;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 20;
  int rule = 0;
#define X(Functor, name) run_rule<Functor>(*driver, rule++, #name, rounds);
  BREGMAN_RULES(X)
#undef X
  std::fprintf(stderr, "%ld elements, %ld zeros differ\n", g_elements, g_zero_differs);
  // Zero in one and not in the other happens only in the rounding band around a threshold.
  CHECK(g_zero_differs * 10000 <= g_elements, "%ld of %ld zeros differ", g_zero_differs, g_elements);
  return report();
}
