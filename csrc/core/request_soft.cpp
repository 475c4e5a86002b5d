// SPDX-License-Identifier: Apache-2.0
//
// The argument checks of soft_topk, of random scores and of the pairs of bipartite_merge.
#include "request_soft.h"

#include <algorithm>

#include "checks.h"

namespace v2drop {
namespace {

// Contiguous [batch, columns] (or [columns] where there is one entry) of one dtype.
template <class T>
T* check_table(const char* name, const v2drop_tensor* tensor, int32_t dtype, const char* dtype_name, int64_t batch, int64_t columns) {
  const RowView view = check_rows(name, tensor, false);
  check_dtype(name, *tensor, dtype, dtype_name);
  check_contiguous(name, *tensor);
  if (view.batch != batch || view.rows != columns) {
    fail("%s: is %" PRId64 " x %" PRId64 ", not %" PRId64 " x %" PRId64, name, view.batch, view.rows, batch, columns);
  }
  return reinterpret_cast<T*>(view.data);
}

RowView check_valid(const v2drop_tensor* valid, const RowView& scores) {
  if (!valid) return {};
  const RowView view = check_rows("valid", valid, false);
  check_dtype("valid", *valid, V2DROP_BOOL, "bool");
  check_same_rows("valid", view, "scores", scores);
  return view;
}

}  // namespace

RandomRequest check_random(int64_t seed, const v2drop_tensor* items, const v2drop_tensor* scores) {
  RandomRequest request = {static_cast<uint64_t>(seed), {}, check_rows("scores", scores, false)};
  check_dtype("scores", *scores, V2DROP_FLOAT32, "float32");
  check_contiguous("scores", *scores);
  if (!items) return request;
  request.items = check_rows("item_seeds", items, false);
  check_dtype("item_seeds", *items, V2DROP_INT64, "int64");
  if (items->ndim != 1 || request.items.rows != request.scores.batch) fail("item_seeds: must be [%" PRId64 "]", request.scores.batch);
  return request;
}

SoftRequest check_soft(const v2drop_tensor* scores, const v2drop_tensor* ratio, const v2drop_tensor* valid, float temperature, int32_t ties,
                       int32_t hard, const v2drop_tensor* mask, const v2drop_tensor* slope, const v2drop_tensor* order) {
  const RowView view = check_rows("scores", scores, false), ratios = check_rows("ratio", ratio, false);
  check_float("scores", *scores);
  check_dtype("ratio", *ratio, V2DROP_FLOAT32, "float32");
  check_contiguous("ratio", *ratio);
  if (ratio->ndim != 1 || (ratios.rows != 1 && ratios.rows != view.batch)) fail("ratio: must be [1] or [%" PRId64 "]", view.batch);
  if (!(temperature >= 0)) fail("temperature: must not be negative");
  if (ties != V2DROP_TIES_INDEX && ties != V2DROP_TIES_RELEASED) fail("ties: unknown code %d", ties);
  if (view.rows > INT32_MAX) fail("scores: more than 2^31 for an entry");
  SoftRequest request = {view,
                         check_valid(valid, view),
                         reinterpret_cast<const float*>(ratios.data),
                         ratios.rows,
                         temperature,
                         ties == V2DROP_TIES_RELEASED,
                         hard != 0,
                         nullptr,
                         nullptr,
                         nullptr};
  request.mask = check_table<float>("mask", mask, V2DROP_FLOAT32, "float32", view.batch, view.rows);
  if (slope) request.slope = check_table<float>("slope", slope, V2DROP_FLOAT32, "float32", view.batch, view.rows);
  if (order) request.order = check_table<int64_t>("order", order, V2DROP_INT64, "int64", view.batch, view.rows);
  return request;
}

SoftBackwardRequest check_soft_backward(const v2drop_tensor* grad, const v2drop_tensor* slope, const v2drop_tensor* scores,
                                        const v2drop_tensor* order, const v2drop_tensor* valid, const v2drop_tensor* grad_scores) {
  const RowView view = check_rows("scores", scores, false);
  check_float("scores", *scores);
  return {view,
          check_valid(valid, view),
          check_table<float>("grad", grad, V2DROP_FLOAT32, "float32", view.batch, view.rows),
          check_table<float>("slope", slope, V2DROP_FLOAT32, "float32", view.batch, view.rows),
          check_table<int64_t>("order", order, V2DROP_INT64, "int64", view.batch, view.rows),
          check_table<float>("grad_scores", grad_scores, V2DROP_FLOAT32, "float32", view.batch, view.rows)};
}

PairsRequest check_pairs(const v2drop_tensor* features, int64_t merged, int64_t protected_rows, int32_t order, const v2drop_tensor* keep,
                         const v2drop_tensor* row, const v2drop_tensor* offsets, const v2drop_tensor* edges) {
  const RowView view = check_rows("features", features, true);
  check_float("features", *features);
  if (protected_rows < 0) fail("protected_rows: must not be negative, got %" PRId64, protected_rows);
  if (merged < 0 || merged > std::max<int64_t>(0, view.rows - protected_rows) / 2) {
    fail("merged: is %" PRId64 ", not in 0..%" PRId64, merged, std::max<int64_t>(0, view.rows - protected_rows) / 2);
  }
  if (order != V2DROP_MERGED_POSITION && order != V2DROP_MERGED_RELEASED) fail("order: unknown code %d", order);
  const int64_t left = view.rows - merged;
  return {view,
          merged,
          protected_rows,
          order == V2DROP_MERGED_RELEASED,
          check_table<int64_t>("keep", keep, V2DROP_INT64, "int64", view.batch, left),
          check_table<int64_t>("row", row, V2DROP_INT64, "int64", view.batch, view.rows),
          check_table<int64_t>("offsets", offsets, V2DROP_INT64, "int64", view.batch, left + 1),
          check_table<int64_t>("edges", edges, V2DROP_INT64, "int64", view.batch, view.rows)};
}

}  // namespace v2drop
