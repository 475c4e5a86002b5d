// SPDX-License-Identifier: Apache-2.0
//
// Exact selection by one block: ordinals in registers where they fit, counted by bins where they do not, and one pass in position order
// that places who is kept. ordinals.h has the arithmetic.
#ifndef V2DROP_CORE_SELECT_CUDA_CUH_
#define V2DROP_CORE_SELECT_CUDA_CUH_

#include "device.cuh"
#include "launch.cuh"
#include "tuning_cuda.h"

namespace v2drop {

struct Scored;  // score_cuda.cuh

// The segments of a call: one for every batch entry, all alike, or a table in device memory.
struct Table {
  const v2drop_segment* rows;  // NULL: `alike`, for entry 0
  v2drop_segment alike;
  int64_t groups;
  int64_t batch, in_rows, out_rows;  // rows of a batch entry, at least 1 of the input

  __device__ v2drop_segment at(int64_t g) const {
    if (rows) return rows[g];
    v2drop_segment s = alike;
    s.src_start = g * in_rows;
    s.dst_start = g * out_rows;
    return s;
  }
  // The last segment that begins at or before an output row, so never one without output rows in front of another.
  __device__ int64_t of_output(int64_t row) const {
    if (!rows) return row / out_rows;
    int64_t low = 0, high = groups - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (rows[middle].dst_start <= row) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// Where ordinals come from: the score kernel of the same call (masked rows included), or given scores and an optional mask.
struct DeviceOrdinals {
  const int32_t* ordinals;  // [batch * rows]
  const char* scores;
  int64_t scores_batch, scores_row;  // strides in bytes
  int32_t scores_dtype;
  int32_t masked_ordinal;
  const char* mask;
  int64_t mask_batch, mask_row;
  int64_t rows;

  __device__ int32_t at(int64_t entry, int64_t position) const {
    // From L2: in a cooperative launch other SMs wrote them a moment ago.
    if (ordinals) return __ldcg(ordinals + entry * rows + position);
    if (mask && !mask[entry * mask_batch + position * mask_row]) return masked_ordinal;
    return ordinal_of_bits(__float_as_uint(load_float(scores + entry * scores_batch + position * scores_row, scores_dtype)));
  }
};

// One counter of each bin for each lane: whatever the ordinals, lanes never meet in a bank nor in an address.
struct Histogram {
  int count[kBins][32];
  FoundBin found;
};

// Calls emit(place, i) for the best k of the ordinals ordinal(0) ... ordinal(n - 1), places in the order of i; returns how many there are,
// less than k only if ordinals are excluded. All threads of the block call it alike. BINS: n may exceed THREADS * kOrdinalsPerThread.
template <int THREADS, bool BINS, class Ordinal, class Emit>
__device__ int select_best(BlockCounts<THREADS>& counts, int n, int k, const Ordinal& ordinal, const Emit& emit) {
  constexpr int kHeld = THREADS * kOrdinalsPerThread;
  // A warp holds neighbours, 32 at a time: loads coalesce, and ballots put them into order.
  const int depth = BINS && n > kHeld ? kOrdinalsPerThread : (n + THREADS - 1) / THREADS;
  const int first = warp_id() * 32 * depth + lane_id();
  int32_t held[kOrdinalsPerThread];
  const auto load = [&](int begin) {
#pragma unroll
    for (int j = 0; j < kOrdinalsPerThread; ++j) {
      const int i = begin + first + 32 * j;
      held[j] = j < depth && i < n ? ordinal(i) : kExcluded;
    }
  };

  Cut cut;
  int32_t lo = INT32_MAX, hi = INT32_MIN;
  if (!BINS || n <= kHeld) {
    load(0);
#pragma unroll
    for (int j = 0; j < kOrdinalsPerThread; ++j) {
      if (j < depth && first + 32 * j < n) {
        lo = min(lo, held[j]);
        hi = max(hi, held[j]);
      }
    }
    counts.range(lo, hi, &lo, &hi);
    cut = find_cut(lo, hi, n, k, [&](int32_t threshold) -> int64_t {
      int count = 0;
#pragma unroll
      for (int j = 0; j < kOrdinalsPerThread; ++j) count += held[j] >= threshold;  // no threshold is as low as kExcluded
      return counts.sum(count);
    });
  } else if constexpr (BINS) {
    for (int i = thread_id(); i < n; i += THREADS) {
      const int32_t x = ordinal(i);
      lo = min(lo, x);
      hi = max(hi, x);
    }
    counts.range(lo, hi, &lo, &hi);
    cut = find_cut_by_bins(lo, hi, n, k, [&](Bins bins, int32_t range_hi, int64_t wanted) -> FoundBin {
      Histogram& histogram = block_shared<Histogram>();
      for (int j = thread_id(); j < kBins * 32; j += THREADS) histogram.count[j / 32][j % 32] = 0;
      __syncthreads();
      for (int i = thread_id(); i < n; i += THREADS) {
        const int32_t x = ordinal(i);
        if (x >= bins.lo && x <= range_hi) atomicAdd(&histogram.count[bin_of(bins, x)][lane_id()], 1);
      }
      __syncthreads();
      // Thread t has the t-th bin from above; the counts of all bins above it are those of the threads before it.
      int mine = 0;
      const int bin = kBins - 1 - thread_id();
      if (bin >= 0) {
        for (int j = 0; j < 32; ++j) mine += histogram.count[bin][(lane_id() + j) % 32];
      }
      int upto = mine;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, upto, step);
        if (lane_id() >= step) upto += other;
      }
      int all;
      upto += counts.sum_before(__shfl_sync(kAllLanes, upto, 31), &all);
      if (bin >= 0 && upto >= wanted && upto - mine < wanted) histogram.found = {bin, upto, upto - mine};
      __syncthreads();
      return histogram.found;
    });
  }

  int above_before = 0, equal_before = 0;
  for (int begin = 0; begin < n; begin += kHeld) {
    if (BINS && n > kHeld) load(begin);
    int above = 0, equal = 0;
#pragma unroll
    for (int j = 0; j < kOrdinalsPerThread; ++j) {
      if (j >= depth) break;
      above += __popc(__ballot_sync(kAllLanes, held[j] > cut.threshold));
      equal += __popc(__ballot_sync(kAllLanes, held[j] == cut.threshold && begin + first + 32 * j < n));
    }
    // At most 2^13 of each in a block at a time: both travel in one number.
    int all;
    const int before = counts.sum_before(above | equal << 16, &all);
    above = above_before + (before & 0xffff);
    equal = equal_before + (before >> 16);
    const unsigned lower = (1u << lane_id()) - 1;
#pragma unroll
    for (int j = 0; j < kOrdinalsPerThread; ++j) {
      if (j >= depth) break;
      const int i = begin + first + 32 * j;
      const unsigned is_above = __ballot_sync(kAllLanes, held[j] > cut.threshold);
      const unsigned is_equal = __ballot_sync(kAllLanes, held[j] == cut.threshold && i < n);
      const int my_above = above + __popc(is_above & lower), my_equal = equal + __popc(is_equal & lower);
      if (i < n && kept(cut, held[j], my_equal)) emit(static_cast<int>(place(cut, my_above, my_equal)), i);
      above += __popc(is_above);
      equal += __popc(is_equal);
    }
    above_before += all & 0xffff;
    equal_before += all >> 16;
  }
  return static_cast<int>(place(cut, above_before, equal_before));
}

// The host's side, in select_cuda.cu.

// The segments as kernels read them. `tiled`: their output rows count too.
Table make_table(const Segments& segments, const ScoreSource& source, int64_t out_rows, bool tiled, const v2drop_context& context,
                 Workspace& workspace);
DeviceOrdinals device_ordinals(const ScoreSource& source, const int32_t* ordinals);  // ordinals NULL: from given scores
// Ordinals of the competing rows of hidden states, into scratch memory; described by `scored`, which is not launched.
Scored describe_ordinals(const ScoreSource& source, const Segments& segments, const Table& table, Workspace& workspace);

// Rows of keep [batch, out_rows], and offsets of a packed result.
struct KeptRows {
  int64_t* keep;
  const int32_t* cu;
  int32_t* new_cu;
};
void launch_select(const Table& table, const DeviceOrdinals& ordinals, const KeptRows& to, int64_t max_n, LaunchDependency dependency,
                   void* stream);

}  // namespace v2drop

#endif  // V2DROP_CORE_SELECT_CUDA_CUH_
