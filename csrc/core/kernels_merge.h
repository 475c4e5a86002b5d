// SPDX-License-Identifier: Apache-2.0
//
// Weighted sums of rows, and dot products of two rows. A column is summed in the order of the edges, each product rounded, so that the
// width of the vectors does not matter.
#ifndef V2DROP_CORE_KERNELS_MERGE_H_
#define V2DROP_CORE_KERNELS_MERGE_H_

#include "kernels_score.h"
#include "simd.h"

namespace v2drop {
namespace {  // internal linkage: see kernels.cpp

template <class T>
inline void finish_block(Pair (&sums)[kPairs], float divisor, typename T::Element* to) {
  V2DROP_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    if (divisor != 1) sums[i] = {sums[i].first / splat(divisor), sums[i].second / splat(divisor)};
    T::write(to, i, {T::round(sums[i].first), T::round(sums[i].second)});
  }
}

// The same for few columns of float32, without a copy of each.
inline void merge_short(const void* x, int64_t stride_bytes, const int64_t* rows, const float* weights, int64_t edges, int64_t columns,
                        float divisor, float* to) {
  float sums[kLanes] = {};
  for (int64_t e = 0; e < edges; ++e) {
    const float* from = reinterpret_cast<const float*>(static_cast<const char*>(x) + rows[e] * stride_bytes);
    const float w = weights ? weights[e] : 1.0f;
    for (int64_t c = 0; c < columns; ++c) sums[c] += w * from[c];
  }
  for (int64_t c = 0; c < columns; ++c) to[c] = divisor == 1 ? sums[c] : sums[c] / divisor;
}

// to = (the sum over e of weights[e] * row rows[e] of x) / divisor
template <class T>
void merge_row(const void* x, int64_t stride_bytes, const int64_t* rows, const float* weights, int64_t edges, int64_t dim, float divisor,
               void* to) {
  using Element = typename T::Element;
  Element* out = static_cast<Element*>(to);
  if constexpr (std::is_same_v<T, Float32>) {
    if (dim < kLanes) return merge_short(x, stride_bytes, rows, weights, edges, dim, divisor, out);
  }
  for (int64_t j = 0; j < dim; j += kLanes) {
    const int64_t left = dim - j < kLanes ? dim - j : kLanes;
    Pair sums[kPairs] = {};
    for (int64_t e = 0; e < edges; ++e) {
      const Element* from = reinterpret_cast<const Element*>(static_cast<const char*>(x) + rows[e] * stride_bytes) + j;
      Element rest[kLanes] = {};
      if (left < kLanes) {
        std::memcpy(rest, from, static_cast<size_t>(left) * sizeof(Element));
        from = rest;
      }
      const F32 w = splat(weights ? weights[e] : 1.0f);
      V2DROP_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        const Pair v = T::read(from, i);
        sums[i].first += w * v.first;
        sums[i].second += w * v.second;
      }
    }
    if (left == kLanes) {
      finish_block<T>(sums, divisor, out + j);
    } else {
      Element rest[kLanes];
      finish_block<T>(sums, divisor, rest);
      std::memcpy(out + j, rest, static_cast<size_t>(left) * sizeof(Element));
    }
  }
}

template <class R>
struct Product {
  static constexpr int kSums = 1;
  static void terms(F32 x, F32 y, F32 (&term)[kSums]) { term[0] = x * y; }
};

template <class T>
float dot_row(const void* x, const void* y, int64_t dim) {
  using Element = typename T::Element;
  float total[1];
  sum_row<Product<T>, T>(static_cast<const Element*>(x), static_cast<const Element*>(y), dim, total);
  return total[0];
}

}  // namespace
}  // namespace v2drop

#endif  // V2DROP_CORE_KERNELS_MERGE_H_
