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
 * Entry points without a suffix run on the CPU. Their twins for NVIDIA GPUs end in _cuda: see the end of this file.
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
  V2DROP_ERROR_ARGUMENT = 1,    /* an argument is wrong; the message names it */
  V2DROP_ERROR_MEMORY = 2,      /* no memory for scratch space */
  V2DROP_ERROR_INTERNAL = 3,    /* a bug in the library */
  V2DROP_ERROR_UNSUPPORTED = 4, /* this build has no CUDA, or there is no such device */
  V2DROP_ERROR_DEVICE = 5       /* the CUDA runtime reports an error; the message is its own */
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
  V2DROP_BITS128 = 9,
  V2DROP_INT32 = 10
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

/* What attention gives a key: its share among the visible keys, or no more than the scaled product with the query. */
typedef enum v2drop_mode { V2DROP_SOFTMAX = 0, V2DROP_DOT = 1 } v2drop_mode;

/* From the weights of all heads to one. A number n > 0 in place of these: the mean of the n heads whose weights on droppable rows sum to
 * most (NaN first; equal sums: the lower head), chosen for every query. */
typedef enum v2drop_heads { V2DROP_HEADS_MEAN = 0, V2DROP_HEADS_SUM = -1, V2DROP_HEADS_MAX = -2 } v2drop_heads;

/* From the queries of an item to one score: the mean, or the square root of the sum of squares. */
typedef enum v2drop_queries { V2DROP_QUERIES_MEAN = 0, V2DROP_QUERIES_L2 = 1 } v2drop_queries;

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

/* How much attention the queries pay to each key: q [batch, heads, queries, dim] and k [batch, kv_heads, rows, dim] of one float dtype,
 * stride[dim] == 1, heads a multiple of kv_heads; head h reads the keys of kv_head h / (heads / kv_heads). query_rows (INT64, [batch,
 * queries]): the row of a query among the keys, negative where there is none. key_mask (optional, BOOL, [batch, rows]): keys where it is
 * false are invisible. causal: so are those after the row of the query. droppable (optional, BOOL, [batch, rows]): rows where it is false
 * score 0. The products are multiplied by `scale`; mode is a v2drop_mode, heads a v2drop_heads, queries a v2drop_queries. Invisible keys
 * weigh 0, a query that sees nothing gives 0, and so do no queries at all; the mean is over those that are there. scores: float32,
 * [batch, rows]. Reads the keys once for every 64 MB of float32 weights, or once for every query where
 * its weights alone are more; that is also the scratch memory. */
V2DROP_API v2drop_status v2drop_attention_score(const v2drop_tensor* q, const v2drop_tensor* k, const v2drop_tensor* query_rows,
                                                const v2drop_tensor* key_mask, const v2drop_tensor* droppable, int32_t causal, float scale,
                                                int32_t mode, int32_t heads, int32_t queries, const v2drop_tensor* scores, int32_t threads);

/* The norm (V2DROP_L2 or V2DROP_L1) of a row of k [batch, kv_heads, rows, dim] over its heads and dim together; stride[dim] == 1.
 * scores: float32, [batch, rows]. */
V2DROP_API v2drop_status v2drop_key_norm(const v2drop_tensor* k, int32_t norm, const v2drop_tensor* scores, int32_t threads);

/* The cosine of every row of x [batch, rows, dim] with some of them: pivots (INT64, [batch, n]), where a number
 * outside the rows is no pivot. cosines: float32, [batch, n, rows], stride[rows] == 1; 0 where either row is zero, or there is no pivot.
 * All three may do without the batch. */
V2DROP_API v2drop_status v2drop_cosine_to_pivots(const v2drop_tensor* x, const v2drop_tensor* pivots, const v2drop_tensor* cosines,
                                                 int32_t threads);

/* ---------------------------------------------------------------------------------------------------------------------------------
 * CUDA. The twins take the same arguments, and in place of `threads` a v2drop_cuda. All data lies in memory of the current device,
 * tables and descriptions on the host. A call checks what the host can see, enqueues on the stream and returns: it allocates nothing,
 * does not synchronise, and may be captured into a CUDA graph. Tables and descriptions are read before it returns; results are there
 * when the stream has come so far. Results do not depend on the design, the device, or what else runs: indices and copied bytes are
 * those of the CPU for equal scores; scores are summed in another fixed order and agree within float32 rounding. What only the device
 * could see is not checked: an index of `keep` outside the rows gives an empty row, duplicates in backward keep one of the two.
 * A library that was built without CUDA has these symbols too; they return V2DROP_ERROR_UNSUPPORTED. */

/* How a drop is launched. The results are the same. */
typedef enum v2drop_design {
  V2DROP_DESIGN_AUTO = 0,        /* by size and device; see csrc/core/tuning_cuda.h */
  V2DROP_DESIGN_COOPERATIVE = 1, /* one cooperative launch; V2DROP_ERROR_UNSUPPORTED where the device or the size cannot. Given scores
                                  * leave nothing to do before the gather: then it is V2DROP_DESIGN_TWO, or THREE where that says so */
  V2DROP_DESIGN_TWO = 2,         /* score; then a gather whose blocks repeat the select; up to 2048 competing rows a stretch, else three */
  V2DROP_DESIGN_THREE = 3        /* score, select, gather */
} v2drop_design;

typedef struct v2drop_cuda {
  void* stream;            /* cudaStream_t of the current device; NULL is the legacy default stream */
  void* workspace;         /* device memory, aligned to 256 bytes; neither what it holds before nor after matters. NULL will do for
                            * v2drop_variation_score_cuda, its backward, v2drop_compact_cuda and v2drop_compact_inplace_cuda */
  int64_t workspace_bytes; /* at least v2drop_workspace_bytes_cuda(...) */
  int32_t design;          /* v2drop_design */
  /* Optional: a copy of `stretches` in device memory. Without it a table that is not uniform (every batch entry one stretch, alike)
   * costs one more launch for every 128 stretches, which carries them over as kernel arguments. */
  const v2drop_stretch* stretches;
} v2drop_cuda;

/* Whether this build has CUDA kernels: a list of their architectures such as "80 86 90 100 120+ptx", or "" if there are none. */
V2DROP_API const char* v2drop_cuda_archs(void);

/* V2DROP_OK if a kernel of this build can run on the current device, else V2DROP_ERROR_UNSUPPORTED or V2DROP_ERROR_DEVICE and the
 * reason in v2drop_last_error(). */
V2DROP_API v2drop_status v2drop_cuda_available(void);

/* Device scratch memory that suffices for any call below but v2drop_attention_score_cuda with so many rows (batch * rows) and stretches;
 * `width` is the K of the results of v2drop_topk_cuda in V2DROP_ORDER_SCORE, else 0. At most 8 bytes a row + 8 a ranked result + 64 a
 * stretch + 1 KB. */
V2DROP_API int64_t v2drop_workspace_bytes_cuda(int64_t rows, int64_t n_stretches, int64_t width);

V2DROP_API v2drop_status v2drop_variation_score_cuda(const v2drop_tensor* prev, const v2drop_tensor* cur, int32_t metric, int32_t round_to,
                                                     const v2drop_tensor* scores, const v2drop_cuda* on);

V2DROP_API v2drop_status v2drop_variation_score_backward_cuda(const v2drop_tensor* grad, const v2drop_tensor* prev,
                                                              const v2drop_tensor* cur, int32_t metric, const v2drop_tensor* grad_prev,
                                                              const v2drop_tensor* grad_cur, const v2drop_cuda* on);

/* cu_seqlens (optional, INT32, contiguous, [n_stretches + 1], on the device; one batch entry): lengths that only the device knows.
 * Stretch g is then rows cu_seqlens[g] to cu_seqlens[g + 1], all competing for min(k, their number) places; of `stretches` only k is
 * used. Offsets outside the rows are clamped. */
V2DROP_API v2drop_status v2drop_topk_cuda(const v2drop_tensor* scores, const v2drop_tensor* prev, const v2drop_tensor* cur,
                                          const v2drop_tensor* mask, const v2drop_stretch* stretches, int64_t n_stretches,
                                          const v2drop_tensor* cu_seqlens, int32_t order, int32_t metric, int32_t round_to,
                                          const v2drop_tensor* values, const v2drop_tensor* indices, const v2drop_cuda* on);

/* cu_seqlens as above: what is kept lies end to end from the first row of `keep` on, the rest of its rows are empty. new_cu (INT32,
 * contiguous, [n_stretches + 1]) receives the offsets of the result; NULL where cu_seqlens is. */
V2DROP_API v2drop_status v2drop_drop_tokens_cuda(const v2drop_tensor* scores, const v2drop_tensor* prev, const v2drop_tensor* cur,
                                                 const v2drop_tensor* mask, const v2drop_stretch* stretches, int64_t n_stretches,
                                                 const v2drop_tensor* cu_seqlens, int32_t metric, int32_t round_to,
                                                 const v2drop_tensor* keep, const v2drop_tensor* new_cu, const v2drop_part* parts,
                                                 int64_t n_parts, const v2drop_cuda* on);

V2DROP_API v2drop_status v2drop_compact_cuda(const v2drop_tensor* keep, const v2drop_part* parts, int64_t n_parts, const v2drop_cuda* on);

V2DROP_API v2drop_status v2drop_compact_backward_cuda(const v2drop_tensor* keep, int64_t rows, const v2drop_part* parts, int64_t n_parts,
                                                      const v2drop_cuda* on);

V2DROP_API v2drop_status v2drop_compact_inplace_cuda(const v2drop_tensor* keep, const v2drop_part* parts, int64_t n_parts,
                                                     const v2drop_cuda* on);

/* Scratch memory for v2drop_attention_score_cuda of q [batch, heads, queries, dim] and `rows` keys: the weights of all queries up to
 * 64 MB, else of as many as fit in those, and of one at the least. With less than that the call works too, as long as it is enough for
 * one query, in more and smaller steps; the results are the same. */
V2DROP_API int64_t v2drop_attention_workspace_bytes_cuda(int64_t batch, int64_t heads, int64_t queries, int64_t rows);

/* At most 1024 heads. */
V2DROP_API v2drop_status v2drop_attention_score_cuda(const v2drop_tensor* q, const v2drop_tensor* k, const v2drop_tensor* query_rows,
                                                     const v2drop_tensor* key_mask, const v2drop_tensor* droppable, int32_t causal,
                                                     float scale, int32_t mode, int32_t heads, int32_t queries, const v2drop_tensor* scores,
                                                     const v2drop_cuda* on);

/* Both do without a workspace. */
V2DROP_API v2drop_status v2drop_key_norm_cuda(const v2drop_tensor* k, int32_t norm, const v2drop_tensor* scores, const v2drop_cuda* on);

V2DROP_API v2drop_status v2drop_cosine_to_pivots_cuda(const v2drop_tensor* x, const v2drop_tensor* pivots, const v2drop_tensor* cosines,
                                                      const v2drop_cuda* on);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* V2DROP_H_ */
