// SPDX-License-Identifier: Apache-2.0
//
// Random scores on the GPU: a thread makes the four numbers of one counter of Philox4x32-10.
#include "device.cuh"
#include "launch.cuh"
#include "ops.h"
#include "tuning_cuda.h"

namespace v2drop {
namespace {

struct Random {
  uint64_t seed;
  const char* items;                       // null: the number of the entry
  int64_t item_stride, rows, blocks, all;  // blocks: counters of an entry, and all: of all entries
  float* scores;
};

__global__ void __launch_bounds__(kThreads) random_kernel(const __grid_constant__ Random r) {
  const int64_t flat = static_cast<int64_t>(blockIdx.x) * kThreads + thread_id();
  if (flat >= r.all) return;
  const int64_t entry = flat / r.blocks, block = flat % r.blocks;
  const int64_t item = r.items ? *reinterpret_cast<const int64_t*>(r.items + entry * r.item_stride) : entry;
  uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(item),
                   static_cast<uint32_t>(static_cast<uint64_t>(item) >> 32)};
  uint32_t key[2] = {static_cast<uint32_t>(r.seed), static_cast<uint32_t>(r.seed >> 32)};
  for (int round = 0; round < 10; ++round, key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0];
    c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1];
    c[1] = static_cast<uint32_t>(b);
    c[3] = static_cast<uint32_t>(a);
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if (4 * block + w < r.rows) r.scores[entry * r.rows + 4 * block + w] = static_cast<float>(c[w] >> 8) * 0x1p-24f;
  }
}

}  // namespace
namespace cuda {

void random_score(const RandomRequest& request, const v2drop_context& context) {
  const int64_t rows = request.scores.rows, blocks = (rows + 3) / 4;
  const Random r = {request.seed,
                    request.items.data,
                    request.items.row_stride,
                    rows,
                    blocks,
                    request.scores.batch * blocks,
                    reinterpret_cast<float*>(request.scores.data)};
  launch(random_kernel, (r.all + kThreads - 1) / kThreads, kThreads, LaunchDependency::kNone, context.stream, r);
}

}  // namespace cuda
}  // namespace v2drop
