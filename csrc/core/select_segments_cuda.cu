// SPDX-License-Identifier: Apache-2.0
//
// Selection on the GPU as a kernel of its own: one block a segment, or a team of blocks where segments are long and few.
#include <algorithm>

#include "occupancy.cuh"
#include "select_bins_cuda.cuh"
#include "selected_cuda.cuh"

namespace v2drop {
namespace {

// First row and length of packed segment g: in bounds whatever the offsets hold.
__device__ int64_t clamped(const int32_t* cu, int64_t g, int64_t rows, int64_t* first) {
  *first = min(max(static_cast<int64_t>(cu[g]), static_cast<int64_t>(0)), rows);
  return max(min(static_cast<int64_t>(cu[g + 1]), rows) - *first, static_cast<int64_t>(0));
}

// Segment g once the offsets are known, and of a drop the new offsets.
template <int THREADS>
__device__ v2drop_segment resolve(const Table& table, int64_t g, int64_t rows, const KeptRows& to, bool first_block,
                                  BlockCounts<THREADS>& counts) {
  v2drop_segment s = table.at(g);
  s.n_prefix = s.n_suffix = s.pad_before = s.pad_after = 0;
  s.n = clamped(to.cu, g, rows, &s.src_start);
  s.k = min(s.k, s.n);
  if (!to.new_cu) return s;
  int64_t before = 0;
#pragma unroll 1
  for (int64_t j = thread_id(); j < g; j += THREADS) {
    int64_t first;
    const int64_t n = clamped(to.cu, j, rows, &first);
    before += min(table.at(j).k, n);
  }
  // Offsets that do not ascend may count a row many times, beyond 32 bits.
  before = min(before, static_cast<int64_t>(INT32_MAX));
  const int64_t low = counts.sum(static_cast<int>(before & 0xffff)), high = counts.sum(static_cast<int>(before >> 16));
  s.dst_start = min(low + (high << 16), table.out_rows);
  s.k = min(s.k, table.out_rows - s.dst_start);
  const bool last = g == table.groups - 1;
  s.pad_after = last ? table.out_rows - s.dst_start - s.k : 0;
  if (first_block && thread_id() == 0) {
    to.new_cu[g] = static_cast<int32_t>(s.dst_start);
    if (last) to.new_cu[g + 1] = static_cast<int32_t>(s.dst_start + s.k);
  }
  return s;
}

// Writes what is selected from segment g, by the `blocks` blocks of which this is number `rank`. `select(n, k, entry,
// competing, emit)` does the selecting, from n rows that begin at row `competing` of a batch entry.
template <int THREADS, class Select>
__device__ void select_segment(const Table& table, const DeviceOrdinals& ordinals, const Selected& to, BlockCounts<THREADS>& counts,
                               int64_t g, int rank, int blocks, const Select& select) {
  const v2drop_segment s = to.kept.cu ? resolve(table, g, ordinals.rows, to.kept, rank == 0, counts) : table.at(g);
  const bool any = s.n_prefix + s.n + s.n_suffix > 0;
  // Row numbers fit 32 bits, which leaves registers to the ordinals.
  const int entry = any ? static_cast<int>(s.src_start / ordinals.rows) : 0,
            position = any ? static_cast<int>(s.src_start % ordinals.rows) : 0, competing = position + static_cast<int>(s.n_prefix);
  int64_t* kept;
  if (to.kept.keep) {
    const auto fill = [&](int64_t* out, int64_t count, int64_t first, int64_t step) {
#pragma unroll 1
      for (int64_t i = rank * THREADS + thread_id(); i < count; i += int64_t{blocks} * THREADS) out[i] = first + step * i;
      return out + count;
    };
    kept = fill(fill(to.kept.keep + s.dst_start, s.pad_before, -1, 0), s.n_prefix, position, 1);
    fill(fill(kept + s.k, s.n_suffix, competing + s.n, 1), s.pad_after, -1, 0);
  } else {
    kept = to.indices + g * to.width;
  }
  const auto value = [&](int64_t place) { return to.values ? to.values + (kept - to.indices + place) * item_bytes(to.dtype) : nullptr; };
  const int found = select(static_cast<int>(s.n), static_cast<int>(s.k), entry, competing, [&](int place, int i) {
    kept[place] = competing + i;
    if (to.values) store_value(value(place), ordinals, entry, competing + i, to.dtype);
  });
  if (to.kept.keep) return;
  for (int64_t i = found + rank * THREADS + thread_id(); i < to.width; i += int64_t{blocks} * THREADS) {
    store_nothing(kept + i, value(i), to.dtype);
  }
}

// Segments of at most kFusedSelect competing rows.
__global__ void __launch_bounds__(kThreads)
    select_kernel(const __grid_constant__ Table table, const __grid_constant__ DeviceOrdinals ordinals,
                  const __grid_constant__ Selected to) {
  trigger_next();
  BlockCounts<kThreads> counts;
  wait_for_previous();
  select_segment(table, ordinals, to, counts, blockIdx.x, 0, 1, [&](int n, int k, int entry, int competing, const auto& emit) {
    const auto load = [&](auto& held, int first, int left) { ordinals.load(held, entry, competing, first, left); };
    return select_held<kThreads>(counts, n, k, load, emit);
  });
}

// Longer ones. `size` and `pages` are for a team of a cooperative launch; `scratch` [batch * rows] is where a block keeps ordinals of given
// scores that its registers do not hold.
template <class Team>
__global__ void __launch_bounds__(kSelectThreads, Team::kBlocksOfSm)
    select_team_kernel(const __grid_constant__ Table table, const __grid_constant__ DeviceOrdinals ordinals,
                       const __grid_constant__ Selected to, int32_t* scratch, int size, int* pages) {
  if constexpr (Team::kCompiled) {
    trigger_next();
    BlockCounts<kSelectThreads> counts;
    Team team(size, pages);
    wait_for_previous();
    select_segment(table, ordinals, to, counts, blockIdx.x / team.size(), team.rank(), team.size(),
                   [&](int n, int k, int entry, int competing, const auto& emit) {
                     return select_by_bins(team, counts, n, k, Stretch{ordinals, scratch, entry, competing}, emit);
                   });
    team.leave();
  }
}

// Microseconds that the model predicts for `groups` segments of n rows in teams of `blocks` blocks, `resident` of which run at once.
double predict(const SelectCost& cost, int64_t groups, int64_t n, int64_t blocks, int64_t resident) {
  const int64_t waves = (groups * blocks + resident - 1) / std::max<int64_t>(1, resident);
  const double rows = static_cast<double>((n + blocks - 1) / blocks);
  const bool held = rows <= kSelectThreads * kHeldOrdinals;
  return static_cast<double>(waves) * (cost.fixed + rows * (held ? cost.held_row : cost.streamed_row));
}

// False where the device, or the share of it that this process has, has no room for such a launch: one block a segment will do.
bool has_room(cudaError_t error) {
  if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize) {
    cudaGetLastError();
    return false;
  }
  check_cuda(error, "launch");
  return true;
}

}  // namespace

void launch_select(const Table& table, const DeviceOrdinals& ordinals, const Selected& to, int64_t max_n, LaunchDependency dependency,
                   Workspace& workspace, const v2drop_context& context) {
  const int64_t groups = table.groups;
  const int32_t mode = context.launch_mode;
  void* const stream = context.stream;
  if (max_n <= kFusedSelect) return launch(select_kernel, groups, kThreads, dependency, stream, table, ordinals, to);

  int32_t* const scratch = ordinals.ordinals ? nullptr : workspace.take<int32_t>(table.batch * ordinals.rows);
  const auto one = select_team_kernel<OneBlock>;
  const double by_one = predict(kOneBlockCost, groups, max_n, 1, resident_blocks<select_team_kernel<OneBlock>, kSelectThreads>());
  const auto wanted = [&](int32_t as, double predicted) { return mode == as || (mode <= V2DROP_LAUNCH_SEPARATE && predicted < by_one); };

  const int64_t clusters = active_clusters<select_team_kernel<ClusterOfBlocks>, kSelectThreads, kClusterBlocks>();
  const auto cluster = select_team_kernel<ClusterOfBlocks>;
  const LaunchShape of_clusters = {groups * kClusterBlocks, kSelectThreads, kClusterBlocks};
  if (clusters > 0 && wanted(V2DROP_LAUNCH_CLUSTER, predict(kClusterCost, groups, max_n, kClusterBlocks, clusters * kClusterBlocks)) &&
      has_room(try_launch(cluster, of_clusters, dependency, stream, table, ordinals, to, scratch, kClusterBlocks, nullptr)))
    return;

  const int64_t together = resident_blocks<select_team_kernel<GridOfBlocks>, kSelectThreads>();
  const auto grid = select_team_kernel<GridOfBlocks>;
  // The pages fit into what a selection leaves of its workspace where a block has some 1000 rows.
  const int64_t size = std::min<int64_t>({kGridBlocks, max_n / 1024, together / groups}), numbers = 2 * kBins * groups * size;
  const LaunchShape of_grid = {groups * size, kSelectThreads, 0};
  if (current_device().cooperative_launch && size > 1 && workspace.left<int>() >= numbers &&
      (clusters == 0 || mode == V2DROP_LAUNCH_GRID) && wanted(V2DROP_LAUNCH_GRID, predict(kGridCost, groups, max_n, size, together)) &&
      has_room(try_launch(grid, of_grid, LaunchDependency::kCooperative, stream, table, ordinals, to, scratch, static_cast<int>(size),
                          workspace.take<int>(numbers))))
    return;

  if (mode > V2DROP_LAUNCH_ONE_BLOCK)
    fail_with(V2DROP_ERROR_UNSUPPORTED, "context.launch_mode: this device cannot launch it for these segments");
  launch(one, groups, kSelectThreads, dependency, stream, table, ordinals, to, scratch, 1, nullptr);
}

}  // namespace v2drop
