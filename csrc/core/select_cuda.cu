// SPDX-License-Identifier: Apache-2.0
//
// What selections on the GPU read, and top-k. select_segments_cuda.cu has the selection itself.
#include <algorithm>

#include "ops.h"
#include "score_cuda.cuh"
#include "selected_cuda.cuh"

namespace v2drop {
namespace {

// Sorts survivors by score: the place of each is the number of those before it, counted against all others.
__global__ void __launch_bounds__(kThreads)
    rank_kernel(const __grid_constant__ Table table, const __grid_constant__ DeviceOrdinals ordinals, const __grid_constant__ Selected to,
                const int64_t* by_position, const int32_t* cu, int64_t tiles) {
  struct Others {
    int32_t ordinal[kThreads];
    int64_t index[kThreads];
  };
  Others& others = block_shared<Others>();
  wait_for_previous();
  const int64_t g = blockIdx.x / tiles, mine = blockIdx.x % tiles * kThreads + thread_id();
  const int64_t entry = cu ? 0 : min(table.at(g).src_start / table.in_rows, table.batch - 1);
  by_position += g * to.width;
  const int64_t index = mine < to.width ? by_position[mine] : -1;
  const int32_t ordinal = index < 0 ? kExcluded : ordinals.at(entry, index);
  int64_t rank = 0;
  for (int64_t begin = 0; begin < to.width; begin += kThreads) {
    const int64_t other = begin + thread_id();
    others.index[thread_id()] = other < to.width ? by_position[other] : -1;
    others.ordinal[thread_id()] = others.index[thread_id()] < 0 ? kExcluded : ordinals.at(entry, others.index[thread_id()]);
    __syncthreads();
    for (int j = 0; j < kThreads; ++j) {
      rank += others.index[j] >= 0 && (others.ordinal[j] > ordinal || (others.ordinal[j] == ordinal && others.index[j] < index));
    }
    __syncthreads();
  }
  if (mine >= to.width) return;
  const int64_t place = g * to.width + (index < 0 ? mine : rank);
  char* value = to.values + place * item_bytes(to.dtype);
  if (index < 0) return store_nothing(to.indices + place, value, to.dtype);
  to.indices[place] = index;
  store_value(value, ordinals, entry, index, to.dtype);
}

bool all_alike(const Segments& segments, int64_t batch, int64_t rows, int64_t out_rows, bool tiled) {
  if (!segments.cu_seqlens && segments.count != batch) return false;
  for (int64_t g = 0; g < segments.count; ++g) {
    const v2drop_segment &s = segments[g], &first = segments[0];
    if (s.k != first.k) return false;
    if (segments.cu_seqlens) continue;
    if (s.src_start != g * rows || s.n_prefix != first.n_prefix || s.n != first.n || s.n_suffix != first.n_suffix) return false;
    if (tiled && (s.dst_start != g * out_rows || s.pad_before != first.pad_before || s.pad_after != first.pad_after)) return false;
  }
  return true;
}

}  // namespace

Table make_table(const Segments& segments, const ScoreSource& source, int64_t out_rows, bool tiled, const v2drop_context& context,
                 Workspace& workspace) {
  if (source.batch * source.rows > kMaxRows) fail("%s: more than 2^30 rows", source.has_scores ? "scores" : "prev");
  Table table = {};
  table.groups = segments.count;
  table.batch = source.batch;
  table.in_rows = std::max<int64_t>(1, source.rows);
  table.out_rows = out_rows;
  if (segments.count == 0) return table;
  if (all_alike(segments, source.batch, source.rows, out_rows, tiled)) {
    table.alike = segments[0];
    return table;
  }
  table.rows = context.device_segments;
  if (table.rows) return table;
  v2drop_segment* rows = workspace.take<v2drop_segment>(segments.count);
  table.rows = rows;
  constexpr int64_t kFields = sizeof(v2drop_segment) / sizeof(int64_t);
  launch_upload(reinterpret_cast<const int64_t*>(segments.data), segments.count * kFields, reinterpret_cast<int64_t*>(rows),
                context.stream);
  return table;
}

DeviceOrdinals device_ordinals(const ScoreSource& source, const int32_t* ordinals) {
  DeviceOrdinals device = {};
  device.rows = source.rows;
  device.ordinals = ordinals;
  device.masked_ordinal = source.masked_ordinal;
  if (ordinals) return device;
  device.scores = source.scores.data;
  device.scores_batch = source.scores.batch_stride;
  device.scores_row = source.scores.row_stride;
  device.scores_dtype = source.scores.dtype;
  if (source.has_mask) {
    device.mask = source.mask.data;
    device.mask_batch = source.mask.batch_stride;
    device.mask_row = source.mask.row_stride;
  }
  return device;
}

Scored describe_ordinals(const ScoreSource& source, const Segments& segments, const Table& table, Workspace& workspace) {
  Scored scored = describe_scores(source.hidden);
  scored.ordinals = workspace.take<int32_t>(source.batch * source.rows);
  if (source.has_mask) {
    scored.mask = source.mask.data;
    scored.mask_batch = source.mask.batch_stride;
    scored.mask_row = source.mask.row_stride;
  }
  scored.masked_ordinal = source.masked_ordinal;
  if (segments.cu_seqlens) return scored;  // all rows
  scored.segments = table;
  int64_t slots = 0;
  for (int64_t g = 0; g < segments.count; ++g) slots += segments[g].n;
  if (slots > kMaxRows) fail("segments: more than 2^30 competing rows");
  scored.slots = static_cast<int32_t>(slots);
  return scored;
}

namespace cuda {

void topk(const TopkRequest& request, const v2drop_context& context) {
  const ScoreSource& source = request.source;
  const Segments& segments = request.segments;
  const int64_t width = request.width;
  if (segments.count == 0 || width == 0) return;

  Workspace workspace(context);
  const Table table = make_table(segments, source, width, false, context, workspace);
  LaunchDependency dependency = LaunchDependency::kNone;
  DeviceOrdinals ordinals;
  if (source.has_scores) {
    ordinals = device_ordinals(source, nullptr);
  } else {
    const Hidden& hidden = source.hidden;
    const Scored scored = describe_ordinals(source, segments, table, workspace);
    ordinals = device_ordinals(source, scored.ordinals);
    dependency = launch_score(scored, hidden.prev.dtype, is_aligned(hidden.prev) && is_aligned(hidden.cur), context.stream);
  }
  const KeptRows lengths = {nullptr, segments.cu_seqlens, nullptr};
  const int64_t max_n = segments.cu_seqlens ? source.rows : segments.largest();
  if (request.order == V2DROP_ORDER_POSITION) {
    launch_select(table, ordinals, Selected{lengths, request.indices, request.values, width, request.dtype}, max_n, dependency, workspace,
                  context);
    return;
  }
  int64_t* by_position = workspace.take<int64_t>(segments.count * width);
  launch_select(table, ordinals, Selected{lengths, by_position, nullptr, width, request.dtype}, max_n, dependency, workspace, context);
  const int64_t tiles = (width + kThreads - 1) / kThreads;
  launch(rank_kernel, segments.count * tiles, kThreads, LaunchDependency::kDependent, context.stream, table, ordinals,
         Selected{{}, request.indices, request.values, width, request.dtype}, by_position, lengths.cu, tiles);
}

}  // namespace cuda
}  // namespace v2drop
