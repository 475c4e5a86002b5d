/* SPDX-License-Identifier: Apache-2.0
 *
 * The C interface of libv2drop: score tokens by how much a layer changed them, keep the best, compact everything that is kept.
 *
 * Ownership   The caller owns every buffer. The library keeps no pointer after a call returns; outputs are written into memory that the
 *             caller allocated, and must not overlap inputs or each other (v2drop_compact_inplace alone works in place).
 * Strides     In elements, 64-bit, of either sign; zero broadcasts an input. An output must not overlap itself.
 * Alignment   A tensor that is read as numbers (hidden states, scores, indices, masks, gradients) is aligned to its element. Parts are
 *             moved as bytes and need no alignment; 64-byte alignment of a destination is fastest.
 * Threads     `threads` is the number of CPU threads a call may use, the caller's included; 0 means all. Small calls use fewer. Results
 *             are bit-identical for any number. Every entry point may be called from several threads at once. The library may be
 *             loaded before fork(): the child starts its own worker threads when it needs them.
 * Arithmetic  Sums are float32 in one fixed order, without fused multiply-add: all instruction sets give the same bits. The
 *             environment variable V2DROP_ISA=baseline|avx2|avx512 caps the instruction set; it is read once, by the
 *             first call. See v2drop_isa().
 * Errors      Every entry point checks its arguments first, and returns a status. It does not throw, print, exit or crash on a bad
 *             argument. v2drop_last_error() gives the message of the calling thread's last failure, which names the argument. After
 *             V2DROP_ERROR_ARGUMENT no output has been written.
 *
 * Entry points without a suffix run on the CPU. Those of other devices carry one (..._cuda) and take a stream.
 */
#ifndef V2DROP_H_
#define V2DROP_H_

#include <stdint.h>

#define V2DROP_VERSION_MAJOR 0
#define V2DROP_VERSION_MINOR 1
#define V2DROP_VERSION_PATCH 0
#define V2DROP_VERSION (V2DROP_VERSION_MAJOR * 10000 + V2DROP_VERSION_MINOR * 100 + V2DROP_VERSION_PATCH)

#if defined(__GNUC__)
#define V2DROP_API __attribute__((visibility("default")))
#else
#define V2DROP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum v2drop_status {
  V2DROP_OK = 0,
  V2DROP_ERROR_ARGUMENT = 1, /* an argument is wrong; the message names it */
  V2DROP_ERROR_MEMORY = 2,   /* no memory for scratch space */
  V2DROP_ERROR_INTERNAL = 3  /* a bug in the library */
} v2drop_status;

typedef enum v2drop_dtype {
  V2DROP_FLOAT32 = 0,
  V2DROP_FLOAT16 = 1,
  V2DROP_BFLOAT16 = 2,
  V2DROP_INT64 = 3,
  V2DROP_BOOL = 4, /* one byte, 0 is false */
  /* Anything else is moved, never interpreted: only its size counts. */
  V2DROP_BITS8 = 5,
  V2DROP_BITS16 = 6,
  V2DROP_BITS32 = 7,
  V2DROP_BITS64 = 8,
  V2DROP_BITS128 = 9
} v2drop_dtype;

typedef enum v2drop_metric {
  V2DROP_L2 = 0,    /* sqrt(sum (cur - prev)^2) */
  V2DROP_L1 = 1,    /* sum |cur - prev| */
  V2DROP_COSINE = 2 /* 1 - cos(prev, cur); 1 where either is zero */
} v2drop_metric;

typedef enum v2drop_order {
  V2DROP_ORDER_POSITION = 0, /* indices ascend */
  V2DROP_ORDER_SCORE = 1     /* scores descend, equal scores by index */
} v2drop_order;

#define V2DROP_MAX_DIMS 8

/* A strided view. `data` may be NULL when an extent is zero. */
typedef struct v2drop_tensor {
  void* data;
  int32_t dtype; /* v2drop_dtype */
  int32_t ndim;
  int64_t shape[V2DROP_MAX_DIMS];
  int64_t stride[V2DROP_MAX_DIMS]; /* in elements */
} v2drop_tensor;

/* A contiguous run of input rows inside one batch entry: `pre` rows that are always kept, `n` that compete for `k` places, `post` that
 * are always kept. Rows are numbered through the batch: entry * rows + position. From output row `out0` on (numbered likewise) it gives
 * `pad_pre` empty rows, the pre rows, the k survivors by position, the post rows, `pad_post` empty rows. */
typedef struct v2drop_stretch {
  int64_t row0, pre, n, post, k, out0, pad_pre, pad_post;
} v2drop_stretch;

/* One tensor to compact. Its `row_dim` has as many rows as the hidden states and, in `dst`, as many as `keep`; all other extents of src
 * and dst agree. `batch_dim` is -1 when there is none (a packed or shared tensor; `keep` then has one entry). `fill` holds the bits
 * written to every element of an empty row: its low bytes, so any two's complement integer may be given as it is. */
typedef struct v2drop_part {
  v2drop_tensor src, dst;
  int32_t batch_dim, row_dim;
  int64_t fill;
} v2drop_part;

/* The version of the library that is running, as V2DROP_VERSION encodes it. */
V2DROP_API int32_t v2drop_version(void);

/* The instruction set in use: "avx512", "avx2" or "baseline". */
V2DROP_API const char* v2drop_isa(void);

/* The message of this thread's last failure; "" if there was none. Valid until this thread's next failure. */
V2DROP_API const char* v2drop_last_error(void);

/* In all that follows: hidden states `prev` and `cur` are [batch, rows, dim] or [rows, dim] of one float dtype, stride[dim] == 1. An
 * optional argument may be NULL. `round_to` is V2DROP_FLOAT32 (round nothing), or a 16-bit float to which the differences of l2 and l1
 * and every final score are rounded, half to even, as arithmetic in that dtype would. */

/* scores: float32, [batch, rows] or [rows]. */
V2DROP_API v2drop_status v2drop_variation_score(const v2drop_tensor* prev, const v2drop_tensor* cur, int32_t metric, int32_t round_to,
                                                const v2drop_tensor* scores, int32_t threads);

/* grad: float32, shaped like the scores. grad_prev and grad_cur: shape and dtype of prev, stride[dim] == 1; NULL for one not wanted.
 * The subgradient where a score is not differentiable is zero. */
V2DROP_API v2drop_status v2drop_variation_score_backward(const v2drop_tensor* grad, const v2drop_tensor* prev, const v2drop_tensor* cur,
                                                         int32_t metric, const v2drop_tensor* grad_prev, const v2drop_tensor* grad_cur,
                                                         int32_t threads);

/* The k best of the n competing rows of every stretch, by (score descending, index ascending); NaN ranks above +inf, -0.0 equals 0.0.
 * Give either `scores` (a float dtype, [batch, rows] or [rows]) or `prev` and `cur`. mask (optional, BOOL, shaped like the scores): rows
 * where it is false are never returned. values [n_stretches, K]: dtype of `scores`, else float32. indices [n_stretches, K]: INT64,
 * positions inside the batch entry. Both contiguous, K >= every k; places left over hold -inf and -1. Of a stretch only row0, pre, n and
 * k are used. `metric` and `round_to` are ignored when scores are given. */
V2DROP_API v2drop_status v2drop_topk(const v2drop_tensor* scores, const v2drop_tensor* prev, const v2drop_tensor* cur,
                                     const v2drop_tensor* mask, const v2drop_stretch* stretches, int64_t n_stretches, int32_t order,
                                     int32_t metric, int32_t round_to, const v2drop_tensor* values, const v2drop_tensor* indices,
                                     int32_t threads);

/* The whole step: score, select, and compact every part. Give either `scores` (a float dtype, [batch, rows] or [rows]) or `prev` and
 * `cur`. keep (out): INT64, contiguous, [batch, out_rows] or [out_rows]; the positions that survive, ascending, -1 in empty rows. mask
 * (optional, BOOL, shaped like the scores): rows where it is false are kept without competing, and k counts them. The stretches, in
 * order, tile the output rows without gaps, and each stays inside one batch entry of both. */
V2DROP_API v2drop_status v2drop_drop_tokens(const v2drop_tensor* scores, const v2drop_tensor* prev, const v2drop_tensor* cur,
                                            const v2drop_tensor* mask, const v2drop_stretch* stretches, int64_t n_stretches, int32_t metric,
                                            int32_t round_to, const v2drop_tensor* keep, const v2drop_part* parts, int64_t n_parts,
                                            int32_t threads);

/* dst[.., i, ..] = src[.., keep[i], ..] for every part, its fill where keep[i] is negative. keep: INT64, contiguous, [batch, out_rows] or
 * [out_rows], in any order; an index that reaches the rows of a part is an error. */
V2DROP_API v2drop_status v2drop_compact(const v2drop_tensor* keep, const v2drop_part* parts, int64_t n_parts, int32_t threads);

/* The transpose of v2drop_compact: src has the out_rows of keep, dst the `rows` of the input; dst[.., keep[i], ..] = src[.., i, ..], and
 * the fill in rows that were not kept. An index that occurs twice in an entry of keep is an error. */
V2DROP_API v2drop_status v2drop_compact_backward(const v2drop_tensor* keep, int64_t rows, const v2drop_part* parts, int64_t n_parts,
                                                 int32_t threads);

/* The same as v2drop_compact inside `src`: the rows at the non-negative entries of keep, which must ascend strictly within each batch
 * entry, move to the front of row_dim; later rows keep what they held. dst and fill are ignored; src must not overlap itself. */
V2DROP_API v2drop_status v2drop_compact_inplace(const v2drop_tensor* keep, const v2drop_part* parts, int64_t n_parts, int32_t threads);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* V2DROP_H_ */
