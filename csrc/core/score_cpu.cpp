// SPDX-License-Identifier: Apache-2.0
//
// Variation scores and their gradients. A row is always summed by one thread in one order, so results do not depend on the threads.
#include <algorithm>

#include "kernels.h"
#include "ops.h"
#include "score_cpu.h"
#include "thread_pool.h"

namespace v2drop {
namespace {

constexpr int64_t kBytesPerChunk = 256 << 10;

// Calls body(entry, position) for every row, in chunks of rows of about kBytesPerChunk.
template <class Body>
void for_each_row(const RowView& rows, int32_t threads, const Body& body) {
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
namespace cpu {

void score(const ScoreRequest& request, const v2drop_context& context) {
  if (score_short(request, context)) return;
  const Hidden& hidden = request.hidden;
  const ScoreRow score_row = kernels().score[hidden.metric][hidden.prev.dtype][hidden.score_dtype];
  for_each_row(hidden.prev, context.threads, [&](int64_t b, int64_t i) {
    store(request.scores.at(b, i), score_row(hidden.prev.at(b, i), hidden.cur.at(b, i), hidden.prev.dim));
  });
}

void score_backward(const ScoreBackwardRequest& request, const v2drop_context& context) {
  const RowView &prev = request.hidden.prev, &cur = request.hidden.cur, &to_prev = request.grad_prev, &to_cur = request.grad_cur;
  if (prev.dim == 0) return;
  const BackwardRow backward = kernels().backward[request.hidden.metric][prev.dtype];
  for_each_row(prev, context.threads, [&](int64_t b, int64_t i) {
    float grad;
    __builtin_memcpy(&grad, request.grad.at(b, i), sizeof grad);
    backward(grad, prev.at(b, i), cur.at(b, i), to_prev.data ? to_prev.at(b, i) : nullptr, to_cur.data ? to_cur.at(b, i) : nullptr,
             prev.dim);
  });
}

}  // namespace cpu
}  // namespace v2drop
