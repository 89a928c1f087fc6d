// Storage types of parameters and gradients, and their conversion to the compute type (fp32; fp64 for fp64).
#pragma once

#include "hd.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

BREGMAN_BEGIN

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct bits16 {  // either of them, which is said beside it: a CUDA kernel serves both
  uint16_t bits;
};

template <class T>
struct compute_type {
  using type = float;
};
template <>
struct compute_type<double> {
  using type = double;
};
template <class T>
using compute_t = typename compute_type<T>::type;

template <class To, class From>
BREGMAN_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

BREGMAN_HD float widen(float x) { return x; }
BREGMAN_HD double widen(double x) { return x; }
BREGMAN_HD float widen(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

BREGMAN_HD float widen(fp16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(bit_cast<__half>(x.bits));
#else
  // Branch-free, so that it vectorises: shift the fields into place and rescale; subnormals come out exact.
  uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  uint32_t finite = bit_cast<uint32_t>(scaled);
  uint32_t special = magnitude | 0x7f800000u;  // Inf and NaN keep their mantissa
  return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
#endif
}

BREGMAN_HD void narrow(float x, float& to) { to = x; }
BREGMAN_HD void narrow(double x, double& to) { to = x; }

BREGMAN_HD void narrow(float x, bf16& to) {
  uint32_t bits = bit_cast<uint32_t>(x);
  uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = uint16_t(nan ? 0x7fc0u : rounded >> 16);
}

BREGMAN_HD void narrow(float x, fp16& to) {
#if defined(__CUDA_ARCH__)
  to.bits = bit_cast<uint16_t>(__float2half_rn(x));
#else
  uint32_t bits = bit_cast<uint32_t>(x);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  // Normal range: rebias and round to nearest even; overflow carries into Inf by itself.
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  normal = normal > 0x7c00u ? 0x7c00u : normal;
  // Subnormal range: adding 0.5 lets the float adder shift and round the mantissa.
  uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = uint16_t(sign | half);
#endif
}

// Whether the stored value is non-zero; NaN is.
BREGMAN_HD bool nonzero(float x) { return !(x == 0.0f); }
BREGMAN_HD bool nonzero(double x) { return !(x == 0.0); }
BREGMAN_HD bool nonzero(bf16 x) { return (x.bits & 0x7fffu) != 0; }
BREGMAN_HD bool nonzero(fp16 x) { return (x.bits & 0x7fffu) != 0; }
BREGMAN_HD bool nonzero(bits16 x) { return (x.bits & 0x7fffu) != 0; }

BREGMAN_END
