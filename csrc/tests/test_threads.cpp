// SPDX-License-Identifier: Apache-2.0
//
// The same bits for any number of threads, from several callers at once, and in a forked child.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "v2drop/v2drop.h"

namespace {

constexpr int64_t kBatch = 2, kRows = 1200, kDim = 777, kKept = 400, kHeads = 7, kHeadDim = 111, kPivots = 3;

struct Result {
  std::vector<int64_t> keep = std::vector<int64_t>(kBatch * kKept, -2);
  std::vector<float> rows = std::vector<float>(kBatch * kKept * kDim, -1.0f), scores = std::vector<float>(kBatch * kRows);
  std::vector<float> attention[2] = {scores, scores}, norms = scores, cosines = std::vector<float>(kBatch * kPivots * kRows);
  bool operator==(const Result& other) const {
    return keep == other.keep && rows == other.rows && scores == other.scores && attention[0] == other.attention[0] &&
           attention[1] == other.attention[1] && norms == other.norms && cosines == other.cosines;
  }
};

v2drop_tensor tensor(void* data, int32_t dtype, int32_t ndim, int64_t rows, int64_t dim) {
  return {data, dtype, ndim, {kBatch, rows, dim}, {rows * dim, dim, 1}};
}

Result drop(std::vector<float>& prev, std::vector<float>& cur, int32_t threads) {
  Result result;
  const v2drop_tensor a = tensor(prev.data(), V2DROP_FLOAT32, 3, kRows, kDim), b = tensor(cur.data(), V2DROP_FLOAT32, 3, kRows, kDim);
  const v2drop_tensor keep = tensor(result.keep.data(), V2DROP_INT64, 2, kKept, 1);
  const v2drop_tensor scores = tensor(result.scores.data(), V2DROP_FLOAT32, 2, kRows, 1);
  const v2drop_gather gather = {b, tensor(result.rows.data(), V2DROP_FLOAT32, 3, kKept, kDim), 0, 1, 0};
  const v2drop_segment segments[] = {{0, 5, kRows - 5, 0, kKept - 5, 0, 0, 0}, {kRows, 0, kRows - 9, 9, kKept - 9, kKept, 0, 0}};
  v2drop_context context = V2DROP_CONTEXT_INIT;
  context.threads = threads;
  v2drop_source by_cosine = V2DROP_SOURCE_INIT, by_l2 = V2DROP_SOURCE_INIT;
  by_cosine.prev = by_l2.prev = &a;
  by_cosine.cur = by_l2.cur = &b;
  by_cosine.metric = V2DROP_COSINE;
  if (v2drop_drop_tokens(&by_cosine, segments, 2, nullptr, &keep, nullptr, &gather, 1, &context) != V2DROP_OK ||
      v2drop_variation_score(&by_l2, &scores, &context) != V2DROP_OK) {
    std::printf("%s\n", v2drop_last_error());
    std::exit(1);
  }
  // Hidden states as the keys of heads that lie side by side, and the last queries of twice as many heads.
  v2drop_tensor k = {cur.data(), V2DROP_FLOAT32, 4, {kBatch, kHeads, kRows, kHeadDim}, {kRows * kDim, kHeadDim, kDim, 1}}, q = k;
  q.data = prev.data();
  q.shape[1] = 2 * kHeads;
  q.shape[2] = 3;
  q.shape[3] = k.shape[3] = kHeadDim / 2;
  q.stride[1] = k.stride[3] * (kHeadDim / 2);
  int64_t numbers[] = {kRows - 1, 700, -1, 3, kRows - 1, -1};
  const v2drop_tensor at = tensor(numbers, V2DROP_INT64, 2, 3, 1);
  const v2drop_tensor cosines = tensor(result.cosines.data(), V2DROP_FLOAT32, 3, kPivots, kRows);
  const v2drop_tensor norms = tensor(result.norms.data(), V2DROP_FLOAT32, 2, kRows, 1);
  bool ok =
      v2drop_key_norm(&k, V2DROP_L2, &norms, &context) == V2DROP_OK && v2drop_cosine_to_pivots(&b, &at, &cosines, &context) == V2DROP_OK;
  for (int i = 0; i < 2; ++i) {
    const v2drop_tensor to = tensor(result.attention[i].data(), V2DROP_FLOAT32, 2, kRows, 1);
    ok &= v2drop_attention_score(&q, &k, &at, nullptr, nullptr, 1, 0.3f, V2DROP_SOFTMAX, i ? 5 : V2DROP_HEADS_MEAN,
                                 i ? V2DROP_QUERIES_L2 : V2DROP_QUERIES_MEAN, &to, &context) == V2DROP_OK;
  }
  if (!ok) {
    std::printf("%s\n", v2drop_last_error());
    std::exit(1);
  }
  return result;
}

}  // namespace

int main() {
  std::vector<float> prev(kBatch * kRows * kDim), cur(prev.size());
  uint32_t random = 1;
  for (std::vector<float>* side : {&prev, &cur}) {
    for (float& x : *side) x = static_cast<float>(static_cast<int32_t>(random = random * 1664525u + 1013904223u)) / 2147483648.0f;
  }
  const Result expected = drop(prev, cur, 1);
  int failures = 0;
  for (int32_t threads : {2, 3, 8, 0, 1}) failures += !(drop(prev, cur, threads) == expected);

  std::vector<std::thread> callers;
  std::vector<int> wrong(4, 0);
  for (size_t c = 0; c < wrong.size(); ++c) {
    callers.emplace_back([&, c] {
      for (int i = 0; i < 5; ++i) wrong[c] += !(drop(prev, cur, 2) == expected);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (int w : wrong) failures += w;

  const pid_t child = fork();  // the parent's workers do not exist there
  if (child == 0) _exit(drop(prev, cur, 2) == expected ? 0 : 1);
  int status = -1;
  waitpid(child, &status, 0);
  failures += status != 0;
  std::printf("threads (%s): %s\n", v2drop_isa(), failures ? "FAILED" : "ok");
  return failures != 0;
}
