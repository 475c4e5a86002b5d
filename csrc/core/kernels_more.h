// SPDX-License-Identifier: Apache-2.0
//
// Inner loops over many small things at once: rows shorter than a vector, random numbers, sigmoids, and the halves of doubles.
#ifndef V2DROP_CORE_KERNELS_MORE_H_
#define V2DROP_CORE_KERNELS_MORE_H_

#include "kernels.h"
#include "kernels_softmax.h"
#include "ordinal.h"
#include "simd.h"

namespace v2drop {
namespace {  // internal linkage: see kernels.cpp

// Scores of float32 rows of DIM elements that lie end to end. The terms are added in the order of kernels_score.h: lane l to lane l + half.
template <bool SQUARES, int DIM>
void score_short_rows(const float* __restrict prev, const float* __restrict cur, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) {
    float term[8] = {};
    V2DROP_UNROLL
    for (int j = 0; j < DIM; ++j) {
      const float d = cur[i * DIM + j] - prev[i * DIM + j];
      term[j] = SQUARES ? d * d : __builtin_fabsf(d);
    }
    const float sum = ((term[0] + term[4]) + (term[2] + term[6])) + ((term[1] + term[5]) + (term[3] + term[7]));
    to[i] = SQUARES ? __builtin_sqrtf(sum) : sum;
  }
}

// The root of a square is the magnitude, unless the square leaves the range: most blocks need no root.
void magnitudes(const float* __restrict prev, const float* __restrict cur, int64_t n, float* __restrict to) {
  constexpr int64_t kBlock = 256;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    uint32_t outside = 0;
    for (int64_t l = i; l < i + m; ++l) {
      const float d = __builtin_fabsf(cur[l] - prev[l]);
      uint32_t u;  // 0, or between 2^-60 and 2^60
      std::memcpy(&u, &d, sizeof u);
      outside |= static_cast<uint32_t>(u != 0) & static_cast<uint32_t>(u - 0x21800000u > 0x3c000000u);
      to[l] = d;
    }
    if (outside) score_short_rows<true, 1>(prev + i, cur + i, m, to + i);
  }
}

template <bool SQUARES>
void score_short(const float* prev, const float* cur, int64_t n, int64_t dim, float* to) {
  using Rows = void (*)(const float*, const float*, int64_t, float*);
  static constexpr Rows kRows[kShortDim] = {SQUARES ? magnitudes : score_short_rows<SQUARES, 1>,
                                            score_short_rows<SQUARES, 2>,
                                            score_short_rows<SQUARES, 3>,
                                            score_short_rows<SQUARES, 4>,
                                            score_short_rows<SQUARES, 5>,
                                            score_short_rows<SQUARES, 6>,
                                            score_short_rows<SQUARES, 7>,
                                            score_short_rows<SQUARES, 8>};
  kRows[dim - 1](prev, cur, n, to);
}

// A row as float32.
template <class T>
void to_floats(const void* row, int64_t n, float* to) {
  using Element = typename T::Element;
  const Element* from = static_cast<const Element*>(row);
  for (int64_t i = 0; i < n; i += kLanes) {
    const size_t left = static_cast<size_t>(n - i < kLanes ? n - i : kLanes);
    Element block[kLanes] = {};
    uint32_t wide[kLanes];
    std::memcpy(block, from + i, left * sizeof(Element));
    T::widen(block, wide);
    std::memcpy(to + i, wide, left * sizeof(float));
  }
}

// Philox4x32-10 (Salmon et al., SC 2011), a counter in each 64-bit lane. What stands above the low 32 bits of a word does not matter: the
// multiplication reads only those.
using U64 = uint64_t __attribute__((vector_size(kWidth * 4)));
constexpr int kCounters = kWidth / 2;

inline U64 times(U64 x, uint32_t factor) {
#if defined(__AVX512F__)
  return bits<U64>(_mm512_maskz_mul_epu32(0xff, bits<__m512i>(x), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__)
  return bits<U64>(_mm256_mul_epu32(bits<__m256i>(x), _mm256_set1_epi64x(factor)));
#elif defined(__SSE2__)
  return bits<U64>(_mm_mul_epu32(bits<__m128i>(x), _mm_set1_epi64x(factor)));
#else
  return (x & 0xffffffffu) * factor;
#endif
}

void random_numbers(uint64_t seed, uint64_t item, int64_t n, float* to) {
  U64 lane;
  for (int l = 0; l < kCounters; ++l) lane[l] = static_cast<uint64_t>(l);
  for (int64_t first = 0; first < n; first += 4 * kCounters) {
    const U64 block = lane + static_cast<uint64_t>(first / 4);
    U64 c0 = block, c1 = block >> 32, c2 = U64{} + item, c3 = U64{} + (item >> 32);
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    V2DROP_UNROLL
    for (int round = 0; round < 10; ++round, key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u) {
      const U64 a = times(c0, 0xD2511F53u), b = times(c2, 0xCD9E8D57u);
      c0 = (b >> 32) ^ c1 ^ uint64_t{key[0]};
      c2 = (a >> 32) ^ c3 ^ uint64_t{key[1]};
      c1 = b;
      c3 = a;
    }
    const U64 early = (c0 & 0xffffffffu) | c1 << 32, late = (c2 & 0xffffffffu) | c3 << 32;
    uint64_t words[2 * kCounters];
    V2DROP_UNROLL
    for (int l = 0; l < kCounters; ++l) {
      words[2 * l] = early[l];
      words[2 * l + 1] = late[l];
    }
    uint32_t bits_of[4 * kCounters];
    float numbers[4 * kCounters];
    std::memcpy(bits_of, words, sizeof bits_of);
    for (int i = 0; i < 4 * kCounters; ++i) numbers[i] = static_cast<float>(static_cast<int32_t>(bits_of[i] >> 8)) * 0x1p-24f;
    const int64_t left = n - first < 4 * kCounters ? n - first : 4 * kCounters;
    std::memcpy(to + first, numbers, static_cast<size_t>(left) * sizeof *to);
  }
}

// x = 1 / (1 + e^-x), to 3 ulp; NaN passes.
void sigmoids(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) {
    float rest[kWidth] = {};
    const int64_t left = n - i < kWidth ? n - i : kWidth;
    std::memcpy(rest, x + i, static_cast<size_t>(left) * sizeof *rest);
    const F32 v = load<F32>(rest), e = exponential(-absolute(v)), whole = splat(1.0f) + e;
    store(rest, bits<F32>(select(v < F32{}, bits<U32>(e / whole), bits<U32>(splat(1.0f) / whole))));
    std::memcpy(x + i, rest, static_cast<size_t>(left) * sizeof *rest);
  }
}

// The ordinal of a double in two halves, each ordered as a signed integer. NaN is highest, and -0.0 equals 0.0.
void halves_of(const char* scores, int64_t stride_bytes, int64_t n, int32_t* __restrict high, int32_t* __restrict low) {
  constexpr int64_t kBlock = 256;
  int64_t block[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    if (stride_bytes == 8) {
      std::memcpy(block, scores + i * 8, static_cast<size_t>(m) * 8);
    } else {
      for (int64_t l = 0; l < m; ++l) std::memcpy(block + l, scores + (i + l) * stride_bytes, 8);
    }
    for (int64_t l = 0; l < m; ++l) {
      const int64_t s = block[l], magnitude = s & INT64_MAX, ordinal = s ^ ((s >> 63) & INT64_MAX);
      const int64_t found = magnitude > 0x7ff0000000000000 ? int64_t{kNaN} << 32 : magnitude == 0 ? 0 : ordinal;
      high[i + l] = static_cast<int32_t>(found >> 32);
      low[i + l] = static_cast<int32_t>(static_cast<uint32_t>(found) ^ 0x80000000u);
    }
  }
}

}  // namespace
}  // namespace v2drop

#endif  // V2DROP_CORE_KERNELS_MORE_H_
