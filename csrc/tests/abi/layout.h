/* SPDX-License-Identifier: Apache-2.0
 *
 * What version 0.1.0 fixed: X(name, value) for every number that a compiled program contains. */
/* clang-format off */
#define SIZES(X) X(v2drop_tensor) X(v2drop_segment) X(v2drop_gather) X(v2drop_source) X(v2drop_context)
#define FIELDS(X) \
  X(v2drop_tensor, data) X(v2drop_tensor, dtype) X(v2drop_tensor, ndim) X(v2drop_tensor, shape) X(v2drop_tensor, stride) \
  X(v2drop_segment, src_start) X(v2drop_segment, n_prefix) X(v2drop_segment, n) X(v2drop_segment, n_suffix) X(v2drop_segment, k) \
  X(v2drop_segment, dst_start) X(v2drop_segment, pad_before) X(v2drop_segment, pad_after) \
  X(v2drop_gather, src) X(v2drop_gather, dst) X(v2drop_gather, batch_dim) X(v2drop_gather, row_dim) X(v2drop_gather, fill) \
  X(v2drop_source, size) X(v2drop_source, scores) X(v2drop_source, prev) X(v2drop_source, cur) X(v2drop_source, mask) \
  X(v2drop_source, metric) X(v2drop_source, score_dtype) \
  X(v2drop_context, size) X(v2drop_context, place) X(v2drop_context, threads) X(v2drop_context, launch_mode) \
  X(v2drop_context, reserved) X(v2drop_context, stream) X(v2drop_context, workspace) X(v2drop_context, workspace_bytes) \
  X(v2drop_context, device_segments)
#define VALUES(X) \
  X(V2DROP_OK) X(V2DROP_ERROR_ARGUMENT) X(V2DROP_ERROR_MEMORY) X(V2DROP_ERROR_INTERNAL) X(V2DROP_ERROR_UNSUPPORTED) \
  X(V2DROP_ERROR_DEVICE) X(V2DROP_FLOAT32) X(V2DROP_FLOAT16) X(V2DROP_BFLOAT16) X(V2DROP_INT64) X(V2DROP_BOOL) X(V2DROP_BITS8) \
  X(V2DROP_BITS16) X(V2DROP_BITS32) X(V2DROP_BITS64) X(V2DROP_BITS128) X(V2DROP_INT32) X(V2DROP_L2) X(V2DROP_L1) X(V2DROP_COSINE) \
  X(V2DROP_ORDER_POSITION) X(V2DROP_ORDER_SCORE) X(V2DROP_SOFTMAX) X(V2DROP_DOT) X(V2DROP_HEADS_MEAN) X(V2DROP_HEADS_SUM) \
  X(V2DROP_HEADS_MAX) X(V2DROP_QUERIES_MEAN) X(V2DROP_QUERIES_L2) X(V2DROP_CPU) X(V2DROP_CUDA) X(V2DROP_LAUNCH_AUTO) \
  X(V2DROP_LAUNCH_COOPERATIVE) X(V2DROP_LAUNCH_FUSED) X(V2DROP_LAUNCH_SEPARATE) X(V2DROP_MAX_DIMS)
/* clang-format on */

typedef struct layout_row {
  const char* name;
  long long number;
} layout_row;

#define LAYOUT_SIZE(type) {"sizeof(" #type ")", (long long)sizeof(type)},
#define LAYOUT_FIELD(type, field) {#type "." #field, (long long)offsetof(type, field)},
#define LAYOUT_FIELD_SIZE(type, field) {"sizeof(" #type "." #field ")", (long long)sizeof(((type*)0)->field)},
#define LAYOUT_VALUE(name) {#name, (long long)name},
#define LAYOUT_ROWS {SIZES(LAYOUT_SIZE) FIELDS(LAYOUT_FIELD) FIELDS(LAYOUT_FIELD_SIZE) VALUES(LAYOUT_VALUE){NULL, 0}}

extern const layout_row layout_then[], layout_now[];
