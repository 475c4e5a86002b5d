// SPDX-License-Identifier: Apache-2.0
//
// Argument checks, and the views they return. A view has passed its checks: byte strides, no dtype to ask about, and offsets that fit in
// 64 bits, so that the code behind it only computes base + index * stride.
#ifndef V2DROP_CORE_CHECK_H_
#define V2DROP_CORE_CHECK_H_

#include <cinttypes>
#include <cstdint>

#include "kernels.h"
#include "status.h"

namespace v2drop {

constexpr int64_t kDtypeBytes[] = {4, 2, 2, 8, 1, 1, 2, 4, 8, 16, 4};  // by v2drop_dtype
constexpr int kDtypes = sizeof(kDtypeBytes) / sizeof(kDtypeBytes[0]);

// Sound in itself: known dtype, sane rank and extents, data where there are elements, and all offsets within 64 bits.
inline void check_tensor(const char* name, const v2drop_tensor* tensor) {
  if (!tensor) fail("%s: is NULL", name);
  if (tensor->dtype < 0 || tensor->dtype >= kDtypes) fail("%s: unknown dtype %d", name, tensor->dtype);
  if (tensor->ndim < 0 || tensor->ndim > V2DROP_MAX_DIMS) fail("%s: %d dimensions, at most %d", name, tensor->ndim, V2DROP_MAX_DIMS);
  bool empty = false, overflow = false;
  int64_t reach = kDtypeBytes[tensor->dtype], elements = reach;
  for (int d = 0; d < tensor->ndim; ++d) {
    const int64_t size = tensor->shape[d], stride = tensor->stride[d];
    if (size < 0) fail("%s: extent %" PRId64 " of dimension %d is negative", name, size, d);
    if (size == 0) {
      empty = true;
      continue;
    }
    int64_t span;
    overflow |= __builtin_mul_overflow(elements, size, &elements);
    overflow |= stride == INT64_MIN || __builtin_mul_overflow(stride < 0 ? -stride : stride, size - 1, &span) ||
                __builtin_mul_overflow(span, kDtypeBytes[tensor->dtype], &span) || __builtin_add_overflow(reach, span, &reach);
  }
  if (overflow) fail("%s: shape and strides exceed 64 bits", name);
  if (!empty && !tensor->data) fail("%s: data is NULL", name);
}

inline bool is_empty(const v2drop_tensor& tensor) {
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] == 0) return true;
  }
  return false;
}

inline void check_dtype(const char* name, const v2drop_tensor& tensor, int32_t dtype, const char* dtype_name) {
  if (tensor.dtype != dtype) fail("%s: must have dtype %s, got code %d", name, dtype_name, tensor.dtype);
}
inline void check_float(const char* name, const v2drop_tensor& tensor) {
  if (tensor.dtype >= kFloats) fail("%s: must be float32, float16 or bfloat16, got dtype code %d", name, tensor.dtype);
}

// [batch, rows] or [rows] (batch 1), of single elements or, with dim, of rows of `dim` elements.
struct Rows {
  char* data;
  int64_t batch, rows, dim;
  int64_t batch_stride, row_stride;  // bytes
  int32_t dtype;

  char* at(int64_t entry, int64_t position) const { return data + entry * batch_stride + position * row_stride; }
  int64_t bytes() const { return rows * batch * dim * kDtypeBytes[dtype]; }
};

inline Rows check_rows(const char* name, const v2drop_tensor* tensor, bool has_dim) {
  check_tensor(name, tensor);
  const int lead = tensor->ndim - has_dim;
  if (lead != 1 && lead != 2) {
    fail("%s: must be %s, got %d dimensions", name, has_dim ? "[batch, rows, dim] or [rows, dim]" : "[batch, rows] or [rows]",
         tensor->ndim);
  }
  const int64_t bytes = kDtypeBytes[tensor->dtype];
  if (reinterpret_cast<uintptr_t>(tensor->data) % static_cast<uintptr_t>(bytes) != 0) fail("%s: data is not aligned to its dtype", name);
  if (has_dim && tensor->stride[lead] != 1 && tensor->shape[lead] > 1) fail("%s: the last dimension must have stride 1", name);
  Rows view = {static_cast<char*>(tensor->data), 1, tensor->shape[lead - 1], has_dim ? tensor->shape[lead] : 1, 0, 0, tensor->dtype};
  // An extent of one or none is never stepped over, and its stride may be anything.
  if (view.rows > 1) view.row_stride = tensor->stride[lead - 1] * bytes;
  if (lead == 2) {
    view.batch = tensor->shape[0];
    if (view.batch > 1) view.batch_stride = tensor->stride[0] * bytes;
  }
  return view;
}

inline void check_same_rows(const char* name, const Rows& view, const char* model_name, const Rows& model) {
  if (view.batch != model.batch || view.rows != model.rows || view.dim != model.dim) {
    fail("%s: is %" PRId64 " x %" PRId64 " x %" PRId64 ", but %s is %" PRId64 " x %" PRId64 " x %" PRId64, name, view.batch, view.rows,
         view.dim, model_name, model.batch, model.rows, model.dim);
  }
}

// A result must not overlap itself, or its rows would overwrite each other.
inline void check_writable(const char* name, const v2drop_tensor& tensor) {
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] > 1 && tensor.stride[d] == 0) fail("%s: dimension %d has stride 0, a result must not overlap itself", name, d);
  }
}

inline void check_contiguous(const char* name, const v2drop_tensor& tensor) {
  if (is_empty(tensor)) return;
  int64_t stride = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] > 1 && tensor.stride[d] != stride) fail("%s: must be contiguous", name);
    stride *= tensor.shape[d];
  }
}

// [batch, heads, rows, dim]: the queries or keys of attention.
struct HeadRows {
  char* data;
  int64_t batch, heads, rows, dim;
  int64_t batch_stride, head_stride, row_stride;  // bytes
  int32_t dtype;

  char* at(int64_t entry, int64_t head, int64_t position) const {
    return data + entry * batch_stride + head * head_stride + position * row_stride;
  }
  int64_t bytes() const { return batch * heads * rows * dim * kDtypeBytes[dtype]; }
};

inline HeadRows check_heads(const char* name, const v2drop_tensor* tensor) {
  check_tensor(name, tensor);
  check_float(name, *tensor);
  if (tensor->ndim != 4) fail("%s: must be [batch, heads, rows, dim], got %d dimensions", name, tensor->ndim);
  const int64_t bytes = kDtypeBytes[tensor->dtype];
  if (reinterpret_cast<uintptr_t>(tensor->data) % static_cast<uintptr_t>(bytes) != 0) fail("%s: data is not aligned to its dtype", name);
  if (tensor->stride[3] != 1 && tensor->shape[3] > 1) fail("%s: the last dimension must have stride 1", name);
  const auto stride = [&](int d) { return tensor->shape[d] > 1 ? tensor->stride[d] * bytes : 0; };
  return {static_cast<char*>(tensor->data),
          tensor->shape[0],
          tensor->shape[1],
          tensor->shape[2],
          tensor->shape[3],
          stride(0),
          stride(1),
          stride(2),
          tensor->dtype};
}

// One number for each of batch x rows: where scores go, or what is known of every row.
inline Rows check_row_values(const char* name, const v2drop_tensor* tensor, int32_t dtype, const char* dtype_name, int64_t batch,
                             int64_t rows) {
  const Rows view = check_rows(name, tensor, false);
  check_dtype(name, *tensor, dtype, dtype_name);
  if (view.batch != batch || view.rows != rows) {
    fail("%s: is %" PRId64 " x %" PRId64 ", not %" PRId64 " x %" PRId64, name, view.batch, view.rows, batch, rows);
  }
  return view;
}

struct Attention {
  HeadRows q, k;
  Rows query_rows, key_mask, droppable, scores;  // data is null for a mask that is not given
  bool causal, dot;
  float scale;
  int32_t heads, queries;
};

inline Attention check_attention(const v2drop_tensor* q, const v2drop_tensor* k, const v2drop_tensor* query_rows,
                                 const v2drop_tensor* key_mask, const v2drop_tensor* droppable, int32_t causal, float scale, int32_t mode,
                                 int32_t heads, int32_t queries, const v2drop_tensor* scores) {
  Attention a = {check_heads("q", q), check_heads("k", k), {}, {}, {}, {}, causal != 0, mode == V2DROP_DOT, scale, heads, queries};
  if (a.k.dtype != a.q.dtype) fail("k: has dtype code %d, but q has %d", a.k.dtype, a.q.dtype);
  if (a.k.batch != a.q.batch) fail("k: has a batch of %" PRId64 ", but q has %" PRId64, a.k.batch, a.q.batch);
  if (a.k.dim != a.q.dim) fail("k: has rows of %" PRId64 " elements, but q has %" PRId64, a.k.dim, a.q.dim);
  if (a.k.heads == 0 || a.q.heads == 0 || a.q.heads % a.k.heads != 0) {
    fail("q: has %" PRId64 " heads, which is no multiple of the %" PRId64 " of k", a.q.heads, a.k.heads);
  }
  a.query_rows = check_row_values("query_rows", query_rows, V2DROP_INT64, "int64", a.q.batch, a.q.rows);
  if (key_mask) a.key_mask = check_row_values("key_mask", key_mask, V2DROP_BOOL, "bool", a.k.batch, a.k.rows);
  if (droppable) a.droppable = check_row_values("droppable", droppable, V2DROP_BOOL, "bool", a.k.batch, a.k.rows);
  if (mode != V2DROP_SOFTMAX && mode != V2DROP_DOT) fail("mode: unknown code %d", mode);
  if (heads < V2DROP_HEADS_MAX || heads > a.q.heads) {
    fail("heads: must be a v2drop_heads or a number of heads up to %" PRId64 ", got %d", a.q.heads, heads);
  }
  if (queries != V2DROP_QUERIES_MEAN && queries != V2DROP_QUERIES_L2) fail("queries: unknown code %d", queries);
  a.scores = check_row_values("scores", scores, V2DROP_FLOAT32, "float32", a.k.batch, a.k.rows);
  check_writable("scores", *scores);
  return a;
}

inline void check_norm(int32_t norm) {
  if (norm < 0 || norm >= kNorms) fail("norm: must be l2 or l1, got code %d", norm);
}

// x [batch, rows, dim], pivots [batch, n] and cosines [batch, n, rows], whose "rows" are the pivots.
struct Pivots {
  Rows x, pivots, cosines;
};

inline Pivots check_pivots(const v2drop_tensor* x, const v2drop_tensor* pivots, const v2drop_tensor* cosines) {
  const Pivots p = {check_rows("x", x, true), check_rows("pivots", pivots, false), check_rows("cosines", cosines, true)};
  check_float("x", *x);
  check_dtype("pivots", *pivots, V2DROP_INT64, "int64");
  if (p.pivots.batch != p.x.batch) fail("pivots: has a batch of %" PRId64 ", but x has %" PRId64, p.pivots.batch, p.x.batch);
  check_dtype("cosines", *cosines, V2DROP_FLOAT32, "float32");
  check_writable("cosines", *cosines);
  const Rows& out = p.cosines;
  if (out.batch != p.x.batch || out.rows != p.pivots.rows || out.dim != p.x.rows) {
    fail("cosines: is %" PRId64 " x %" PRId64 " x %" PRId64 ", not %" PRId64 " x %" PRId64 " x %" PRId64, out.batch, out.rows, out.dim,
         p.x.batch, p.pivots.rows, p.x.rows);
  }
  return p;
}

struct Hidden {
  Rows prev, cur;
  ScoreRow score;
};

inline void check_metric(int32_t metric) {
  if (metric < 0 || metric >= kMetrics) fail("metric: unknown code %d", metric);
}

inline Hidden check_hidden(const v2drop_tensor* prev, const v2drop_tensor* cur, int32_t metric, int32_t round_to) {
  check_metric(metric);
  if (round_to < 0 || round_to >= kFloats) fail("round_to: must be float32, float16 or bfloat16, got dtype code %d", round_to);
  const Rows a = check_rows("prev", prev, true), b = check_rows("cur", cur, true);
  check_float("prev", *prev);
  if (a.dtype != b.dtype) fail("cur: has dtype code %d, but prev has %d", b.dtype, a.dtype);
  check_same_rows("cur", b, "prev", a);
  return {a, b, kernels().score[metric][a.dtype][round_to]};
}

// Where scores of `hidden` go.
inline Rows check_scores_of(const Hidden& hidden, const v2drop_tensor* scores) {
  const Rows view = check_rows("scores", scores, false);
  check_dtype("scores", *scores, V2DROP_FLOAT32, "float32");
  check_writable("scores", *scores);
  Rows like = hidden.prev;
  like.dim = 1;
  check_same_rows("scores", view, "the score of prev", like);
  return view;
}

// The gradient of those scores, and where its consequences go; data is null for one that is not wanted.
struct GradientRows {
  Rows grad, prev, cur;
};

inline GradientRows check_gradients(const Hidden& hidden, const v2drop_tensor* grad, const v2drop_tensor* grad_prev,
                                    const v2drop_tensor* grad_cur) {
  GradientRows rows = {check_rows("grad", grad, false), {}, {}};
  check_dtype("grad", *grad, V2DROP_FLOAT32, "float32");
  Rows like = hidden.prev;
  like.dim = 1;
  check_same_rows("grad", rows.grad, "the score of prev", like);
  const auto check_one = [&](const char* name, const v2drop_tensor* tensor) {
    if (!tensor) return Rows{};
    const Rows view = check_rows(name, tensor, true);
    check_dtype(name, *tensor, hidden.prev.dtype, "of prev");
    check_writable(name, *tensor);
    check_same_rows(name, view, "prev", hidden.prev);
    return view;
  };
  rows.prev = check_one("grad_prev", grad_prev);
  rows.cur = check_one("grad_cur", grad_cur);
  return rows;
}

inline void check_threads(int32_t threads) {
  if (threads < 0) fail("threads: must not be negative, got %d", threads);
}

// A table of stretches, each within one entry of a batch of `rows` rows, with 0 <= k <= n.
inline void check_stretches(const v2drop_stretch* stretches, int64_t n_stretches, int64_t batch, int64_t rows) {
  if (n_stretches < 0) fail("n_stretches: must not be negative, got %" PRId64, n_stretches);
  if (n_stretches > 0 && !stretches) fail("stretches: is NULL");
  for (int64_t g = 0; g < n_stretches; ++g) {
    const v2drop_stretch& s = stretches[g];
    const int64_t limit = batch * rows;  // each field is checked against what is left, so that no sum overflows
    if (s.row0 < 0 || s.row0 > limit) fail("stretches[%" PRId64 "]: row0 %" PRId64 " is outside the %" PRId64 " rows", g, s.row0, limit);
    const int64_t left = s.row0 == limit ? 0 : rows - s.row0 % rows;
    if (s.pre < 0 || s.n < 0 || s.post < 0 || s.pre > left || s.n > left - s.pre || s.post > left - s.pre - s.n) {
      fail("stretches[%" PRId64 "]: pre %" PRId64 ", n %" PRId64 ", post %" PRId64 " do not fit in the %" PRId64 " rows left in the entry",
           g, s.pre, s.n, s.post, left);
    }
    if (s.k < 0 || s.k > s.n) fail("stretches[%" PRId64 "]: k is %" PRId64 ", not in 0..%" PRId64, g, s.k, s.n);
  }
}

// Offsets [n_stretches + 1] that only the device can read, in place of the rows of a table that then says no more than k.
inline const int32_t* check_cu(const char* name, const v2drop_tensor* cu, int64_t n_stretches) {
  const Rows view = check_rows(name, cu, false);
  check_dtype(name, *cu, V2DROP_INT32, "int32");
  check_contiguous(name, *cu);
  if (cu->ndim != 1 || view.rows != n_stretches + 1) fail("%s: must be [%" PRId64 "]", name, n_stretches + 1);
  return reinterpret_cast<const int32_t*>(view.data);
}

inline void check_budgets(const v2drop_stretch* stretches, int64_t n_stretches, int64_t batch) {
  if (batch != 1) fail("cu_seqlens: goes with one batch entry, but there are %" PRId64, batch);
  if (n_stretches < 0) fail("n_stretches: must not be negative, got %" PRId64, n_stretches);
  if (n_stretches > 0 && !stretches) fail("stretches: is NULL");
  for (int64_t g = 0; g < n_stretches; ++g) {
    if (stretches[g].k < 0) fail("stretches[%" PRId64 "]: k is %" PRId64 ", negative", g, stretches[g].k);
  }
}

}  // namespace v2drop

#endif  // V2DROP_CORE_CHECK_H_
