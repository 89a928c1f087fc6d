// The CPU loops for AVX512. Standard headers come first: only our own code may use these instructions.
#if defined(__x86_64__)
#define BREGMAN_ISA avx512
#define BREGMAN_AVX512  // GCC 12 does not define its own macros after the pragma below
#define BREGMAN_FMA
#include "step.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#endif

#include "kernels.h"

namespace bregman {
void run_items_avx512(const PlanView& plan, const void* const* grads, const StepArgs& args, int32_t* counts,
                    int64_t begin, int64_t end) {
  avx512::run_items(plan, grads, args, counts, begin, end);
}
}  // namespace bregman

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
