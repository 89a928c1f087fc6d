// The walker for separable penalties: a block takes one chunk of one tensor.
#include "walker.cuh"

namespace bregman {

template <class Rule, class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    separable_kernel(const __grid_constant__ KernelArgs<Rule, compute_t<T>> args) {
  using Part = Tile<Rule, T>;
  constexpr int V = Part::V;
  if (is_skipped(args)) return;
  const Scalars<Rule, compute_t<T>> k = scalars_of(args);
  const PlanView plan{global(args.plan)};
  const int index = args.first_item + int(blockIdx.x);
  const Item item = plan.items()[index];
  const Part tile(plan.records()[item.tensor], args.grads[item.tensor - args.first_tensor], args.brain);
  int count = 0;
  auto step = [&](auto width, int j) {
    constexpr int W = width.value;
    const int64_t i = item.begin + j;
    const uint32_t bits = tile.template keep<W>(i);
    typename Part::C q[W], scale[W];
    tile.template point<false>(i, bits, k, true, true, q, scale);
    count += __popc(tile.finish(i, bits, k, q));
  };
  const int whole = tile.vectors ? item.count - item.count % V : 0;
#pragma unroll 1
  for (int j = int(threadIdx.x) * V; j < whole; j += kThreads * V) step(Width<V>(), j);
#pragma unroll 1
  for (int j = whole + int(threadIdx.x); j < item.count; j += kThreads) step(Width<1>(), j);
  if (args.counts == nullptr) return;
  count = block_sum(count);
  if (threadIdx.x == 0) {
    global(args.counts)[2 * index] = count;
    global(args.counts)[2 * index + 1] = 0;
  }
}

cudaError_t step_separable(const PlanView& plan, const void* device_plan, const void* const* grads,
                           const StepArgs& args, int32_t* counts, cudaStream_t stream) {
  return visit_rule(plan.header().rule, [&](auto rule) {
    return visit_dtype(DType(plan.header().dtype), [&](auto storage) {
      using Rule = decltype(rule);
      using T = decltype(storage);
      return for_launches<Rule, compute_t<T>>(
          plan, device_plan, grads, args, counts, [&](const auto& kernel_args, dim3 blocks) {
            return launch(separable_kernel<Rule, T>, blocks, dim3(kThreads), 0, stream, kernel_args);
          });
    });
  });
}

}  // namespace bregman
