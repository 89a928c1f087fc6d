// The CUDA launchers: raw pointers and a stream, no torch.
#pragma once

#include "../plan/step_args.h"
#include "launch.h"

namespace bregman {

// One launch for all tensors of a plan (one per kMaxGrads tensors beyond that), three where groups share budgets. `plan` is
// in host memory, `device_plan` its copy on the device, `counts` two ints per item on the device, or null.
cudaError_t step_cuda(const PlanView& plan, const void* device_plan, const void* const* grads, const StepArgs& args,
                      int32_t* counts, cudaStream_t stream);

// Shared memory that a block of `device` can have for a tile, in bytes.
int64_t tile_bytes(int device);

}  // namespace bregman
