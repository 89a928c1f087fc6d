// What a CPU step takes, and the entry points that the instruction sets provide.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../plan/step_args.h"

namespace bregman {

// Memory of one thread for tiles, kept between steps.
class Scratch {
 public:
  template <class V>
  V* get(int which, int64_t count) {
    Buffer& buffer = buffers_[which];
    size_t bytes = size_t(count) * sizeof(V);
    if (buffer.bytes < bytes) {
      buffer.data.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      if (!buffer.data) throw std::bad_alloc();
      buffer.bytes = bytes;
    }
    return reinterpret_cast<V*>(buffer.data.get());
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<char, Free> data;
    size_t bytes = 0;
  };
  Buffer buffers_[8];
};

Scratch& thread_scratch();

using RunItems = void (*)(const PlanView&, const void* const* grads, const StepArgs&, int32_t* counts, int64_t begin,
                          int64_t end);

// The loops for the best instruction set of this processor, and its name. BREGMAN_CUDA_ISA overrides (base, avx2,
// avx512), downwards only.
struct Isa {
  const char* name;
  RunItems run;
};
const Isa& best_isa();

void run_items_base(const PlanView&, const void* const*, const StepArgs&, int32_t*, int64_t, int64_t);
#if defined(__x86_64__)
void run_items_avx2(const PlanView&, const void* const*, const StepArgs&, int32_t*, int64_t, int64_t);
void run_items_avx512(const PlanView&, const void* const*, const StepArgs&, int32_t*, int64_t, int64_t);
#endif

}  // namespace bregman
