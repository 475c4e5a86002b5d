// SPDX-License-Identifier: Apache-2.0
//
// The inner loops, which kernels.cpp defines once per instruction set. They see single rows and flat arrays: strides, threads and
// checks are the business of the *_cpu.cpp files.
#ifndef V2DROP_CORE_KERNELS_H_
#define V2DROP_CORE_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace v2drop {

constexpr int kMetrics = 3;  // v2drop_metric
constexpr int kFloats = 3;   // the first values of v2drop_dtype: float32, float16, bfloat16

using ScoreRow = float (*)(const void* prev, const void* cur, int64_t dim);
using BackwardRow = void (*)(float grad, const void* prev, const void* cur, void* grad_prev, void* grad_cur, int64_t dim);
using KeysOf = void (*)(const void* scores, int64_t stride_bytes, int64_t n, int32_t* keys);

struct Kernels {
  const char* isa;
  ScoreRow score[kMetrics][kFloats][kFloats];                               // [metric][dtype][rounded to]; rounding to float32 is none
  BackwardRow backward[kMetrics][kFloats];                                  // [metric][dtype]; either gradient may be null
  KeysOf keys_of[kFloats];                                                  // [dtype]
  void (*range)(const int32_t* keys, int64_t n, int32_t* lo, int32_t* hi);  // n >= 1
  int64_t (*at_least)(const int32_t* keys, int64_t n, int32_t threshold);   // how many are >= threshold
  void (*copy_past_cache)(void* to, const void* from, size_t bytes);        // needs store_fence() before others read `to`
  void (*store_fence)();
};

// The best table that this machine can run, chosen once.
const Kernels& kernels();

}  // namespace v2drop

#endif  // V2DROP_CORE_KERNELS_H_
