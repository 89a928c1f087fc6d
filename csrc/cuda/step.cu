// The launches of a step: which walker serves a plan, and the kernel between the two visits of groups that share a budget.
// And what the device offers.
#include "../math/envelope.h"
#include "walker.cuh"

namespace bregman {

__device__ __forceinline__ double from_lane(double x, int offset) { return __shfl_xor_sync(~0u, x, offset); }
__device__ __forceinline__ Shares from_lane(Shares x, int offset) {
  return {from_lane(x.rise, offset), from_lane(x.decay, offset), from_lane(x.full, offset)};
}
__device__ __forceinline__ Span from_lane(Span x, int offset) {
  return {from_lane(x.low, offset), from_lane(x.high, offset), from_lane(x.alive, offset)};
}

// The sum over the block in a fixed order, in all threads.
template <class S>
__device__ __forceinline__ S sum_of_block(S sum) {
  constexpr int kAll = kBudgetThreads / 32;
  BREGMAN_SHARED(S, partial, kAll);
  for (int offset = 16; offset > 0; offset /= 2) sum = plus(sum, from_lane(sum, offset));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = partial[0];
  for (int w = 1; w < kAll; ++w) sum = plus(sum, partial[w]);
  __syncthreads();
  return sum;
}

// Finds the shares that budgets leave their groups (math/envelope.h), from the sums of the first visit: a block for each.
template <bool kHalfSpace>
__global__ void __launch_bounds__(kBudgetThreads, 1) budget_kernel(const char* device_plan) {
  const PlanView plan{global(device_plan)};
  const Budget budget = plan.budgets()[blockIdx.x];
  auto each_tensor = [&](auto f) {
    for (int tensor = budget.first_tensor; tensor < budget.end_tensor; ++tensor) {
      const TensorRecord& record = plan.records()[tensor];
      if (record.numel) f(record, global(plan.group_slopes(record)), global(plan.sharing())[tensor].decay);
    }
  };
  // A thread reads the slopes that it wrote. They are kept, as each turn would take square roots again.
  each_tensor([&](const TensorRecord& record, double* slopes, double decay) {
    const double* squares = global(plan.group_numbers(record));
    for (int64_t g = int64_t(threadIdx.x); g < record.layout.groups(); g += kBudgetThreads)
      slopes[g] = rise_of<kHalfSpace>(squares[g], decay).slope;
  });
  const double eta = envelope_root(double(budget.k), [&](auto sum, auto f) {
    each_tensor([&](const TensorRecord& record, const double* slopes, double decay) {
      const int64_t groups = record.layout.groups();
#pragma unroll 4
      for (int64_t g = int64_t(threadIdx.x); g < groups; g += kBudgetThreads)
        sum = plus(sum, f(rise_from<kHalfSpace>(slopes[g], decay)));
    });
    return sum_of_block(sum);
  });
  for (int tensor = budget.first_tensor + int(threadIdx.x); tensor < budget.end_tensor; tensor += kBudgetThreads)
    global(plan.sharing())[tensor].eta = eta;
}

static cudaError_t share_budgets(const PlanView& plan, const void* device_plan, cudaStream_t stream) {
  const dim3 blocks(unsigned(plan.header().budgets));
  const auto kernel = plan.header().group_sums == 2 ? budget_kernel<true> : budget_kernel<false>;
  return launch(kernel, blocks, dim3(kBudgetThreads), 0, stream, static_cast<const char*>(device_plan));
}

cudaError_t step_cuda(const PlanView& plan, const void* device_plan, const void* const* grads, const StepArgs& args,
                      int32_t* counts, cudaStream_t stream) {
  if (plan.header().budgets == 0)
    return (plan.header().grouped ? step_tiles : step_separable)(plan, device_plan, grads, args, counts, stream);
  StepArgs half = args;
  half.phase = Phase::norms;
  cudaError_t status = step_tiles(plan, device_plan, grads, half, counts, stream);
  if (status == cudaSuccess) status = share_budgets(plan, device_plan, stream);
  half.phase = Phase::scale;
  return status == cudaSuccess ? step_tiles(plan, device_plan, grads, half, counts, stream) : status;
}

int64_t tile_bytes(int device) {
  int bytes = 48 * 1024;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) (void)cudaGetLastError();
  return bytes - kGroupBytes;
}

}  // namespace bregman
