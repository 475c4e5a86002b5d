// SPDX-License-Identifier: Apache-2.0
//
// 64-bit offsets: rows that lie more than 2^32 bytes and 2^31 elements apart, in memory of which only the touched pages exist.
#include <sys/mman.h>

#include <cstdio>
#include <cstring>

#include "v2drop/v2drop.h"

namespace {

int failures = 0;
#define CHECK(condition) \
  ((condition) ? void() : void((std::printf("%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, v2drop_last_error()), ++failures)))

void* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

}  // namespace

int main() {
  constexpr int64_t kRow = (int64_t{1} << 31) + 4096, kRows = 4, kDim = 100;  // elements
  const size_t bytes = static_cast<size_t>((kRows - 1) * kRow + kDim) * sizeof(float);
  float* cur = static_cast<float*>(reserve(bytes));
  float* out = static_cast<float*>(reserve(bytes));
  if (!cur || !out) {
    std::printf("offsets: skipped, no address space\n");
    return 0;
  }
  const float prev[kDim] = {};
  const float size[kRows] = {1, 4, 2, 3};
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t d = 0; d < kDim; ++d) cur[r * kRow + d] = size[r];
  }

  int64_t kept[3];
  const v2drop_tensor a = {const_cast<float*>(prev), V2DROP_FLOAT32, 2, {kRows, kDim}, {0, 1}};
  const v2drop_tensor b = {cur, V2DROP_FLOAT32, 2, {kRows, kDim}, {kRow, 1}};
  const v2drop_tensor keep = {kept, V2DROP_INT64, 1, {3}, {1}};
  const v2drop_gather gather = {b, {out, V2DROP_FLOAT32, 2, {3, kDim}, {kRow, 1}}, -1, 0, 0};
  const v2drop_segment segment = {0, 0, kRows, 0, 3, 0, 0, 0};
  v2drop_source source = V2DROP_SOURCE_INIT;
  source.prev = &a;
  source.cur = &b;
  source.metric = V2DROP_L1;
  v2drop_context context = V2DROP_CONTEXT_INIT;
  context.threads = 2;
  CHECK(v2drop_drop_tokens(&source, &segment, 1, nullptr, &keep, nullptr, &gather, 1, &context) == V2DROP_OK);
  CHECK(kept[0] == 1 && kept[1] == 2 && kept[2] == 3);
  for (int64_t i = 0; i < 3; ++i)
    CHECK(out[i * kRow] == size[i + 1] && std::memcmp(out + i * kRow, cur + (i + 1) * kRow, sizeof prev) == 0);

  // Planes that far apart, as in the heads of a long KV cache: [2, rows, dim].
  const v2drop_gather planes = {
      {cur, V2DROP_FLOAT32, 3, {2, 1, kDim}, {3 * kRow, kDim, 1}}, {out, V2DROP_FLOAT32, 3, {2, 1, kDim}, {kRow, kDim, 1}}, -1, 1, 0};
  int64_t zero = 0;
  const v2drop_tensor first = {&zero, V2DROP_INT64, 1, {1}, {1}};
  CHECK(v2drop_compact(&first, &planes, 1, &context) == V2DROP_OK);
  CHECK(out[0] == size[0] && out[kRow] == size[3]);

  CHECK(v2drop_compact_inplace(&keep, &gather, 1, &context) == V2DROP_OK);
  for (int64_t i = 0; i < 3; ++i) CHECK(cur[i * kRow + kDim - 1] == size[i + 1]);
  munmap(cur, bytes);
  munmap(out, bytes);
  if (!failures) std::printf("offsets: ok\n");
  return failures != 0;
}
