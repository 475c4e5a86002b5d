// SPDX-License-Identifier: Apache-2.0
//
// Selection on the GPU: one block for each segment.
#include <algorithm>

#include "ops.h"
#include "score_cuda.cuh"
#include "select_cuda.cuh"

namespace v2drop {
namespace {

// Where the segments select to.
struct Selected {
  KeptRows kept;     // of a drop, or
  int64_t* indices;  // of a top-k [groups, width]
  char* values;      // NULL: the rank kernel writes them
  int64_t width;
  int32_t dtype;
};

__device__ int item_bytes(int dtype) { return dtype == V2DROP_FLOAT32 ? 4 : 2; }

__device__ void store_bits(char* to, uint32_t bits, int dtype) {
  if (dtype == V2DROP_FLOAT32) {
    *reinterpret_cast<uint32_t*>(to) = bits;
  } else {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bits);
  }
}

__device__ void store_value(char* to, const DeviceOrdinals& ordinals, int64_t entry, int64_t position, int dtype) {
  if (ordinals.ordinals) return store_bits(to, bits_of_ordinal(ordinals.at(entry, position)), V2DROP_FLOAT32);
  const char* from = ordinals.scores + entry * ordinals.scores_batch + position * ordinals.scores_row;
  store_bits(to, dtype == V2DROP_FLOAT32 ? *reinterpret_cast<const uint32_t*>(from) : *reinterpret_cast<const uint16_t*>(from), dtype);
}

__device__ void store_nothing(int64_t* index, char* value, int dtype) {
  *index = -1;
  if (value) store_bits(value, dtype == V2DROP_FLOAT32 ? 0xff800000u : dtype == V2DROP_FLOAT16 ? 0xfc00u : 0xff80u, dtype);
}

// First row and length of packed segment g: in bounds whatever the offsets hold.
__device__ int64_t clamped(const int32_t* cu, int64_t g, int64_t rows, int64_t* first) {
  *first = min(max(static_cast<int64_t>(cu[g]), static_cast<int64_t>(0)), rows);
  return max(min(static_cast<int64_t>(cu[g + 1]), rows) - *first, static_cast<int64_t>(0));
}

// Segment g once the offsets are known, and of a drop the new offsets.
template <int THREADS>
__device__ v2drop_segment resolve(const Table& table, int64_t g, int64_t rows, const KeptRows& to, BlockCounts<THREADS>& counts) {
  v2drop_segment s = table.at(g);
  s.n_prefix = s.n_suffix = s.pad_before = s.pad_after = 0;
  s.n = clamped(to.cu, g, rows, &s.src_start);
  s.k = min(s.k, s.n);
  if (!to.new_cu) return s;
  int64_t before = 0;
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
  if (thread_id() == 0) {
    to.new_cu[g] = static_cast<int32_t>(s.dst_start);
    if (last) to.new_cu[g + 1] = static_cast<int32_t>(s.dst_start + s.k);
  }
  return s;
}

template <int THREADS, bool BINS>
__global__ void __launch_bounds__(THREADS)
    select_kernel(const __grid_constant__ Table table, const __grid_constant__ DeviceOrdinals ordinals,
                  const __grid_constant__ Selected to) {
  trigger_next();
  BlockCounts<THREADS> counts;
  const int64_t g = blockIdx.x;
  wait_for_previous();
  const v2drop_segment s = to.kept.cu ? resolve(table, g, ordinals.rows, to.kept, counts) : table.at(g);
  const bool any = s.n_prefix + s.n + s.n_suffix > 0;
  const int64_t entry = any ? s.src_start / ordinals.rows : 0, position = any ? s.src_start % ordinals.rows : 0,
                competing = position + s.n_prefix;
  const auto ordinal = [&](int i) { return ordinals.at(entry, competing + i); };
  const int n = static_cast<int>(s.n), k = static_cast<int>(s.k);
  if (to.kept.keep) {
    int64_t* out = to.kept.keep + s.dst_start;
    for (int64_t i = thread_id(); i < s.pad_before; i += THREADS) out[i] = -1;
    out += s.pad_before;
    for (int64_t i = thread_id(); i < s.n_prefix; i += THREADS) out[i] = position + i;
    out += s.n_prefix;
    select_best<THREADS, BINS>(counts, n, k, ordinal, [&](int place, int i) { out[place] = competing + i; });
    out += s.k;
    for (int64_t i = thread_id(); i < s.n_suffix; i += THREADS) out[i] = competing + s.n + i;
    out += s.n_suffix;
    for (int64_t i = thread_id(); i < s.pad_after; i += THREADS) out[i] = -1;
    return;
  }
  int64_t* index = to.indices + g * to.width;
  char* value = to.values ? to.values + g * to.width * item_bytes(to.dtype) : nullptr;
  const int found = select_best<THREADS, BINS>(counts, n, k, ordinal, [&](int place, int i) {
    index[place] = competing + i;
    if (value) store_value(value + static_cast<int64_t>(place) * item_bytes(to.dtype), ordinals, entry, competing + i, to.dtype);
  });
  for (int64_t i = found + thread_id(); i < to.width; i += THREADS) {
    store_nothing(index + i, value ? value + i * item_bytes(to.dtype) : nullptr, to.dtype);
  }
}

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

void launch_select(const Table& table, const DeviceOrdinals& ordinals, const Selected& to, int64_t max_n, LaunchDependency dependency,
                   void* stream) {
  if (max_n <= kFusedSelect) {
    launch(select_kernel<kThreads, false>, table.groups, kThreads, dependency, stream, table, ordinals, to);
  } else {
    launch(select_kernel<kSelectThreads, true>, table.groups, kSelectThreads, dependency, stream, table, ordinals, to);
  }
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
  launch_upload(reinterpret_cast<const int64_t*>(segments.data), segments.count * kFields, reinterpret_cast<int64_t*>(rows), context.stream);
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

void launch_select(const Table& table, const DeviceOrdinals& ordinals, const KeptRows& to, int64_t max_n, LaunchDependency dependency,
                   void* stream) {
  launch_select(table, ordinals, Selected{to, nullptr, nullptr, 0, V2DROP_FLOAT32}, max_n, dependency, stream);
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
    launch_select(table, ordinals, Selected{lengths, request.indices, request.values, width, request.dtype}, max_n, dependency,
                  context.stream);
    return;
  }
  int64_t* by_position = workspace.take<int64_t>(segments.count * width);
  launch_select(table, ordinals, Selected{lengths, by_position, nullptr, width, request.dtype}, max_n, dependency, context.stream);
  const int64_t tiles = (width + kThreads - 1) / kThreads;
  launch(rank_kernel, segments.count * tiles, kThreads, LaunchDependency::kDependent, context.stream, table, ordinals,
         Selected{{}, request.indices, request.values, width, request.dtype}, by_position, lengths.cu, tiles);
}

}  // namespace cuda
}  // namespace v2drop
