// SPDX-License-Identifier: Apache-2.0
//
// Exact selection without a sort: scores become integer ordinals, bisection finds the cut, one pass in position order places who is kept.
#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "ops.h"
#include "ordinal.h"
#include "select_cpu.h"
#include "thread_pool.h"

namespace v2drop {
namespace {

constexpr int64_t kBytesPerChunk = 256 << 10;

void make_ordinals_of(const ScoreSource& source, int64_t entry, int64_t position, int64_t n, int32_t* ordinals) {
  const auto competes = [&](int64_t i) { return !source.has_mask || *source.mask.at(entry, position + i) != 0; };
  if (source.has_scores) {
    const RowView& scores = source.scores;
    kernels().ordinals_of[scores.dtype](scores.at(entry, position), scores.row_stride, n, ordinals);
    if (!source.has_mask) return;
    for (int64_t i = 0; i < n; ++i) ordinals[i] = competes(i) ? ordinals[i] : source.masked_ordinal;
  } else {
    const Hidden& h = source.hidden;
    const ScoreRow score_row = kernels().score[h.metric][h.prev.dtype][h.score_dtype];
    for (int64_t i = 0; i < n; ++i) {
      if (!competes(i)) {
        ordinals[i] = source.masked_ordinal;
        continue;
      }
      const float score = score_row(h.prev.at(entry, position + i), h.cur.at(entry, position + i), h.prev.dim);
      uint32_t bits;
      std::memcpy(&bits, &score, sizeof bits);
      ordinals[i] = ordinal_of_bits(bits);
    }
  }
}

void write_value(char* to, int32_t ordinal, int32_t dtype) {  // only -inf is ever written as a 16-bit float
  const uint32_t bits = dtype == V2DROP_FLOAT16 ? 0xfc00u : dtype == V2DROP_BFLOAT16 ? 0xff80u : bits_of_ordinal(ordinal);
  std::memcpy(to, &bits, static_cast<size_t>(kDtypeBytes[dtype]));
}

}  // namespace

Ordinals place_ordinals(const Segments& segments) {
  Ordinals ordinals;
  ordinals.first.resize(static_cast<size_t>(segments.count) + 1);
  for (int64_t g = 0; g < segments.count; ++g) ordinals.first[g + 1] = ordinals.first[g] + segments[g].n;
  ordinals.data.reset(new int32_t[static_cast<size_t>(ordinals.first.back())]);  // not make_unique, which would clear it
  return ordinals;
}

Phase make_ordinals(const ScoreSource& source, const Segments& segments, const Ordinals& ordinals, int64_t* bytes) {
  const int64_t rows = source.rows, total = ordinals.first.back();
  const int64_t row_bytes = source.has_scores ? 16 : 2 * source.hidden.prev.dim * kDtypeBytes[source.hidden.prev.dtype];
  const int64_t chunk = std::max<int64_t>(1, kBytesPerChunk / std::max<int64_t>(16, row_bytes));
  *bytes += total * row_bytes;
  return {(total + chunk - 1) / chunk, [&, rows, total, chunk](int64_t c) {
            int64_t begin = c * chunk;
            const int64_t end = std::min(total, begin + chunk);
            auto g = std::upper_bound(ordinals.first.begin(), ordinals.first.end(), begin) - ordinals.first.begin() - 1;
            for (; begin < end; ++g) {
              const v2drop_segment& s = segments[g];
              const int64_t row = s.src_start + s.n_prefix + (begin - ordinals.first[g]), n = std::min(end, ordinals.first[g + 1]) - begin;
              if (n > 0) make_ordinals_of(source, row / rows, row % rows, n, ordinals.data.get() + begin);
              begin += n;
            }
          }};
}

Phase for_each_segment(const Segments& segments, const Ordinals& ordinals, std::function<void(int64_t)> select) {
  constexpr int64_t kPerItem = 4096;  // ordinals and segments: some microseconds
  const int64_t count = segments.count;
  const int64_t group = count ? std::max<int64_t>(1, kPerItem * count / std::max<int64_t>(1, ordinals.first.back() + count)) : 1;
  return {(count + group - 1) / group, [count, group, select = std::move(select)](int64_t item) {
            for (int64_t g = item * group; g < std::min(count, (item + 1) * group); ++g) select(g);
          }};
}

int64_t select_best(const int32_t* ordinals, int64_t n, int64_t k, int64_t offset, int64_t* out) {
  if (n == 0) return 0;
  const Kernels& kernel = kernels();
  int32_t lo = 0, hi = 0;
  kernel.range(ordinals, n, &lo, &hi);
  if (k == 1 && hi != kExcluded) {
    *out = offset + (std::find(ordinals, ordinals + n, hi) - ordinals);
    return 1;
  }
  const Cut cut = find_cut(lo, hi, n, k, [&](int32_t threshold) { return kernel.at_least(ordinals, n, threshold); });
  // A kept row and a dropped one take the same path: a branch would be mispredicted at every other row.
  int64_t above = 0, equal = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = place(cut, above, equal);
    if (slot == k) return k;
    out[slot] = offset + i;
    above += ordinals[i] > cut.threshold;
    equal += ordinals[i] == cut.threshold;
  }
  return place(cut, above, equal);
}

namespace cpu {

void topk(const TopkRequest& request, const v2drop_context& context) {
  if (request.dtype == V2DROP_FLOAT64) return topk_double(request, context);
  const ScoreSource& source = request.source;
  const Segments& segments = request.segments;
  const Ordinals ordinals = place_ordinals(segments);
  const auto select = [&](int64_t g) {
    const v2drop_segment& s = segments[g];
    const int64_t row = s.src_start + s.n_prefix, entry = s.n ? row / source.rows : 0, offset = s.n ? row % source.rows : 0;
    const int32_t* ordinal = ordinals.data.get() + ordinals.first[g];
    const int64_t item = kDtypeBytes[request.dtype];
    int64_t* index = request.indices + g * request.width;
    char* value = request.values + g * request.width * item;
    const int64_t found = select_best(ordinal, s.n, s.k, offset, index);
    if (request.order == V2DROP_ORDER_SCORE) {
      std::sort(index, index + found, [&](int64_t a, int64_t b) {
        const int32_t x = ordinal[a - offset], y = ordinal[b - offset];
        return x != y ? x > y : a < b;
      });
    }
    for (int64_t i = 0; i < request.width; ++i, value += item) {
      if (i >= found) {
        index[i] = -1;
        write_value(value, ordinal_of_bits(0xff800000u), request.dtype);
      } else if (source.has_scores) {
        std::memcpy(value, source.scores.at(entry, index[i]), static_cast<size_t>(item));
      } else {
        write_value(value, ordinal[index[i] - offset], request.dtype);
      }
    }
  };
  int64_t bytes = kSelectBytes * ordinals.first.back();
  const Phase scores = make_ordinals(source, segments, ordinals, &bytes);
  parallel({scores, for_each_segment(segments, ordinals, select)}, useful_threads(context.threads, bytes));
}

}  // namespace cpu
}  // namespace v2drop
