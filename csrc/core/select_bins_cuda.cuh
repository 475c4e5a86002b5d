// SPDX-License-Identifier: Apache-2.0
//
// Exact selection from a segment by a team of blocks. Every block has a stretch of the segment, in registers where it fits; the team
// narrows the range of the cut by counts of 256 bins, three or four times for scores, and every block then places its own survivors in
// parallel.
#ifndef V2DROP_CORE_SELECT_BINS_CUDA_CUH_
#define V2DROP_CORE_SELECT_BINS_CUDA_CUH_

#include "select_cuda.cuh"
#include "team_cuda.cuh"

namespace v2drop {

// Several counters of each bin, by lane, so that at most 32 / kColumns lanes meet in one, also where all ordinals are equal.
struct Histogram {
  static constexpr int kColumns = 8;
  alignas(16) int count[kBins + 1][kColumns];  // the last for what is beyond the range
  FoundBin found;
};

// The range of the ordinals of the team, of which this thread has [lo, hi].
template <class Team>
__device__ void range_of_team(Team& team, BlockCounts<kSelectThreads>& counts, int32_t* lo, int32_t* hi) {
  counts.range(*lo, *hi, lo, hi);
  if constexpr (Team::kMost > 1) {
    if (thread_id() == 0) {
      team.own()[0] = *lo;
      team.own()[1] = *hi;
    }
    team.meet();
    const int other = lane_id() < team.size() ? lane_id() : 0;
    *lo = __reduce_min_sync(kAllLanes, team.of(other, 0));
    *hi = __reduce_max_sync(kAllLanes, team.of(other, 1));
  }
}

// Counts the ordinals of the team by bin, and finds the one that holds the `wanted`-th best. `each_tile(body)` calls body() with every tile
// of this block in `held`.
template <class Team, class EachTile>
__device__ FoundBin find_bin(Team& team, BlockCounts<kSelectThreads>& counts, Bins bins, int32_t hi, int64_t wanted,
                             const int32_t (&held)[kHeldOrdinals], int depth, const EachTile& each_tile) {
  static_assert(kSelectThreads >= kBins && Histogram::kColumns == 8, "a thread has one bin, as two int4");
  Histogram& histogram = block_shared<Histogram>();
  int4* quads = reinterpret_cast<int4*>(histogram.count);
  for (int j = thread_id(); j < kBins * 2; j += kSelectThreads) quads[j] = make_int4(0, 0, 0, 0);
  __syncthreads();
  int* column = &histogram.count[0][lane_id() % Histogram::kColumns];
  const uint32_t first = static_cast<uint32_t>(bins.lo), width = static_cast<uint32_t>(hi) - first;
  each_tile([&] {
#pragma unroll
    for (int j = 0; j < kHeldOrdinals; ++j) {
      if (past(j, depth)) break;
      const uint32_t offset = static_cast<uint32_t>(held[j]) - first;  // beyond the width also where the ordinal is below the range
      atomicAdd(column + (offset <= width ? offset >> bins.shift : kBins) * Histogram::kColumns, 1);  // no branch
    }
  });
  __syncthreads();
  const int mine = thread_id();
  if (mine < kBins) {
    const int turn = mine / 4 % 2;  // eight neighbours read eight different groups of banks
    const int4 a = quads[mine * 2 + turn], b = quads[mine * 2 + 1 - turn];
    team.own()[mine] = a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w;
  }
  team.meet();
  // Thread t has the t-th bin from above; the counts of all bins above it are those of the threads before it.
  const int bin = kBins - 1 - mine;
  int count = 0;
  if (bin >= 0) {
    constexpr int kBatch = Team::kMost < 8 ? Team::kMost : 8;  // reads at once
#pragma unroll 1
    for (int first_rank = 0; first_rank < team.size(); first_rank += kBatch) {
      int of_block[kBatch];
#pragma unroll
      for (int r = 0; r < kBatch; ++r) of_block[r] = first_rank + r < team.size() ? team.of(first_rank + r, bin) : 0;
#pragma unroll
      for (int r = 0; r < kBatch; ++r) count += of_block[r];
    }
  }
  int upto = count;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, upto, step);
    if (lane_id() >= step) upto += other;
  }
  int all;
  upto += counts.sum_before(__shfl_sync(kAllLanes, upto, 31), &all);
  if (bin >= 0 && upto >= wanted && upto - count < wanted) histogram.found = {bin, upto, upto - count};
  __syncthreads();
  return histogram.found;
}

// The competing rows of a segment. The ordinals of given scores are kept in `scratch` [batch * rows], where every thread finds what it
// wrote itself, if a block has more of them than its registers hold.
struct Stretch {
  const DeviceOrdinals& ordinals;
  int32_t* scratch;
  int entry, position;

  template <int COUNT>
  __device__ void load(int32_t (&held)[COUNT], int first, int left, bool again) const {
    ordinals.load(held, entry, position, first, left);
    if (!again || ordinals.ordinals) return;
    int32_t* const to = scratch + entry * ordinals.rows + position + first;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      if (32 * j < left) to[32 * j] = held[j];
    }
  }
  template <int COUNT>
  __device__ void load_again(int32_t (&held)[COUNT], int first, int left) const {
    const int32_t* const from = ordinals.ordinals ? ordinals.ordinals : scratch;
    DeviceOrdinals::load_computed(from + entry * ordinals.rows + position + first, held, left);
  }
};

// Calls emit(place, i) for the best k of the ordinals 0 ... n - 1 of a segment, places in the order of i: each block of the team for those
// of its own stretch. Returns how many there are, less than k only if ordinals are excluded. All threads of the team call it alike.
template <class Team, class Emit>
__device__ int select_by_bins(Team& team, BlockCounts<kSelectThreads>& counts, int n, int k, const Stretch& stretch, const Emit& emit) {
  constexpr int kTile = kSelectThreads * kHeldOrdinals;
  if (k <= 0) return 0;
  const int share = (n + team.size() - 1) / team.size(), begin = min(n, share * team.rank()), end = min(n, begin + share);
  const int tiles = (end - begin + kTile - 1) / kTile;
  // A warp holds neighbours, 32 at a time: loads coalesce, and ballots put them into order.
  const int depth = tiles > 1 ? kHeldOrdinals : (end - begin + kSelectThreads - 1) / kSelectThreads;
  const int mine = begin + warp_id() * 32 * depth + lane_id();
  int32_t held[kHeldOrdinals];
  const auto each_tile = [&](const auto& body) {
    for (int tile = 0; tile < tiles; ++tile) {
      const int i = mine + tile * kTile;
      if (tiles > 1) stretch.load_again(held, i, min(end - i, 32 * depth));
      body();
    }
  };

  int32_t lo = INT32_MAX, hi = INT32_MIN;
  for (int tile = 0; tile < tiles; ++tile) {
    const int i = mine + tile * kTile, left = min(end - i, 32 * depth);
    stretch.load(held, i, left, tiles > 1);
#pragma unroll
    for (int j = 0; j < kHeldOrdinals; ++j) {
      if (32 * j < left) lo = min(lo, held[j]);
      hi = max(hi, held[j]);  // kExcluded where there is none
    }
  }
  Cut cut = {kExcluded, 0};
  if (k < n) {
    range_of_team(team, counts, &lo, &hi);
    cut = find_cut_by_bins(lo, hi, n, k, [&](Bins bins, int32_t range_hi, int64_t wanted) -> FoundBin {
      return find_bin(team, counts, bins, range_hi, wanted, held, depth, each_tile);
    });
  }

  Placed placed = {cut.threshold, cut.threshold == kExcluded ? 0 : static_cast<int>(cut.ties), 0, 0};
  int all_above = 0, all_equal = 0;
  if constexpr (Team::kMost > 1) {
    int above = 0, equal = 0;
    each_tile([&] {
#pragma unroll
      for (int j = 0; j < kHeldOrdinals; ++j) {
        if (past(j, depth)) break;
        above += held[j] > placed.threshold;
        equal += held[j] == placed.threshold;
      }
    });
    above = counts.sum(above);
    equal = counts.sum(equal);
    if (thread_id() == 0) {
      team.own()[0] = above;
      team.own()[1] = equal;
    }
    team.meet();
    const bool is_one = lane_id() < team.size();
    above = is_one ? team.of(lane_id(), 0) : 0;
    equal = is_one ? team.of(lane_id(), 1) : 0;
    all_above = __reduce_add_sync(kAllLanes, above);
    all_equal = __reduce_add_sync(kAllLanes, equal);
    placed.above = __reduce_add_sync(kAllLanes, lane_id() < team.rank() ? above : 0);
    placed.equal = __reduce_add_sync(kAllLanes, lane_id() < team.rank() ? equal : 0);
  }
  int i = mine;
  each_tile([&] {
    place_held(counts, held, depth, i, placed, emit);
    i += kTile;
  });
  if constexpr (Team::kMost == 1) {
    all_above = placed.above;
    all_equal = placed.equal;
  }
  return all_above + min(all_equal, placed.ties);
}

}  // namespace v2drop

#endif  // V2DROP_CORE_SELECT_BINS_CUDA_CUH_
