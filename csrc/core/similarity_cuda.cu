// SPDX-License-Identifier: Apache-2.0
//
// Norms of keys, and cosines with pivot rows, on the GPU.
#include <algorithm>

#include "dots_cuda.cuh"
#include "launch.cuh"
#include "ops.h"

namespace v2drop {
namespace {

struct Norms {
  DeviceHeads k;
  int32_t dim, heads, squares;
  int64_t rows, all;  // of an entry, of all entries
  char* scores;
  int64_t scores_batch, scores_row;
};

template <class T>
__device__ float add_norm(float sum, const Vector<T>& x, int squares) {
#pragma unroll
  for (int e = 0; e < Vector<T>::kElements; ++e) {
    const float value = T::widen(x.elements[e]);
    sum = squares ? __fmaf_rn(value, value, sum) : sum + fabsf(value);
  }
  return sum;
}

// A group of lanes takes kDotRows rows, and all their heads.
template <class T, int LANES, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm) key_norm_kernel(const __grid_constant__ Norms n) {
  constexpr int kElements = Vector<T>::kElements;
  const int lane = thread_id() % LANES;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * (kThreads / LANES) + thread_id() / LANES) * kDotRows;
  const char* row[kDotRows];
  float sums[kDotRows] = {};
#pragma unroll
  for (int r = 0; r < kDotRows; ++r) {
    const int64_t at = first + r < n.all ? first + r : n.all - 1;
    row[r] = n.k.at(at / n.rows, 0, at % n.rows);
  }
  for (int head = 0; head < n.heads; ++head) {
    for (int j = lane * kElements; j < n.dim; j += LANES * kElements) {
      Vector<T> x[kDotRows];
#pragma unroll
      for (int r = 0; r < kDotRows; ++r) x[r] = load_vector<T, ALIGNED, false>(row[r] + head * n.k.head_stride, j, n.dim);
#pragma unroll
      for (int r = 0; r < kDotRows; ++r) sums[r] = add_norm<T>(sums[r], x[r], n.squares);
    }
  }
  sum_over_lanes<LANES>(sums);
  constexpr int kShare = LANES / kDotRows;
  const int64_t at = first + lane / kShare;
  if (lane % kShare != 0 || at >= n.all) return;
  *reinterpret_cast<float*>(n.scores + at / n.rows * n.scores_batch + at % n.rows * n.scores_row) =
      n.squares ? __fsqrt_rn(sums[0]) : sums[0];
}

struct Cosines {
  DeviceRows x;
  const char* pivots;
  int64_t pivots_batch, pivots_row;
  int32_t dim, n_pivots;
  int64_t rows, all;
  char* cosines;
  int64_t cosines_batch, cosines_pivot;
};

// A warp takes two rows, with four pivots at a time. Sums are float64, as those of the score: see score_cuda.cuh.
constexpr int kCosineRows = 2, kCosinePivots = 4;

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kDotBlocksOfSm) cosine_kernel(const __grid_constant__ Cosines c) {
  constexpr int kElements = Vector<T>::kElements;
  // The rows of a warp lie in one entry.
  const int64_t groups = (c.rows + kCosineRows - 1) / kCosineRows;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_id();
  if (warp >= c.all) return;
  const int64_t entry = warp / groups, first = warp % groups * kCosineRows;
  const char* row[kCosineRows];
#pragma unroll
  for (int r = 0; r < kCosineRows; ++r) row[r] = c.x.at(entry, first + r < c.rows ? first + r : first);
  for (int p0 = 0; p0 < c.n_pivots; p0 += kCosinePivots) {
    const char* pivot[kCosinePivots];
    unsigned there = 0;
#pragma unroll
    for (int p = 0; p < kCosinePivots; ++p) {
      int64_t at = -1;
      if (p0 + p < c.n_pivots) {
        at = *reinterpret_cast<const int64_t*>(c.pivots + entry * c.pivots_batch + (p0 + p) * c.pivots_row);
      }
      const bool valid = at >= 0 && at < c.rows;
      there |= static_cast<unsigned>(valid) << p;
      pivot[p] = c.x.at(entry, valid ? at : 0);
    }
    double products[kCosineRows * kCosinePivots] = {}, squares[kCosineRows] = {}, of_pivots[kCosinePivots] = {};
    for (int j = lane_id() * kElements; j < c.dim; j += 32 * kElements) {
      Vector<T> x[kCosineRows], y[kCosinePivots];
#pragma unroll
      for (int r = 0; r < kCosineRows; ++r) x[r] = load_vector<T, ALIGNED, true>(row[r], j, c.dim);
#pragma unroll
      for (int p = 0; p < kCosinePivots; ++p) y[p] = load_vector<T, ALIGNED, true>(pivot[p], j, c.dim);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        double wide[kCosineRows];
#pragma unroll
        for (int r = 0; r < kCosineRows; ++r) {
          wide[r] = T::widen(x[r].elements[e]);
          squares[r] = __fma_rn(wide[r], wide[r], squares[r]);
        }
#pragma unroll
        for (int p = 0; p < kCosinePivots; ++p) {
          const double of_pivot = T::widen(y[p].elements[e]);
          of_pivots[p] = __fma_rn(of_pivot, of_pivot, of_pivots[p]);
#pragma unroll
          for (int r = 0; r < kCosineRows; ++r) {
            products[p * kCosineRows + r] = __fma_rn(wide[r], of_pivot, products[p * kCosineRows + r]);
          }
        }
      }
    }
    // Afterwards each number lies in as many lanes as there are for it, in their order.
    constexpr int kLanesOf = 32 / (kCosineRows * kCosinePivots);
    sum_over_lanes<32>(products);
    sum_over_lanes<32>(of_pivots);
    sum_over_lanes<32>(squares);
    const int i = lane_id() / kLanesOf, p = i / kCosineRows, r = i % kCosineRows;
    const double of_pivot = __shfl_sync(kAllLanes, of_pivots[0], 32 / kCosinePivots * p),
                 of_row = __shfl_sync(kAllLanes, squares[0], 32 / kCosineRows * r);
    if (lane_id() % kLanesOf != 0 || p0 + p >= c.n_pivots || first + r >= c.rows) continue;
    const bool none = !(there >> p & 1) || of_pivot == 0 || of_row == 0;
    const float cosine = none ? 0.0f : static_cast<float>(__ddiv_rn(products[0], __dsqrt_rn(of_row) * __dsqrt_rn(of_pivot)));
    *reinterpret_cast<float*>(c.cosines + entry * c.cosines_batch + (p0 + p) * c.cosines_pivot + (first + r) * 4) = cosine;
  }
}

}  // namespace
namespace cuda {

void key_norm(const NormRequest& request, const v2drop_context& context) {
  const HeadRows& keys = request.k;
  const RowView& out = request.scores;
  check_dim("k", keys.dim);
  if (keys.heads > INT32_MAX) fail("k: more than 2^31 heads");
  if (keys.batch == 0 || keys.rows == 0) return;
  if (keys.batch > kMaxRows / keys.rows) fail("k: more than 2^30 rows");
  const Norms n = {device_heads(keys),
                   static_cast<int32_t>(keys.dim),
                   static_cast<int32_t>(keys.heads),
                   request.norm == V2DROP_L2,
                   keys.rows,
                   keys.batch * keys.rows,
                   out.data,
                   out.batch_stride,
                   out.row_stride};
  for_row_type(keys.dtype, keys.dim, is_aligned(keys), [&](auto type, auto lanes, auto aligned) {
    constexpr int kLanes = decltype(lanes)::value, kRows = kThreads / kLanes * kDotRows;
    launch(key_norm_kernel<decltype(type), kLanes, decltype(aligned)::value>, (n.all + kRows - 1) / kRows, kThreads,
           LaunchDependency::kNone, context.stream, n);
  });
}

void cosine_to_pivots(const PivotsRequest& p, const v2drop_context& context) {
  check_dim("x", p.x.dim);
  if (p.pivots.rows > INT32_MAX / 2) fail("pivots: more than 2^30 for an entry");
  if (p.x.batch == 0 || p.x.rows == 0 || p.pivots.rows == 0) return;
  if (p.x.batch > kMaxRows / p.x.rows) fail("x: more than 2^30 rows");
  const int64_t warps = (p.x.rows + kCosineRows - 1) / kCosineRows * p.x.batch;
  const Cosines c = {device_rows(p.x),
                     p.pivots.data,
                     p.pivots.batch_stride,
                     p.pivots.row_stride,
                     static_cast<int32_t>(p.x.dim),
                     static_cast<int32_t>(p.pivots.rows),
                     p.x.rows,
                     warps,
                     p.cosines.data,
                     p.cosines.batch_stride,
                     p.cosines.row_stride};
  for_row_type(p.x.dtype, p.x.dim, is_aligned(p.x), [&](auto type, auto, auto aligned) {
    launch(cosine_kernel<decltype(type), decltype(aligned)::value>, (warps + kThreads / 32 - 1) / (kThreads / 32), kThreads,
           LaunchDependency::kNone, context.stream, c);
  });
}

}  // namespace cuda
}  // namespace v2drop
