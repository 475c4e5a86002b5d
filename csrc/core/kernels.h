// SPDX-License-Identifier: Apache-2.0
//
// The inner loops, which kernels.cpp defines once per instruction set. They work on single rows and flat arrays; strides, threads and
// checks are left to the *_cpu.cpp files.
#ifndef V2DROP_CORE_KERNELS_H_
#define V2DROP_CORE_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace v2drop {

constexpr int kMetrics = 3;  // v2drop_metric
constexpr int kFloats = 3;   // the first values of v2drop_dtype: float32, float16, bfloat16
constexpr int kShortDim = 8;
constexpr int kNorms = 2;  // the first values of v2drop_metric: l2, l1

using ScoreRow = float (*)(const void* prev, const void* cur, int64_t dim);
using BackwardRow = void (*)(float grad, const void* prev, const void* cur, void* grad_prev, void* grad_cur, int64_t dim);
using OrdinalsOf = void (*)(const void* scores, int64_t stride_bytes, int64_t n, int32_t* ordinals);

// Dot products: the vectors of one side are packed first, as floats in the order of the lanes that will meet them. A packed vector has
// packed_dim(dim) floats, zeros at its end.
constexpr int64_t packed_dim(int64_t dim) { return (dim + 31) / 32 * 32; }
using Pack = void (*)(const void* row, int64_t dim, float* packed);
// out[v * out_stride + i] = scale * (vector v . row i), with the same bits whatever the other rows and vectors are.
using Dots = void (*)(const void* rows, int64_t stride_bytes, int64_t n, const float* packed, int64_t vectors, int64_t dim, float scale,
                      float* out, int64_t out_stride);
// sums[i] += the sum of squares (l2) or absolute values (l1) of row i.
using AddNorms = void (*)(const void* rows, int64_t stride_bytes, int64_t n, int64_t dim, float* sums);

// The same in float64, for cosines: the vectors are widened to floats in their order, wide_dim(dim) of them with zeros at the end.
// out[v * out_stride + i] = vector v . row i; out[i] = the sum of squares of row i.
constexpr int64_t wide_dim(int64_t dim) { return (dim + 63) / 64 * 64; }
using WidenRow = void (*)(const void* row, int64_t dim, float* wide);
using WideDots = void (*)(const void* rows, int64_t stride_bytes, int64_t n, const float* wide, int64_t vectors, int64_t dim, double* out,
                          int64_t out_stride);
using WideSquares = void (*)(const void* rows, int64_t stride_bytes, int64_t n, int64_t dim, double* out);

struct Kernels {
  const char* isa;
  ScoreRow score[kMetrics][kFloats][kFloats];                                   // [metric][dtype][rounded to]; rounding to float32 is none
  BackwardRow backward[kMetrics][kFloats];                                      // [metric][dtype]; either gradient may be null
  OrdinalsOf ordinals_of[kFloats];                                              // [dtype]
  void (*range)(const int32_t* ordinals, int64_t n, int32_t* lo, int32_t* hi);  // n >= 1
  int64_t (*at_least)(const int32_t* ordinals, int64_t n, int32_t threshold);   // how many are >= threshold
  Pack pack[kFloats];                                                           // [dtype]
  Dots dots[kFloats];                                                           // [dtype]
  AddNorms add_norms[kNorms][kFloats];                                          // [norm][dtype]
  WidenRow widen_row[kFloats];                                                  // [dtype]
  WideDots wide_dots[kFloats];                                                  // [dtype]
  WideSquares wide_squares[kFloats];                                            // [dtype]
  // x[i] = e^(x[i] - max), to 2 ulp, 0 where that is below 2^-126; gives the maximum (NaN apart) and the sum. A maximum of -inf counts as
  // 0.
  void (*exponentials)(float* x, int64_t n, float* max, float* sum);
  float (*sum_where)(const float* x, const unsigned char* where, int64_t n);  // of those where it is not 0
  void (*add_scaled)(float* to, const float* x, float factor, int64_t n);     // to += factor * x
  void (*max_scaled)(float* to, const float* x, float factor, int64_t n);     // to = max(to, factor * x), NaN wins
  void (*add_squares)(float* to, const float* x, int64_t n);                  // to += x^2
  // to = (sum over e of weights[e] (null: 1) * row rows[e] of x) / divisor; and the dot product of two rows.
  void (*merge_row[kFloats])(const void* x, int64_t stride_bytes, const int64_t* rows, const float* weights, int64_t edges, int64_t dim,
                             float divisor, void* to);
  float (*dot_row[kFloats])(const void* x, const void* y, int64_t dim);
  // Norms (l2, l1) of the differences of n float32 rows of 1 to kShortDim elements, end to end; the bits are those of `score`.
  void (*score_short[kNorms])(const float* prev, const float* cur, int64_t n, int64_t dim, float* to);
  void (*to_floats[kFloats])(const void* row, int64_t n, float* to);
  void (*random_numbers)(uint64_t seed, uint64_t item, int64_t n, float* to);
  void (*sigmoids)(float* x, int64_t n);
  void (*halves_of)(const char* scores, int64_t stride_bytes, int64_t n, int32_t* high, int32_t* low);
  void (*copy_past_cache)(void* to, const void* from, size_t bytes);  // needs store_fence() before others read `to`
  void (*store_fence)();
};

// The best table that this machine can run, chosen once.
const Kernels& kernels();

}  // namespace v2drop

#endif  // V2DROP_CORE_KERNELS_H_
