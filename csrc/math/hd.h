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

// `value`, which nvcc takes for one that varies with `with`: else it computes every penalty's constants before the loop
// and keeps them in registers, whichever penalty is applied.
template <class C>
BREGMAN_HD C varying(C value, [[maybe_unused]] C with) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(C) == 8)
    asm("" : "+d"(value) : "d"(with));
  else
    asm("" : "+f"(value) : "f"(with));
#endif
  return value;
}

BREGMAN_HD float absolute(float x) { return fabsf(x); }
BREGMAN_HD double absolute(double x) { return fabs(x); }

BREGMAN_HD float square_root(float x) { return sqrtf(x); }
BREGMAN_HD double square_root(double x) { return sqrt(x); }

// x^(-1/K) for K = 2 or 3 and x >= 0, to 1e-7 (float) and 2e-16 (double): finite and positive also where x is zero or
// denormal, without meaning there. Bits and products alone: it vectorises, and every device gives the same bits.
template <int K, class C>
BREGMAN_HD C inverse_root(C x) {
  using Bits = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;
  constexpr double bias = sizeof(C) == 8 ? 1023 : 127, one = sizeof(C) == 8 ? 0x1p52 : 0x1p23;
  Bits bits;
  __builtin_memcpy(&bits, &x, sizeof(C));
  // The bits of a float are its logarithm, roughly, so that -1/K times them begin a root: off by 5% at most. Each step
  // cubes the error: measured 4e-2, 4e-4, 3e-10 and then rounding, over the range of both types.
  Bits share = bits >> (K == 2 ? 1 : 2);
  if constexpr (K == 3) {  // a third is 1/4 + 1/16 + 1/64 + ...
    share += share >> 2;
    share += share >> 4;
    share += share >> 8;
  }
  bits = Bits((1 + 1.0 / K) * (bias - 0.048) * one) - share;
  C y;
  __builtin_memcpy(&y, &bits, sizeof(C));
  for (int step = 0; step < (sizeof(C) == 8 ? 3 : 2); ++step) {
    C left = K == 2 ? C(1) - x * y * y : C(1) - x * y * y * y;
    y = y + y * (left * (C(1.0 / K) + left * C((K + 1) / (2.0 * K * K))));
  }
  return y;
}

// Cube root of a sum of squares, without a branch or a library call: the same bits on every host and device, in few
// operations, as its loops wait for them. A third of the exponent is a first guess to 4%; Halley's step cubes the error
// (twice in fp64), Newton's squares it. Within 0.74 ulp (measured) from 2^-90 to 2^125, and a thousandth up to 2^127; a
// 2^-120 that is added keeps the guess a normal number at and near zero, what is larger counts as infinite. fp64: with
// 2^-960, from 2^-900 to 2^1021.
template <class C>
BREGMAN_HD C cube_root(C x) {
  constexpr bool kWide = sizeof(C) == 8;
  const C a = x + C(kWide ? 0x1p-960 : 0x1p-120);
  C t;
  if constexpr (kWide) {
    uint64_t bits;
    __builtin_memcpy(&bits, &a, sizeof(bits));
    bits = uint64_t(uint32_t(bits >> 32) / 3 + 715094163u) << 32;
    __builtin_memcpy(&t, &bits, sizeof(bits));
  } else {
    int32_t bits;
    __builtin_memcpy(&bits, &a, sizeof(bits));
    bits = int32_t(float(bits) * (1.0f / 3) + 709950000.0f);  // fewer instructions than a division of integers
    __builtin_memcpy(&t, &bits, sizeof(bits));
  }
  for (int step = 0; step < (kWide ? 2 : 1); ++step) {
    const C cube = t * t * t;
    t = t + t * ((a - cube) / (cube + cube + a));
  }
  t = t - (t - a / (t * t)) * C(1.0 / 3);
  return select(x <= C(kWide ? 0x1p1023 : 0x1p127), t, x);  // NaN is its own root
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
