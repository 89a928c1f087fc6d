// CUDA as far as our kernels use it, on the CPU, in plain C++20: g++ compiles the very .cu files with this header in
// place of <cuda_runtime.h> (-DBREGMAN_EMULATE, -I this folder, link cuda_emulation.cpp).
//
// One OS thread runs one CUDA thread of a block; the same threads walk all blocks, one block after the other. Shared
// memory is truly shared, so a sanitizer sees what compute-sanitizer would: ASan overruns, TSan a missing barrier.
// Every construct is as strict as the programming guide, not as lenient as the hardware: threads that leave the block
// while others wait, different __syncthreads of one block, lanes outside of a mask and misaligned vectors abort.
//
// What it cannot see: races between blocks (they run in order), and what depends on the timing of a GPU.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

// --- the language -----------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#define BREGMAN_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::emulation::dynamic_shared())
#define BREGMAN_SHARED(type, name, count)                 \
  static ::emulation::SharedArray<type, count> name##_of; \
  auto& name = name##_of.data

#define BREGMAN_VECTOR2(T, name, align) \
  struct alignas(align) name { T x, y; }; \
  constexpr name make_##name(T x, T y) { return {x, y}; }
#define BREGMAN_VECTOR4(T, name, align) \
  struct alignas(align) name { T x, y, z, w; }; \
  constexpr name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
BREGMAN_VECTOR2(float, float2, 8)
BREGMAN_VECTOR2(int, int2, 8)
BREGMAN_VECTOR2(unsigned int, uint2, 8)
BREGMAN_VECTOR2(double, double2, 16)
BREGMAN_VECTOR2(long long, longlong2, 16)
BREGMAN_VECTOR2(unsigned long long, ulonglong2, 16)
BREGMAN_VECTOR4(float, float4, 16)
BREGMAN_VECTOR4(int, int4, 16)
BREGMAN_VECTOR4(unsigned int, uint4, 16)
BREGMAN_VECTOR4(unsigned short, ushort4, 8)
#undef BREGMAN_VECTOR2
#undef BREGMAN_VECTOR4

struct uint3 { unsigned int x = 0, y = 0, z = 0; };
struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

inline constinit thread_local uint3 threadIdx, blockIdx;
inline constinit dim3 blockDim, gridDim;  // one launch at a time
inline constexpr int warpSize = 32;

using std::max;
using std::min;

// --- the runtime API --------------------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice,
                      cudaMemcpyDefault };
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
template <class F> cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t);

// --- the machine (cuda_emulation.cpp) ---------------------------------------------------------------------------
namespace emulation {

using Site = std::source_location;  // where a thread waits, for the messages

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void check_alignment(const void* p, std::size_t alignment, const char* what);
unsigned char* dynamic_shared();
void block_barrier(const Site& site);
int lane();

// Every lane of `mask` posts 64 bits; returns what all 32 lanes posted (garbage for lanes outside of the mask).
const std::uint64_t* warp_exchange(unsigned mask, std::uint64_t bits, const char* what, const Site& site);
std::uint64_t posted_by(const std::uint64_t* slots, unsigned mask, int source, const char* what, const Site& site);

cudaError_t run(dim3 grid, dim3 block, std::size_t smem, std::size_t argument_bytes, void (*body)(void*), void* context);

// Static shared memory that is filled with NaN before every block, as dynamic shared memory is.
struct SharedBase {
  SharedBase(void* data, std::size_t bytes);
  void* data_;
  std::size_t bytes_;
  SharedBase* next_;
};
template <class T, std::size_t count> struct SharedArray {
  alignas(16) T data[count];
  SharedBase base{data, sizeof(data)};
};

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t smem, cudaStream_t, A&&... args) {
  struct Context {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } context{kernel, std::tuple<P...>(std::forward<A>(args)...)};
  const auto body = [](void* p) {
    Context& c = *static_cast<Context*>(p);
    std::apply(c.kernel, c.args);
  };
  return run(grid, block, smem, (sizeof(P) + ... + 0), body, &context);
}

template <class T> std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "warp primitives take 32 or 64 bits");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T> T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The common part of all shuffles: `source` is a lane; a source past the end of the caller's segment gives its own value.
template <class T>
T shuffle(unsigned mask, T value, int source, bool inside, const char* what, const Site& site) {
  const std::uint64_t* slots = warp_exchange(mask, to_bits(value), what, site);
  return inside ? from_bits<T>(posted_by(slots, mask, source, what, site)) : value;
}

inline unsigned ballot(unsigned mask, bool predicate, const char* what, const Site& site) {
  const std::uint64_t* slots = warp_exchange(mask, predicate, what, site);
  unsigned votes = 0;
  for (int i = 0; i < warpSize; ++i)
    if (mask >> i & 1) votes |= static_cast<unsigned>(slots[i] & 1) << i;
  return votes;
}

}  // namespace emulation

// --- barriers and warps -----------------------------------------------------------------------------------------
inline void __syncthreads(emulation::Site site = emulation::Site::current()) { emulation::block_barrier(site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, emulation::Site site = emulation::Site::current()) {
  emulation::warp_exchange(mask, 0, "__syncwarp", site);
}

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
                                 emulation::Site site = emulation::Site::current()) {
  const int segment = emulation::lane() & ~(width - 1);
  return emulation::shuffle(mask, value, segment + (source & (width - 1)), true, "__shfl_sync", site);
}

template <class T> T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                                     emulation::Site site = emulation::Site::current()) {
  const int source = emulation::lane() ^ lane_mask, last = emulation::lane() | (width - 1);
  return emulation::shuffle(mask, value, source, source <= last, "__shfl_xor_sync", site);
}

template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                                      emulation::Site site = emulation::Site::current()) {
  const int source = emulation::lane() + static_cast<int>(delta), last = emulation::lane() | (width - 1);
  return emulation::shuffle(mask, value, source, source <= last, "__shfl_down_sync", site);
}

template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                                    emulation::Site site = emulation::Site::current()) {
  const int source = emulation::lane() - static_cast<int>(delta), first = emulation::lane() & ~(width - 1);
  return emulation::shuffle(mask, value, source, source >= first, "__shfl_up_sync", site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::ballot(mask, predicate != 0, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::ballot(mask, predicate != 0, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::ballot(mask, predicate == 0, "__all_sync", site) == 0;
}

// --- memory and bits --------------------------------------------------------------------------------------------
// Relaxed, as in CUDA: an atomic orders nothing but itself, and TSan must not take it for a barrier.
template <class T> T atomicAdd(T* p, std::type_identity_t<T> v) {
  return std::atomic_ref<T>(*p).fetch_add(v, std::memory_order_relaxed);
}
template <class T> T atomicOr(T* p, std::type_identity_t<T> v) {
  return std::atomic_ref<T>(*p).fetch_or(v, std::memory_order_relaxed);
}
template <class T> T atomicMax(T* p, std::type_identity_t<T> v) {
  std::atomic_ref<T> target(*p);
  T old = target.load(std::memory_order_relaxed);
  while (old < v && !target.compare_exchange_weak(old, v, std::memory_order_relaxed)) {}
  return old;
}

inline void __threadfence() { std::atomic_signal_fence(std::memory_order_seq_cst); }  // blocks run in order
template <class T> T __ldg(const T* p) { return *p; }

inline int __popc(unsigned v) { return std::popcount(v); }
inline int __popcll(unsigned long long v) { return std::popcount(v); }
inline int __ffs(int v) { return v ? std::countr_zero(static_cast<unsigned>(v)) + 1 : 0; }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }

// Compile with -ffp-contract=off, or g++ may fuse these.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
