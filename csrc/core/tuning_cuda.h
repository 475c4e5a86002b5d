// SPDX-License-Identifier: Apache-2.0
//
// Sizes of the CUDA kernels, and the limits that choose between launch modes. None of these numbers has been measured on a GPU yet: each
// says where it comes from. None of them changes a result.
#ifndef V2DROP_CORE_TUNING_CUDA_H_
#define V2DROP_CORE_TUNING_CUDA_H_

#include <cstdint>

namespace v2drop {

// Threads of the kernels that move memory. A row is shared by as many warps as leave each thread kScoreLoads 16-byte loads of either
// tensor, all in flight at once: 128 threads for 4096 bfloat16, which is what published row reductions on an H100 use as well.
constexpr int kThreads = 256;
constexpr int kScoreLoads = 4;

// Blocks that an SM must be able to hold: half of its threads, so at most 64 registers for each. 32 warps with four 16-byte loads each
// are 64 KB in flight; an H200 needs some 26 KB for each SM to be at full bandwidth.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200  // there the compiler spills at 64
constexpr int kBlocksOfSm = 3;
#else
constexpr int kBlocksOfSm = 4;
#endif

// The same for the cooperative kernel, which needs registers for all of its phases: three blocks of two rows of 4096 bfloat16 hold 792
// rows on an H200 at once, the 576 of an image among them.
constexpr int kCooperativeBlocksOfSm = 3;

// Rows in a call: row numbers, also a grid's worth beyond the last one, fit 32 bits in the kernels. Offsets are 64-bit everywhere.
constexpr int64_t kMaxRows = 1 << 30;

// Groups of rows that a block scores one after the other where a table of segments has to be searched first.
constexpr int kTableRowGroups = 4;

// Competing rows of a segment up to which the blocks of the gather repeat the select, 8 ordinals in the registers of each thread; beyond,
// select is a kernel of its own, whose blocks hold 16 ordinals in each of 512 threads, two blocks to an SM, and read more from L2 for every
// pass. Teams of blocks share long segments: clusters of 8, the size that every GPU with clusters has, or blocks of a cooperative launch.
constexpr int kOrdinalsPerThread = 8;
constexpr int kFusedSelect = kThreads * kOrdinalsPerThread;
constexpr int kSelectThreads = 512, kHeldOrdinals = 16, kSelectBlocksOfSm = 2;
constexpr int kClusterBlocks = 8, kGridBlocks = 16;

// Predicted microseconds of a selection on an H200, which choose how many blocks share a segment: what its barriers and passes cost
// whatever its length, and each row of a block that holds its rows, or reads them for every pass. Lines through what tools/sass_count.py
// prints.
struct SelectCost {
  double fixed, held_row, streamed_row;
};
constexpr SelectCost kOneBlockCost = {2.8, 0.00037, 0.0005}, kClusterCost = {5.1, 0.0004, 0.0005}, kGridCost = {11.6, 0.0004, 0.0005};

// Segments that a tile of the gather may make on average where its blocks repeat the select: one after the other, at some 2 us each.
constexpr int kSegmentsOfTile = 4;

// Bytes of hidden states (one tensor) up to which the blocks of the gather repeat the select, one block on each SM, since those that share
// one select one after the other. Such a drop is one cooperative launch, which takes the host least, or two in a graph, where a dependent
// launch takes less than a grid barrier by the model; beyond these bytes a select in a launch of its own takes less (bench/gpu_model.py).
constexpr int64_t kSmallBytes = 16 << 20;

// Output bytes of one block of the gather: less where that leaves fewer than kBlocksPerSm blocks for each SM.
// Its items, each some rows of one piece of one tensor, are four 16-byte accesses of each thread; a piece is not narrower than what a
// gather on an H100 moves at full speed, by published figures.
constexpr int64_t kGatherBytes = 64 << 10, kGatherBytesMin = 8 << 10;
constexpr int64_t kItemBytes = int64_t{4} * 16 * kThreads, kPieceBytesMin = 512;
constexpr int kBlocksPerSm = 4;
constexpr int kTileRows = 128;  // output rows of a tile at most; their source rows lie in shared memory

// Dot products of rows with some vectors: a group of lanes takes kDotRows rows, whose loads are all in flight at once, and multiplies them
// with kDotVectors vectors at a time, so that a vector is loaded once for the rows. Two blocks of 256 threads with four 16-byte loads each
// are 32 KB in flight for an SM; the sums, the rows and their addresses need more than the 64 registers that four blocks would leave.
constexpr int kDotRows = 4, kDotVectors = 4;
constexpr int kDotBlocksOfSm = 2;

// Keys of attention whose logits are in shared memory at a time, for so many (query, head) pairs of a key head; and at most how many
// blocks share the keys of a key head: every block of the second launch reads the maxima and sums of all of them.
constexpr int kAttentionKeys = 128, kAttentionVectors = 16;
constexpr int kAttentionSplits = 128;
constexpr int kAttentionPairs = 1024;                   // (query, head) pairs of an entry in one step
constexpr int64_t kAttentionBytes = int64_t{64} << 20;  // of scratch memory, beyond which queries go in several steps

// Rows of the inverse map that one block fills; each reads the whole of keep, so not too few.
constexpr int kInvertRows = 8192;

}  // namespace v2drop

#endif  // V2DROP_CORE_TUNING_CUDA_H_
