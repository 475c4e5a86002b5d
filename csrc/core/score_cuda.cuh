// SPDX-License-Identifier: Apache-2.0
//
// Variation scores by warps: the 16-byte loads of a row are issued before the first is used, sums are float32 in one fixed order that
// depends on nothing but the row's length and dtype.
#ifndef V2DROP_CORE_SCORE_CUDA_CUH_
#define V2DROP_CORE_SCORE_CUDA_CUH_

#include <cstring>

#include "device.cuh"
#include "request.h"
#include "select_cuda.cuh"
#include "tuning_cuda.h"

namespace v2drop {

// Hidden states [batch, rows, dim]; strides in bytes.
struct DeviceRows {
  const char* data;
  int64_t batch_stride, row_stride;

  __device__ const char* at(int64_t entry, int64_t position) const { return data + entry * batch_stride + position * row_stride; }
};

struct Scored {
  DeviceRows prev, cur;
  int32_t dim, metric, score_dtype;
  int32_t warps;  // that share a row: a power of two, at most kThreads / 32
  int64_t rows;   // of a batch entry
  int64_t slots;  // competing rows of all segments, end to end
  Table segments;
  const char* mask;
  int64_t mask_batch, mask_row;
  int32_t masked_ordinal;
  // One of them: ordinals [batch * rows], or scores.
  int32_t* ordinals;
  char* scores;
  int64_t scores_batch, scores_row;
};

template <class T>
struct Vector {
  static constexpr int kElements = 16 / sizeof(typename T::Element);
  typename T::Element elements[kElements];
};

// 16 bytes of a row from element j on, zeros behind its end. ALIGNED: rows begin and end at multiples of 16 bytes.
template <class T, bool ALIGNED, bool AGAIN>
__device__ Vector<T> load_vector(const char* row, int j, int dim) {
  Vector<T> vector;
  if constexpr (ALIGNED) {
    // What is not read again need not stay in the cache.
    const uint4* from = reinterpret_cast<const uint4*>(row + static_cast<int64_t>(j) * sizeof(typename T::Element));
    const uint4 bits = j >= dim ? make_uint4(0, 0, 0, 0) : AGAIN ? __ldg(from) : __ldcs(from);
    static_assert(sizeof bits == sizeof vector, "16 bytes");
    memcpy(&vector, &bits, sizeof vector);
  } else {
    const typename T::Element* from = reinterpret_cast<const typename T::Element*>(row) + j;
#pragma unroll
    for (int e = 0; e < Vector<T>::kElements; ++e) vector.elements[e] = j + e < dim ? from[e] : typename T::Element(0);
  }
  return vector;
}

// Sums of squares of prev, cur and their difference (of absolute differences for l1).
struct Sums {
  float prev = 0, cur = 0, change = 0;
};

template <class T>
__device__ void add(Sums& sums, const Vector<T>& x, const Vector<T>& y, int metric, int score_dtype) {
  // The branches are outside the loops, and one element's numbers live at a time: registers are for the loads in flight.
  if (metric == V2DROP_COSINE) {
#pragma unroll
    for (int e = 0; e < Vector<T>::kElements; ++e) {
      const float a = T::widen(x.elements[e]), b = T::widen(y.elements[e]), d = b - a;
      sums.prev = __fmaf_rn(a, a, sums.prev);
      sums.cur = __fmaf_rn(b, b, sums.cur);
      sums.change = __fmaf_rn(d, d, sums.change);
    }
  } else if (metric == V2DROP_L2 && score_dtype == V2DROP_FLOAT32) {
#pragma unroll
    for (int e = 0; e < Vector<T>::kElements; ++e) {
      const float d = T::widen(y.elements[e]) - T::widen(x.elements[e]);
      sums.change = __fmaf_rn(d, d, sums.change);
    }
  } else {
#pragma unroll
    for (int e = 0; e < Vector<T>::kElements; ++e) {
      const float d = round_to_dtype(T::widen(y.elements[e]) - T::widen(x.elements[e]), score_dtype);
      sums.change = metric == V2DROP_L1 ? sums.change + fabsf(d) : __fmaf_rn(d, d, sums.change);
    }
  }
}

// This thread's share of a row; `lane` of `lanes` threads. Nothing is added where the row is not `wanted`.
template <class T, bool ALIGNED, bool AGAIN>
__device__ Sums sum_row(const char* prev, const char* cur, int dim, int lane, int lanes, bool wanted, int metric, int score_dtype) {
  constexpr int kElements = Vector<T>::kElements;
  constexpr int kLoads = ALIGNED ? kScoreLoads : 1;  // element by element there are as many loads in flight, and registers, with one
  Sums sums;
  if (!wanted) return sums;
  for (int begin = lane * kElements; begin < dim; begin += kLoads * lanes * kElements) {
    Vector<T> x[kLoads], y[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      x[j] = load_vector<T, ALIGNED, AGAIN>(prev, begin + j * lanes * kElements, dim);
      y[j] = load_vector<T, ALIGNED, true>(cur, begin + j * lanes * kElements, dim);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) add<T>(sums, x[j], y[j], metric, score_dtype);
  }
  return sums;
}

// Adds up the shares of the warps of a row, for all of its threads. Every thread of the block comes here.
class RowSums {
 public:
  __device__ Sums total(Sums sums, int warps, bool squares) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      sums.change += __shfl_xor_sync(kAllLanes, sums.change, step);
      if (squares) {
        sums.prev += __shfl_xor_sync(kAllLanes, sums.prev, step);
        sums.cur += __shfl_xor_sync(kAllLanes, sums.cur, step);
      }
    }
    if (warps == 1) return sums;
    // Two buffers in turns, so that one barrier is enough.
    Shared& shared = block_shared<Shared>();
    if (lane_id() == 0) shared.of_warp[turn_][warp_id()] = {sums.prev, sums.cur, sums.change};
    __syncthreads();
    const int first = warp_id() / warps * warps;
    Sums all;
    for (int w = 0; w < warps; ++w) {
      const Share share = shared.of_warp[turn_][first + w];
      all.prev += share.prev;
      all.cur += share.cur;
      all.change += share.change;
    }
    turn_ ^= 1;
    return all;
  }

 private:
  struct Share {
    float prev, cur, change;
  };
  struct Shared {
    Share of_warp[2][kThreads / 32];
  };
  int turn_ = 0;
};

__device__ inline float score_of(const Sums& sums, int metric) {
  if (metric == V2DROP_L1) return sums.change;
  if (metric == V2DROP_L2) return __fsqrt_rn(sums.change);
  // 1 - cos from |x|^2, |y|^2 and |x - y|^2: for nearly parallel rows 1 - x.y/(|x||y|) would cancel, |x - y|^2 does not.
  if (sums.prev == 0 || sums.cur == 0) return 1.0f;
  const float a = __fsqrt_rn(sums.prev), b = __fsqrt_rn(sums.cur), gap = a - b;
  const float rest = sums.change - gap * gap;
  return __fdiv_rn(rest < 0 ? 0.0f : rest, 2 * a * b);  // NaN passes
}

// The segment that a slot lies in, found by the whole block: the slot becomes its place there.
__device__ inline int segment_of_slot(BlockCounts<kThreads>& counts, const Table& table, int* slot) {
  struct Found {
    int group, place;
  };
  Found& found = block_shared<Found>();
  int before = 0;
  for (int base = 0;; base += kThreads) {
    const int g = base + thread_id();
    const int n = g < table.groups ? static_cast<int>(table.rows[g].n) : 0;
    int upto = n;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, upto, step);
      if (lane_id() >= step) upto += other;
    }
    int all;
    const int begin = before + counts.sum_before(__shfl_sync(kAllLanes, upto, 31), &all) + upto - n;
    if (*slot >= begin && *slot < begin + n) found = {g, *slot - begin};
    __syncthreads();
    if (*slot < before + all || base + kThreads >= table.groups) {
      *slot = found.place;
      return found.group;
    }
    before += all;
  }
}

// Scores `groups` groups of kThreads / 32 / warps rows, from slot `first` on. There are less than 2^31 rows in a call: 32-bit numbers
// leave the registers to the loads.
template <class T, bool ALIGNED>
__device__ void score_rows(const Scored& s, BlockCounts<kThreads>& counts, RowSums& sums, int first, int groups) {
  const int lanes = 32 * s.warps, lane = thread_id() % lanes, mine = thread_id() / lanes, together = kThreads / lanes;
  int g = 0, place = first;
  if (s.segments.rows) g = segment_of_slot(counts, s.segments, &place);
  place += mine;
  for (int group = 0; group < groups; ++group, place += together) {
    const bool inside = first + group * together + mine < s.slots;
    int entry = 0, position = 0;
    if (inside) {
      const v2drop_segment* table = s.segments.rows;
      if (table) {
        while (place >= table[g].n) place -= static_cast<int>(table[g++].n);
        const int row = static_cast<int>(table[g].src_start + table[g].n_prefix) + place;
        entry = row / s.rows;
        position = row % s.rows;
      } else {
        const int n = static_cast<int>(s.segments.alike.n);
        entry = place / n;
        position = static_cast<int>(s.segments.alike.n_prefix) + place % n;
      }
    }
    const bool masked = inside && s.mask && !s.mask[entry * s.mask_batch + position * s.mask_row];
    const Sums share = sum_row<T, ALIGNED, false>(s.prev.at(entry, position), s.cur.at(entry, position), s.dim, lane, lanes,
                                                  inside && !masked, s.metric, s.score_dtype);
    const Sums all = sums.total(share, s.warps, s.metric == V2DROP_COSINE);
    if (lane != 0 || !inside) continue;
    const float score = round_to_dtype(score_of(all, s.metric), s.score_dtype);
    if (s.ordinals) {
      s.ordinals[static_cast<int64_t>(entry) * s.rows + position] = masked ? s.masked_ordinal : ordinal_of_bits(__float_as_uint(score));
    } else {
      *reinterpret_cast<float*>(s.scores + entry * s.scores_batch + position * s.scores_row) = score;
    }
  }
}

// The host's side, in score_cuda.cu.

DeviceRows device_rows(const RowView& view);
// Scores of the rows of `hidden`, of which those of `segments` compete; the caller says where they go.
Scored describe_scores(const Hidden& hidden);
// Whether all rows begin and end at multiples of 16 bytes.
bool is_aligned(const RowView& view);
int64_t score_blocks(const Scored& scored, int groups);
// Returns the dependency to the next launch: without rows to score nothing is launched, and the next one is the first of its call.
LaunchDependency launch_score(const Scored& scored, int32_t dtype, bool aligned, void* stream);

}  // namespace v2drop

#endif  // V2DROP_CORE_SCORE_CUDA_CUH_
