// SPDX-License-Identifier: Apache-2.0
//
// Rows shared by groups of lanes: which group takes which row, and sums over a group.
#ifndef V2DROP_CORE_DOTS_CUDA_CUH_
#define V2DROP_CORE_DOTS_CUDA_CUH_

#include <type_traits>

#include "device.cuh"
#include "request.h"
#include "score_cuda.cuh"
#include "tuning_cuda.h"

namespace v2drop {

// Rows [batch, heads, rows, dim]; strides in bytes.
struct DeviceHeads {
  const char* data;
  int64_t batch_stride, head_stride, row_stride;

  __device__ const char* at(int64_t entry, int64_t head, int64_t position) const {
    return data + entry * batch_stride + head * head_stride + position * row_stride;
  }
};

inline DeviceHeads device_heads(const HeadRows& x) { return {x.data, x.batch_stride, x.head_stride, x.row_stride}; }

inline bool is_aligned(const HeadRows& x) {
  const int64_t bits = reinterpret_cast<intptr_t>(x.data) | x.batch_stride | x.head_stride | x.row_stride | x.dim * kDtypeBytes[x.dtype];
  return bits % 16 == 0;
}

// Sums of COUNT values over groups of LANES lanes, with half as many values to exchange in every step: afterwards value[e] of lane l is the
// sum of value l * COUNT / LANES + e (of l / (LANES / COUNT) where there are more lanes than values). Every lane of the warp comes here.
template <int LANES, int COUNT, int STEP = LANES / 2, int HALF = COUNT / 2, class Number>
__device__ void sum_over_lanes(Number (&value)[COUNT]) {
  if constexpr (STEP > 0 && HALF > 0) {
    const bool upper = lane_id() & STEP;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      const Number keep = upper ? value[i + HALF] : value[i], give = upper ? value[i] : value[i + HALF];
      value[i] = keep + __shfl_xor_sync(kAllLanes, give, STEP);
    }
  } else if constexpr (STEP > 0) {
    value[0] += __shfl_xor_sync(kAllLanes, value[0], STEP);
  }
  if constexpr (STEP > 1) sum_over_lanes<LANES, COUNT, STEP / 2, HALF / 2>(value);
}

template <class T>
__device__ float element(const char* row, int j) {
  return T::widen(reinterpret_cast<const typename T::Element*>(row)[j]);
}

// sum + x . y
template <class T>
__device__ float add_dot(float sum, const Vector<T>& x, const Vector<T>& y) {
#pragma unroll
  for (int e = 0; e < Vector<T>::kElements; ++e) sum = __fmaf_rn(T::widen(x.elements[e]), T::widen(y.elements[e]), sum);
  return sum;
}

// Calls body(T(), lanes, aligned) with as many lanes as a row of `dim` elements has 16-byte loads, 8 to 32.
template <class Body>
void for_row_type(int32_t dtype, int64_t dim, bool aligned, const Body& body) {
  const auto with = [&](auto type) {
    const int64_t loads = dim * kDtypeBytes[dtype] / 16;
    const auto with_lanes = [&](auto lanes) { aligned ? body(type, lanes, std::true_type()) : body(type, lanes, std::false_type()); };
    if (loads <= 8) {
      with_lanes(std::integral_constant<int, 8>());
    } else if (loads <= 16) {
      with_lanes(std::integral_constant<int, 16>());
    } else {
      with_lanes(std::integral_constant<int, 32>());
    }
  };
  if (dtype == V2DROP_FLOAT32) {
    with(Float32());
  } else if (dtype == V2DROP_FLOAT16) {
    with(Float16());
  } else {
    with(BFloat16());
  }
}

inline void check_dim(const char* name, int64_t dim) {
  if (dim > INT32_MAX / 2) fail("%s: rows of more than 2^30 elements", name);
}

}  // namespace v2drop

#endif  // V2DROP_CORE_DOTS_CUDA_CUH_
