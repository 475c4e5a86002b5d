// SPDX-License-Identifier: Apache-2.0
//
// What selections read, and exact selection by one block that holds all ordinals of a segment in registers. ordinal.h has the arithmetic,
// select_bins_cuda.cuh the selection from longer segments.
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

  // Ordinals first + 32 j of a segment that begins at `position`, for 32 j < left; kExcluded elsewhere. What they are read from is settled
  // before the loads, so that eight of them at least are in flight at once.
  template <int COUNT>
  __device__ void load(int32_t (&to)[COUNT], int64_t entry, int64_t position, int first, int left) const {
    if (ordinals) return load_computed(ordinals + entry * rows + position + first, to, left);
    const char* from = scores + entry * scores_batch + (position + first) * scores_row;
    if (scores_dtype == V2DROP_FLOAT32) {
      load_scores<Float32>(from, to, left);
    } else if (scores_dtype == V2DROP_FLOAT16) {
      load_scores<Float16>(from, to, left);
    } else {
      load_scores<BFloat16>(from, to, left);
    }
    if (!mask) return;
    const char* allowed = mask + entry * mask_batch + (position + first) * mask_row;
    in_batches<char>(
        to, left, [&](int j) { return allowed[32 * j * mask_row]; },
        [&](char x, int32_t& ordinal) { ordinal = x ? ordinal : masked_ordinal; });
  }

  // The same for ordinals of the score kernel; from L2: in a cooperative launch other SMs wrote them a moment ago.
  template <int COUNT>
  static __device__ void load_computed(const int32_t* from, int32_t (&to)[COUNT], int left) {
#pragma unroll
    for (int j = 0; j < COUNT; ++j) to[j] = 32 * j < left ? __ldcg(from + 32 * j) : kExcluded;
  }

  template <class T, int COUNT>
  __device__ void load_scores(const char* from, int32_t (&to)[COUNT], int left) const {
    using Element = typename T::Element;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) to[j] = kExcluded;
    in_batches<Element>(
        to, left, [&](int j) { return *reinterpret_cast<const Element*>(from + 32 * j * scores_row); },
        [&](Element x, int32_t& ordinal) { ordinal = ordinal_of_bits(__float_as_uint(T::widen(x))); });
  }

  // Calls use(get(j), to[j]) for 32 j < left, after eight calls of get at a time.
  template <class Element, int COUNT, class Get, class Use>
  static __device__ void in_batches(int32_t (&to)[COUNT], int left, const Get& get, const Use& use) {
    constexpr int kBatch = 8;
    static_assert(COUNT % kBatch == 0, "whole batches");
#pragma unroll
    for (int begin = 0; begin < COUNT; begin += kBatch) {
      if (32 * begin >= left) break;
      Element batch[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) batch[j] = 32 * (begin + j) < left ? get(begin + j) : Element(0);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (32 * (begin + j) < left) use(batch[j], to[begin + j]);
      }
    }
  }

  __device__ int32_t at(int64_t entry, int64_t position) const {
    // From L2: in a cooperative launch other SMs wrote them a moment ago.
    if (ordinals) return __ldcg(ordinals + entry * rows + position);
    if (mask && !mask[entry * mask_batch + position * mask_row]) return masked_ordinal;
    return ordinal_of_bits(__float_as_uint(load_float(scores + entry * scores_batch + position * scores_row, scores_dtype)));
  }
};

// Whether ordinal j and those after it are kExcluded in all threads: asked for every fourth only, since kExcluded does no harm.
__device__ inline bool past(int j, int depth) { return j % 4 == 0 && j >= depth; }

// Kept rows before a place, and the cut.
struct Placed {
  int32_t threshold;
  int ties, above, equal;

  __device__ int place() const { return above + min(equal, ties); }
};

// Calls emit(place, i) for the survivors of a tile, of which each thread holds `depth` ordinals, i of the first and every 32nd after it;
// then `placed` is that of the next tile.
template <int THREADS, int HELD, class Emit>
__device__ void place_held(BlockCounts<THREADS>& counts, const int32_t (&held)[HELD], int depth, int i, Placed& placed, const Emit& emit) {
  // At most 2^13 of each in a block at a time: both travel in one number.
  int mine = 0;
#pragma unroll
  for (int j = 0; j < HELD; ++j) {
    if (past(j, depth)) break;
    mine += held[j] > placed.threshold ? 1 : held[j] == placed.threshold ? 1 << 16 : 0;
  }
  int all;
  const int before = counts.sum_before(__reduce_add_sync(kAllLanes, mine), &all);
  Placed at = {placed.threshold, placed.ties, placed.above + (before & 0xffff), placed.equal + (before >> 16)};
  int place = at.place();
  const unsigned lower = (1u << lane_id()) - 1;
#pragma unroll
  for (int j = 0; j < HELD; ++j) {
    if (past(j, depth)) break;
    unsigned kept = __ballot_sync(kAllLanes, held[j] > at.threshold);
    if (at.equal < at.ties) {
      const bool is_equal = held[j] == at.threshold;
      const unsigned equal = __ballot_sync(kAllLanes, is_equal);
      kept |= __ballot_sync(kAllLanes, is_equal && at.equal + __popc(equal & lower) < at.ties);
      at.equal += __popc(equal);
    }
    if (kept >> lane_id() & 1) emit(place + __popc(kept & lower), i + 32 * j);
    place += __popc(kept);
  }
  placed.above += all & 0xffff;
  placed.equal += all >> 16;
}

// Calls emit(place, i) for the best k of the ordinals 0 ... n - 1, places in the order of i, for n up to THREADS * kOrdinalsPerThread: one
// block holds them all, and bisects. All threads of the block call it alike. load(held, first, left) fills held[j]
// with ordinal first + 32 j where 32 j < left, and with kExcluded elsewhere.
template <int THREADS, class Load, class Emit>
__device__ int select_held(BlockCounts<THREADS>& counts, int n, int k, const Load& load, const Emit& emit) {
  const int depth = (n + THREADS - 1) / THREADS, first = warp_id() * 32 * depth + lane_id();
  int32_t held[kOrdinalsPerThread];
  const int left = min(n - first, 32 * depth);
  load(held, first, left);
  int32_t lo = INT32_MAX, hi = INT32_MIN;
#pragma unroll
  for (int j = 0; j < kOrdinalsPerThread; ++j) {
    if (32 * j < left) lo = min(lo, held[j]);
    hi = max(hi, held[j]);
  }
  counts.range(lo, hi, &lo, &hi);
  const Cut cut = find_cut(lo, hi, n, k, [&](int32_t threshold) -> int64_t {
    int count = 0;
#pragma unroll
    for (int j = 0; j < kOrdinalsPerThread; ++j) count += held[j] >= threshold;  // no threshold is as low as kExcluded
    return counts.sum(count);
  });
  Placed placed = {cut.threshold, cut.threshold == kExcluded ? 0 : static_cast<int>(cut.ties), 0, 0};
  place_held(counts, held, depth, first, placed, emit);
  return placed.place();
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

}  // namespace v2drop

#endif  // V2DROP_CORE_SELECT_CUDA_CUH_
