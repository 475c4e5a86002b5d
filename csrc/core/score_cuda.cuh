// SPDX-License-Identifier: Apache-2.0
//
// Variation scores by warps: the 16-byte loads of a row are issued before the first is used, sums, float32 and for cosine float64,
// in one fixed order that depends on nothing but the row's length and dtype.
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

// What l2 and l1 sum over a row: squares, or absolute values, of the difference.
struct ChangeSums {
  static constexpr int kCount = 1, kLoads = kScoreLoads;
  float values[kCount] = {};

  template <class T>
  __device__ void add(const Vector<T>& x, const Vector<T>& y, int metric, int score_dtype) {
    float change = values[0];
    // The branches are outside the loops, and one element's numbers live at a time: registers are for the loads in flight.
    if (metric == V2DROP_L2 && score_dtype == V2DROP_FLOAT32) {
#pragma unroll
      for (int e = 0; e < Vector<T>::kElements; ++e) {
        const float d = T::widen(y.elements[e]) - T::widen(x.elements[e]);
        change = __fmaf_rn(d, d, change);
      }
    } else {
#pragma unroll
      for (int e = 0; e < Vector<T>::kElements; ++e) {
        const float d = round_to_dtype(T::widen(y.elements[e]) - T::widen(x.elements[e]), score_dtype);
        change = metric == V2DROP_L1 ? change + fabsf(d) : __fmaf_rn(d, d, change);
      }
    }
    values[0] = change;
  }
  __device__ float score(int metric) const { return metric == V2DROP_L1 ? values[0] : __fsqrt_rn(values[0]); }
};

// What cosine sums: |x|^2, |y|^2, x.y and |x - y|^2, as on the CPU. In float64, where products of float32 numbers are exact: float32 sums
// overflow beyond 1.8e19 and vanish below 1e-19, and 1 - cos of rows whose norms differ needs more digits than they have. Scaled float32
// sums with their rounding errors beside them would take 30 instructions for a pair of elements, and a pass before them for the scale;
// this takes five on the float64 pipe and two conversions, which stay below the time of the loads where that pipe has half the rate of
// float32 (A100, H100, H200), are as long as the loads on a B200, and some four times as long where it has 1/64 (GeForce, RTX PRO).
struct CosineSums {
  static constexpr int kCount = 4, kLoads = kScoreLoads / 2;  // the sums need the registers of the other loads
  double values[kCount] = {};

  template <class T>
  __device__ void add(const Vector<T>& x, const Vector<T>& y, int, int) {
#pragma unroll
    for (int e = 0; e < Vector<T>::kElements; ++e) {
      const double a = T::widen(x.elements[e]), b = T::widen(y.elements[e]), d = b - a;
      values[0] = __fma_rn(a, a, values[0]);
      values[1] = __fma_rn(b, b, values[1]);
      values[2] = __fma_rn(a, b, values[2]);
      values[3] = __fma_rn(d, d, values[3]);
    }
  }
  __device__ bool has_zero() const { return values[0] == 0 || values[1] == 0; }
  __device__ double product() const { return __dsqrt_rn(values[0]) * __dsqrt_rn(values[1]); }  // of the norms
  __device__ double distance() const {
    if (has_zero()) return 1;
    const double a = __dsqrt_rn(values[0]), b = __dsqrt_rn(values[1]), gap = a - b;
    // For nearly parallel rows of like norms 1 - x.y/(|x||y|) would cancel, |x - y|^2 does not; for others it is the other way round.
    const bool alike = a <= 2 * b && b <= 2 * a;
    const double distance = alike ? __ddiv_rn(values[3] - gap * gap, 2 * a * b) : 1 - __ddiv_rn(values[2], a * b);
    return distance < 0 ? 0 : distance > 2 ? 2 : distance;  // NaN passes
  }
  __device__ float score(int) const { return static_cast<float>(distance()); }
};

// This thread's share of a row; `lane` of `lanes` threads. Nothing is added where the row is not `wanted`.
template <class Sums, class T, bool ALIGNED, bool AGAIN>
__device__ Sums sum_row(const char* prev, const char* cur, int dim, int lane, int lanes, bool wanted, int metric, int score_dtype) {
  constexpr int kElements = Vector<T>::kElements;
  constexpr int kLoads = ALIGNED ? Sums::kLoads : 1;  // element by element there are as many loads in flight, and registers, with one
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
    for (int j = 0; j < kLoads; ++j) sums.template add<T>(x[j], y[j], metric, score_dtype);
  }
  return sums;
}

// Adds up the shares of the warps of a row, for all of its threads. Every thread of the block comes here.
class RowSums {
 public:
  template <class Sums>
  __device__ Sums total(Sums sums, int warps) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < Sums::kCount; ++i) sums.values[i] += __shfl_xor_sync(kAllLanes, sums.values[i], step);
    }
    if (warps == 1) return sums;
    // Two buffers in turns, so that one barrier is enough.
    Shared<Sums>& shared = block_shared<Shared<Sums>>();
    if (lane_id() == 0) shared.of_warp[turn_][warp_id()] = sums;
    __syncthreads();
    const int first = warp_id() / warps * warps;
    Sums all;
    for (int w = 0; w < warps; ++w) {
#pragma unroll
      for (int i = 0; i < Sums::kCount; ++i) all.values[i] += shared.of_warp[turn_][first + w].values[i];
    }
    turn_ ^= 1;
    return all;
  }

 private:
  template <class Sums>
  struct Shared {
    Sums of_warp[2][kThreads / 32];
  };
  int turn_ = 0;
};

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
template <class Sums, class T, bool ALIGNED>
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
    const char *prev = s.prev.at(entry, position), *cur = s.cur.at(entry, position);
    const bool wanted = inside && !masked;
    const Sums share = sum_row<Sums, T, ALIGNED, false>(prev, cur, s.dim, lane, lanes, wanted, s.metric, s.score_dtype);
    const float exact = sums.total(share, s.warps).score(s.metric);
    if (lane != 0 || !inside) continue;
    const float score = round_to_dtype(exact, s.score_dtype);
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
