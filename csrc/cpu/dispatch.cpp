// Which instruction set runs, chosen once.
#include <cstring>

#include "step.h"

namespace bregman {

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

static Isa choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("BREGMAN_CUDA_ISA");
  bool any = limit == nullptr || *limit == 0 || !std::strcmp(limit, "avx512");
  bool at_most_avx2 = any || !std::strcmp(limit, "avx2");
  __builtin_cpu_init();
  if (any && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return {"avx512", run_items_avx512};
  if (at_most_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", run_items_avx2};
#endif
  return {"base", run_items_base};
}

const Isa& best_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace bregman
