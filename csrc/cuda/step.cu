// Which walker serves a plan, and what the device offers.
#include "walker.cuh"

namespace bregman {

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
  return bytes - 24576;  // the per-group arrays and the static ones
}

}  // namespace bregman
