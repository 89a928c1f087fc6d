// Host and device: the macros and the few scalar functions that all formulas are written with. No torch, no CUDA runtime.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
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

// Cube root of any number, within 0.97 ulp (measured, fp32 and fp64), without a branch or a library call:
// the same bits on every host and device. A third of the exponent is a first guess to 4%; each Halley step cubes its
// error. Very small and very large numbers are scaled, so that neither cubes nor guesses leave the normal range.
template <class C>
BREGMAN_HD C cube_root(C x) {
  constexpr bool kWide = sizeof(C) == 8;
  constexpr C kTiny = C(kWide ? 0x1p-900 : 0x1p-100), kHuge = C(kWide ? 0x1p900 : 0x1p100);
  constexpr C kUp = C(kWide ? 0x1p300 : 0x1p48), kRootUp = C(kWide ? 0x1p100 : 0x1p16);
  const C size = x < C(0) ? -x : x;
  const C scale = select(size < kTiny, kUp, select(size > kHuge, C(1) / kUp, C(1)));
  const C unscale = select(size < kTiny, C(1) / kRootUp, select(size > kHuge, kRootUp, C(1)));
  const C a = size * scale;
  C t;
  if constexpr (kWide) {
    uint64_t bits;
    __builtin_memcpy(&bits, &a, sizeof(bits));
    bits = uint64_t(uint32_t(bits >> 32) / 3 + 715094163u) << 32;
    __builtin_memcpy(&t, &bits, sizeof(bits));
  } else {
    uint32_t bits;
    __builtin_memcpy(&bits, &a, sizeof(bits));
    bits = bits / 3 + 709921077u;
    __builtin_memcpy(&t, &bits, sizeof(bits));
  }
  for (int step = 0; step < (kWide ? 3 : 2); ++step) {
    const C cube = t * t * t;
    t = t + t * ((a - cube) / (cube + cube + a));
  }
  t = t * unscale;
  t = x < C(0) ? -t : t;
  // Zero, infinity and NaN are their own roots.
  return select((size > C(0)) & (size <= C(std::numeric_limits<C>::max())), t, x);
}

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
