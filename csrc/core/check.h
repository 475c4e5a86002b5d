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
