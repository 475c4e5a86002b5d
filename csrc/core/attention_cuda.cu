// SPDX-License-Identifier: Apache-2.0
//
// How much attention some queries pay to every key, in two launches. The first reads the keys, once for all heads and queries that share
// them, writes the masked logits, and of every run of keys the maximum and the sum of exponentials. Every block of the second puts these
// together and reduces the weights of its keys. Runs have a size that depends on the number of keys alone, so results depend on neither
// the device nor on what else is in the batch.
//
// The file is longer than others: both kernels, and the host code that sizes them, depend on one layout of the scratch memory, which must
// be changed in all of them together.
#include <algorithm>

#include "dots_cuda.cuh"
#include "launch.cuh"
#include "ops.h"

namespace v2drop {
namespace {

// One step: `queries` of the queries, from query0 on.
struct Weighing {
  DeviceHeads q, k;
  const char *query_rows, *key_mask, *droppable;  // the masks may be null
  int64_t query_rows_batch, query_rows_row, key_mask_batch, key_mask_row, droppable_batch, droppable_row;
  int32_t dim, group, kv_heads;
  int32_t query0, queries;
  int64_t rows;
  int32_t splits, split_keys;
  bool causal, dot;
  float scale;
  // [entry][head][query of the step][row, or split].
  float *logits, *maxima, *sums, *droppable_sums;  // the last one, by which heads are chosen, is null where none are

  __device__ int64_t query_row(int64_t entry, int query) const {
    return *reinterpret_cast<const int64_t*>(query_rows + entry * query_rows_batch + (query0 + query) * query_rows_row);
  }
  __device__ bool is_droppable(int64_t entry, int64_t row) const {
    return !droppable || droppable[entry * droppable_batch + row * droppable_row];
  }
};

// e^x for x <= 0 and NaN.
__device__ inline float exponential(float x) { return expf(x); }

// exp(-inf - -inf) is not a number, but no weight.
__device__ inline float base_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

struct LogitTile {
  // The pitch puts the four vectors that a group writes at once into different banks.
  static constexpr int kPitch = kAttentionKeys + kDotRows;
  float logits[kAttentionVectors][kPitch];
  const char* query[kAttentionVectors];
  float maximum[kAttentionVectors], sum[kAttentionVectors], droppable_sum[kAttentionVectors];  // of the tiles so far
};

// Products of kAttentionKeys keys from `first` on with the vectors of the tile, by all threads of the block.
template <class T, int LANES, bool ALIGNED>
__device__ void multiply(const Weighing& a, const char* keys, int64_t first, int vectors, LogitTile& tile) {
  constexpr int kElements = Vector<T>::kElements, kGroups = kThreads / LANES, kValues = kDotRows * kDotVectors;
  constexpr int kShare = LANES > kValues ? LANES / kValues : 1, kSums = LANES < kValues ? kValues / LANES : 1;
  const int lane = thread_id() % LANES;
#pragma unroll 1
  for (int quad = thread_id() / LANES; quad < kAttentionKeys / kDotRows; quad += kGroups) {
    const char* row[kDotRows];
#pragma unroll
    for (int r = 0; r < kDotRows; ++r) {
      const int64_t key = first + quad * kDotRows + r;
      row[r] = keys + (key < a.rows ? key : a.rows - 1) * a.k.row_stride;
    }
#pragma unroll 1
    for (int v = 0; v < vectors; v += kDotVectors) {  // beyond the first ones the rows come from L1
      float value[kValues] = {};
#pragma unroll 1
      for (int j = lane * kElements; j < a.dim; j += LANES * kElements) {
        if constexpr (ALIGNED) {
          Vector<T> x[kDotRows];
#pragma unroll
          for (int r = 0; r < kDotRows; ++r) x[r] = load_vector<T, true, true>(row[r], j, a.dim);
#pragma unroll
          for (int i = 0; i < kDotVectors; ++i) {
            const Vector<T> y = load_vector<T, true, true>(tile.query[v + i], j, a.dim);
#pragma unroll
            for (int r = 0; r < kDotRows; ++r) value[i * kDotRows + r] = add_dot<T>(value[i * kDotRows + r], x[r], y);
          }
        } else {  // the same sums, an element at a time
          const int end = min(a.dim, j + kElements);
#pragma unroll 1
          for (int e = j; e < end; ++e) {
            float x[kDotRows];
#pragma unroll
            for (int r = 0; r < kDotRows; ++r) x[r] = element<T>(row[r], e);
#pragma unroll
            for (int i = 0; i < kDotVectors; ++i) {
              const float y = element<T>(tile.query[v + i], e);
#pragma unroll
              for (int r = 0; r < kDotRows; ++r) value[i * kDotRows + r] = __fmaf_rn(x[r], y, value[i * kDotRows + r]);
            }
          }
        }
      }
      sum_over_lanes<LANES>(value);
      if (lane % kShare != 0) continue;
#pragma unroll
      for (int e = 0; e < kSums; ++e) {
        const int of = lane * kValues / LANES + e;
        tile.logits[v + of / kDotRows][quad * kDotRows + of % kDotRows] = value[e] * a.scale;
      }
    }
  }
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Masks the logits of one vector, writes them, and adds them to what is known of those before. A warp comes here.
__device__ inline void weigh_vector(const Weighing& a, int64_t entry, int64_t pair, int query, int64_t first, int64_t end, int v,
                                    LogitTile& tile) {
  const int64_t reach = a.query_row(entry, query);
  float x[kAttentionKeys / 32], most = tile.maximum[v];
  bool counts[kAttentionKeys / 32];
#pragma unroll
  for (int i = 0; i < kAttentionKeys / 32; ++i) {
    const int64_t key = first + lane_id() + 32 * i;
    const bool seen = key < end && reach >= 0 && (!a.causal || key <= reach) &&
                      (!a.key_mask || a.key_mask[entry * a.key_mask_batch + key * a.key_mask_row]);
    x[i] = seen ? tile.logits[v][lane_id() + 32 * i] : a.dot ? 0.0f : -INFINITY;
    // A softmax gives 1 in total: what gives least to the other keys gives most, and exactly 0 where there are none.
    counts[i] = seen && a.droppable_sums && a.is_droppable(entry, key) == a.dot;
    if (key < end) a.logits[pair * a.rows + key] = x[i];
    most = fmaxf(most, x[i]);
  }
  most = warp_max(most);
  const float base = base_of(most), shrink = a.dot ? 1.0f : exponential(tile.maximum[v] - base);
  float all = 0, droppable = 0;
#pragma unroll
  for (int i = 0; i < kAttentionKeys / 32; ++i) {
    const float weight = a.dot ? x[i] : exponential(x[i] - base);
    all += weight;
    droppable += counts[i] ? weight : 0.0f;
  }
  all = tile.sum[v] * shrink + warp_sum(all);
  droppable = tile.droppable_sum[v] * shrink + warp_sum(droppable);
  __syncwarp();
  if (lane_id() == 0) tile.maximum[v] = most, tile.sum[v] = all, tile.droppable_sum[v] = droppable;
}

template <class T, int LANES, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kDotBlocksOfSm) weigh_kernel(const __grid_constant__ Weighing a) {
  trigger_next();
  wait_for_previous();
  LogitTile& tile = block_shared<LogitTile>();
  const int split = static_cast<int>(blockIdx.x) % a.splits, kv = static_cast<int>(blockIdx.x) / a.splits % a.kv_heads,
            entry = static_cast<int>(blockIdx.x) / a.splits / a.kv_heads, all_vectors = a.group * a.queries, mine = thread_id();
  const int64_t begin = static_cast<int64_t>(split) * a.split_keys, pair0 = (static_cast<int64_t>(entry) * a.kv_heads + kv) * all_vectors;
  const int64_t end = begin + a.split_keys < a.rows ? begin + a.split_keys : a.rows;
#pragma unroll 1
  for (int v0 = 0; v0 < all_vectors; v0 += kAttentionVectors) {
    const int vectors = min(kAttentionVectors, all_vectors - v0);
    if (mine < kAttentionVectors) {
      const int n = v0 + min(mine, vectors - 1);
      tile.query[mine] = a.q.at(entry, kv * a.group + n / a.queries, a.query0 + n % a.queries);
      tile.maximum[mine] = -INFINITY, tile.sum[mine] = 0, tile.droppable_sum[mine] = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int64_t first = begin; first < end; first += kAttentionKeys) {
      multiply<T, LANES, ALIGNED>(a, a.k.at(entry, kv, 0), first, vectors, tile);
      __syncthreads();
#pragma unroll 1
      for (int v = warp_id(); v < vectors; v += kThreads / 32) {
        weigh_vector(a, entry, pair0 + v0 + v, (v0 + v) % a.queries, first, end, v, tile);
      }
      __syncthreads();
    }
    if (mine < vectors) {
      const int64_t at = (pair0 + v0 + mine) * a.splits + split;
      a.maxima[at] = tile.maximum[mine];
      a.sums[at] = tile.sum[mine];
      if (a.droppable_sums) a.droppable_sums[at] = tile.droppable_sum[mine];
    }
    __syncthreads();
  }
}

struct Reduction {
  Weighing of;
  int32_t heads, how, squares;  // query heads; v2drop_heads; whether queries add their squares
  int32_t all_queries;
  bool first, last;
  int32_t tiles;
  float* totals;  // [entry][row], of the steps so far
  char* scores;
  int64_t scores_batch, scores_row;
};

// Of every (head, query) pair: the maximum, and what its exponentials are multiplied with.
struct Pairs {
  float maximum[kAttentionPairs], factor[kAttentionPairs];
  int32_t total[kAttentionPairs];  // the key of what a head gives to the droppable rows
};

__global__ void __launch_bounds__(kThreads, kBlocksOfSm) reduce_kernel(const __grid_constant__ Reduction r) {
  constexpr int kWarps = kThreads / 32;
  const Weighing& a = r.of;
  trigger_next();
  wait_for_previous();
  Pairs& pairs = block_shared<Pairs>();
  BlockCounts<kThreads> counts;
  const int entry = static_cast<int>(blockIdx.x) / r.tiles, n_pairs = r.heads * a.queries;
  const int64_t row = static_cast<int64_t>(static_cast<int>(blockIdx.x) % r.tiles) * kThreads + thread_id();
  const float scale = 1.0f / static_cast<float>(r.how > 0 ? r.how : r.how == V2DROP_HEADS_MEAN ? r.heads : 1);

  for (int pair = warp_id(); pair < n_pairs; pair += kWarps) {
    const int64_t at = (static_cast<int64_t>(entry) * n_pairs + pair) * a.splits;
    float most = -INFINITY, all = 0, droppable = 0;
    if (!a.dot) {
      for (int s = lane_id(); s < a.splits; s += 32) most = fmaxf(most, a.maxima[at + s]);
      most = warp_max(most);
    }
    for (int s = lane_id(); s < a.splits; s += 32) {
      const float weight = a.dot ? 1.0f : exponential(a.maxima[at + s] - base_of(most));
      all += a.sums[at + s] * weight;
      if (a.droppable_sums) droppable += a.droppable_sums[at + s] * weight;
    }
    all = warp_sum(all);
    const float factor = a.dot ? scale : most == -INFINITY && all == 0 ? 0.0f : __fdiv_rn(scale, all);
    droppable = warp_sum(droppable) * (a.dot ? factor : -factor);
    if (lane_id() == 0) {
      pairs.maximum[pair] = base_of(most);
      pairs.factor[pair] = factor;
      pairs.total[pair] = ordinal_of_bits(__float_as_uint(droppable));
    }
  }
  __syncthreads();
  if (r.how > 0) {  // pairs of heads that are not among the chosen ones weigh nothing
    for (int pair = thread_id(); pair < n_pairs; pair += kThreads) {
      const int mine = pairs.total[pair];
      int before = 0;
      for (int other = pair % a.queries; other < n_pairs; other += a.queries) {
        before += pairs.total[other] > mine || (pairs.total[other] == mine && other < pair);
      }
      if (before >= r.how) pairs.factor[pair] = 0;
    }
    __syncthreads();
  }
  int present = 0;
  for (int i = thread_id(); r.last && i < r.all_queries; i += kThreads) present += a.query_row(entry, i - a.query0) >= 0;
  present = counts.sum(present);
  if (row >= a.rows) return;

  const bool largest = r.how == V2DROP_HEADS_MAX;
  const int64_t at = static_cast<int64_t>(entry) * a.rows + row;
  float total = r.first ? 0.0f : r.totals[at];
  for (int query = 0; query < a.queries; ++query) {
    float of_query = largest && a.dot ? -INFINITY : 0.0f;
    for (int pair = query; pair < n_pairs; pair += a.queries) {
      const float factor = pairs.factor[pair];
      if (factor == 0) continue;
      const float logit = a.logits[(static_cast<int64_t>(entry) * n_pairs + pair) * a.rows + row];
      // What is invisible weighs nothing, whatever the factor.
      const float weight = a.dot ? logit * factor : logit == -INFINITY ? 0.0f : exponential(logit - pairs.maximum[pair]) * factor;
      of_query = !largest ? of_query + weight : of_query >= weight || of_query != of_query ? of_query : weight;
    }
    if (a.query_row(entry, query) >= 0) total += r.squares ? of_query * of_query : of_query;
  }
  if (!r.last) {
    r.totals[at] = total;
    return;
  }
  float score = r.squares ? __fsqrt_rn(total) : __fdiv_rn(total, static_cast<float>(present > 0 ? present : 1));
  if (!a.is_droppable(entry, row)) score = 0;
  *reinterpret_cast<float*>(r.scores + entry * r.scores_batch + row * r.scores_row) = score;
}

int64_t split_keys(int64_t rows) {
  const int64_t tiles = rows / kAttentionKeys + (rows % kAttentionKeys != 0);  // rows may be anything here
  return std::max<int64_t>(1, (tiles + kAttentionSplits - 1) / kAttentionSplits) * kAttentionKeys;
}
int64_t splits_of(int64_t rows) { return std::max<int64_t>(1, rows / split_keys(rows) + (rows % split_keys(rows) != 0)); }

// Scratch memory of a step with so many queries; saturates, so that no size overflows.
int64_t step_bytes(int64_t batch, int64_t heads, int64_t queries, int64_t rows) {
  constexpr int64_t kMost = INT64_MAX / 8;
  const auto times = [](int64_t a, int64_t b) {
    int64_t product;
    return __builtin_mul_overflow(a, b, &product) || product > kMost ? kMost : product;
  };
  const int64_t pairs = times(times(batch, heads), queries), padding = 5 * 256;
  return times(pairs, times(rows, 4)) + times(pairs, times(splits_of(rows), 12)) + times(batch, times(rows, 4)) + padding;
}

// How many queries go into a step with so much scratch memory; one at the least.
int64_t step_queries(int64_t batch, int64_t heads, int64_t queries, int64_t rows, int64_t bytes) {
  int64_t low = 1, high = std::max<int64_t>(1, std::min(queries, kAttentionPairs / std::max<int64_t>(1, heads)));
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    step_bytes(batch, heads, middle, rows) <= bytes ? low = middle : high = middle - 1;
  }
  return low;
}

}  // namespace

namespace cuda {

void attention(const AttentionRequest& a, const v2drop_context& context) {
  if (a.q.heads > kAttentionPairs) fail("q: has %" PRId64 " heads, more than %d", a.q.heads, kAttentionPairs);
  if (a.q.rows > INT32_MAX / 2) fail("q: more than 2^30 queries");
  check_dim("q", a.q.dim);
  const int64_t splits = splits_of(a.k.rows), tiles = (a.k.rows + kThreads - 1) / kThreads;
  if (a.k.rows > kMaxRows || a.k.batch > kMaxRows / std::max<int64_t>(1, std::max(a.k.heads * splits, tiles))) {
    fail("k: more than 2^30 rows, or more blocks than a launch has");
  }
  if (a.k.batch == 0 || a.k.rows == 0) return;

  const int64_t step = step_queries(a.k.batch, a.q.heads, a.q.rows, a.k.rows, context.workspace_bytes);
  const int64_t pairs = a.k.batch * a.q.heads * std::min(step, a.q.rows);
  Workspace workspace(context);
  Weighing w = {};
  w.q = device_heads(a.q);
  w.k = device_heads(a.k);
  w.query_rows = a.query_rows.data, w.query_rows_batch = a.query_rows.batch_stride, w.query_rows_row = a.query_rows.row_stride;
  w.key_mask = a.key_mask.data, w.key_mask_batch = a.key_mask.batch_stride, w.key_mask_row = a.key_mask.row_stride;
  w.droppable = a.droppable.data, w.droppable_batch = a.droppable.batch_stride, w.droppable_row = a.droppable.row_stride;
  w.dim = static_cast<int32_t>(a.q.dim);
  w.group = static_cast<int32_t>(a.q.heads / a.k.heads);
  w.kv_heads = static_cast<int32_t>(a.k.heads);
  w.rows = a.k.rows;
  w.splits = static_cast<int32_t>(splits);
  w.split_keys = static_cast<int32_t>(split_keys(a.k.rows));
  w.causal = a.causal;
  w.dot = a.dot;
  w.scale = a.scale;
  w.logits = workspace.take<float>(pairs * a.k.rows);
  w.maxima = workspace.take<float>(pairs * splits);
  w.sums = workspace.take<float>(pairs * splits);
  if (a.heads > 0) w.droppable_sums = workspace.take<float>(pairs * splits);
  Reduction r = {};
  if (step < a.q.rows) r.totals = workspace.take<float>(a.k.batch * a.k.rows);
  r.heads = static_cast<int32_t>(a.q.heads);
  r.how = a.heads;
  r.squares = a.queries == V2DROP_QUERIES_L2;
  r.all_queries = static_cast<int32_t>(a.q.rows);
  r.tiles = static_cast<int32_t>(tiles);
  r.scores = a.scores.data, r.scores_batch = a.scores.batch_stride, r.scores_row = a.scores.row_stride;

  LaunchDependency dependency = LaunchDependency::kNone;  // the first launch of a call does not wait
  for (int64_t query = 0; query == 0 || query < a.q.rows; query += step) {
    w.query0 = static_cast<int32_t>(query);
    w.queries = static_cast<int32_t>(std::min(step, a.q.rows - query));
    if (w.queries > 0) {
      for_row_type(a.k.dtype, a.k.dim, is_aligned(a.q) && is_aligned(a.k), [&](auto type, auto lanes, auto aligned) {
        launch(weigh_kernel<decltype(type), decltype(lanes)::value, decltype(aligned)::value>, a.k.batch * a.k.heads * splits, kThreads,
               dependency, context.stream, w);
      });
      dependency = LaunchDependency::kDependent;
    }
    r.of = w;
    r.first = query == 0;
    r.last = query + step >= a.q.rows;
    launch(reduce_kernel, a.k.batch * tiles, kThreads, dependency, context.stream, r);
    dependency = LaunchDependency::kDependent;
  }
}

}  // namespace cuda
}  // namespace v2drop

using namespace v2drop;

int64_t v2drop_attention_workspace_bytes(int64_t batch, int64_t heads, int64_t queries, int64_t rows) {
  if (batch <= 0 || heads <= 0 || queries <= 0 || rows <= 0) return 0;
  return step_bytes(batch, heads, step_queries(batch, heads, queries, rows, kAttentionBytes), rows);
}
