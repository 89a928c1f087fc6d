// The CPU module: defines the ops and runs them on torch's thread pool.
#include <atomic>

#include "../cpu/budgets.h"
#include "../cpu/step.h"
#include "ops.h"

namespace bregman {
namespace {

// A chunk of 16 K elements keeps its arrays in L2 and leaves enough items to share out. Rows of a strided tile are as long
// as L2 allows, which holds what the second visit needs: all that the first one read, or with a dual that alone. Larger
// tensors are better visited in strips: short rows cost an address translation each, though the second visit of strips
// reads memory, too (input channels in LinBreg and AdaBreg: ResNet-18 5 and 15% faster than in tiles, ResNet-50 15 and 30%).
constexpr int64_t kTileBytes = 9 << 17;  // 32 groups of 9 columns of a 512-channel convolution, two arrays in fp32
Tuning cpu_tuning(int64_t bytes_needed, bool strips) {
  constexpr int64_t kAll = int64_t(1) << 40;
  return {/*chunk=*/16384,       /*tile=*/16384,         /*strided_tile=*/kTileBytes / bytes_needed, /*min_segment=*/16,
          /*least_segment=*/16, /*max_groups=*/1 << 20, /*align=*/16, /*capacity=*/kAll, /*panel=*/kAll, /*workers=*/1,
          /*strip_rows=*/32, /*strip_columns=*/strips ? 16384 : 0};
}
// Below this much work, waking a thread costs more than it saves; threads take so much at a time.
constexpr int64_t kGrainElements = 16384;

Plan plan_cpu(const Tensors params, const Tensors state, const Tensors masks, const std::vector<int64_t> addresses,
              const std::vector<int64_t> group_dims, const std::vector<double> weights,
              const std::vector<int64_t> budgets, int64_t rule) {
  STD_TORCH_CHECK(!params.empty(), "a plan needs at least one tensor");
  // A gradient counts with a dual, too: it passes through L2.
  const RuleTraits traits = rule_traits(rule, false);
  const int64_t arrays = traits.reads_param ? 2 + int64_t(state.size() / params.size()) : 2;
  const bool strips = traits.group_sums > 0;
  return plan_tensors(params, state, masks, addresses, group_dims, weights, budgets, rule,
                      cpu_tuning(arrays * std::max<int64_t>(4, params[0].element_size()), strips));
}

// Calls f(begin, end) for grains of [first, last) on all threads. Each has a share of its own, from one step to the next,
// which it takes in order, and then helps the others: the cores of a busy machine differ by a fifth.
template <class F>
void for_grains(int64_t first, int64_t last, int64_t grain, bool backwards, const F& f) {
  struct alignas(64) Share {
    int64_t begin, end;
    std::atomic<int64_t> taken = 0;
  };
  const int64_t grains = (last - first + grain - 1) / grain;
  const int64_t count = std::min<int64_t>(grains, torch::stable::get_num_threads());
  std::vector<Share> shares(count);
  for (int64_t i = 0; i < count; ++i) shares[i].begin = grains * i / count, shares[i].end = grains * (i + 1) / count;
  torch::stable::parallel_for(0, count, 1, [&](int64_t own, int64_t end) {
    for (; own < end; ++own)
      for (int64_t i = 0; i < count; ++i) {
        Share& share = shares[(own + i) % count];
        const int64_t size = share.end - share.begin;
        for (int64_t n; (n = share.taken.fetch_add(1, std::memory_order_relaxed)) < size;) {
          const int64_t begin = first + (backwards ? share.end - 1 - n : share.begin + n) * grain;
          f(begin, std::min(last, begin + grain));
        }
      }
  });
}

Text describe_cpu() { return describe(best_isa().name); }

void step_cpu(const Tensor, const Tensor device_plan, const Tensors grads, const Tensor odd, const Tensor counts,
              const std::vector<int64_t> kinds, const std::vector<double> scalars, const Tensor live) {
  PlanView plan{static_cast<const char*>(device_plan.data_ptr())};
  const StepArgs args = check_step(plan, counts, kinds, scalars, live);
  std::vector<const void*> pointers;
  if (!check_grads(plan, grads, odd, pointers)) return;
  const PlanHeader& header = plan.header();
  if (header.items == 0 || args.scalars[0] != 0) return;
  int32_t* out = counts.numel() ? static_cast<int32_t*>(counts.data_ptr()) : nullptr;
  const int64_t per_item = std::max<int64_t>(1, header.elements / header.items);
  auto visit = [&](Phase phase, int64_t first, int64_t last) {
    StepArgs part = args;
    part.phase = phase;
    const int64_t grain = header.strips ? 1 : std::max<int64_t>(1, kGrainElements / per_item);
    // The second visit of strips goes backwards: caches hold what the first visit touched last.
    for_grains(first, last, grain, phase == Phase::finish_strips, [&](int64_t begin, int64_t end) {
      best_isa().run(plan, pointers.data(), part, out, begin, end);
    });
  };
  // The second visit of strips finds in L3 what so few of them left there (ProxSGD: 1.5 of the l1 step's time, not 1.8).
  const int64_t together = std::max<int64_t>(8, 2 * torch::stable::get_num_threads());
  all_visits(plan, out != nullptr, together, visit, [](int64_t count, auto f) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  });
}

STABLE_TORCH_LIBRARY(bregman_cuda, m) { BREGMAN_SCHEMA(m); }

STABLE_TORCH_LIBRARY_IMPL(bregman_cuda, CompositeExplicitAutograd, m) {
  m.impl("describe", TORCH_BOX(&describe_cpu));
  m.impl("why_not", TORCH_BOX(&why_not));
}

STABLE_TORCH_LIBRARY_IMPL(bregman_cuda, CPU, m) {
  m.impl("plan", TORCH_BOX(&plan_cpu));
  m.impl("step", TORCH_BOX(&step_cpu));
}

}  // namespace
}  // namespace bregman
