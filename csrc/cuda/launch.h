// The only launch site, and the only file that knows whether a GPU or the emulation layer runs the kernels.
//
// launch(kernel, grid, block, smem, stream, args...)   instead of kernel<<<...>>>(args...)
// BREGMAN_DYNAMIC_SHARED(type, name)                   the block's dynamic shared memory as `type* name`
// BREGMAN_SHARED(type, name, count)                    a static shared array `type name[count]`
// load_vector<V>(p) / store_vector(p, v)               one aligned access of sizeof(V) bytes to global memory
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef BREGMAN_EMULATE
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
// The same spelling as in the emulation, where both are filled with NaN before every block.
#define BREGMAN_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char bregman_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(bregman_dynamic_shared)
#define BREGMAN_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace bregman {

// Runs `kernel` on `stream` and returns the launch's own status. `smem` is in bytes; each argument is converted to
// the kernel's parameter type. A grid without blocks is an error, as in CUDA: callers skip empty launches.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t smem, cudaStream_t stream, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each kernel parameter");
#ifdef BREGMAN_EMULATE
  return emulation::launch(kernel, grid, block, smem, stream, std::forward<A>(args)...);
#else
  constexpr std::size_t kOptInAbove = 48 * 1024;  // CUDA programming guide: more must be asked for, per kernel
  cudaError_t status = cudaSuccess;
  if (smem > kOptInAbove)
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(smem));
  if (status == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    status = cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
  }
  if (status != cudaSuccess) (void)cudaGetLastError();  // reported here: do not let the next caller's check trip on it
  return status;
#endif
}

#if defined(BREGMAN_EMULATE) || defined(__CUDACC__)

namespace detail {
template <std::size_t bytes> struct Word;
template <> struct Word<4> { using type = unsigned int; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

template <class V> __device__ __forceinline__ void check_vector(const void* p, const char* what) {
  static_assert(std::is_trivially_copyable<V>::value, "a vector is plain data");
#ifdef BREGMAN_EMULATE
  emulation::check_alignment(p, sizeof(V), what);
#else
  (void)what;
  __builtin_assume(__isGlobal(p));  // a pointer read from a table would otherwise get generic accesses
#endif
}
}  // namespace detail

// Through the built-in vector type, so that it is one instruction whatever V is made of.
template <class V> __device__ __forceinline__ V load_vector(const void* p) {
  detail::check_vector<V>(p, "load_vector");
  using Word = typename detail::Word<sizeof(V)>::type;
#ifdef BREGMAN_EMULATE
  Word word;
  std::memcpy(&word, p, sizeof(word));
#else
  const Word word = *static_cast<const Word*>(p);
#endif
  V v;
  memcpy(&v, &word, sizeof(v));
  return v;
}

template <class V> __device__ __forceinline__ void store_vector(void* p, V v) {
  detail::check_vector<V>(p, "store_vector");
  using Word = typename detail::Word<sizeof(V)>::type;
  Word word;
  memcpy(&word, &v, sizeof(v));
#ifdef BREGMAN_EMULATE
  std::memcpy(p, &word, sizeof(word));
#else
  *static_cast<Word*>(p) = word;
#endif
}

#endif  // device code

}  // namespace bregman
