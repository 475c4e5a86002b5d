// SPDX-License-Identifier: Apache-2.0
//
// Checked requests of soft_topk, of random scores and of the pairs of bipartite_merge; see request.h.
#ifndef V2DROP_CORE_REQUEST_SOFT_H_
#define V2DROP_CORE_REQUEST_SOFT_H_

#include "request.h"

namespace v2drop {

struct RandomRequest {
  uint64_t seed;
  RowView items;  // int64, a seed for each entry; `data` is null: its number
  RowView scores;
};

struct SoftRequest {
  RowView scores, valid;  // `data` of valid is null where all are
  const float* ratio;
  int64_t ratios;     // one for all entries, or one for each
  float temperature;  // 0: the number of valid scores
  bool released, hard;
  // Contiguous [batch, rows]; slope and order are null where they are not wanted.
  float *mask, *slope;
  int64_t* order;
};

struct SoftBackwardRequest {
  RowView scores, valid;
  const float *grad, *slope;
  const int64_t* order;
  float* grad_scores;
};

struct PairsRequest {
  RowView features;
  int64_t merged, protected_rows;
  bool released;
  // Contiguous: [batch, rows - merged], [batch, rows], [batch, rows - merged + 1] and [batch, rows].
  int64_t *keep, *row, *offsets, *edges;
};

RandomRequest check_random(int64_t seed, const v2drop_tensor* items, const v2drop_tensor* scores);
SoftRequest check_soft(const v2drop_tensor* scores, const v2drop_tensor* ratio, const v2drop_tensor* valid, float temperature, int32_t ties,
                       int32_t hard, const v2drop_tensor* mask, const v2drop_tensor* slope, const v2drop_tensor* order);
SoftBackwardRequest check_soft_backward(const v2drop_tensor* grad, const v2drop_tensor* slope, const v2drop_tensor* scores,
                                        const v2drop_tensor* order, const v2drop_tensor* valid, const v2drop_tensor* grad_scores);
PairsRequest check_pairs(const v2drop_tensor* features, int64_t merged, int64_t protected_rows, int32_t order, const v2drop_tensor* keep,
                         const v2drop_tensor* row, const v2drop_tensor* offsets, const v2drop_tensor* edges);

}  // namespace v2drop

#endif  // V2DROP_CORE_REQUEST_SOFT_H_
