// SPDX-License-Identifier: Apache-2.0
//
// The blocks that select from one segment together: one block, a thread-block cluster, or blocks of a cooperative launch. Each shows a page
// of numbers to the others at a time: it writes its own page, meets the others, and reads theirs. There are two pages in turns, so that
// one meeting is enough: whoever writes a page again has met the others since they read it.
#ifndef V2DROP_CORE_TEAM_CUDA_CUH_
#define V2DROP_CORE_TEAM_CUDA_CUH_

#include "device.cuh"
#include "tuning_cuda.h"

namespace v2drop {

struct Pages {
  int numbers[2][kBins];
};

class OneBlock {
 public:
  static constexpr int kMost = 1, kBlocksOfSm = kSelectBlocksOfSm;
  static constexpr bool kCompiled = true;
  __device__ OneBlock(int, int*) {}
  __device__ int size() const { return 1; }
  __device__ int rank() const { return 0; }
  __device__ int* own() { return block_shared<Pages>().numbers[turn_]; }
  __device__ void meet() {
    __syncthreads();
    turn_ ^= 1;
  }
  __device__ int of(int, int i) const { return block_shared<Pages>().numbers[turn_ ^ 1][i]; }
  __device__ void leave() {}

 private:
  int turn_ = 0;
};

// Pages in the shared memory of the blocks, which the others read directly.
class ClusterOfBlocks {
 public:
  static constexpr int kMost = kClusterBlocks, kBlocksOfSm = kSelectBlocksOfSm;
#if defined(V2DROP_EMULATED) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  static constexpr bool kCompiled = true;
  __device__ ClusterOfBlocks(int, int*) {}
  __device__ int size() const { return kClusterBlocks; }
  __device__ int rank() const { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
  __device__ int* own() { return block_shared<Pages>().numbers[turn_]; }
  __device__ void meet() {
    cooperative_groups::this_cluster().sync();
    turn_ ^= 1;
  }
  __device__ int of(int rank, int i) const {
    return *cooperative_groups::this_cluster().map_shared_rank(block_shared<Pages>().numbers[turn_ ^ 1] + i, rank);
  }
  // Its shared memory ends with a block: nobody may still be reading it.
  __device__ void leave() { cooperative_groups::this_cluster().sync(); }
#else
  static constexpr bool kCompiled = false;  // no clusters
#endif

 private:
  [[maybe_unused]] int turn_ = 0;
};

// Pages in global memory, [2, size, kBins] for a segment. All blocks of the grid meet, also those of other segments, so each segment meets
// as often as the one that meets most.
class GridOfBlocks {
 public:
  static constexpr int kMost = kGridBlocks, kBlocksOfSm = 1;  // few blocks: they may have the registers
  static constexpr bool kCompiled = true;
  static constexpr int kMeetings = 6;  // the range, four passes of bins, the counts
  __device__ GridOfBlocks(int size, int* pages) : size_(size), pages_(pages + int64_t{2} * kBins * size * (blockIdx.x / size)) {}
  __device__ int size() const { return size_; }
  __device__ int rank() const { return static_cast<int>(blockIdx.x) % size_; }
  __device__ int* own() { return pages_ + kBins * (turn_ * size_ + rank()); }
  __device__ void meet() {
    cooperative_groups::this_grid().sync();
    turn_ ^= 1;
    ++met_;
  }
  __device__ int of(int rank, int i) const { return __ldcg(pages_ + kBins * ((turn_ ^ 1) * size_ + rank) + i); }
  __device__ void leave() {
    if (static_cast<int>(gridDim.x) == size_) return;  // one segment: its blocks decide alike
    while (met_ < kMeetings) meet();
  }

 private:
  int size_, turn_ = 0, met_ = 0;
  int* pages_;
};

}  // namespace v2drop

#endif  // V2DROP_CORE_TEAM_CUDA_CUH_
