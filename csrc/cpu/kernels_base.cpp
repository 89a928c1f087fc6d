// The CPU loops for any processor.
#define BREGMAN_ISA base
#include "kernels.h"

namespace bregman {
void run_items_base(const PlanView& plan, const void* const* grads, const StepArgs& args, int32_t* counts,
                    int64_t begin, int64_t end) {
  base::run_items(plan, grads, args, counts, begin, end);
}
}  // namespace bregman
