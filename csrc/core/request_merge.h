// SPDX-License-Identifier: Apache-2.0
//
// Checked requests of the merges; see request.h.
#ifndef V2DROP_CORE_REQUEST_MERGE_H_
#define V2DROP_CORE_REQUEST_MERGE_H_

#include "request.h"

namespace v2drop {

// Lists of edges: those of output row k of an entry are offsets[k] to offsets[k + 1], each from rows[e] with weights[e] (null: 1).
struct Edges {
  const int64_t *offsets, *rows;
  const float* weights;
  int64_t batch, targets, count;  // entries; output rows and edges of each

  const int64_t* offsets_of(int64_t entry) const { return offsets + entry * (targets + 1); }
  const int64_t* rows_of(int64_t entry) const { return rows + entry * count; }
  const float* weights_of(int64_t entry) const { return weights ? weights + entry * count : nullptr; }
};

struct MergeRequest {
  RowView x, out;
  Edges edges;
  bool mean;
};

struct MergeBackwardRequest {
  RowView grad, x;
  Edges edges;
  bool mean;
  RowView grad_x;       // `data` is null where it is not wanted
  float* grad_weights;  // contiguous [batch, edges], or null
  // The edges by source row, on CUDA: those of row n of an entry are back_edges[back_offsets[n]] to back_edges[back_offsets[n + 1]].
  const int64_t *back_offsets, *back_edges;
};

MergeRequest check_merge(const v2drop_tensor* x, const v2drop_tensor* offsets, const v2drop_tensor* rows, const v2drop_tensor* weights,
                         int32_t mean, const v2drop_tensor* out);
MergeBackwardRequest check_merge_backward(const v2drop_tensor* grad, const v2drop_tensor* x, const v2drop_tensor* offsets,
                                          const v2drop_tensor* rows, const v2drop_tensor* weights, int32_t mean,
                                          const v2drop_tensor* back_offsets, const v2drop_tensor* back_edges, const v2drop_tensor* grad_x,
                                          const v2drop_tensor* grad_weights, int32_t place);

}  // namespace v2drop

#endif  // V2DROP_CORE_REQUEST_MERGE_H_
