// Seeded faults: small kernels of the product's kind, each in a correct and a faulty variant. CTest asserts that the
// correct one passes and that the faulty one is caught, so the emulation layer and the sanitizers are seen to work.
//   faults <name> correct|faulty
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "launch.h"

namespace {

using bregman::launch;
using bregman::load_vector;
using bregman::store_vector;

constexpr unsigned kFull = 0xffffffffu;
constexpr int kThreads = 64;

// Exactly n elements on the heap: ASan sees the first byte outside.
std::unique_ptr<float[]> ramp(int n) {
  auto p = std::make_unique<float[]>(n);
  for (int i = 0; i < n; ++i) p[i] = static_cast<float>(i % 7) - 3;
  return p;
}

// --- group norm: warps leave their sums in shared memory and everyone reads them ---------------------------------
template <bool faulty> __global__ void group_norm(const float* in, float* out, int n) {
  BREGMAN_DYNAMIC_SHARED(float, sums);
  const float* row = in + static_cast<std::size_t>(blockIdx.x) * n;
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += row[i] * row[i];
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(kFull, sum, d);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if (!faulty) __syncthreads();
  float total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += sums[w];
  const float norm = sqrtf(total);
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[static_cast<std::size_t>(blockIdx.x) * n + i] = row[i] / norm;
}

template <bool faulty> void dropped_barrier() {
  const int groups = 20, n = 75;
  const auto in = ramp(groups * n);
  std::vector<float> out(groups * n);
  CHECK(launch(group_norm<faulty>, groups, kThreads, kThreads / 32 * sizeof(float), nullptr, in.get(), out.data(), n) ==
        cudaSuccess);
  if (faulty) return;  // the values are a matter of luck: TSan is what has to speak
  for (int g = 0; g < groups; ++g) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += static_cast<double>(out[g * n + i]) * out[g * n + i];
    CHECK(std::abs(sum - 1) < 1e-5, "group %d has norm^2 %g", g, sum);
  }
}

// --- chunk loop: a vector body and a scalar tail -----------------------------------------------------------------
template <bool faulty> __global__ void scale_chunk(const float* in, float* out, int n) {
  const int body = n / 4 * 4, end = faulty ? n + 1 : n;
  for (int i = 4 * threadIdx.x; i < body; i += 4 * blockDim.x) {
    float4 v = load_vector<float4>(in + i);
    v.x *= 2, v.y *= 2, v.z *= 2, v.w *= 2;
    store_vector(out + i, v);
  }
  for (int i = body + threadIdx.x; i < end; i += blockDim.x) out[i] = 2 * in[i];
}

template <bool faulty> void long_tail() {
  for (int n : {1, 3, 4, 5, 257}) {
    const auto in = ramp(n), out = ramp(n);
    launch(scale_chunk<faulty>, 1, kThreads, 0, nullptr, in.get(), out.get(), n);
    for (int i = 0; i < n; ++i) CHECK(out[i] == 2 * in[i], "n = %d, element %d", n, i);
  }
}

// The same without a sanitizer: guard bytes on both sides.
template <bool faulty> void long_tail_guarded() {
  const int n = 257, guard = 4;
  const auto in = ramp(n + 1);
  std::vector<float> out(n + 2 * guard, 77.f);
  launch(scale_chunk<faulty>, 1, kThreads, 0, nullptr, in.get(), out.data() + guard, n);
  for (int i = 0; i < guard; ++i) CHECK(out[i] == 77 && out[guard + n + i] == 77, "guard word %d was written", i);
}

// --- 16-byte access to a view that starts in the middle of a vector ----------------------------------------------
template <bool faulty> __global__ void copy_vectors(const float* in, float* out, int n) {
  const bool aligned = (reinterpret_cast<std::size_t>(in) | reinterpret_cast<std::size_t>(out)) % 16 == 0;
  if (faulty || aligned) {
    for (int i = threadIdx.x; i < n / 4; i += blockDim.x) store_vector(out + 4 * i, load_vector<float4>(in + 4 * i));
  } else {
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = in[i];
  }
}

template <bool faulty> __global__ void copy_cast(const float* in, float* out, int n) {  // past load_vector: for UBSan
  if (!faulty && reinterpret_cast<std::size_t>(in) % 16 != 0) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = in[i];
  } else {
    for (int i = threadIdx.x; i < n / 4; i += blockDim.x) {
      const float4 v = reinterpret_cast<const float4*>(in)[i];
      out[4 * i] = v.x, out[4 * i + 1] = v.y, out[4 * i + 2] = v.z, out[4 * i + 3] = v.w;
    }
  }
}

void misaligned(void (*kernel)(const float*, float*, int)) {
  const int n = 64;
  alignas(16) float in[n + 1], out[n + 4];
  for (int i = 0; i <= n; ++i) in[i] = static_cast<float>(i);
  launch(kernel, 1, kThreads, 0, nullptr, in + 1, out, n);
  CHECK(std::memcmp(in + 1, out, n * sizeof(float)) == 0);
}

template <bool faulty> void misaligned_vector() { misaligned(copy_vectors<faulty>); }
template <bool faulty> void misaligned_cast() { misaligned(copy_cast<faulty>); }

// --- shared memory read where nothing was written, in a block after a full one ------------------------------------
template <bool faulty> __global__ void column_sums(const float* in, float* out, int n) {
  BREGMAN_SHARED(float, tile, kThreads);
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < n) tile[threadIdx.x] = in[i];
  else if (!faulty) tile[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int t = 0; t < kThreads; ++t) sum += tile[t];
    out[blockIdx.x] = sum;
  }
}

template <bool faulty> void uninitialised_shared() {
  const int n = 3 * kThreads + 5, blocks = 4;
  std::vector<float> in(n, 1.f), out(blocks);
  launch(column_sums<faulty>, blocks, kThreads, 0, nullptr, in.data(), out.data(), n);
  for (int b = 0; b < blocks; ++b)
    CHECK(out[b] == std::min(kThreads, n - b * kThreads), "block %d sums to %g", b, static_cast<double>(out[b]));
}

// --- shared memory one element too small --------------------------------------------------------------------------
__global__ void reverse(int* out) {
  BREGMAN_DYNAMIC_SHARED(int, s);
  s[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}

template <bool faulty> void small_shared() {
  std::vector<int> out(kThreads);
  launch(reverse, 1, kThreads, (kThreads - faulty) * sizeof(int), nullptr, out.data());
  for (int i = 0; i < kThreads; ++i) CHECK(out[i] == kThreads - 1 - i);
}

// --- barriers that not everyone reaches ----------------------------------------------------------------------------
template <bool faulty> __global__ void early_exit(int* out, int n) {
  const bool active = static_cast<int>(threadIdx.x) < n;
  if (faulty && !active) return;
  __syncthreads();
  if (active) out[threadIdx.x] = 1;
}

template <bool faulty> __global__ void two_barriers(int* out, int) {
  if (!faulty || threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

template <bool faulty> __global__ void partial_warp(int* out, int n) {  // a full mask in a branch of half a warp
  const bool active = static_cast<int>(threadIdx.x) < n;
  int v = active;
  if (!faulty || active) v = __shfl_xor_sync(kFull, v, 1);
  if (active) out[threadIdx.x] = v;
}

void diverge(void (*kernel)(int*, int)) {
  std::vector<int> out(kThreads);
  launch(kernel, 2, kThreads, 0, nullptr, out.data(), 40);
  for (int i = 0; i < 40; ++i) CHECK(out[i] == 1);
}

template <bool faulty> void divergent_exit() { diverge(early_exit<faulty>); }
template <bool faulty> void divergent_branch() { diverge(two_barriers<faulty>); }
template <bool faulty> void divergent_shuffle() { diverge(partial_warp<faulty>); }

// --- two threads add to one word ------------------------------------------------------------------------------------
template <bool faulty> __global__ void count(unsigned* total) {
  if (faulty) ++*total;
  else atomicAdd(total, 1u);
}

template <bool faulty> void plain_count() {
  unsigned total = 0;
  launch(count<faulty>, 4, kThreads, 0, nullptr, &total);
  if (!faulty) CHECK(total == 4 * kThreads, "counted %u", total);
}

struct Case {
  const char* name;
  void (*run[2])();
};
#define CASE(name) Case{#name, {name<false>, name<true>}}
const Case kCases[] = {CASE(dropped_barrier),      CASE(long_tail),        CASE(long_tail_guarded), CASE(misaligned_vector),
                       CASE(misaligned_cast),      CASE(small_shared),     CASE(divergent_exit),    CASE(divergent_branch),
                       CASE(uninitialised_shared), CASE(divergent_shuffle), CASE(plain_count)};

}  // namespace

int main(int argc, char** argv) {
  for (const Case& c : kCases)
    if (argc == 3 && std::strcmp(argv[1], c.name) == 0) {
      c.run[std::strcmp(argv[2], "faulty") == 0]();
      return report();
    }
  std::fprintf(stderr, "usage: faults <name> correct|faulty\n");
  return 2;
}
