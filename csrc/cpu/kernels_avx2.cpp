// The CPU loops for AVX2. Standard headers come first: only our own code may use these instructions.
#if defined(__x86_64__)
#define BREGMAN_ISA avx2
#define BREGMAN_FMA  // GCC 12 does not define __FMA__ after the pragma below
#include "step.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

#include "kernels.h"

namespace bregman {
void run_items_avx2(const PlanView& plan, const void* const* grads, const StepArgs& args, int32_t* counts,
                    int64_t begin, int64_t end) {
  avx2::run_items(plan, grads, args, counts, begin, end);
}
}  // namespace bregman

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
