// Host and device: the macros and the few scalar functions that all formulas are written with. No torch, no CUDA runtime.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define BREGMAN_HD __host__ __device__ __forceinline__
#else
#define BREGMAN_HD inline __attribute__((always_inline))
#endif

// Each CPU instruction set gets a namespace of its own, or the linker would merge AVX-512 code into the base build.
#ifndef BREGMAN_ISA
#define BREGMAN_ISA generic
#endif
#define BREGMAN_BEGIN namespace bregman { inline namespace BREGMAN_ISA {
#define BREGMAN_END } }

BREGMAN_BEGIN

template <class C>
BREGMAN_HD C clamp(C x, C low, C high) {
  // Comparisons, not fmin/fmax: a NaN passes through.
  C below = x > high ? high : x;
  return below < low ? low : below;
}

// condition ? a : b, as one blend on the host: GCC threads the code behind a ternary through it, as branches, and does
// not vectorise the loop then.
template <class C>
BREGMAN_HD C select(bool condition, C a, C b) {
#if defined(__CUDA_ARCH__)
  return condition ? a : b;
#else
  using Bits = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;
  Bits x, y;
  __builtin_memcpy(&x, &a, sizeof(C));
  __builtin_memcpy(&y, &b, sizeof(C));
  const Bits mask = Bits(0) - Bits(condition);
  x = (x & mask) | (y & ~mask);
  __builtin_memcpy(&a, &x, sizeof(C));
  return a;
#endif
}

BREGMAN_HD float square_root(float x) { return sqrtf(x); }
BREGMAN_HD double square_root(double x) { return sqrt(x); }

template <class C>
struct smallest_normal;
template <>
struct smallest_normal<float> {
  static constexpr float value = 1.17549435e-38f;
};
template <>
struct smallest_normal<double> {
  static constexpr double value = 2.2250738585072014e-308;
};

BREGMAN_END
