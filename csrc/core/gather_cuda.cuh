// SPDX-License-Identifier: Apache-2.0
//
// Compaction by tiles: a block takes some output rows of one batch entry, finds their source rows (in `keep`, or by selecting them
// itself) and moves its share of the bytes of all tensors. Tensors that differ in nothing but their addresses form a class.
#ifndef V2DROP_CORE_GATHER_CUDA_CUH_
#define V2DROP_CORE_GATHER_CUDA_CUH_

#include <cstring>
#include <vector>

#include "device.cuh"
#include "launch.cuh"
#include "select_cuda.cuh"
#include "tuning_cuda.h"

namespace v2drop {

constexpr int kTensorsPerLaunch = 128;
constexpr int kClassesPerLaunch = 8;

// All strides in bytes.
struct CopyClass {
  int64_t src_batch, dst_batch, src_row, dst_row;
  int32_t src_rows;   // rows that src has: an index beyond them is an empty row
  int64_t row_vecs;   // accesses of `vec_bytes` that make a row
  int32_t vec_bytes;  // 1, 2, 4, 8 or 16
  int32_t pieces;     // of a row, one item each
  int32_t piece_vecs;
  int32_t log_lanes;  // threads side by side on a piece
  int32_t first_tensor;
  int32_t planes;  // of a tensor, within a batch entry
  int32_t items;   // tensors * planes * pieces
  int32_t n_dims;  // that make the planes
  struct Dim {
    int64_t src, dst;
    int32_t size;
  } dims[V2DROP_MAX_DIMS - 1];
  int64_t begin;   // where its items begin among the bytes of an output row ...
  int64_t weight;  // ... and how many each counts for
  alignas(16) char fill[16];
};

struct CopyBatch {
  int32_t n_classes;
  int32_t tile_rows;
  int64_t batch, out_rows, tiles;  // tiles of a batch entry
  int64_t share, shares;           // bytes of an output row that a block takes, and blocks that share a tile
  int64_t* keep;                   // [batch, out_rows]: read, or if selected written
  CopyClass classes[kClassesPerLaunch];
  struct {
    char *src, *dst;
  } tensors[kTensorsPerLaunch];
};

// What a gather needs to select its rows itself.
struct Selection {
  Table segments;
  DeviceOrdinals ordinals;
};

// `vecs` accesses, at most one a thread, to each of the rows source[0 ... rows) of src, and of the rows of dst; the first is the row's
// access number `phase`, which is known modulo 16.
template <class Vec>
__device__ void move_piece(const CopyClass& c, const char* src, char* dst, const int32_t* source, int rows, int phase, int vecs) {
  constexpr int kLoads = 4;  // in flight at once
  constexpr int kBytes = static_cast<int>(sizeof(Vec));
  const int lanes = 1 << c.log_lanes, lane = thread_id() & (lanes - 1), row0 = thread_id() >> c.log_lanes,
            together = kThreads >> c.log_lanes;
  if (lane >= vecs) return;
  const char* from = src + lane * kBytes;
  char* to = dst + lane * kBytes;
  const int64_t src_row = in_register(c.src_row), dst_row = in_register(c.dst_row);
  const int src_rows = in_register(c.src_rows);
  const Vec fill = reinterpret_cast<const Vec*>(c.fill)[(phase + lane) % (16 / kBytes)];
  for (int begin = row0; begin < rows; begin += kLoads * together) {
    Vec moved[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int row = begin + j * together;
      const int source_row = row < rows ? source[row] : -1;
      moved[j] = source_row >= 0 && source_row < src_rows ? __ldcs(reinterpret_cast<const Vec*>(from + source_row * src_row)) : fill;
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int row = begin + j * together;
      if (row < rows) *reinterpret_cast<Vec*>(to + row * dst_row) = moved[j];
    }
  }
}

// This block's share of every tensor, for the rows of one tile.
__device__ inline void move_tile(const CopyBatch& work, int64_t entry, int64_t first_row, int rows, int64_t share, const int32_t* source) {
  const int64_t begin = share * work.share, end = begin + work.share;
#pragma unroll 1
  for (int n = 0; n < work.n_classes; ++n) {
    const CopyClass& c = work.classes[n];
    // The items that begin within the share: the place of the first is found by division, those of the others by counting.
    int item = static_cast<int>(begin <= c.begin ? 0 : (begin - c.begin + c.weight - 1) / c.weight);
    const int last = static_cast<int>(end <= c.begin ? 0 : min(static_cast<int64_t>(c.items), (end - c.begin + c.weight - 1) / c.weight));
    if (item >= last) continue;
    int piece = item % c.pieces, plane = item / c.pieces % c.planes, tensor = c.first_tensor + item / c.pieces / c.planes;
#pragma unroll 1
    for (; item < last; ++item) {
      const char* src = work.tensors[tensor].src + entry * c.src_batch;
      char* dst = work.tensors[tensor].dst + entry * c.dst_batch + first_row * c.dst_row;
      for (int d = 0, rest = plane; d < c.n_dims; ++d) {
        const int at = rest % c.dims[d].size;
        rest /= c.dims[d].size;
        src += at * c.dims[d].src;
        dst += at * c.dims[d].dst;
      }
      const int64_t first_vec = static_cast<int64_t>(piece) * c.piece_vecs;
      const int vecs = static_cast<int>(min(static_cast<int64_t>(c.piece_vecs), c.row_vecs - first_vec));
      src += first_vec * c.vec_bytes;
      dst += first_vec * c.vec_bytes;
      const int phase = static_cast<int>(first_vec % 16);
      if (++piece == c.pieces) {
        piece = 0;
        if (++plane == c.planes) plane = 0, ++tensor;
      }
      switch (c.vec_bytes) {
        case 16:
          move_piece<uint4>(c, src, dst, source, rows, phase, vecs);
          break;
        case 8:
          move_piece<uint2>(c, src, dst, source, rows, phase, vecs);
          break;
        case 4:
          move_piece<unsigned>(c, src, dst, source, rows, phase, vecs);
          break;
        case 2:
          move_piece<unsigned short>(c, src, dst, source, rows, phase, vecs);
          break;
        default:
          move_piece<unsigned char>(c, src, dst, source, rows, phase, vecs);
      }
    }
  }
}

// The source rows of output rows `first` to `first + rows` (flat over the batch), all of one batch entry; -1 is an empty row.
// COMPUTED: ordinals come from the score kernel, never from given scores, which saves registers.
template <bool COMPUTED>
__device__ void select_rows(const Selection& selection, BlockCounts<kThreads>& counts, int64_t first, int rows, int32_t* source) {
  const Table& table = selection.segments;
  if (thread_id() < rows) source[thread_id()] = -1;  // survivors are written by other threads, behind the barriers of the select
  const int64_t end = first + rows;
  int64_t done = first;
  for (int64_t g = table.of_output(first); done < end; ++g) {
    const v2drop_segment s = table.at(g);
    const int64_t kept0 = s.dst_start + s.pad_before, entry = s.src_start / table.in_rows, position = s.src_start % table.in_rows;
    const int64_t best0 = kept0 + s.n_prefix, post0 = best0 + s.k;
    if (thread_id() < rows) {
      const int64_t row = first + thread_id();
      if (row >= kept0 && row < best0) source[thread_id()] = static_cast<int32_t>(position + row - kept0);
      if (row >= post0 && row < post0 + s.n_suffix) source[thread_id()] = static_cast<int32_t>(position + s.n_prefix + s.n + row - post0);
    }
    if (best0 < end && post0 > first) {
      const int64_t competing = position + s.n_prefix;
      [[maybe_unused]] const int32_t* computed =
          COMPUTED ? selection.ordinals.ordinals + entry * selection.ordinals.rows + competing : nullptr;
      const int best_row = static_cast<int>(best0 - first);
      select_held<kThreads>(
          counts, static_cast<int>(s.n), static_cast<int>(s.k),
          [&](int32_t (&held)[kOrdinalsPerThread], int begin, int left) {
            if constexpr (COMPUTED) {
              DeviceOrdinals::load_computed(computed + begin, held, left);
            } else {
              selection.ordinals.load(held, entry, competing, begin, left);
            }
          },
          [&](int place, int i) {
            const int row = best_row + place;
            if (row >= 0 && row < rows) source[row] = static_cast<int32_t>(competing) + i;
          });
    }
    done = post0 + s.n_suffix + s.pad_after;
  }
  __syncthreads();
}

// One tile of a gather.
template <bool SELECT, bool COMPUTED>
__device__ void gather_tile(const CopyBatch& work, const Selection* selection, BlockCounts<kThreads>& counts, int64_t block) {
  struct Source {
    int32_t rows[kTileRows];
  };
  Source& source = block_shared<Source>();
  const int64_t share = block % work.shares, tile = block / work.shares;
  const int64_t entry = tile / work.tiles, first_row = tile % work.tiles * work.tile_rows;
  const int rows = static_cast<int>(min(static_cast<int64_t>(work.tile_rows), work.out_rows - first_row));
  int64_t* keep = work.keep + entry * work.out_rows + first_row;
  if constexpr (SELECT) {
    select_rows<COMPUTED>(*selection, counts, entry * work.out_rows + first_row, rows, source.rows);
    if (share == 0 && thread_id() < rows) keep[thread_id()] = source.rows[thread_id()];
  } else {
    if (thread_id() < rows) {
      const int64_t row = keep[thread_id()];
      source.rows[thread_id()] = row >= 0 && row < kMaxRows ? static_cast<int32_t>(row) : -1;
    }
    __syncthreads();
  }
  move_tile(work, entry, first_row, rows, share, source.rows);
}

// The host's side, in compact_cuda.cu. The launches that move all copies, none if there is nothing to move; the first has what fits.
std::vector<CopyBatch> plan_batches(const std::vector<Copy>& copies, const Keep& keep);
int64_t blocks_of(const CopyBatch& work);
void set_tile_rows(CopyBatch& work, int rows);  // at most kTileRows
// Makes the blocks fewer and larger until they are at most `places`, where they can be: a second wave would repeat the select.
void fit_into(CopyBatch& work, int64_t places);
// Gathers by `keep` as it stands, from launch `first` on.
void launch_gather(const std::vector<CopyBatch>& launches, size_t first, LaunchDependency dependency, void* stream);

}  // namespace v2drop

#endif  // V2DROP_CORE_GATHER_CUDA_CUH_
