// SPDX-License-Identifier: Apache-2.0
//
// The emulator itself: what kernels may rely on gives the same results in every order; what they may not is found.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "emulate.h"

namespace {

int failures = 0;
#define CHECK(condition) ((condition) ? void() : void((std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition), ++failures)))

constexpr unsigned kAll = 0xffffffffu;

template <class T>
T& block_shared() {
  static const char key = 0;
  return *static_cast<T*>(emulate::shared(sizeof(T), alignof(T), &key));
}

template <class... Exp, class... Act>
cudaError_t launch(unsigned blocks, unsigned threads, void (*kernel)(Exp...), Act... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <class... Exp, class... Act>
cudaError_t launch_with(cudaLaunchAttributeID id, unsigned blocks, unsigned threads, void (*kernel)(Exp...), Act... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = id;
  if (id == cudaLaunchAttributeCooperative) attribute.val.cooperative = 1;
  if (id == cudaLaunchAttributeProgrammaticStreamSerialization) attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <class... Exp, class... Act>
cudaError_t launch_clusters(unsigned cluster, unsigned blocks, unsigned threads, void (*kernel)(Exp...), Act... args) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // both at once are allowed
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

void in_every_order(const std::function<void()>& body) {
  for (const char* order : {"forward", "reverse", "1", "2", "123456789"}) {
    setenv("V2DROP_EMULATE_ORDER", order, 1);
    body();
  }
  unsetenv("V2DROP_EMULATE_ORDER");
}

// What a child process that runs this says on stderr before it aborts; "" if it does not abort.
std::string last_words(const std::function<void()>& body) {
  int ends[2];
  if (pipe(ends) != 0) return "";
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    body();
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char buffer[256];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) said.append(buffer, n);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT ? said : "";
}

#define CHECK_ABORTS(message, ...)                                                       \
  do {                                                                                   \
    const std::string said = last_words([&] { (void)(__VA_ARGS__); });                   \
    if (said.find(message) == std::string::npos) {                                       \
      std::printf("%s:%d: %s\n  said: %s\n", __FILE__, __LINE__, message, said.c_str()); \
      ++failures;                                                                        \
    }                                                                                    \
  } while (0)

// What must work.

struct Sums {
  int of_warp[32];
};

// Sum of a block in two levels of shuffles, then one atomic per block.
__global__ void __launch_bounds__(256) sum_kernel(const int* __restrict__ x, int n, int* __restrict__ total) {
  int sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += __ldg(x + i);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  Sums& sums = block_shared<Sums>();
  if (threadIdx.x % 32 == 0) sums.of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? sums.of_warp[threadIdx.x] : 0;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(kAll, sum, step);
    if (threadIdx.x == 0) atomicAdd(total, sum);
  }
}

void test_sum() {
  std::vector<int> x(10007);
  int expected = 0;
  for (size_t i = 0; i < x.size(); ++i) expected += x[i] = static_cast<int>(i * 2654435761u % 10007) - 5000;
  in_every_order([&] {
    for (unsigned threads : {32u, 64u, 256u, 1024u}) {
      int total = 0;
      CHECK(launch(5, threads, sum_kernel, x.data(), static_cast<int>(x.size()), &total) == cudaSuccess);
      CHECK(total == expected);
    }
  });
}

struct Scan {
  int at[2][256];
};

// One barrier per step: what is read in a step was written in the one before, to the other buffer.
__global__ void scan_kernel(const int* x, int* out) {
  Scan& scan = block_shared<Scan>();
  const unsigned t = threadIdx.x;
  int turn = 0;
  scan.at[0][t] = x[blockIdx.x * blockDim.x + t];
  for (unsigned step = 1; step < blockDim.x; step *= 2, turn ^= 1) {
    __syncthreads();
    scan.at[turn ^ 1][t] = scan.at[turn][t] + (t >= step ? scan.at[turn][t - step] : 0);
  }
  out[blockIdx.x * blockDim.x + t] = scan.at[turn][t];
}

void test_scan() {
  constexpr unsigned kBlocks = 3, kThreads = 256;
  std::vector<int> x(kBlocks * kThreads), expected(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<int>(i * i % 1009);
    expected[i] = x[i] + (i % kThreads ? expected[i - 1] : 0);
  }
  in_every_order([&] {
    std::vector<int> out(x.size(), -1);
    CHECK(launch(kBlocks, kThreads, scan_kernel, x.data(), out.data()) == cudaSuccess);
    CHECK(out == expected);
  });
}

// The same without the barrier.
__global__ void broken_scan_kernel(const int* x, int* out) {
  Scan& scan = block_shared<Scan>();
  const unsigned t = threadIdx.x;
  scan.at[0][t] = x[t];
  out[t] = scan.at[0][t] + (t > 0 ? scan.at[0][t - 1] : 0);
}

void test_missing_barrier() {
  std::vector<int> x(256, 1), forward(256), reverse(256);
  CHECK(launch(1, 256, broken_scan_kernel, x.data(), forward.data()) == cudaSuccess);
  setenv("V2DROP_EMULATE_ORDER", "reverse", 1);
  CHECK(launch(1, 256, broken_scan_kernel, x.data(), reverse.data()) == cudaSuccess);
  unsetenv("V2DROP_EMULATE_ORDER");
  CHECK(forward[255] == 2);
  CHECK(reverse[255] == 1 + static_cast<int>(0xCDCDCDCDu));  // shared memory that no thread has written yet
}

// The order of blocks is not defined.
__global__ void ticket_kernel(unsigned* counter, unsigned* ticket) {
  if (threadIdx.x == 0) ticket[blockIdx.x] = atomicAdd(counter, 1u);
}

void test_orders() {
  const auto tickets = [](const char* order) {
    setenv("V2DROP_EMULATE_ORDER", order, 1);
    unsigned counter = 0;
    std::vector<unsigned> ticket(16, 99);
    CHECK(launch(16, 32, ticket_kernel, &counter, ticket.data()) == cudaSuccess && counter == 16);
    unsetenv("V2DROP_EMULATE_ORDER");
    return ticket;
  };
  const auto forward = tickets("forward"), reverse = tickets("reverse"), shuffled = tickets("7");
  for (unsigned i = 0; i < 16; ++i) CHECK(forward[i] == i && reverse[i] == 15 - i);
  CHECK(shuffled != forward && shuffled != reverse && shuffled != tickets("8") && shuffled == tickets("7"));
}

struct Parameters {
  int rounds;
  int pad[900];  // about what a launch with a table in its parameters has
};

// Every round, each thread adds up what all threads of the grid wrote in the last.
__global__ void grid_kernel(const __grid_constant__ Parameters p, long long* values) {
  const unsigned n = gridDim.x * blockDim.x, self = blockIdx.x * blockDim.x + threadIdx.x;
  for (int round = 0; round < p.rounds; ++round) {
    long long sum = 0;
    for (unsigned i = 0; i < n; ++i) sum += __ldcg(values + (round & 1) * n + i);
    values[(~round & 1) * n + self] = sum % 1000003 + self;
    cooperative_groups::this_grid().sync();
  }
}

void test_grid_sync() {
  constexpr unsigned kBlocks = 8, kThreads = 64, kN = kBlocks * kThreads;
  Parameters p = {};
  p.rounds = 4;
  std::vector<long long> expected(kN);
  for (unsigned i = 0; i < kN; ++i) expected[i] = i;
  for (int round = 0; round < p.rounds; ++round) {
    long long sum = 0;
    for (long long x : expected) sum += x;
    for (unsigned i = 0; i < kN; ++i) expected[i] = sum % 1000003 + i;
  }
  in_every_order([&] {
    std::vector<long long> values(2 * kN, -1);
    for (unsigned i = 0; i < kN; ++i) values[i] = i;
    CHECK(launch_with(cudaLaunchAttributeCooperative, kBlocks, kThreads, grid_kernel, p, values.data()) == cudaSuccess);
    CHECK(std::vector<long long>(values.begin(), values.begin() + kN) == expected);
  });
}

struct Shares {
  int of_thread[64];
};

// Each thread adds up what its neighbours in the blocks of the cluster wrote. SYNCS: bit 0 is the barrier before others read, bit 1 the one
// before a block may end.
template <int SYNCS>
__global__ void cluster_kernel(const int* x, int* out) {
  Shares& shares = block_shared<Shares>();
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  const auto cluster = cooperative_groups::this_cluster();
  shares.of_thread[t] = x[i];
  if (SYNCS & 1) {
    cluster.sync();
  } else {
    __syncthreads();
  }
  unsigned sum = cluster.block_rank() * 1000 + cluster.num_blocks();  // wraps where what is read was never written
  // The higher its rank the later a block reads, so the others may have ended.
  for (unsigned late = 0; late < cluster.block_rank(); ++late) __syncthreads();
  for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) {
    sum += static_cast<unsigned>(cluster.map_shared_rank(shares.of_thread, static_cast<int>(rank))[(t + 1) % blockDim.x]);
  }
  out[i] = static_cast<int>(sum);
  if (SYNCS & 2) cluster.sync();
}

constexpr unsigned kClusterBlocks = 4, kClusterThreads = 64, kClusterGrid = 12;

// What the kernel with these barriers makes in an order; nothing if it aborts.
template <int SYNCS>
std::vector<int> of_clusters(const char* order) {
  std::vector<int> x(kClusterGrid * kClusterThreads), out(x.size(), -1);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<int>(i * i % 911);
  setenv("V2DROP_EMULATE_ORDER", order, 1);
  const auto run = [&] {
    CHECK(launch_clusters(kClusterBlocks, kClusterGrid, kClusterThreads, cluster_kernel<SYNCS>, x.data(), out.data()) == cudaSuccess);
  };
  const bool ends = last_words(run).empty();
  if (ends) run();
  unsetenv("V2DROP_EMULATE_ORDER");
  return ends ? out : std::vector<int>();
}

// Of a cluster of blocks: right in every order with both barriers, and wrong in some order without either.
void test_clusters() {
  std::vector<int> expected(kClusterGrid * kClusterThreads);
  for (size_t i = 0; i < expected.size(); ++i) {
    const size_t block = i / kClusterThreads, first = block / kClusterBlocks * kClusterBlocks, rank = block - first;
    expected[i] = static_cast<int>(rank * 1000 + kClusterBlocks);
    for (size_t other = first; other < first + kClusterBlocks; ++other) {
      const size_t j = other * kClusterThreads + (i + 1) % kClusterThreads;
      expected[i] += static_cast<int>(j * j % 911);
    }
  }
  int without_first = 0, without_last = 0;
  for (const char* order : {"forward", "reverse", "1", "2", "3"}) {
    CHECK(of_clusters<3>(order) == expected);
    without_first += of_clusters<2>(order) != expected;
    without_last += of_clusters<1>(order) != expected;
  }
  CHECK(without_first > 0 && without_last > 0);
}

__global__ void cluster_block_missing_kernel() {
  if (cooperative_groups::this_cluster().block_rank() != 1) cooperative_groups::this_cluster().sync();
}
__global__ void cluster_rank_kernel(int rank) {
  *cooperative_groups::this_cluster().map_shared_rank(&block_shared<Shares>(), rank) = {};
  cooperative_groups::this_cluster().sync();
}
__global__ void cluster_address_kernel(int* x) { cooperative_groups::this_cluster().map_shared_rank(x, 0); }

void test_cluster_errors() {
  int x = 0, clusters = -1;
  CHECK_ABORTS("block 1: threads 0-31 have left the kernel\n  block 2: threads 0-31 wait at this_cluster",
               launch_clusters(4, 4, 32, cluster_block_missing_kernel));
  CHECK_ABORTS("map_shared_rank() in a launch without clusters", launch(1, 32, cluster_rank_kernel, 0));
  CHECK_ABORTS("rank 4 of a cluster of 4", launch_clusters(4, 8, 32, cluster_rank_kernel, 4));
  CHECK_ABORTS("is not in shared memory", launch_clusters(2, 2, 32, cluster_address_kernel, &x));
  CHECK(launch_clusters(8, 16, 32, cluster_rank_kernel, 7) == cudaSuccess);
  // Not a multiple; beyond the portable size; a device that has none.
  CHECK(launch_clusters(8, 12, 32, cluster_rank_kernel, 0) == cudaErrorInvalidClusterSize);
  CHECK(launch_clusters(16, 16, 32, cluster_rank_kernel, 0) == cudaErrorInvalidClusterSize);

  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(32);
  config.attrs = &attribute;
  config.numAttrs = 1;
  CHECK(cudaOccupancyMaxActiveClusters(&clusters, cluster_rank_kernel, &config) == cudaSuccess && clusters == 4);
  setenv("V2DROP_EMULATE_CLUSTERS", "0", 1);
  CHECK(cudaOccupancyMaxActiveClusters(&clusters, cluster_rank_kernel, &config) == cudaSuccess && clusters == 0);
  CHECK(launch_clusters(8, 16, 32, cluster_rank_kernel, 0) == cudaErrorInvalidClusterSize);
  unsetenv("V2DROP_EMULATE_CLUSTERS");
  CHECK(cudaGetLastError() == cudaErrorInvalidClusterSize);
}

__global__ void atomics_kernel(int* i, unsigned* u, unsigned long long* l) {
  const int x = static_cast<int>(threadIdx.x) - 100;
  atomicMin(i, x);
  atomicMax(i + 1, x);
  atomicAdd(i + 2, x);
  atomicMin(u, static_cast<unsigned>(x));
  atomicMax(u + 1, static_cast<unsigned>(x));
  atomicOr(u + 2, 1u << threadIdx.x % 32);
  atomicMax(l, static_cast<unsigned long long>(threadIdx.x) << 40);
  atomicAdd(l + 1, 1ull << 33);
  if (atomicCAS(u + 3, 0u, 1u) == 0) atomicAdd(u + 4, 1u);
  if (atomicExch(u + 5, 1u) == 0) atomicAdd(u + 6, 1u);
}

void test_atomics() {
  in_every_order([&] {
    int i[3] = {5, 5, 5};
    unsigned u[7] = {~0u};
    unsigned long long l[2] = {};
    CHECK(launch(1, 256, atomics_kernel, i, u, l) == cudaSuccess);
    CHECK(i[0] == -100 && i[1] == 155 && i[2] == 5 + 255 * 128 - 256 * 100);
    CHECK(u[0] == 0 && u[1] == ~0u && u[2] == ~0u && u[3] == 1 && u[4] == 1 && u[5] == 1 && u[6] == 1);
    CHECK(l[0] == 255ull << 40 && l[1] == 256ull << 33);
  });
}

// Every check of a lane or a block goes into `wrong`.
__global__ void lanes_kernel(int* wrong) {
  const int t = threadIdx.x, lane = t % 32;
  const auto expect = [&](bool right) { atomicAdd(wrong, right ? 0 : 1); };
  expect(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249u);
  expect(__any_sync(kAll, lane == 31) && !__any_sync(kAll, 0) && __all_sync(kAll, 1) && !__all_sync(kAll, lane != 7));
  expect(__shfl_sync(kAll, t, 5) == t - lane + 5 && __shfl_sync(kAll, t, 37) == t - lane + 5);
  expect(__shfl_sync(kAll, t, 3, 8) == t - lane % 8 + 3);
  expect(__shfl_up_sync(kAll, t, 1) == (lane ? t - 1 : t) && __shfl_up_sync(kAll, t, 2, 4) == (lane % 4 < 2 ? t : t - 2));
  expect(__shfl_down_sync(kAll, t, 4) == (lane < 28 ? t + 4 : t) && __shfl_down_sync(kAll, t, 1, 4) == (lane % 4 < 3 ? t + 1 : t));
  expect(__shfl_xor_sync(kAll, t, 9) == (t ^ 9) && __shfl_xor_sync(kAll, t, 16, 8) == (lane < 16 ? t : t ^ 16));
  expect(__shfl_sync(kAll, t + 0.25f, 31) == t - lane + 31.25f);
  expect(__shfl_xor_sync(kAll, (1ll << 40) + t, 1) == (1ll << 40) + (t ^ 1));
  expect(__shfl_down_sync(kAll, ~0ull - t, 1) == ~0ull - (lane < 31 ? t + 1 : t));
  expect(__reduce_add_sync(kAll, lane - 20) == 16 * 31 - 640 && __reduce_add_sync(kAll, 0x10000000u) == 0u);
  expect(__reduce_min_sync(kAll, lane - 20) == -20 && __reduce_max_sync(kAll, lane - 20) == 11);
  expect(__reduce_min_sync(kAll, static_cast<unsigned>(lane - 20)) == 0 &&
         __reduce_max_sync(kAll, static_cast<unsigned>(lane - 20)) == ~0u - 0);
  const int half = blockDim.x / 2;
  for (int turn = 0; turn < 3; ++turn) expect(__syncthreads_count(t < half + turn) == half + turn);
  expect(__syncthreads_or(t == 3) && !__syncthreads_or(0) && __syncthreads_and(2) && !__syncthreads_and(t != 3));
  __syncwarp();
  // Warps may go different ways between the barriers of a block.
  int steps = 0;
  for (int i = 0; i <= t / 32; ++i) steps += __reduce_add_sync(kAll, 1);
  expect(steps == 32 * (t / 32 + 1));
  expect(__syncthreads_count(1) == static_cast<int>(blockDim.x));
}

void test_lanes() {
  in_every_order([&] {
    int wrong = 0;
    CHECK(launch(3, 96, lanes_kernel, &wrong) == cudaSuccess);
    CHECK(wrong == 0);
  });
}

__global__ void odd_kernel(unsigned* ballots, int* counts) {
  const unsigned ballot = __ballot_sync(kAll, 1);
  ballots[threadIdx.x] = __all_sync(kAll, 1) ? ballot : 0;
  counts[threadIdx.x] = __reduce_add_sync(kAll, 1) + __syncthreads_count(1);
}

void test_odd_block() {
  unsigned ballots[40];
  int counts[40];
  CHECK(launch(1, 40, odd_kernel, ballots, counts) == cudaSuccess);
  for (int i = 0; i < 40; ++i) CHECK(ballots[i] == (i < 32 ? kAll : 0xffu) && counts[i] == 40 + (i < 32 ? 32 : 8));
}

__global__ void grid_3d_kernel(int* seen) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicAdd(seen + block * blockDim.x * blockDim.y * blockDim.z + thread, 1);
}

void test_3d() {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2, 3, 5);
  config.blockDim = dim3(4, 2, 3);
  std::vector<int> seen(30 * 24);
  CHECK(cudaLaunchKernelEx(&config, grid_3d_kernel, seen.data()) == cudaSuccess);
  CHECK(seen == std::vector<int>(30 * 24, 1));
}

__global__ void access_kernel(uint4* wide, long long* eight, float* four) {
  __stcg(wide + 1, __ldcs(wide));
  __stcs(eight, __ldcg(eight + 1));
  __stcs(four, __fmaf_rn(__ldca(four), 0x1.001p0f, -0x1.002p0f));
}

void test_access() {
  alignas(16) uint4 wide[2] = {{1, 2, 3, 4}, {}};
  long long eight[2] = {1, 1ll << 40};
  float four = 0x1.001p0f;
  CHECK(launch(1, 1, access_kernel, wide, eight, &four) == cudaSuccess);
  CHECK(std::memcmp(wide, wide + 1, 16) == 0 && eight[0] == 1ll << 40);
  CHECK(four == 0x1p-24f);  // 0 if the product were rounded
}

void test_integers() {
  CHECK(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64 && __ffs(0) == 0 && __ffs(8) == 4 && __ffsll(1ll << 40) == 41);
  CHECK(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0 && __clzll(0) == 64 && __clzll(1) == 63);
  CHECK(min(3, -4) == -4 && max(3u, ~0u) == ~0u && min(int64_t{1} << 40, int64_t{5}) == 5 && max(1ll, 2ll) == 2);
  CHECK(__float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0x80000000u) == 0.0f && __int_as_float(__float_as_int(-2.5f)) == -2.5f);
}

// Conversions, against the definition of the formats in double arithmetic.

double value_of(unsigned bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1), fraction = bits & ((1 << fraction_bits) - 1);
  double size;
  if (exponent == (1 << exponent_bits) - 1) {
    size = fraction ? NAN : INFINITY;
  } else {
    size = std::ldexp(exponent ? fraction + (1 << fraction_bits) : fraction, (exponent ? exponent : 1) - bias - fraction_bits);
  }
  return bits & 0x8000 ? -size : size;
}

// Rounding is monotone, so it is right everywhere if it is right at each number, half way to the next, and beside the middle. The
// number after the largest is, for rounding, the next power of two.
template <class Widen, class Narrow>
void check_format(int exponent_bits, Widen widen, Narrow narrow) {
  const unsigned infinity = ((1u << exponent_bits) - 1) << (15 - exponent_bits);
  int wrong = 0;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const double exact = value_of(bits, exponent_bits);
    const float wide = widen(bits);
    if (std::isnan(exact)) {
      wrong += !std::isnan(wide) || narrow(wide) != 0x7fff;
      continue;
    }
    wrong += wide != exact || std::signbit(wide) != std::signbit(exact) || narrow(wide) != bits;
    if ((bits & 0x7fff) == infinity) continue;
    const bool last = ((bits + 1) & 0x7fff) == infinity;
    const double next = last ? std::copysign(std::ldexp(1.0, 1 << (exponent_bits - 1)), exact) : value_of(bits + 1, exponent_bits);
    const float middle = static_cast<float>((exact + next) / 2), far = std::copysign(INFINITY, middle);
    wrong += middle != (exact + next) / 2;  // has to be a float for this test
    wrong += narrow(middle) != bits + (bits & 1) || narrow(std::nextafter(middle, 0.0f)) != bits ||
             narrow(std::nextafter(middle, far)) != bits + 1;
  }
  CHECK(wrong == 0);
  CHECK(narrow(1e38f * 10) == infinity && narrow(-1e38f * 10) == (infinity | 0x8000));
  CHECK(narrow(__uint_as_float(1)) == 0 && narrow(__uint_as_float(0x80000001)) == 0x8000);
  for (unsigned nan : {0x7fc00000u, 0x7f800001u, 0xffffffffu, 0x7f80ffffu}) CHECK(narrow(__uint_as_float(nan)) == 0x7fff);
}

void test_conversions() {
  check_format(
      5, [](unsigned bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); },
      [](float x) -> unsigned { return __half_as_ushort(__float2half_rn(x)); });
  check_format(
      8, [](unsigned bits) { return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits))); },
      [](float x) -> unsigned { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); });
}

// What must be found.

__global__ void leaves_kernel() {
  if (threadIdx.x != 31) __syncthreads();
}
__global__ void lane_missing_kernel(int* out) {
  if (threadIdx.x != 3) *out = __shfl_sync(kAll, 1, 0);
}
__global__ void barrier_and_warp_kernel() { threadIdx.x == 3 ? __syncthreads() : __syncwarp(); }
__global__ void mixed_kernel() { threadIdx.x < 32 ? __syncthreads() : (void)__syncthreads_or(1); }
__global__ void block_missing_kernel() {
  if (blockIdx.x != 1) cooperative_groups::this_grid().sync();
}
__global__ void mask_kernel() { __ballot_sync(0xffffu, 1); }
__global__ void reads_absent_lane_kernel() { __shfl_xor_sync(kAll, 1, 16); }
__global__ void trap_kernel(int at) {
  if (static_cast<int>(threadIdx.x) == at) __trap();
}
struct Large {
  char bytes[40 << 10];
};
struct Larger {
  char bytes[40 << 10], one;
};
__global__ void much_shared_kernel() {
  block_shared<Large>();
  block_shared<Larger>();
}
__global__ void reads_kernel(const int* x) { __ldg(x); }
__global__ void waits_and_reads_kernel(const int* x) {
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
  __ldg(x);
}
__global__ void empty_kernel() {}

void test_errors() {
  int x[8] = {};
  const auto early = cudaLaunchAttributeProgrammaticStreamSerialization;
  CHECK_ABORTS("block 0: threads 0-30 wait at __syncthreads, threads 31-31 have left the kernel", launch(2, 32, leaves_kernel));
  CHECK_ABORTS("threads 0-2 wait at __shfl_sync, threads 3-3 have left", launch(1, 32, lane_missing_kernel, x));
  CHECK_ABORTS("threads 3-3 wait at __syncthreads, threads 4-31 wait at __syncwarp", launch(1, 32, barrier_and_warp_kernel));
  CHECK_ABORTS("__syncthreads_or is reached while others wait at __syncthreads", launch(1, 64, mixed_kernel));
  CHECK_ABORTS("block 1: threads 0-31 have left the kernel\n  block 2: threads 0-31 wait at this_grid",
               launch_with(cudaLaunchAttributeCooperative, 3, 32, block_missing_kernel));
  CHECK_ABORTS("not cooperative", launch(3, 32, block_missing_kernel));
  CHECK_ABORTS("__ballot_sync: the mask is 0xffff", launch(1, 32, mask_kernel));
  CHECK_ABORTS("of a warp of 8", launch(1, 8, reads_absent_lane_kernel));
  CHECK_ABORTS("block 0, thread 5: __trap()", launch(1, 32, trap_kernel, 5));
  CHECK_ABORTS("81921 bytes of shared memory", launch(1, 32, much_shared_kernel));
  CHECK_ABORTS("is not a multiple of 16",
               launch(1, 1, access_kernel, reinterpret_cast<uint4*>(reinterpret_cast<char*>(x) + 4), nullptr, nullptr));
  CHECK_ABORTS("__ldg comes before cudaGridDependencySynchronize", launch_with(early, 1, 1, reads_kernel, x));
  CHECK_ABORTS("the end of the kernel comes before", launch_with(early, 1, 1, empty_kernel));
  CHECK_ABORTS("got sideways", (setenv("V2DROP_EMULATE_ORDER", "sideways", 1), launch(1, 1, empty_kernel)));
  CHECK_ABORTS("__syncthreads outside a kernel", (__syncthreads(), 0));
  CHECK(last_words([] { launch(2, 32, empty_kernel); }).empty());
  CHECK(launch_with(early, 2, 32, waits_and_reads_kernel, x) == cudaSuccess);
}

void test_host() {
  const int64_t before = v2drop_emulate_launches();
  CHECK(launch(0, 32, empty_kernel) == cudaErrorInvalidConfiguration);
  CHECK(launch(1, 0, empty_kernel) == cudaErrorInvalidConfiguration && launch(1, 1025, empty_kernel) == cudaErrorInvalidConfiguration);
  CHECK(launch_with(cudaLaunchAttributeCooperative, 9, 32, empty_kernel) == cudaErrorCooperativeLaunchTooLarge);
  CHECK(cudaPeekAtLastError() == cudaErrorCooperativeLaunchTooLarge && cudaGetLastError() == cudaErrorCooperativeLaunchTooLarge);
  CHECK(cudaGetLastError() == cudaSuccess && v2drop_emulate_launches() == before);
  CHECK(launch(1, 1024, empty_kernel) == cudaSuccess && launch_with(cudaLaunchAttributeCooperative, 8, 1024, empty_kernel) == cudaSuccess);
  CHECK(v2drop_emulate_launches() == before + 2 && emulate::launches() == before + 2);
  CHECK(std::strcmp(cudaGetErrorName(cudaErrorInvalidValue), "cudaErrorInvalidValue") == 0);

  int value = -1, blocks = 0;
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value == 4);
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, sum_kernel, 256, 0) == cudaSuccess && blocks == 2);
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 1) == cudaErrorInvalidDevice && cudaSetDevice(1) != cudaSuccess);

  unsigned* memory;
  CHECK(cudaMalloc(&memory, 1000) == cudaSuccess && reinterpret_cast<uintptr_t>(memory) % 256 == 0 && memory[7] == 0xCDCDCDCDu);
  CHECK(cudaMemsetAsync(memory, 1, 8, nullptr) == cudaSuccess &&
        cudaMemcpyAsync(&value, memory + 1, 4, cudaMemcpyDeviceToHost) == cudaSuccess);
  CHECK(value == 0x01010101 && cudaStreamSynchronize(nullptr) == cudaSuccess && cudaFree(memory) == cudaSuccess);
}

__global__ void add_kernel(int* total, int x) {
  if (threadIdx.x == 0) *total += x;
}

// A capture runs nothing and copies the arguments; what would wait inside one aborts, and so does giving back memory that it holds.
void test_capture() {
  int* total;
  CHECK(cudaMalloc(&total, sizeof *total) == cudaSuccess);
  *total = 0;
  const int64_t before = emulate::launches(), waits = v2drop_emulate_synchronisations();
  emulate::begin_capture();
  for (int x : {1, 10}) CHECK(launch(1, 32, add_kernel, total, x) == cudaSuccess);
  CHECK_ABORTS("cudaMemcpyAsync while launches are captured", cudaMemcpyAsync(total, &waits, 4, cudaMemcpyHostToDevice));
  CHECK_ABORTS("cudaStreamSynchronize while launches are captured", cudaStreamSynchronize(nullptr));
  CHECK_ABORTS("cudaDeviceSynchronize while launches are captured", cudaDeviceSynchronize());
  CHECK_ABORTS("cudaMalloc while launches are captured", cudaMalloc(&total, 4));
  CHECK(emulate::end_capture() == 2 && *total == 0 && emulate::launches() == before);
  emulate::replay();
  emulate::replay();
  CHECK(*total == 22 && emulate::launches() == before + 4 && v2drop_emulate_synchronisations() == waits);
  CHECK(emulate::holds(total, sizeof *total) && !emulate::holds(total + 1, sizeof *total));
  CHECK_ABORTS("memory of a captured launch is given back", cudaFree(total));
  emulate::drop_capture();
  CHECK(cudaFree(total) == cudaSuccess && v2drop_emulate_synchronisations() == waits + 1);
}

void test_threads() {
  const std::vector<int> x(1000, 1);
  std::vector<int> totals(4);
  std::vector<std::thread> callers;
  for (int& total : totals) {
    callers.emplace_back([&x, &total] {
      for (int i = 0; i < 20; ++i) launch(2, 64, sum_kernel, x.data(), 1000, &total);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(totals == std::vector<int>(4, 20000));
}

__global__ void barriers_kernel(int* out) {
  int sum = 0;
  for (int i = 0; i < 30; ++i) sum += __syncthreads_count((threadIdx.x + i) % 3 == 0);
  if (threadIdx.x == 0) atomicAdd(out, sum);
}

// The Python tests rely on this speed; the bound is lax for the sanitizers and for busy machines.
void test_speed() {
  int out = 0;
  launch(1, 256, barriers_kernel, &out);
  const auto begin = std::chrono::steady_clock::now();
  launch(64, 256, barriers_kernel, &out);
  const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
  std::printf("emulator: 64 blocks of 256 threads with 30 barriers: %.1f ms\n", ms);
  CHECK(out == 65 * 30 * 256 / 3 && ms < 2000);
}

}  // namespace

int main() {
  test_sum();
  test_scan();
  test_missing_barrier();
  test_orders();
  test_grid_sync();
  test_clusters();
  test_cluster_errors();
  test_atomics();
  test_lanes();
  test_odd_block();
  test_3d();
  test_access();
  test_integers();
  test_conversions();
  test_errors();
  test_host();
  test_capture();
  test_threads();
  test_speed();
  std::printf("emulator: %s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
