// SPDX-License-Identifier: Apache-2.0
//
// CUDA threads as fibers on the CPU, so that the kernels of csrc/core/*_cuda.cu can be tested where there is no GPU: the C++ compiler takes
// them as C++ against the headers in include/. A fiber runs until it waits for others or ends; a launch runs at once, on the calling
// thread. V2DROP_EMULATE_ORDER, read at every launch, is the order in which blocks and threads run: `forward` (default), `reverse`, or a
// number, the seed of a shuffle before every round. A correct kernel gives the same results in all of them. V2DROP_EMULATE_CLUSTERS=0, read
// as often, makes the device one without thread-block clusters. What would hang or be undefined
// on a GPU (threads that wait for ones that never come, a misaligned vector access) aborts with a message.
// With V2DROP_EMULATE_LAUNCHES=0, read at the first launch, launches are checked and counted but run nothing: what is left is host time.
#ifndef V2DROP_TOOLS_EMULATE_H_
#define V2DROP_TOOLS_EMULATE_H_

#include <cstddef>
#include <cstdint>

namespace emulate {

// The device that the host sees.
constexpr int kMultiprocessors = 4, kBlocksPerMultiprocessor = 2, kL2Bytes = 1 << 20, kSharedBytes = 48 << 10, kMaxThreads = 1024,
              kMaxClusterBlocks = 8;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Memory of the current block: one piece per key, the same for all its threads, filled with 0xCD when the block starts to use it.
void* shared(size_t bytes, size_t align, const void* key);

// Waits for the block; returns how many of its threads gave true.
int block_barrier(const char* name, bool predicate = false);

// Waits for all blocks of a cooperative launch.
void grid_barrier();

// A cluster's blocks run at the same time: waits for all of them; the place of this one among them, and their number; and the address
// in the shared memory of another one that `own` has in that of this block.
void cluster_barrier();
unsigned cluster_rank();
unsigned cluster_blocks();
void* shared_of_rank(void* own, unsigned rank);

// Waits for the warp; returns what its lanes gave, good until the next call. `count` is smaller than 32 in the last warp of an odd block.
struct Lanes {
  const uint64_t* values;
  unsigned count, self;
};
Lanes warp_barrier(const char* name, unsigned mask, uint64_t value = 0);

// A thread of a programmatic launch must call the first before the second, and before it ends; `name` is what it is about to do.
void wait_for_previous_launch();
void require_previous_launch(const char* name);

// Kernels launched so far in this process, by all threads: all of them, those in clusters, and cooperative ones.
enum class Launches { kAll, kClusters, kCooperative };
int64_t launches(Launches which = Launches::kAll);

// A capture, as of a CUDA graph: launches are not run but recorded, with copies of their arguments; replay() runs them, as often as it is
// called. holds() says whether a recorded launch has an argument that is an address in this memory. The next capture, or drop_capture(),
// forgets them.
void begin_capture();
bool is_capturing();
size_t end_capture();
void replay();
bool holds(const void* memory, size_t bytes);
void drop_capture();

// Called by functions of the CUDA runtime that make the host wait, as copies from and to pageable memory do: counts, and aborts in a
// capture.
void synchronises(const char* name);
int64_t synchronisations();

// Called where memory is given back: aborts if a recorded launch holds it.
void gives_back(const void* memory, size_t bytes);

}  // namespace emulate

// The same for a test that loads the library.
extern "C" __attribute__((visibility("default"))) int64_t v2drop_emulate_launches(void);
extern "C" __attribute__((visibility("default"))) int64_t v2drop_emulate_last_blocks(void);  // of the last launch
extern "C" __attribute__((visibility("default"))) int64_t v2drop_emulate_cluster_launches(void);
extern "C" __attribute__((visibility("default"))) int64_t v2drop_emulate_cooperative_launches(void);
extern "C" __attribute__((visibility("default"))) int64_t v2drop_emulate_synchronisations(void);
extern "C" __attribute__((visibility("default"))) void v2drop_emulate_begin_capture(void);
extern "C" __attribute__((visibility("default"))) int64_t v2drop_emulate_end_capture(void);
extern "C" __attribute__((visibility("default"))) void v2drop_emulate_replay(void);
extern "C" __attribute__((visibility("default"))) int32_t v2drop_emulate_holds(const void* memory, int64_t bytes);
extern "C" __attribute__((visibility("default"))) void v2drop_emulate_drop_capture(void);

#endif  // V2DROP_TOOLS_EMULATE_H_
