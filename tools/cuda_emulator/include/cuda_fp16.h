// SPDX-License-Identifier: Apache-2.0
#ifndef V2DROP_TESTS_EMULATE_CUDA_FP16_H_
#define V2DROP_TESTS_EMULATE_CUDA_FP16_H_

#include "cuda_runtime.h"

// A conversion turns every NaN into one, with all bits set but the sign.
struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, fraction = x.bits & 0x3ffu;
  if (exponent == 31) return __uint_as_float(fraction ? 0x7fffffffu : sign | 0x7f800000u);
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint(static_cast<float>(fraction) * 0x1p-24f));
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  unsigned rounded;
  if (x != x) return {0x7fff};
  if (size >= 0x477ff000u) {  // 65520, half way from the largest number to the next power of two
    rounded = 0x7c00;
  } else if (size < 0x38800000u) {  // below 2^-14: the last bit of a half is 2^-24 here, and so is that of a float from 0.5 on
    rounded = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u;
  } else {
    rounded = (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;
  }
  return {static_cast<unsigned short>(sign | rounded)};
}

#endif  // V2DROP_TESTS_EMULATE_CUDA_FP16_H_
