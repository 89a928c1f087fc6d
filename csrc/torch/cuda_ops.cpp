// The CUDA module: the same ops for CUDA tensors, on the current stream of their device. Compiled with
// BREGMAN_EMULATE it runs the same kernels on CPU tensors, for tests, as a library of its own.
#include "../cuda/step.h"
#include "../cuda/tuning.h"
#include "ops.h"

#ifdef BREGMAN_EMULATE
#define BREGMAN_LIBRARY bregman_emulated
#define BREGMAN_KEY CPU
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define BREGMAN_LIBRARY bregman_cuda
#define BREGMAN_KEY CUDA
#endif

namespace bregman {
namespace {

Plan plan_cuda(const Tensors params, const Tensors state, const Tensors masks, const std::vector<int64_t> addresses,
               const std::vector<int64_t> group_dims, const std::vector<double> weights,
               const std::vector<int64_t> budgets, int64_t rule) {
  STD_TORCH_CHECK(!params.empty(), "a plan needs at least one tensor");
  int64_t bytes = dtype_of(params[0]) == DType::f64 ? 8 : 4;
  if (rule_traits(rule, false).paired) bytes *= 2;  // a point and its prox scale
  const Tuning tuning = cuda_tuning(params[0].element_size(), bytes, tile_bytes(int(params[0].get_device())));
  return plan_tensors(params, state, masks, addresses, group_dims, weights, budgets, rule, tuning);
}

void step_op(const Tensor plan_blob, const Tensor device_plan, const Tensors grads, const Tensor odd,
             const Tensor counts, const std::vector<int64_t> kinds, const std::vector<double> scalars,
             const Tensor live) {
  PlanView plan{static_cast<const char*>(plan_blob.data_ptr())};
  const StepArgs args = check_step(plan, counts, kinds, scalars, live);
  std::vector<const void*> pointers;
  if (!check_grads(plan, grads, odd, pointers)) return;
  if (plan.header().items == 0 || (!args.on_device && args.scalars[0] != 0)) return;
  cudaStream_t stream = nullptr;
#ifndef BREGMAN_EMULATE
  torch::stable::accelerator::DeviceGuard guard(device_plan.get_device_index());
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_plan.get_device(), &current));
  stream = static_cast<cudaStream_t>(current);
#endif
  int32_t* out = counts.numel() ? static_cast<int32_t*>(counts.data_ptr()) : nullptr;
  const cudaError_t status = step_cuda(plan, device_plan.data_ptr(), pointers.data(), args, out, stream);
#ifndef BREGMAN_EMULATE
  STD_TORCH_CHECK(status != cudaErrorNoKernelImageForDevice && status != cudaErrorUnsupportedPtxVersion,
                  "the kernels were not built for this GPU: ", cudaGetErrorString(status),
                  " (reinstall on a machine with it, or with TORCH_CUDA_ARCH_LIST set to its compute capability; ",
                  "`python -m bregman_cuda info` says what was built, fused=False does without)");
#endif
  STD_TORCH_CHECK(status == cudaSuccess, "the kernel launch failed: ", cudaGetErrorString(status));
}

#ifdef BREGMAN_EMULATE
Text describe_emulated() { return describe("emulated"); }

STABLE_TORCH_LIBRARY(bregman_emulated, m) { BREGMAN_SCHEMA(m); }

STABLE_TORCH_LIBRARY_IMPL(bregman_emulated, CompositeExplicitAutograd, m) {
  m.impl("describe", TORCH_BOX(&describe_emulated));
  m.impl("why_not", TORCH_BOX(&why_not));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(BREGMAN_LIBRARY, BREGMAN_KEY, m) {
  m.impl("plan", TORCH_BOX(&plan_cuda));
  m.impl("step", TORCH_BOX(&step_op));
}

}  // namespace
}  // namespace bregman
