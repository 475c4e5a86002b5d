// SPDX-License-Identifier: Apache-2.0
//
// Checked requests: what an entry point receives, after all argument checks that CPU and CUDA share. A view in a request has byte strides,
// a known dtype and offsets that fit in 64 bits, so that the code behind it only computes base + index * stride.
#ifndef V2DROP_CORE_REQUEST_H_
#define V2DROP_CORE_REQUEST_H_

#include <cinttypes>
#include <cstdint>
#include <vector>

#include "status.h"
#include "v2drop/v2drop.h"

namespace v2drop {

constexpr int64_t kDtypeBytes[] = {4, 2, 2, 8, 1, 1, 2, 4, 8, 16, 4, 8};  // by v2drop_dtype

// [batch, rows] or [rows] (batch 1), of single elements or, with dim, of rows of `dim` elements.
struct RowView {
  char* data;
  int64_t batch, rows, dim;
  int64_t batch_stride, row_stride;  // bytes
  int32_t dtype;

  char* at(int64_t entry, int64_t position) const { return data + entry * batch_stride + position * row_stride; }
  int64_t bytes() const { return rows * batch * dim * kDtypeBytes[dtype]; }
};

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

// Hidden states before and after a layer, and how the change of a row is scored.
struct Hidden {
  RowView prev, cur;
  int32_t metric, score_dtype;
};

struct ScoreRequest {
  Hidden hidden;
  RowView scores;
};

// The gradient of the scores, and where the gradients of the hidden states go; `data` is null for one that is not wanted.
struct ScoreBackwardRequest {
  Hidden hidden;
  RowView grad, grad_prev, grad_cur;
};

// What competing rows are ranked by: given scores or, without them, hidden states; and an optional mask. A row where the mask is false gets
// `masked_ordinal` and is not read.
struct ScoreSource {
  bool has_scores, has_mask;
  RowView scores, mask;
  Hidden hidden;
  int32_t masked_ordinal;
  int64_t batch, rows;
};

struct Segments {
  const v2drop_segment* data;
  int64_t count;
  const int32_t* cu_seqlens;  // not null: the rows of the segments are only on the device, and of `data` only k counts

  const v2drop_segment& operator[](int64_t g) const { return data[g]; }
  int64_t largest() const;  // number of competing rows
};

struct TopkRequest {
  ScoreSource source;
  Segments segments;
  int32_t order;
  // Results [segments, width]; `dtype` is that of the values.
  char* values;
  int64_t* indices;
  int64_t width;
  int32_t dtype;
};

// keep[entry * count + i] is the source row of output row i, or negative.
struct Keep {
  int64_t* data;
  int64_t batch, count;
};

// One tensor to gather, reduced to what moving it takes; strides in bytes. All dimensions but the row's and the innermost contiguous ones
// are planes.
struct Copy {
  struct Dim {
    int64_t size, src, dst;
    bool is_batch;
  };
  char *src, *dst;
  int64_t src_rows, dst_rows, src_row, dst_row;
  int64_t inner;  // contiguous bytes of a row
  Dim dims[V2DROP_MAX_DIMS];
  int n_dims;
  int64_t planes;
  char fill[16];   // the fill, repeated
  bool like_last;  // differs from the copy before it in its addresses alone

  // The start of a plane in both tensors, and the batch entry it belongs to.
  struct Plane {
    char *src, *dst;
    int64_t entry;
  };
  Plane plane(int64_t index) const;
};

struct DropRequest {
  ScoreSource source;
  Segments segments;
  Keep keep;
  int32_t* new_cu;  // null where segments.cu_seqlens is
  std::vector<Copy> copies;
};

struct CompactRequest {
  Keep keep;
  int64_t rows;  // of the input; backward only
  std::vector<Copy> copies;
};

struct AttentionRequest {
  HeadRows q, k;
  RowView query_rows, key_mask, droppable, scores;  // `data` is null for a mask that is not given
  bool causal, dot;
  float scale;
  int32_t heads, queries;
};

struct NormRequest {
  HeadRows k;
  int32_t norm;
  RowView scores;
};

struct UploadRequest {
  const int64_t* values;  // on the host
  int64_t count;
  void* to;
  int32_t dtype;  // INT64 or INT32
};

// x [batch, rows, dim], pivots [batch, n] and cosines [batch, n, rows], whose "rows" are the pivots.
struct PivotsRequest {
  RowView x, pivots, cosines;
};

// Each throws Error if an argument is invalid.
v2drop_context check_context(const v2drop_context* context);
ScoreRequest check_score(const v2drop_source* source, const v2drop_tensor* scores);
ScoreBackwardRequest check_score_backward(const v2drop_tensor* grad, const v2drop_source* source, const v2drop_tensor* grad_prev,
                                          const v2drop_tensor* grad_cur);
TopkRequest check_topk(const v2drop_source* source, const v2drop_segment* segments, int64_t n_segments, const v2drop_tensor* cu_seqlens,
                       int32_t order, const v2drop_tensor* values, const v2drop_tensor* indices, int32_t place);
DropRequest check_drop(const v2drop_source* source, const v2drop_segment* segments, int64_t n_segments, const v2drop_tensor* cu_seqlens,
                       const v2drop_tensor* keep, const v2drop_tensor* new_cu, const v2drop_gather* gathers, int64_t n_gathers,
                       int32_t place);
CompactRequest check_compact(const v2drop_tensor* keep, const v2drop_gather* gathers, int64_t n_gathers);
CompactRequest check_compact_backward(const v2drop_tensor* keep, int64_t rows, const v2drop_gather* gathers, int64_t n_gathers);
CompactRequest check_compact_inplace(const v2drop_tensor* keep, const v2drop_gather* gathers, int64_t n_gathers);
AttentionRequest check_attention(const v2drop_tensor* q, const v2drop_tensor* k, const v2drop_tensor* query_rows,
                                 const v2drop_tensor* key_mask, const v2drop_tensor* droppable, int32_t causal, float scale, int32_t mode,
                                 int32_t heads, int32_t queries, const v2drop_tensor* scores);
NormRequest check_key_norm(const v2drop_tensor* k, int32_t norm, const v2drop_tensor* scores);
PivotsRequest check_pivots(const v2drop_tensor* x, const v2drop_tensor* pivots, const v2drop_tensor* cosines);
UploadRequest check_upload(const v2drop_tensor* values, const v2drop_tensor* to);

}  // namespace v2drop

#endif  // V2DROP_CORE_REQUEST_H_
