// SPDX-License-Identifier: Apache-2.0
//
// Scores of rows that are shorter than a vector: many rows in one call of the inner loop. The bits are those of any other row.
#include <algorithm>

#include "kernels.h"
#include "score_cpu.h"
#include "thread_pool.h"

namespace v2drop {

bool score_short(const ScoreRequest& request, const v2drop_context& context) {
  const RowView &prev = request.hidden.prev, &cur = request.hidden.cur, &to = request.scores;
  const int64_t row_bytes = prev.dim * int64_t{sizeof(float)}, rows = prev.rows;
  const auto end_to_end = [&](const RowView& view, int64_t bytes) { return rows == 1 || view.row_stride == bytes; };
  if (prev.dim < 1 || prev.dim > kShortDim || prev.dtype != V2DROP_FLOAT32 || request.hidden.score_dtype != V2DROP_FLOAT32 ||
      request.hidden.metric == V2DROP_COSINE || !end_to_end(prev, row_bytes) || !end_to_end(cur, row_bytes) ||
      !end_to_end(to, sizeof(float))) {
    return false;
  }
  constexpr int64_t kRowsPerChunk = 8192;
  const auto score = kernels().score_short[request.hidden.metric];
  const int64_t chunks = (rows + kRowsPerChunk - 1) / kRowsPerChunk;
  parallel_for(prev.batch * chunks, useful_threads(context.threads, 2 * prev.bytes()), [&](int64_t c) {
    const int64_t entry = c / chunks, first = c % chunks * kRowsPerChunk;
    score(reinterpret_cast<const float*>(prev.at(entry, first)), reinterpret_cast<const float*>(cur.at(entry, first)),
          std::min(kRowsPerChunk, rows - first), prev.dim, reinterpret_cast<float*>(to.at(entry, first)));
  });
  return true;
}

}  // namespace v2drop
