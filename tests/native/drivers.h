// The drivers under test behind one signature; for one translation unit.
#pragma once

#include <cstring>

#include "check.h"
#include "cpu/budgets.h"
#include "cpu/step.h"
#include "cuda/step.h"
#include "cuda/tuning.h"
#include "specs.h"

struct Driver {
  const char* name;
  Tuning (*tuning)(int64_t element_bytes, int64_t state_bytes);
  void (*step)(const PlanView& plan, const void* const* grads, const StepArgs& args, int32_t* counts);
};

#ifdef BREGMAN_LOOPS
// csrc/cpu/dispatch.cpp has it, which needs all instruction sets: the same source, compiled three times.
Scratch& bregman::thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

inline void cpu_step(const PlanView& plan, const void* const* grads, const StepArgs& args, int32_t* counts) {
  // As its op does.
  if (args.scalars[0] != 0) return;
  StepArgs part = args;
  auto visit = [&](Phase phase, int64_t begin, int64_t end) {
    part.phase = phase;
    run_items_base(plan, grads, part, counts, begin, end);
  };
  all_visits(plan, counts != nullptr, pick({1, 3, 100}), visit, [](int64_t count, auto f) {
    for (int64_t i = 0; i < count; ++i) f(i);
  });
}

inline Tuning cpu_tuning(int64_t, int64_t) { return random_tuning(); }
#endif

inline void cuda_step(const PlanView& plan, const void* const* grads, const StepArgs& args, int32_t* counts) {
  const cudaError_t status = step_cuda(plan, plan.base, grads, args, counts, nullptr);
  CHECK(status == cudaSuccess, "step_cuda: %s", cudaGetErrorString(status));
}

// The driver's own, and others, so that small tensors take the paths of large ones.
inline Tuning some_cuda_tuning(int64_t element_bytes, int64_t state_bytes) {
  Tuning tuning = cuda_tuning(element_bytes, state_bytes, tile_bytes(0));
  if (g_random() % 2) {
    tuning.chunk = pick({64, 256});
    tuning.tile = pick({32, 128, 1024});
    tuning.strided_tile = pick({32, 128, 1024});
    tuning.capacity = pick({64, 102, 510, 2048});
    tuning.panel = std::min<int64_t>(tuning.capacity, pick({64, 100, 256}));
    tuning.max_groups = pick({16, kMaxGroups});
  }
  return tuning;
}

inline const Driver* find_driver(const char* name) {
  static const Driver drivers[] = {
      {"cuda", some_cuda_tuning, cuda_step},
#ifdef BREGMAN_LOOPS
      {"cpu", cpu_tuning, cpu_step},
#endif
  };
  for (const Driver& driver : drivers)
    if (!std::strcmp(driver.name, name)) return &driver;
  return nullptr;
}
