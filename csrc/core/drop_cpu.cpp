// SPDX-License-Identifier: Apache-2.0
//
// The whole step in one call and one parallel region: score, select, compact.
#include <algorithm>

#include "ops.h"
#include "ordinal.h"
#include "select_cpu.h"
#include "thread_pool.h"

namespace v2drop {
namespace {

void write_keep(const v2drop_segment& s, int64_t rows, const int32_t* ordinals, int64_t* out) {
  int64_t position = s.n_prefix + s.n + s.n_suffix > 0 ? s.src_start % rows : 0;
  out = std::fill_n(out, s.pad_before, -1);
  for (int64_t i = 0; i < s.n_prefix; ++i) *out++ = position++;
  out += select_best(ordinals, s.n, s.k, position, out);
  position += s.n;
  for (int64_t i = 0; i < s.n_suffix; ++i) *out++ = position++;
  std::fill_n(out, s.pad_after, -1);
}

}  // namespace

namespace cpu {

void drop(const DropRequest& request, const v2drop_context& context) {
  const Segments& segments = request.segments;
  const Ordinals ordinals = place_ordinals(segments);
  const auto select = [&](int64_t g) {
    write_keep(segments[g], request.source.rows, ordinals.data.get() + ordinals.first[g], request.keep.data + segments[g].dst_start);
  };
  int64_t bytes = kSelectBytes * ordinals.first.back();
  const Phase scores = make_ordinals(request.source, segments, ordinals, &bytes), rows = gather(request.keep, request.copies, &bytes);
  parallel({scores, for_each_segment(segments, ordinals, select), rows}, useful_threads(context.threads, bytes));
}

}  // namespace cpu
}  // namespace v2drop
