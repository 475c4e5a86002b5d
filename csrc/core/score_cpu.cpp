// SPDX-License-Identifier: Apache-2.0
//
// Variation scores and their gradients. A row is always summed by one thread in one order, so results do not depend on the threads.
#include <algorithm>

#include "check.h"
#include "thread_pool.h"

namespace v2drop {
namespace {

constexpr int64_t kBytesPerChunk = 256 << 10;

// Calls body(entry, position) for every row, in chunks of rows of about kBytesPerChunk.
template <class Body>
void for_each_row(const Rows& rows, int32_t threads, const Body& body) {
  const int64_t total = rows.batch * rows.rows, row_bytes = std::max<int64_t>(64, 2 * rows.dim * kDtypeBytes[rows.dtype]);
  const int64_t chunk = std::max<int64_t>(1, kBytesPerChunk / row_bytes);
  parallel_for((total + chunk - 1) / chunk, useful_threads(threads, 2 * rows.bytes()), [&](int64_t c) {
    const int64_t end = std::min(total, (c + 1) * chunk);
    int64_t entry = c * chunk / rows.rows, position = c * chunk % rows.rows;
    for (int64_t row = c * chunk; row < end; ++row) {
      body(entry, position);
      if (++position == rows.rows) position = 0, ++entry;
    }
  });
}

void store(char* to, float x) { __builtin_memcpy(to, &x, sizeof x); }

}  // namespace
}  // namespace v2drop

using namespace v2drop;

v2drop_status v2drop_variation_score(const v2drop_tensor* prev, const v2drop_tensor* cur, int32_t metric, int32_t round_to,
                                     const v2drop_tensor* scores, int32_t threads) {
  return guard([&] {
    const Hidden hidden = check_hidden(prev, cur, metric, round_to);
    const Rows out = check_scores_of(hidden, scores);
    check_threads(threads);

    for_each_row(hidden.prev, threads, [&](int64_t b, int64_t i) {
      store(out.at(b, i), hidden.score(hidden.prev.at(b, i), hidden.cur.at(b, i), hidden.prev.dim));
    });
  });
}

v2drop_status v2drop_variation_score_backward(const v2drop_tensor* grad, const v2drop_tensor* prev, const v2drop_tensor* cur,
                                              int32_t metric, const v2drop_tensor* grad_prev, const v2drop_tensor* grad_cur,
                                              int32_t threads) {
  return guard([&] {
    const Hidden hidden = check_hidden(prev, cur, metric, V2DROP_FLOAT32);
    const Rows& a = hidden.prev;
    const GradientRows to = check_gradients(hidden, grad, grad_prev, grad_cur);
    check_threads(threads);
    if (a.dim == 0) return;

    const BackwardRow backward = kernels().backward[metric][a.dtype];
    for_each_row(a, threads, [&](int64_t b, int64_t i) {
      float g;
      __builtin_memcpy(&g, to.grad.at(b, i), sizeof g);
      backward(g, a.at(b, i), hidden.cur.at(b, i), grad_prev ? to.prev.at(b, i) : nullptr, grad_cur ? to.cur.at(b, i) : nullptr, a.dim);
    });
  });
}
