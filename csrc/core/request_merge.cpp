// SPDX-License-Identifier: Apache-2.0
//
// The argument checks of the merges, for CPU and CUDA alike. What the lists hold is checked by the CPU ops, for only they can read it.
#include "request_merge.h"

#include "checks.h"

namespace v2drop {
namespace {

// int64 or float32, contiguous, [batch, columns], or [columns] where there is one entry. columns < 0: any number.
RowView check_list(const char* name, const v2drop_tensor* tensor, int32_t dtype, const char* dtype_name, int64_t batch, int64_t columns) {
  const RowView view = check_rows(name, tensor, false);
  check_dtype(name, *tensor, dtype, dtype_name);
  check_contiguous(name, *tensor);
  if (view.batch != batch) fail("%s: has %" PRId64 " entries, but there are %" PRId64, name, view.batch, batch);
  if (columns >= 0 && view.rows != columns) fail("%s: has %" PRId64 " columns, but must have %" PRId64, name, view.rows, columns);
  return view;
}

Edges check_edges(const v2drop_tensor* offsets, const v2drop_tensor* rows, const v2drop_tensor* weights, int64_t batch) {
  const RowView starts = check_list("offsets", offsets, V2DROP_INT64, "int64", batch, -1);
  const RowView from = check_list("rows", rows, V2DROP_INT64, "int64", batch, -1);
  if (starts.rows < 1) fail("offsets: must have a column more than there are output rows, got none");
  Edges edges = {
      reinterpret_cast<int64_t*>(starts.data), reinterpret_cast<int64_t*>(from.data), nullptr, batch, starts.rows - 1, from.rows};
  if (weights) edges.weights = reinterpret_cast<float*>(check_list("weights", weights, V2DROP_FLOAT32, "float32", batch, from.rows).data);
  return edges;
}

// Rows like those of x, as many as `rows`, that a call writes (`result`) or reads.
RowView check_like(const char* name, const v2drop_tensor* tensor, const RowView& x, int64_t rows, bool result) {
  const RowView view = check_rows(name, tensor, true);
  check_dtype(name, *tensor, x.dtype, "of x");
  if (result) check_writable(name, *tensor);
  RowView model = x;
  model.rows = rows;
  check_same_rows(name, view, "the merge of x", model);
  return view;
}

}  // namespace

MergeRequest check_merge(const v2drop_tensor* x, const v2drop_tensor* offsets, const v2drop_tensor* rows, const v2drop_tensor* weights,
                         int32_t mean, const v2drop_tensor* out) {
  const RowView view = check_rows("x", x, true);
  check_float("x", *x);
  const Edges edges = check_edges(offsets, rows, weights, view.batch);
  return {view, check_like("out", out, view, edges.targets, true), edges, mean != 0};
}

MergeBackwardRequest check_merge_backward(const v2drop_tensor* grad, const v2drop_tensor* x, const v2drop_tensor* offsets,
                                          const v2drop_tensor* rows, const v2drop_tensor* weights, int32_t mean,
                                          const v2drop_tensor* back_offsets, const v2drop_tensor* back_edges, const v2drop_tensor* grad_x,
                                          const v2drop_tensor* grad_weights, int32_t place) {
  MergeBackwardRequest request = {};
  request.x = check_rows("x", x, true);
  check_float("x", *x);
  request.edges = check_edges(offsets, rows, weights, request.x.batch);
  request.grad = check_like("grad", grad, request.x, request.edges.targets, false);
  request.mean = mean != 0;
  const int64_t batch = request.edges.batch, count = request.edges.count;
  if (grad_x) {
    request.grad_x = check_like("grad_x", grad_x, request.x, request.x.rows, true);
    if (place == V2DROP_CUDA) {
      const RowView starts = check_list("back_offsets", back_offsets, V2DROP_INT64, "int64", batch, request.x.rows + 1);
      const RowView back = check_list("back_edges", back_edges, V2DROP_INT64, "int64", batch, count);
      request.back_offsets = reinterpret_cast<int64_t*>(starts.data);
      request.back_edges = reinterpret_cast<int64_t*>(back.data);
    }
  }
  if (place != V2DROP_CUDA && (back_offsets || back_edges)) fail("back_offsets: must be NULL on the CPU, which sorts the edges itself");
  if (grad_weights) {
    request.grad_weights = reinterpret_cast<float*>(check_list("grad_weights", grad_weights, V2DROP_FLOAT32, "float32", batch, count).data);
  }
  return request;
}

}  // namespace v2drop
