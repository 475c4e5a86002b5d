// SPDX-License-Identifier: Apache-2.0
//
// The whole step in one call: score, select, compact.
#include <algorithm>

#include "keys.h"
#include "ops.h"
#include "thread_pool.h"

namespace v2drop {
namespace {

void write_keep(const v2drop_stretch& s, int64_t rows, const int32_t* keys, int64_t* out) {
  int64_t position = s.pre + s.n + s.post > 0 ? s.row0 % rows : 0;
  out = std::fill_n(out, s.pad_pre, -1);
  for (int64_t i = 0; i < s.pre; ++i) *out++ = position++;
  out += select_best(keys, s.n, s.k, position, out);
  position += s.n;
  for (int64_t i = 0; i < s.post; ++i) *out++ = position++;
  std::fill_n(out, s.pad_post, -1);
}

}  // namespace

void check_tiling(const v2drop_stretch* stretches, int64_t n_stretches, int64_t rows, const Keep& keep) {
  int64_t next = 0;
  const int64_t limit = keep.batch * keep.count;
  for (int64_t g = 0; g < n_stretches; ++g) {
    const v2drop_stretch& s = stretches[g];
    if (s.out0 != next) fail("stretches[%" PRId64 "]: out0 is %" PRId64 ", but the rows before it end at %" PRId64, g, s.out0, next);
    const int64_t kept = s.pre + s.k + s.post, left = next == limit ? 0 : keep.count - next % keep.count;
    if (s.pad_pre < 0 || s.pad_post < 0 || s.pad_pre > left || kept > left - s.pad_pre || s.pad_post > left - s.pad_pre - kept) {
      fail("stretches[%" PRId64 "]: %" PRId64 " + %" PRId64 " + %" PRId64 " output rows do not fit in the %" PRId64 " left in the entry", g,
           s.pad_pre, kept, s.pad_post, left);
    }
    if (kept > 0 && s.row0 / rows != next / keep.count) fail("stretches[%" PRId64 "]: reads and writes different batch entries", g);
    next += s.pad_pre + kept + s.pad_post;
  }
  if (next != limit) fail("stretches: give %" PRId64 " output rows, but keep has %" PRId64, next, limit);
}

}  // namespace v2drop

using namespace v2drop;

v2drop_status v2drop_drop_tokens(const v2drop_tensor* scores, const v2drop_tensor* prev, const v2drop_tensor* cur,
                                 const v2drop_tensor* mask, const v2drop_stretch* stretches, int64_t n_stretches, int32_t metric,
                                 int32_t round_to, const v2drop_tensor* keep, const v2drop_part* parts, int64_t n_parts, int32_t threads) {
  return guard([&] {
    const KeySource source = check_source(scores, prev, cur, metric, round_to, mask, kForced);
    const int64_t batch = source.batch, rows = source.rows;
    check_stretches(stretches, n_stretches, batch, rows);
    const Keep out = check_keep(keep);
    if (out.batch != batch) fail("keep: has %" PRId64 " entries, but there are %" PRId64, out.batch, batch);
    check_tiling(stretches, n_stretches, rows, out);
    const std::vector<Copy> copies = check_parts(parts, n_parts, batch, rows, out.count, false);
    check_threads(threads);

    const Keys keys = make_keys(source, stretches, n_stretches, threads);
    parallel_for(n_stretches, useful_threads(threads, keys.first.back() * 32),
                 [&](int64_t g) { write_keep(stretches[g], rows, keys.data.get() + keys.first[g], out.data + stretches[g].out0); });
    gather(out, copies, threads);
  });
}
