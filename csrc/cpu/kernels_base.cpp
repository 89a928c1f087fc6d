// The CPU loops for any processor.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#pragma GCC optimize("O1")  // for processors older than AVX2: not worth a third of the build's time
#endif
#define BREGMAN_ISA base
#include "kernels.h"

namespace bregman {
void run_items_base(const PlanView& plan, const void* const* grads, const StepArgs& args, int32_t* counts,
                    int64_t begin, int64_t end) {
  base::run_items(plan, grads, args, counts, begin, end);
}
}  // namespace bregman
