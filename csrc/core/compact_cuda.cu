// SPDX-License-Identifier: Apache-2.0
//
// Moving rows on the GPU: one launch gathers every tensor of a call as bytes. Backward is the same gather through the inverse of `keep`:
// no atomics, no zero-fill before.
#include <algorithm>

#include "gather_cuda.cuh"
#include "ops.h"

namespace v2drop {
namespace {

__global__ void __launch_bounds__(kThreads, kBlocksOfSm) gather_kernel(const __grid_constant__ CopyBatch work) {
  BlockCounts<kThreads> counts;
  wait_for_previous();
  gather_tile<false, false>(work, nullptr, counts, blockIdx.x);
}

// inverse[entry][keep[entry][j]] = j, -1 elsewhere. A block owns kInvertRows rows of the inverse and reads all of keep.
__global__ void __launch_bounds__(kThreads)
    invert_kernel(int64_t* inverse, const int64_t* keep, int64_t rows, int64_t count, int64_t chunks) {
  trigger_next();
  const int64_t entry = blockIdx.x / chunks, begin = blockIdx.x % chunks * kInvertRows, end = min(begin + kInvertRows, rows);
  inverse += entry * rows;
  keep += entry * count;
  for (int64_t row = begin + thread_id(); row < end; row += kThreads) inverse[row] = -1;
  __syncthreads();
  for (int64_t j = thread_id(); j < count; j += kThreads) {
    const int64_t row = keep[j];
    if (row >= begin && row < end) inverse[row] = j;
  }
}

struct Step {
  int64_t from[kTileRows], to[kTileRows];
};

// The kept rows of one piece of one plane move to the front, some at a time in ascending order: keep ascends, so keep[j] >= j, and no
// step overwrites a row that a later one still reads.
template <class Vec>
__device__ void move_to_front(const CopyClass& c, char* data, const int64_t* keep, int64_t count, int64_t first, int vecs,
                              BlockCounts<kThreads>& counts) {
  constexpr int kLoads = 4;
  Step& step = block_shared<Step>();
  const int lane = thread_id() & ((1 << c.log_lanes) - 1), row0 = thread_id() >> c.log_lanes, together = kThreads >> c.log_lanes;
  const int rows = min(kTileRows, together * kLoads);
  int64_t front = 0;
  for (int64_t begin = 0; begin < count; begin += rows) {
    const int64_t j = begin + thread_id();
    const int64_t from = thread_id() < rows && j < count ? keep[j] : -1;
    const bool moving = from >= 0 && from < c.src_rows;
    const unsigned kept_lanes = __ballot_sync(kAllLanes, moving);
    int all;
    const int before = counts.sum_before(__popc(kept_lanes), &all) + __popc(kept_lanes & ((1u << lane_id()) - 1));
    if (moving) {
      step.from[before] = from;
      step.to[before] = front + before;
    }
    __syncthreads();
    Vec moved[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int row = row0 + l * together;
      if (row < all && lane < vecs) moved[l] = reinterpret_cast<const Vec*>(data + step.from[row] * c.src_row)[first + lane];
    }
    __syncthreads();  // all rows of the step are in registers before the first is overwritten
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int row = row0 + l * together;
      if (row < all && lane < vecs && step.to[row] < c.src_rows)
        reinterpret_cast<Vec*>(data + step.to[row] * c.src_row)[first + lane] = moved[l];
    }
    __syncthreads();
    front += all;
  }
}

__global__ void __launch_bounds__(kThreads) move_to_front_kernel(const __grid_constant__ CopyBatch work) {
  BlockCounts<kThreads> counts;
  const int64_t entry = blockIdx.x / work.shares;
  int item = static_cast<int>(blockIdx.x % work.shares);
  int n = 0;
  while (item >= work.classes[n].items) item -= work.classes[n++].items;
  const CopyClass& c = work.classes[n];
  const int64_t piece = item % c.pieces;
  item /= c.pieces;
  int plane = item % c.planes;
  char* data = work.tensors[c.first_tensor + item / c.planes].src + entry * c.src_batch;
  for (int d = 0; d < c.n_dims; ++d) {
    data += plane % c.dims[d].size * c.dims[d].src;
    plane /= c.dims[d].size;
  }
  const int64_t first = piece * c.piece_vecs;
  const int vecs = static_cast<int>(min(static_cast<int64_t>(c.piece_vecs), c.row_vecs - first));
  const int64_t* keep = work.keep + entry * work.out_rows;
  switch (c.vec_bytes) {
    case 16:
      return move_to_front<uint4>(c, data, keep, work.out_rows, first, vecs, counts);
    case 8:
      return move_to_front<uint2>(c, data, keep, work.out_rows, first, vecs, counts);
    case 4:
      return move_to_front<unsigned>(c, data, keep, work.out_rows, first, vecs, counts);
    case 2:
      return move_to_front<unsigned short>(c, data, keep, work.out_rows, first, vecs, counts);
    default:
      return move_to_front<unsigned char>(c, data, keep, work.out_rows, first, vecs, counts);
  }
}

// Cuts the rows of a class into pieces of at most so many bytes, or one access where that is more.
void cut_rows(CopyClass& c, int64_t bytes) {
  const int64_t most = std::clamp<int64_t>(bytes / c.vec_bytes, 1, kThreads), pieces = (c.row_vecs + most - 1) / most;
  if (pieces * c.planes > INT32_MAX) fail("gathers: one has more than 2^31 pieces");
  c.pieces = static_cast<int32_t>(pieces);
  c.piece_vecs = static_cast<int32_t>((c.row_vecs + pieces - 1) / pieces);
  c.log_lanes = 0;
  while (1 << c.log_lanes < std::min(c.piece_vecs, kThreads)) ++c.log_lanes;
  c.weight = std::max<int64_t>(64, static_cast<int64_t>(c.piece_vecs) * c.vec_bytes);  // an item is not free, however narrow
}

// The class of a copy, without what depends on its neighbours. Each thread makes at most one access to a row of a piece.
CopyClass class_of(const Copy& copy) {
  CopyClass c;
  std::memset(&c, 0, sizeof c);  // compared as bytes
  int64_t bits =
      16 | copy.inner | copy.src_row | copy.dst_row | reinterpret_cast<intptr_t>(copy.src) | reinterpret_cast<intptr_t>(copy.dst);
  int64_t planes = 1;
  for (int d = 0; d < copy.n_dims; ++d) {
    const Copy::Dim& dim = copy.dims[d];
    bits |= dim.src | dim.dst;
    if (dim.is_batch) {
      c.src_batch = dim.src;
      c.dst_batch = dim.dst;
      continue;
    }
    planes *= dim.size;
    if (planes > INT32_MAX) fail("gathers: one has more than 2^31 planes of rows");
    c.dims[c.n_dims++] = {dim.src, dim.dst, static_cast<int32_t>(dim.size)};
  }
  c.planes = static_cast<int32_t>(planes);
  c.src_row = copy.src_row;
  c.dst_row = copy.dst_row;
  if (copy.src_rows > kMaxRows || copy.dst_rows > kMaxRows) fail("gathers: one has more than 2^30 rows");
  c.src_rows = static_cast<int32_t>(copy.src_rows);
  c.vec_bytes = static_cast<int32_t>(bits & -bits);
  c.row_vecs = copy.inner / c.vec_bytes;
  cut_rows(c, int64_t{16} * kThreads);
  std::memcpy(c.fill, copy.fill, sizeof c.fill);
  return c;
}

int32_t count_items(const CopyClass& c, int64_t tensors) {
  const int64_t items = tensors * c.planes * c.pieces;
  if (items > INT32_MAX) fail("gathers: need more than 2^31 pieces in one launch");
  return static_cast<int32_t>(items);
}

// How the launch is cut into blocks: large ones share an index load (and a select) among many bytes, many ones fill the GPU. An item is
// some 16 KB of one tensor, so that what it takes to find it, and the latency of its loads, are spread over four loads of every thread:
// many rows where those that make up most of the bytes are narrow, and then narrow pieces of the wider ones.
void cut_into_blocks(CopyBatch& work) {
  int64_t row_bytes = 0, most = 0, width = 0;
  for (int n = 0; n < work.n_classes; ++n) {
    const CopyClass& c = work.classes[n];
    const int64_t bytes = c.items * c.weight;
    row_bytes += bytes;
    if (bytes > most) most = bytes, width = c.weight;
  }
  const int64_t total = work.batch * work.out_rows * row_bytes;
  const int64_t bytes = std::clamp(total / (kBlocksPerSm * current_device().sms), kGatherBytesMin, kGatherBytes);
  int rows = 1;
  while (2 * rows <= kTileRows && rows < work.out_rows &&
         (2 * rows * width <= std::min(bytes, kItemBytes) || 2 * rows * row_bytes <= bytes)) {
    rows *= 2;
  }
  set_tile_rows(work, rows);
  set_tile_rows(work, static_cast<int>((work.out_rows + work.tiles - 1) / work.tiles));  // as many tiles, all alike

  int64_t widest = 0;
  row_bytes = 0;
  for (int n = 0; n < work.n_classes; ++n) {
    CopyClass& c = work.classes[n];
    const int64_t tensors = c.items / (c.planes * c.pieces);
    cut_rows(c, std::clamp<int64_t>(kItemBytes / work.tile_rows, kPieceBytesMin, int64_t{16} * kThreads));
    c.items = count_items(c, tensors);
    c.begin = row_bytes;
    row_bytes += c.items * c.weight;
    widest = std::max(widest, c.weight);
  }
  // A share is whole items, or some blocks would have two and others none.
  work.share = std::max(widest, bytes / work.tile_rows / widest * widest);
  work.shares = (row_bytes + work.share - 1) / work.share;
}

std::vector<CopyBatch> group_by_class(const std::vector<Copy>& copies, const Keep& keep) {
  struct Group {
    CopyClass c;
    std::vector<const Copy*> copies;
  };
  std::vector<Group> groups;
  const auto alignment = [](const Copy& copy) {
    const intptr_t bits = 16 | reinterpret_cast<intptr_t>(copy.src) | reinterpret_cast<intptr_t>(copy.dst);
    return bits & -bits;
  };
  size_t last = 0;  // the group of the copy before
  for (size_t i = 0; i < copies.size(); ++i) {
    const Copy& copy = copies[i];
    if (copy.planes == 0) continue;
    if (!copy.like_last || alignment(copy) != alignment(copies[i - 1])) {
      const CopyClass c = class_of(copy);
      last = static_cast<size_t>(
          std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return !std::memcmp(&g.c, &c, sizeof c); }) - groups.begin());
      if (last == groups.size()) groups.push_back({c, {}});
    }
    groups[last].copies.push_back(&copy);
  }
  std::vector<CopyBatch> launches;
  int used = kTensorsPerLaunch;
  for (const Group& group : groups) {
    for (size_t done = 0; done < group.copies.size();) {
      if (used == kTensorsPerLaunch || launches.back().n_classes == kClassesPerLaunch) {
        launches.emplace_back();
        launches.back().keep = keep.data;
        launches.back().batch = keep.batch;
        launches.back().out_rows = keep.count;
        used = 0;
      }
      CopyBatch& work = launches.back();
      CopyClass& c = work.classes[work.n_classes++] = group.c;
      c.first_tensor = used;
      for (; done < group.copies.size() && used < kTensorsPerLaunch; ++done) {
        work.tensors[used++] = {group.copies[done]->src, group.copies[done]->dst};
      }
      c.items = count_items(c, used - c.first_tensor);
    }
  }
  return launches;
}

}  // namespace

std::vector<CopyBatch> plan_batches(const std::vector<Copy>& copies, const Keep& keep) {
  if (keep.batch * keep.count == 0) return {};
  std::vector<CopyBatch> launches = group_by_class(copies, keep);
  for (CopyBatch& work : launches) cut_into_blocks(work);
  return launches;
}

void set_tile_rows(CopyBatch& work, int rows) {
  work.tile_rows = rows;
  work.tiles = (work.out_rows + rows - 1) / rows;
}

void fit_into(CopyBatch& work, int64_t places) {
  if (blocks_of(work) <= places) return;
  const int64_t tiles = std::max<int64_t>(1, places / (work.batch * work.shares));
  set_tile_rows(work, static_cast<int>(std::min<int64_t>(kTileRows, (work.out_rows + tiles - 1) / tiles)));
  if (blocks_of(work) <= places) return;
  const int64_t shares = std::max<int64_t>(1, places / (work.batch * work.tiles)), together = (work.shares + shares - 1) / shares;
  work.share *= together;
  work.shares = (work.shares + together - 1) / together;
}

int64_t blocks_of(const CopyBatch& work) { return work.batch * work.tiles * work.shares; }

void launch_gather(const std::vector<CopyBatch>& launches, size_t first, LaunchDependency dependency, void* stream) {
  for (size_t i = first; i < launches.size(); ++i) {
    // Later launches wait for the first one to end, which itself waited.
    launch(gather_kernel, blocks_of(launches[i]), kThreads, i == first ? dependency : LaunchDependency::kNone, stream, launches[i]);
  }
}

namespace cuda {

void compact(const CompactRequest& request, const v2drop_context& context) {
  launch_gather(plan_batches(request.copies, request.keep), 0, LaunchDependency::kNone, context.stream);
}

void compact_backward(const CompactRequest& request, const v2drop_context& context) {
  const Keep& keep = request.keep;
  const int64_t rows = request.rows;
  Workspace workspace(context);
  const Keep inverse = {workspace.take<int64_t>(keep.batch * rows), keep.batch, rows};
  const std::vector<CopyBatch> launches = plan_batches(request.copies, inverse);
  if (launches.empty()) return;
  const int64_t chunks = (rows + kInvertRows - 1) / kInvertRows;
  launch(invert_kernel, keep.batch * chunks, kThreads, LaunchDependency::kNone, context.stream, inverse.data, keep.data, rows, keep.count,
         chunks);
  launch_gather(launches, 0, LaunchDependency::kDependent, context.stream);
}

void compact_inplace(const CompactRequest& request, const v2drop_context& context) {
  if (request.keep.count == 0) return;
  for (CopyBatch& work : group_by_class(request.copies, request.keep)) {
    for (int n = 0; n < work.n_classes; ++n) work.shares += work.classes[n].items;
    if (work.shares > INT32_MAX) fail("gathers: need more than 2^31 pieces in one launch");
    launch(move_to_front_kernel, work.batch * work.shares, kThreads, LaunchDependency::kNone, context.stream, work);
  }
}

}  // namespace cuda
}  // namespace v2drop
