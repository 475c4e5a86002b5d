// SPDX-License-Identifier: Apache-2.0
//
// Exact selection without a sort: scores become integer keys, bisection finds the cut, one pass in position order places who is kept.
#include <algorithm>
#include <cstring>

#include "keys.h"
#include "ops.h"
#include "thread_pool.h"

namespace v2drop {
namespace {

constexpr int64_t kBytesPerChunk = 256 << 10;

void make_keys_of(const KeySource& source, int64_t entry, int64_t position, int64_t n, int32_t* keys) {
  const auto competes = [&](int64_t i) { return !source.has_mask || *source.mask.at(entry, position + i) != 0; };
  if (source.has_scores) {
    const Rows& scores = source.scores;
    kernels().keys_of[scores.dtype](scores.at(entry, position), scores.row_stride, n, keys);
    if (!source.has_mask) return;
    for (int64_t i = 0; i < n; ++i) keys[i] = competes(i) ? keys[i] : source.masked_key;
  } else {
    const Hidden& h = source.hidden;
    for (int64_t i = 0; i < n; ++i) {
      if (!competes(i)) {
        keys[i] = source.masked_key;
        continue;
      }
      const float score = h.score(h.prev.at(entry, position + i), h.cur.at(entry, position + i), h.prev.dim);
      uint32_t bits;
      std::memcpy(&bits, &score, sizeof bits);
      keys[i] = key_of_bits(bits);
    }
  }
}

void write_value(char* to, int32_t key, int32_t dtype) {  // only -inf is ever written as a 16-bit float
  const uint32_t bits = dtype == V2DROP_FLOAT16 ? 0xfc00u : dtype == V2DROP_BFLOAT16 ? 0xff80u : bits_of_key(key);
  std::memcpy(to, &bits, static_cast<size_t>(kDtypeBytes[dtype]));
}

}  // namespace

KeySource check_source(const v2drop_tensor* scores, const v2drop_tensor* prev, const v2drop_tensor* cur, int32_t metric, int32_t round_to,
                       const v2drop_tensor* mask, int32_t masked_key) {
  KeySource source = {};
  Rows given;
  if (scores) {
    if (prev || cur) fail("%s: give either scores or prev and cur, not both", prev ? "prev" : "cur");
    given = check_rows("scores", scores, false);
    check_float("scores", *scores);
    source.has_scores = true;
    source.scores = given;
  } else {
    source.hidden = check_hidden(prev, cur, metric, round_to);
    given = source.hidden.prev;
    given.dim = 1;
  }
  if (mask) {
    source.mask = check_rows("mask", mask, false);
    check_dtype("mask", *mask, V2DROP_BOOL, "bool");
    check_same_rows("mask", source.mask, scores ? "scores" : "the score of prev", given);
    source.has_mask = true;
  }
  source.masked_key = masked_key;
  source.batch = given.batch;
  source.rows = given.rows;
  return source;
}

TopkRows check_topk(const v2drop_tensor* scores, const v2drop_stretch* stretches, int64_t n_stretches, int32_t order,
                    const v2drop_tensor* values, const v2drop_tensor* indices) {
  if (order != V2DROP_ORDER_POSITION && order != V2DROP_ORDER_SCORE) fail("order: unknown code %d", order);
  const int32_t dtype = scores ? scores->dtype : static_cast<int32_t>(V2DROP_FLOAT32);
  const Rows out_values = check_rows("values", values, false), out_indices = check_rows("indices", indices, false);
  check_dtype("values", *values, dtype, scores ? "of scores" : "float32");
  check_dtype("indices", *indices, V2DROP_INT64, "int64");
  check_contiguous("values", *values);
  check_contiguous("indices", *indices);
  if (indices->ndim != 2 || out_indices.batch != n_stretches) fail("indices: must be [%" PRId64 ", K]", n_stretches);
  check_same_rows("values", out_values, "indices", out_indices);
  const int64_t width = out_indices.rows;
  for (int64_t g = 0; g < n_stretches; ++g) {
    if (stretches[g].k > width) fail("indices: width %" PRId64 " is less than k %" PRId64 " of stretch %" PRId64, width, stretches[g].k, g);
  }
  return {out_values.data, reinterpret_cast<int64_t*>(out_indices.data), width, dtype};
}

Keys make_keys(const KeySource& source, const v2drop_stretch* stretches, int64_t n_stretches, int32_t threads) {
  Keys keys;
  keys.first.resize(static_cast<size_t>(n_stretches) + 1);
  for (int64_t g = 0; g < n_stretches; ++g) keys.first[g + 1] = keys.first[g] + stretches[g].n;
  const int64_t total = keys.first.back();
  keys.data.reset(new int32_t[static_cast<size_t>(total)]);  // not make_unique, which would clear it

  const int64_t rows = source.rows;
  const int64_t row_bytes = source.has_scores ? 16 : 2 * source.hidden.prev.dim * kDtypeBytes[source.hidden.prev.dtype];
  const int64_t chunk = std::max<int64_t>(1, kBytesPerChunk / std::max<int64_t>(16, row_bytes));
  parallel_for((total + chunk - 1) / chunk, useful_threads(threads, total * row_bytes), [&](int64_t c) {
    int64_t begin = c * chunk;
    const int64_t end = std::min(total, begin + chunk);
    auto g = std::upper_bound(keys.first.begin(), keys.first.end(), begin) - keys.first.begin() - 1;
    for (; begin < end; ++g) {
      const v2drop_stretch& s = stretches[g];
      const int64_t row = s.row0 + s.pre + (begin - keys.first[g]), n = std::min(end, keys.first[g + 1]) - begin;
      if (n > 0) make_keys_of(source, row / rows, row % rows, n, keys.data.get() + begin);
      begin += n;
    }
  });
  return keys;
}

int64_t select_best(const int32_t* keys, int64_t n, int64_t k, int64_t offset, int64_t* out) {
  if (n == 0) return 0;
  const Kernels& kernel = kernels();
  int32_t lo = 0, hi = 0;
  kernel.range(keys, n, &lo, &hi);
  const Cut cut = find_cut(lo, hi, n, k, [&](int32_t threshold) { return kernel.at_least(keys, n, threshold); });
  // A kept row and a dropped one take the same path: a branch would be mispredicted at every other row.
  int64_t above = 0, equal = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = place(cut, above, equal);
    if (slot == k) return k;
    out[slot] = offset + i;
    above += keys[i] > cut.threshold;
    equal += keys[i] == cut.threshold;
  }
  return place(cut, above, equal);
}

}  // namespace v2drop

using namespace v2drop;

v2drop_status v2drop_topk(const v2drop_tensor* scores, const v2drop_tensor* prev, const v2drop_tensor* cur, const v2drop_tensor* mask,
                          const v2drop_stretch* stretches, int64_t n_stretches, int32_t order, int32_t metric, int32_t round_to,
                          const v2drop_tensor* values, const v2drop_tensor* indices, int32_t threads) {
  return guard([&] {
    const KeySource source = check_source(scores, prev, cur, metric, round_to, mask, kExcluded);
    check_stretches(stretches, n_stretches, source.batch, source.rows);
    const TopkRows out = check_topk(scores, stretches, n_stretches, order, values, indices);
    check_threads(threads);

    const Keys keys = make_keys(source, stretches, n_stretches, threads);
    // Selection passes over its keys some twenty times, in the cache.
    parallel_for(n_stretches, useful_threads(threads, keys.first.back() * 32), [&](int64_t g) {
      const v2drop_stretch& s = stretches[g];
      const int64_t row = s.row0 + s.pre, entry = s.n ? row / source.rows : 0, offset = s.n ? row % source.rows : 0;
      const int32_t* key = keys.data.get() + keys.first[g];
      const int64_t item = kDtypeBytes[out.dtype];
      int64_t* index = out.indices + g * out.width;
      char* value = out.values + g * out.width * item;
      const int64_t found = select_best(key, s.n, s.k, offset, index);
      if (order == V2DROP_ORDER_SCORE) {
        std::sort(index, index + found, [&](int64_t a, int64_t b) {
          const int32_t x = key[a - offset], y = key[b - offset];
          return x != y ? x > y : a < b;
        });
      }
      for (int64_t i = 0; i < out.width; ++i, value += item) {
        if (i >= found) {
          index[i] = -1;
          write_value(value, key_of_bits(0xff800000u), out.dtype);
        } else if (scores) {
          std::memcpy(value, source.scores.at(entry, index[i]), static_cast<size_t>(item));
        } else {
          write_value(value, key[index[i] - offset], out.dtype);
        }
      }
    });
  });
}
