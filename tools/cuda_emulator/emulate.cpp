// SPDX-License-Identifier: Apache-2.0
//
// The scheduler: fibers, barriers, launches. One launch runs at a time, under a mutex, so its state can be global.
#include "emulate.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATE_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define EMULATE_ASAN
#endif
#ifdef EMULATE_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || !defined(__ELF__)
#define EMULATE_UCONTEXT
#endif
#ifdef EMULATE_UCONTEXT
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulate {
namespace {

#ifdef EMULATE_ASAN
constexpr size_t kStackBytes = 256 << 10;  // instrumented frames are larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// Switching between the stacks of fibers.

#ifdef EMULATE_UCONTEXT
struct Context {
  ucontext_t at;
  void start(char* stack, void (*entry)()) {
    getcontext(&at);
    at.uc_stack.ss_sp = stack;
    at.uc_stack.ss_size = kStackBytes;
    at.uc_link = nullptr;
    makecontext(&at, entry, 0);
  }
};
void swap_stacks(Context* from, Context* to) { swapcontext(&from->at, &to->at); }
#else
// What a called function must preserve goes onto the old stack and comes back from the new one. swapcontext() does that too, but with two
// system calls for the signal mask: 20 times slower.
struct Context {
  void* at;
  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;  // entry returns to nowhere, and finds the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    at = std::fill_n(top - 6, 6, nullptr) - 6;
  }
};
extern "C" __attribute__((visibility("hidden"))) void v2drop_emulate_swap_stacks(Context* from, Context* to);
__asm__(
    ".pushsection .text\n"
    ".globl v2drop_emulate_swap_stacks\n"
    ".hidden v2drop_emulate_swap_stacks\n"
    ".type v2drop_emulate_swap_stacks, @function\n"
    "v2drop_emulate_swap_stacks:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq (%rsi), %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n"
    ".size v2drop_emulate_swap_stacks, . - v2drop_emulate_swap_stacks\n"
    ".popsection\n");
void swap_stacks(Context* from, Context* to) { v2drop_emulate_swap_stacks(from, to); }
#endif

// Barriers, blocks, threads.

// Where `members` fibers meet. Two meetings may overlap (some have left one while others arrive at the next), three cannot: hence the
// parity of `meeting` picks one of two places for what they bring.
struct Barrier {
  unsigned members, arrived = 0, meeting = 0;
  const char* name = nullptr;
  int trues[2] = {0, 0};
  explicit Barrier(unsigned members) : members(members) {}
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][32];
  explicit Warp(unsigned lanes) : barrier(lanes) {}
};

struct Piece {
  const void* key;
  void* memory;
  size_t bytes, align;
};

struct Block;

// The blocks of a cluster by rank, and where they meet.
struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;
  explicit Cluster(unsigned threads) : barrier(threads) {}
};

struct Block {
  uint3 index;
  unsigned rank;     // in its cluster ...
  Cluster* cluster;  // ... NULL in a launch without clusters
  unsigned running;  // threads that have not ended
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Piece> pieces;

  Block(uint3 index, unsigned rank, Cluster* cluster, unsigned threads)
      : index(index), rank(rank), cluster(cluster), running(threads), barrier(threads) {
    for (unsigned first = 0; first < threads; first += 32) warps.emplace_back(std::min(32u, threads - first));
  }
  // Of a block that has ended nothing is left: what others of its cluster still read there is not what it wrote.
  void end_thread() {
    if (--running > 0) return;
    for (const Piece& piece : pieces) memset(piece.memory, 0xCD, piece.bytes);
  }
  ~Block() {
    for (const Piece& piece : pieces) ::operator delete(piece.memory, std::align_val_t(piece.align));
  }
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* asan = nullptr;
  Block* block = nullptr;
  unsigned number = 0;  // in its block
  uint3 thread = {};
  bool ended = true, waited = false;  // waited for the launch before
  Barrier* waits_at = nullptr;
  unsigned meeting = 0;

  bool can_run() const { return !ended && !(waits_at && waits_at->meeting == meeting); }
};

std::mutex launching;
std::atomic<int64_t> launched[3], last_blocks{0};  // by Launches
thread_local cudaError_t last_error = cudaSuccess;

struct {
  Context context;
  void* asan;
  const void* stack;
  size_t stack_bytes;
} scheduler;
Fiber* current = nullptr;
Barrier* grid = nullptr;
bool programmatic;
void (*run_thread)(const void*);
const void* kernel;

void enter(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block->index;
#ifdef EMULATE_ASAN
  __sanitizer_start_switch_fiber(&scheduler.asan, fiber.stack, kStackBytes);
#endif
  swap_stacks(&scheduler.context, &fiber.context);
#ifdef EMULATE_ASAN
  __sanitizer_finish_switch_fiber(scheduler.asan, nullptr, nullptr);
#endif
  current = nullptr;
}

void arrived_in(Fiber* fiber) {
#ifdef EMULATE_ASAN
  __sanitizer_finish_switch_fiber(fiber ? fiber->asan : nullptr, &scheduler.stack, &scheduler.stack_bytes);
#else
  (void)fiber;
#endif
}

void leave(Fiber& fiber) {
#ifdef EMULATE_ASAN
  __sanitizer_start_switch_fiber(&fiber.asan, scheduler.stack, scheduler.stack_bytes);
#endif
  swap_stacks(&fiber.context, &scheduler.context);
  arrived_in(&fiber);
}

// A fiber outlives its thread and takes on another.
void fiber_main() noexcept {
  arrived_in(nullptr);
  for (Fiber& self = *current;;) {
    run_thread(kernel);
    require_previous_launch("the end of the kernel");
    self.ended = true;
    leave(self);
  }
}

// Never freed: other threads may launch while this one ends the process.
std::vector<std::unique_ptr<Fiber>>& pool() {
  static auto& fibers = *new std::vector<std::unique_ptr<Fiber>>;
  return fibers;
}

void grow_pool(size_t count) {
  while (pool().size() < count) {
    std::unique_ptr<Fiber> fiber(new Fiber);
    const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* stack = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, guard, PROT_NONE) != 0) fail("no memory for the stacks of %zu threads", count);
    fiber->stack = static_cast<char*>(stack) + guard;
    fiber->context.start(fiber->stack, fiber_main);
    pool().push_back(std::move(fiber));
  }
}

// Returns the parity of the meeting.
unsigned meet(Barrier& barrier, const char* name, bool predicate) {
  Fiber& self = *current;
  const unsigned meeting = barrier.meeting, parity = meeting & 1;
  if (barrier.arrived == 0) {
    barrier.name = name;
    barrier.trues[parity] = 0;
  } else if (strcmp(barrier.name, name) != 0) {
    fail("%s is reached while others wait at %s", name, barrier.name);
  }
  barrier.trues[parity] += predicate;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.meeting;
  } else {
    self.waits_at = &barrier;
    self.meeting = meeting;
    leave(self);
    self.waits_at = nullptr;
  }
  return parity;
}

void require_kernel(const char* name) {
  if (!current) fail("%s outside a kernel", name);
}

void require_cluster(const char* name) {
  require_kernel(name);
  if (!current->block->cluster) fail("%s in a launch without clusters", name);
}

// Of any block of the cluster: a piece is at the same place in all of them, whether the block has used it or not.
void* piece_of(Block& block, size_t bytes, size_t align, const void* key) {
  std::vector<Piece>& pieces = block.pieces;
  size_t total = bytes;
  for (const Piece& piece : pieces) {
    if (piece.key == key) {
      if (piece.bytes != bytes) fail("two sizes, %zu and %zu, for one piece of shared memory", piece.bytes, bytes);
      return piece.memory;
    }
    total += piece.bytes;
  }
  if (total > kSharedBytes) fail("%zu bytes of shared memory in a block, more than %d", total, kSharedBytes);
  void* memory = memset(::operator new(bytes, std::align_val_t(align)), 0xCD, bytes);
  pieces.push_back({key, memory, bytes, align});
  return memory;
}

// Orders.

// xorshift64*: the same order from the same seed with every standard library.
class Order {
 public:
  Order() {
    const char* text = getenv("V2DROP_EMULATE_ORDER");
    if (!text || !*text || strcmp(text, "forward") == 0) return;
    reverse_ = strcmp(text, "reverse") == 0;
    if (reverse_) return;
    char* end;
    state_ = strtoull(text, &end, 10) * 2 + 1;
    shuffle_ = true;
    if (*end || !(*text >= '0' && *text <= '9')) fail("V2DROP_EMULATE_ORDER is forward, reverse or a number, got %s", text);
  }

  bool shuffles() const { return shuffle_; }

  template <class T>
  void apply(std::vector<T>& items) {
    if (reverse_) std::reverse(items.begin(), items.end());
    if (!shuffle_) return;
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next() % i]);
  }

 private:
  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return (state_ * 0x2545f4914f6cdd1dull) >> 16;
  }

  bool reverse_ = false, shuffle_ = false;
  uint64_t state_ = 1;
};

// Launches.

uint3 unflatten(unsigned i, dim3 size) { return {i % size.x, i / size.x % size.y, i / size.x / size.y}; }

// "block 2: threads 0-30 wait at __syncthreads, thread 31 has left the kernel", for every block that cannot go on.
[[noreturn]] void report_deadlock(const std::vector<std::unique_ptr<Block>>& blocks, unsigned threads) {
  std::string text;
  for (size_t b = 0; b < blocks.size(); ++b) {
    const auto state = [&](unsigned i) {
      const Fiber& fiber = *pool()[b * threads + i];
      return fiber.ended ? "left the kernel" : fiber.waits_at->name;
    };
    text += "\n  block " + std::to_string(blocks[b]->index.x) + ":";
    for (unsigned first = 0, last, groups = 0; first < threads; first = last + 1) {
      for (last = first; last + 1 < threads && strcmp(state(last + 1), state(first)) == 0;) ++last;
      if (++groups == 9) {
        text += ", ...";
        break;
      }
      text += (groups > 1 ? ", threads " : " threads ") + std::to_string(first) + "-" + std::to_string(last) +
              (pool()[b * threads + first]->ended ? " have " : " wait at ") + state(first);
    }
  }
  fail("threads wait for others that never come%s", text.c_str());
}

void run_blocks(const std::vector<std::unique_ptr<Block>>& blocks, unsigned threads, Order& order) {
  std::vector<Fiber*> fibers;
  for (const std::unique_ptr<Block>& block : blocks) {
    for (unsigned i = 0; i < threads; ++i) {
      Fiber* fiber = pool()[fibers.size()].get();
      fiber->block = block.get();
      fiber->number = i;
      fiber->thread = unflatten(i, blockDim);
      fiber->ended = false;
      fiber->waited = !programmatic;
      fibers.push_back(fiber);
    }
  }
  if (!order.shuffles()) order.apply(fibers);
  for (size_t left = fibers.size(); left != 0;) {
    if (order.shuffles()) order.apply(fibers);
    bool progress = false;
    for (Fiber* fiber : fibers) {
      if (!fiber->can_run()) continue;
      enter(*fiber);
      if (fiber->ended) {
        --left;
        fiber->block->end_thread();
      }
      progress = true;
    }
    if (!progress) report_deadlock(blocks, threads);
  }
}

uint64_t volume(dim3 size) { return uint64_t{size.x} * size.y * size.z; }

bool has_clusters() {
  const char* text = getenv("V2DROP_EMULATE_CLUSTERS");
  return !text || strcmp(text, "0") != 0;
}

// A launch of a capture: the arguments are inside the body, a copy of the function object that a thread calls.
struct Recorded {
  cudaLaunchConfig_t config;
  std::vector<cudaLaunchAttribute> attributes;
  void (*thread)(const void*);
  std::unique_ptr<std::max_align_t[]> body;
  size_t bytes;
};
std::vector<Recorded>& recorded = *new std::vector<Recorded>;
std::atomic<bool> capturing{false};
std::atomic<int64_t> synchronised{0};

cudaError_t check(const cudaLaunchConfig_t& config, bool* cooperative, bool* early, unsigned* cluster) {
  *cooperative = *early = false;
  *cluster = 0;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) {
      *cooperative = attribute.val.cooperative != 0;
    } else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      *early = attribute.val.programmaticStreamSerializationAllowed != 0;
    } else if (attribute.id == cudaLaunchAttributeClusterDimension) {
      // One dimension is all that the kernels use.
      if (attribute.val.clusterDim.y != 1 || attribute.val.clusterDim.z != 1) return cudaErrorInvalidValue;
      *cluster = attribute.val.clusterDim.x;
      if (!has_clusters()) return cudaErrorInvalidClusterSize;
      if (*cluster == 0 || *cluster > kMaxClusterBlocks || config.gridDim.x % *cluster != 0) return cudaErrorInvalidClusterSize;
    } else if (attribute.id != cudaLaunchAttributeIgnore) {
      return cudaErrorInvalidValue;
    }
  }
  const uint64_t blocks = volume(config.gridDim), threads = volume(config.blockDim);
  if (blocks == 0 || config.gridDim.x > 0x7fffffffu || config.gridDim.y > 0xffffu || config.gridDim.z > 0xffffu ||
      config.dynamicSmemBytes != 0 || threads == 0 || threads > kMaxThreads)
    return cudaErrorInvalidConfiguration;
  if (*cooperative && *cluster) return cudaErrorInvalidValue;  // what a kernel may do there is not emulated
  if (*cooperative && blocks > kMultiprocessors * kBlocksPerMultiprocessor) return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

}  // namespace

void fail(const char* format, ...) {
  fflush(stdout);
  fprintf(stderr, "emulated CUDA: ");
  if (current) fprintf(stderr, "block %u, thread %u: ", current->block->index.x, current->number);
  va_list args;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fputc('\n', stderr);
  abort();
}

void* shared(size_t bytes, size_t align, const void* key) {
  require_kernel("shared memory");
  return piece_of(*current->block, bytes, align, key);
}

int block_barrier(const char* name, bool predicate) {
  require_kernel(name);
  Barrier& barrier = current->block->barrier;
  return barrier.trues[meet(barrier, name, predicate)];
}

void grid_barrier() {
  require_kernel("this_grid().sync()");
  if (!grid) fail("this_grid().sync() in a launch that is not cooperative");
  meet(*grid, "this_grid().sync()", false);
}

void cluster_barrier() {
  require_cluster("this_cluster().sync()");
  meet(current->block->cluster->barrier, "this_cluster().sync()", false);
}

unsigned cluster_rank() {
  require_cluster("block_rank()");
  return current->block->rank;
}

unsigned cluster_blocks() {
  require_cluster("num_blocks()");
  return static_cast<unsigned>(current->block->cluster->blocks.size());
}

void* shared_of_rank(void* own, unsigned rank) {
  require_cluster("map_shared_rank()");
  const std::vector<Block*>& blocks = current->block->cluster->blocks;
  if (rank >= blocks.size()) fail("map_shared_rank(): rank %u of a cluster of %zu blocks", rank, blocks.size());
  if (blocks[rank]->running == 0) fail("map_shared_rank(): block %u of the cluster has ended", rank);
  for (const Piece& piece : current->block->pieces) {
    const ptrdiff_t offset = static_cast<char*>(own) - static_cast<char*>(piece.memory);
    if (offset < 0 || offset >= static_cast<ptrdiff_t>(piece.bytes)) continue;
    return static_cast<char*>(piece_of(*blocks[rank], piece.bytes, piece.align, piece.key)) + offset;
  }
  fail("map_shared_rank(): %p is not in shared memory", own);
}

int active_clusters(const cudaLaunchConfig_t& config) {
  bool cooperative, early;
  unsigned cluster;
  if (check(config, &cooperative, &early, &cluster) != cudaSuccess || cluster == 0) return 0;
  return static_cast<int>(kMultiprocessors * kBlocksPerMultiprocessor / cluster);
}

Lanes warp_barrier(const char* name, unsigned mask, uint64_t value) {
  require_kernel(name);
  if (mask != 0xffffffffu) fail("%s: the mask is %#x; only a whole warp is emulated", name, mask);
  const unsigned lane = current->number % 32;
  Warp& warp = current->block->warps[current->number / 32];
  warp.values[warp.barrier.meeting & 1][lane] = value;
  const unsigned parity = meet(warp.barrier, name, false);
  return {warp.values[parity], warp.barrier.members, lane};
}

void wait_for_previous_launch() {
  require_kernel("cudaGridDependencySynchronize");
  current->waited = true;
}

void require_previous_launch(const char* name) {
  require_kernel(name);
  if (!current->waited) fail("%s comes before cudaGridDependencySynchronize in a programmatic launch", name);
}

int64_t launches(Launches which) { return launched[static_cast<size_t>(which)].load(); }

void begin_capture() {
  const std::lock_guard<std::mutex> lock(launching);
  if (capturing) fail("a capture inside a capture");
  recorded.clear();
  capturing = true;
}

size_t end_capture() {
  const std::lock_guard<std::mutex> lock(launching);
  capturing = false;
  return recorded.size();
}

void replay() {
  if (capturing) fail("a replay inside a capture");
  for (Recorded& item : recorded) {
    item.config.attrs = item.attributes.data();
    if (launch(item.config, item.thread, item.body.get(), item.bytes) != cudaSuccess) fail("a recorded launch fails");
  }
}

bool holds(const void* memory, size_t bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(memory);
  for (const Recorded& item : recorded) {
    for (size_t at = 0; at + sizeof(uintptr_t) <= item.bytes; at += sizeof(uintptr_t)) {
      uintptr_t word;
      memcpy(&word, reinterpret_cast<const char*>(item.body.get()) + at, sizeof word);
      if (word >= first && word - first < bytes) return true;
    }
  }
  return false;
}

void drop_capture() { recorded.clear(); }

bool is_capturing() { return capturing; }

void synchronises(const char* name) {
  if (capturing) fail("%s while launches are captured", name);
  ++synchronised;
}

int64_t synchronisations() { return synchronised.load(); }

void gives_back(const void* memory, size_t bytes) {
  if (holds(memory, bytes)) fail("memory of a captured launch is given back");
}

cudaError_t launch(const cudaLaunchConfig_t& config, void (*thread)(const void*), const void* body, size_t bytes) {
  bool cooperative, early;
  unsigned cluster;
  const cudaError_t error = check(config, &cooperative, &early, &cluster);
  if (error != cudaSuccess) return last_error = error;
  static const bool idle = [] {
    const char* given = std::getenv("V2DROP_EMULATE_LAUNCHES");
    return given && std::strcmp(given, "0") == 0;
  }();
  if (idle) {
    ++launched[static_cast<size_t>(Launches::kAll)];
    return cudaSuccess;
  }
  const std::lock_guard<std::mutex> lock(launching);
  if (capturing) {
    std::unique_ptr<std::max_align_t[]> copy(new std::max_align_t[bytes / sizeof(std::max_align_t) + 1]);
    memcpy(copy.get(), body, bytes);
    recorded.push_back({config, {config.attrs, config.attrs + config.numAttrs}, thread, std::move(copy), bytes});
    return cudaSuccess;
  }
  const unsigned blocks = static_cast<unsigned>(volume(config.gridDim)), threads = static_cast<unsigned>(volume(config.blockDim));
  const unsigned together = cooperative ? blocks : cluster ? cluster : 1;
  Order order;
  std::vector<unsigned> queue(blocks / together);  // groups of blocks that run at the same time
  std::iota(queue.begin(), queue.end(), 0u);
  if (!cooperative) order.apply(queue);

  grow_pool(size_t{together} * threads);
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  run_thread = thread;
  kernel = body;
  programmatic = early;
  Barrier all(blocks * threads);
  grid = cooperative ? &all : nullptr;
  for (const unsigned group : queue) {
    Cluster mates(cluster * threads);
    std::vector<std::unique_ptr<Block>> live;
    for (unsigned i = 0; i < together; ++i) {
      live.emplace_back(new Block(unflatten(group * together + i, gridDim), i, cluster ? &mates : nullptr, threads));
      mates.blocks.push_back(live.back().get());
    }
    run_blocks(live, threads, order);
  }
  grid = nullptr;
  ++launched[static_cast<size_t>(Launches::kAll)];
  last_blocks = blocks;
  if (cluster) ++launched[static_cast<size_t>(Launches::kClusters)];
  if (cooperative) ++launched[static_cast<size_t>(Launches::kCooperative)];
  return cudaSuccess;
}

}  // namespace emulate

int64_t v2drop_emulate_launches() { return emulate::launches(); }
int64_t v2drop_emulate_synchronisations() { return emulate::synchronisations(); }
void v2drop_emulate_begin_capture() { emulate::begin_capture(); }
int64_t v2drop_emulate_end_capture() { return static_cast<int64_t>(emulate::end_capture()); }
void v2drop_emulate_replay() { emulate::replay(); }
int32_t v2drop_emulate_holds(const void* memory, int64_t bytes) { return emulate::holds(memory, static_cast<size_t>(bytes)); }
void v2drop_emulate_drop_capture() { emulate::drop_capture(); }
int64_t v2drop_emulate_last_blocks() { return emulate::last_blocks.load(); }
int64_t v2drop_emulate_cluster_launches() { return emulate::launches(emulate::Launches::kClusters); }
int64_t v2drop_emulate_cooperative_launches() { return emulate::launches(emulate::Launches::kCooperative); }

cudaError_t cudaPeekAtLastError() { return emulate::last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulate::last_error;
  emulate::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
#define EMULATE_NAME(name) \
  case name:               \
    return #name
  switch (error) {
    EMULATE_NAME(cudaSuccess);
    EMULATE_NAME(cudaErrorInvalidValue);
    EMULATE_NAME(cudaErrorMemoryAllocation);
    EMULATE_NAME(cudaErrorInitializationError);
    EMULATE_NAME(cudaErrorInvalidConfiguration);
    EMULATE_NAME(cudaErrorStubLibrary);
    EMULATE_NAME(cudaErrorInsufficientDriver);
    EMULATE_NAME(cudaErrorInvalidDeviceFunction);
    EMULATE_NAME(cudaErrorNoDevice);
    EMULATE_NAME(cudaErrorInvalidDevice);
    EMULATE_NAME(cudaErrorNoKernelImageForDevice);
    EMULATE_NAME(cudaErrorUnsupportedPtxVersion);
    EMULATE_NAME(cudaErrorInvalidResourceHandle);
    EMULATE_NAME(cudaErrorIllegalAddress);
    EMULATE_NAME(cudaErrorLaunchOutOfResources);
    EMULATE_NAME(cudaErrorLaunchFailure);
    EMULATE_NAME(cudaErrorCooperativeLaunchTooLarge);
    EMULATE_NAME(cudaErrorNotSupported);
    EMULATE_NAME(cudaErrorInvalidClusterSize);
    EMULATE_NAME(cudaErrorSystemDriverMismatch);
    EMULATE_NAME(cudaErrorUnknown);
  }
#undef EMULATE_NAME
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
