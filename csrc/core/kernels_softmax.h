// SPDX-License-Identifier: Apache-2.0
//
// Exponentials and the reductions of the weights of attention.
#ifndef V2DROP_CORE_KERNELS_SOFTMAX_H_
#define V2DROP_CORE_KERNELS_SOFTMAX_H_

#include "kernels_dots.h"
#include "simd.h"

namespace v2drop {
namespace {  // internal linkage: see kernels.cpp

// e^x for x <= 0, or NaN. x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 p(r); p is a minimax fit that adds 0.05 ulp, the
// arithmetic the rest of 2. n ln 2 is subtracted in two parts, the first of so few bits that its product is exact.
inline F32 exponential(F32 x) {
  const F32 shift = splat(0x1.8p23f);  // adding it rounds to an integer, which is then in the low bits
  const F32 shifted = x * splat(0x1.715476p0f) + shift, n = shifted - shift;
  const F32 r = (x - n * splat(0x1.63p-1f)) - n * splat(-0x1.bd0106p-13f);
  F32 p = splat(0x1.6a23cep-10f);
  p = p * r + splat(0x1.123a2p-7f);
  p = p * r + splat(0x1.5558f2p-5f);
  p = p * r + splat(0x1.555492p-3f);
  p = p * r + splat(0x1.fffffcp-2f);
  const F32 mantissa = splat(1.0f) + (r + (r * r) * p);
  const U32 scaled = bits<U32>(mantissa) + (bits<U32>(shifted) << 23);
  return bits<F32>(select(x < splat(-0x1.5d589ep6f), U32{}, select(x == x, scaled, bits<U32>(x))));
}

// A total of lanes as above, of a vector of numbers.
inline float total_of(const DotLanes& sums) { return totals(sums, sums, sums, sums)[0]; }

template <class V>
inline V larger(V a, V b) {
  return b > a ? b : a;
}

// Of the elements of a vector without NaN. In memory, as the sums of a row are added, each step would wait for the one before to be stored.
inline float maximum(F32 x) {
  F32x4 quarters[kWidth / 4];
  std::memcpy(quarters, &x, sizeof x);
  V2DROP_UNROLL
  for (int half = kWidth / 8; half > 0; half /= 2) {
    V2DROP_UNROLL
    for (int i = 0; i < half; ++i) quarters[i] = larger(quarters[i], quarters[i + half]);
  }
  const F32x4 pair = larger(quarters[0], V2DROP_SHUFFLE(quarters[0], quarters[0], 2, 3, 0, 1));
  return pair[1] > pair[0] ? pair[1] : pair[0];
}

void exponentials(float* x, int64_t n, float* max, float* sum) {
  constexpr int kAtOnce = 4;  // comparisons wait for each other less
  F32 most[kAtOnce];
  for (F32& m : most) m = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kAtOnce * kWidth <= n; i += kAtOnce * kWidth) {
    V2DROP_UNROLL
    for (int m = 0; m < kAtOnce; ++m) {
      const F32 y = load<F32>(x + i + m * kWidth);
      most[m] = y > most[m] ? y : most[m];
    }
  }
  float found = maximum(larger(larger(most[0], most[1]), larger(most[2], most[3])));
  for (; i < n; ++i) found = x[i] > found ? x[i] : found;
  const F32 base = splat(found == -__builtin_inff() ? 0.0f : found);

  DotLanes sums;
  for (i = 0; i < n; i += kDotLanes) {
    float rest[kDotLanes];
    float* at = x + i;
    const bool whole = n - i >= kDotLanes;
    if (!whole) {
      for (int l = 0; l < kDotLanes; ++l) rest[l] = l < n - i ? at[l] : -__builtin_inff();
      at = rest;
    }
    V2DROP_UNROLL
    for (int v = 0; v < kDotVectors; ++v) {
      const F32 e = exponential(load<F32>(at + v * kWidth) - base);
      store(at + v * kWidth, e);
      sums.v[v] += e;
    }
    if (!whole) std::memcpy(x + i, rest, static_cast<size_t>(n - i) * sizeof *rest);
  }
  *max = found;
  *sum = total_of(sums);
}

float sum_where(const float* x, const unsigned char* where, int64_t n) {
  float sums[kDotLanes] = {};
  for (int64_t i = 0; i < n; i += kDotLanes) {
    for (int64_t l = 0; l < kDotLanes && i + l < n; ++l) sums[l] += where[i + l] ? x[i + l] : 0.0f;
  }
  DotLanes lanes;
  std::memcpy(lanes.v, sums, sizeof sums);
  return total_of(lanes);
}

void add_scaled(float* __restrict to, const float* __restrict x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += factor * x[i];
}
void max_scaled(float* __restrict to, const float* __restrict x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float y = factor * x[i];
    to[i] = to[i] >= y || to[i] != to[i] ? to[i] : y;
  }
}
void add_squares(float* __restrict to, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += x[i] * x[i];
}

}  // namespace
}  // namespace v2drop

#endif  // V2DROP_CORE_KERNELS_SOFTMAX_H_
