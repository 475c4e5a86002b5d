// SPDX-License-Identifier: Apache-2.0
//
// Ordinals of scores, and counts over them.
#ifndef V2DROP_CORE_KERNELS_SELECT_H_
#define V2DROP_CORE_KERNELS_SELECT_H_

#include "ordinal.h"
#include "simd.h"

namespace v2drop {
namespace {  // internal linkage: see kernels.cpp

template <class T>
void ordinals_of(const void* scores, int64_t stride_bytes, int64_t n, int32_t* ordinals) {
  using Element = typename T::Element;
  Element block[kLanes] = {};
  uint32_t values[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const int m = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    const char* from = static_cast<const char*>(scores) + i * stride_bytes;
    if (stride_bytes == static_cast<int64_t>(sizeof(Element))) {
      std::memcpy(block, from, static_cast<size_t>(m) * sizeof(Element));
    } else {
      for (int l = 0; l < m; ++l) std::memcpy(&block[l], from + l * stride_bytes, sizeof(Element));
    }
    T::widen(block, values);
    for (int l = 0; l < m; ++l) ordinals[i + l] = ordinal_of_bits(values[l]);
  }
}

void range(const int32_t* ordinals, int64_t n, int32_t* lo, int32_t* hi) {
  int32_t low = ordinals[0], high = ordinals[0];
  for (int64_t i = 1; i < n; ++i) {
    low = ordinals[i] < low ? ordinals[i] : low;
    high = ordinals[i] > high ? ordinals[i] : high;
  }
  *lo = low;
  *hi = high;
}

int64_t at_least(const int32_t* ordinals, int64_t n, int32_t threshold) {
  int64_t total = 0;
  for (int64_t i = 0; i < n;) {  // 32-bit counts fill a whole vector; a block is small enough for them
    const int64_t end = n - i < (1 << 30) ? n : i + (1 << 30);
    int32_t count = 0;
    for (; i < end; ++i) count += ordinals[i] >= threshold;
    total += count;
  }
  return total;
}

}  // namespace
}  // namespace v2drop

#endif  // V2DROP_CORE_KERNELS_SELECT_H_
