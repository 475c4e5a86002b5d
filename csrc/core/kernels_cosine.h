// SPDX-License-Identifier: Apache-2.0
//
// Dot products of rows with a few vectors in float64, where products of floats are exact: no rounding but that of the sums, no overflow.
// They are summed in kCosineLanes lanes, which are added pairwise, in one order whatever the vector width and the other rows.
#ifndef V2DROP_CORE_KERNELS_COSINE_H_
#define V2DROP_CORE_KERNELS_COSINE_H_

#include "kernels.h"
#include "simd.h"

namespace v2drop {
namespace {  // internal linkage: see kernels.cpp

constexpr int kCosineLanes = 8;
using Lanes = double __attribute__((vector_size(kCosineLanes * 8)));
using Narrow = float __attribute__((vector_size(kCosineLanes * 4)));

inline double total(const Lanes& lanes) {
  double v[kCosineLanes];
  std::memcpy(v, &lanes, sizeof v);
  for (int half = kCosineLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

// A vector is no return value: it may be wider than those that functions return on this instruction set.
template <class From>
inline void widen_lanes(const From* from, Lanes& to) {
  Narrow narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  to = __builtin_convertvector(narrow, Lanes);
}

// kLanes elements of a row from j on as the bits of floats, zeros behind its end: they add nothing to any sum.
template <class T>
inline void widen_block(const typename T::Element* row, int64_t j, int64_t dim, uint32_t (&to)[kLanes]) {
  if (j + kLanes <= dim) {
    T::widen(row + j, to);
  } else {
    typename T::Element rest[kLanes] = {};
    std::memcpy(rest, row + j, static_cast<size_t>(dim - j) * sizeof *row);
    T::widen(rest, to);
  }
}

template <class T>
void widen_row(const void* row, int64_t dim, float* to) {
  static_assert(wide_dim(1) == kLanes, "widened rows are whole blocks");
  for (int64_t j = 0; j < dim; j += kLanes) {
    uint32_t block[kLanes];
    widen_block<T>(static_cast<const typename T::Element*>(row), j, dim, block);
    std::memcpy(to + j, block, sizeof block);
  }
}

template <class T, int ROWS, int VECTORS>
inline void wide_dots_tile(const char* rows, int64_t stride_bytes, const float* wide, int64_t dim, double* out, int64_t out_stride) {
  const int64_t pitch = wide_dim(dim);
  Lanes sums[VECTORS][ROWS] = {};
  for (int64_t j = 0; j < dim; j += kLanes) {
    uint32_t block[ROWS][kLanes];
    for (int r = 0; r < ROWS; ++r) {
      widen_block<T>(reinterpret_cast<const typename T::Element*>(rows + r * stride_bytes), j, dim, block[r]);
    }
    for (int i = 0; i < kLanes; i += kCosineLanes) {
      Lanes x[ROWS];
      V2DROP_UNROLL
      for (int r = 0; r < ROWS; ++r) widen_lanes(block[r] + i, x[r]);
      V2DROP_UNROLL
      for (int v = 0; v < VECTORS; ++v) {
        Lanes y;
        widen_lanes(wide + v * pitch + j + i, y);
        V2DROP_UNROLL
        for (int r = 0; r < ROWS; ++r) sums[v][r] += x[r] * y;
      }
    }
  }
  for (int v = 0; v < VECTORS; ++v) {
    for (int r = 0; r < ROWS; ++r) out[v * out_stride + r] = total(sums[v][r]);
  }
}

template <class T, int ROWS>
inline void wide_dots_rows(const char* rows, int64_t stride_bytes, const float* wide, int64_t vectors, int64_t dim, double* out,
                           int64_t out_stride) {
  constexpr int kMost = kWidth == 16 ? 4 : 2;  // as many vectors share the reading of the rows as their sums leave registers for
  int64_t v = 0;
  for (; v + kMost <= vectors; v += kMost) {
    wide_dots_tile<T, ROWS, kMost>(rows, stride_bytes, wide + v * wide_dim(dim), dim, out + v * out_stride, out_stride);
  }
  for (; v < vectors; ++v) {
    wide_dots_tile<T, ROWS, 1>(rows, stride_bytes, wide + v * wide_dim(dim), dim, out + v * out_stride, out_stride);
  }
}

template <class T>
void wide_dots(const void* rows, int64_t stride_bytes, int64_t n, const float* wide, int64_t vectors, int64_t dim, double* out,
               int64_t out_stride) {
  constexpr int kRows = kWidth == 16 ? 4 : kWidth == 8 ? 2 : 1;
  const char* row = static_cast<const char*>(rows);
  int64_t i = 0;
  for (; i + kRows <= n; i += kRows)
    wide_dots_rows<T, kRows>(row + i * stride_bytes, stride_bytes, wide, vectors, dim, out + i, out_stride);
  for (; i < n; ++i) wide_dots_rows<T, 1>(row + i * stride_bytes, stride_bytes, wide, vectors, dim, out + i, out_stride);
}

template <class T>
void wide_squares(const void* rows, int64_t stride_bytes, int64_t n, int64_t dim, double* out) {
  const char* row = static_cast<const char*>(rows);
  for (int64_t i = 0; i < n; ++i) {
    Lanes sum = {};
    for (int64_t j = 0; j < dim; j += kLanes) {
      uint32_t block[kLanes];
      widen_block<T>(reinterpret_cast<const typename T::Element*>(row + i * stride_bytes), j, dim, block);
      for (int e = 0; e < kLanes; e += kCosineLanes) {
        Lanes x;
        widen_lanes(block + e, x);
        sum += x * x;
      }
    }
    out[i] = total(sum);
  }
}

}  // namespace
}  // namespace v2drop

#endif  // V2DROP_CORE_KERNELS_COSINE_H_
