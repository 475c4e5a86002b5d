/* SPDX-License-Identifier: Apache-2.0
 *
 * The C interface of libv2drop: score tokens by how much a layer changed them, keep the best ones, and compact every tensor to the rows
 * that are kept. There is one entry point for each op. Its last argument, a v2drop_context, says where it runs: on the CPU or on an NVIDIA
 * GPU.
 *
 * Ownership   The caller owns every buffer. The library keeps no pointer after a call returns. Outputs are written into memory that the
 *             caller allocated; they must not overlap inputs or each other (only v2drop_compact_inplace works in place), which every entry
 *             point checks. The halves of one buffer, or the columns of one matrix, do not overlap.
 * Strides     In elements, 64-bit, of either sign. A stride of zero broadcasts an input. An output must not overlap itself.
 * Alignment   A tensor that is read as numbers (hidden states, scores, indices, masks, gradients) is aligned to its element. Gathered
 * tensors are moved as bytes and need no alignment; 64-byte alignment of a destination is fastest. Threads     Every entry point may be
 * called from several threads at once. On the CPU a call uses up to `threads` threads of the context, the caller's included; small calls
 * use fewer. Results are bit-identical for any number of threads. The library may be loaded before fork(): the child process starts its own
 * worker threads when it needs them. Arithmetic  On the CPU sums are float32, for cosine float64, in one fixed order, without fused
 * multiply-add, so all instruction sets give the same bits. The environment variable V2DROP_ISA=baseline|avx2|avx512|avx512bf16 limits the
 * instruction set; it is read once, by the first call. See v2drop_isa(). Errors      Every entry point checks its arguments first and
 * returns a status. It does not throw, print, exit or crash on an invalid argument. v2drop_last_error() returns the message of the calling
 * thread's last failure; it begins with the name of the argument. After V2DROP_ERROR_ARGUMENT no output has been written. CUDA        With
 * a context whose place is V2DROP_CUDA, all data lies in memory of the current device; segments and descriptions of tensors lie on the
 * host. A call checks what the host can see, enqueues its work on the stream and returns: it allocates nothing, does not synchronise, and
 * may be captured into a CUDA graph. Segments and descriptions are read before it returns; results are available when the stream has
 * reached that point. Results do not depend on the launch mode, on the device or on other work: indices and copied bytes equal those of the
 * CPU for equal scores; scores are summed in another fixed order and agree within float32 rounding. What only the device can see is not
 * checked: an index of `keep` outside the rows gives an empty row, and of duplicates in v2drop_compact_backward one is kept. A library that
 * was built without CUDA returns V2DROP_ERROR_UNSUPPORTED for such a context.
 *
 * Compatibility within a major version
 *   - Enumerators keep their values, functions their signatures, and structs the offsets of their fields. New ones may be added.
 *   - v2drop_tensor, v2drop_segment and v2drop_gather, which are passed in arrays, do not change.
 *   - v2drop_source and v2drop_context, which are passed by pointer, may grow at the end. Their first field is the size of the struct that
 *     the caller was compiled with, so initialise them with V2DROP_SOURCE_INIT and V2DROP_CONTEXT_INIT (or set `size` and clear the
 *     rest). The library takes fields beyond that size as zero, which always means the behaviour of the version before the field was
 *     added. A newer caller may pass a larger struct to an older library, which accepts it if the part it does not know is zero and
 *     otherwise returns V2DROP_ERROR_UNSUPPORTED.
 */
#ifndef V2DROP_H_
#define V2DROP_H_

#include <stddef.h>
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
  V2DROP_ERROR_ARGUMENT = 1,    /* an argument is invalid; the message names it */
  V2DROP_ERROR_MEMORY = 2,      /* no memory for scratch space */
  V2DROP_ERROR_INTERNAL = 3,    /* a bug in the library */
  V2DROP_ERROR_UNSUPPORTED = 4, /* this build has no CUDA, there is no such device, or the request needs a newer library */
  V2DROP_ERROR_DEVICE = 5       /* the CUDA runtime reports an error; the message is its own */
} v2drop_status;

typedef enum v2drop_dtype {
  V2DROP_FLOAT32 = 0,
  V2DROP_FLOAT16 = 1,
  V2DROP_BFLOAT16 = 2,
  V2DROP_INT64 = 3,
  V2DROP_BOOL = 4, /* one byte, 0 is false */
  /* Any other dtype is moved but never interpreted: only its size counts. */
  V2DROP_BITS8 = 5,
  V2DROP_BITS16 = 6,
  V2DROP_BITS32 = 7,
  V2DROP_BITS64 = 8,
  V2DROP_BITS128 = 9,
  V2DROP_INT32 = 10,
  V2DROP_FLOAT64 = 11 /* interpreted by v2drop_topk on the CPU only */
} v2drop_dtype;

typedef enum v2drop_metric {
  V2DROP_L2 = 0,    /* sqrt(sum (cur - prev)^2) */
  V2DROP_L1 = 1,    /* sum |cur - prev| */
  V2DROP_COSINE = 2 /* 1 - cos(prev, cur); 1 where either is zero */
} v2drop_metric;

typedef enum v2drop_order {
  V2DROP_ORDER_POSITION = 0, /* indices ascend */
  V2DROP_ORDER_SCORE = 1     /* scores descend, equal scores by ascending index */
} v2drop_order;

/* The weight of a key for a query: its softmax probability among the visible keys, or its scaled product with the query. */
typedef enum v2drop_mode { V2DROP_SOFTMAX = 0, V2DROP_DOT = 1 } v2drop_mode;

/* The reduction over heads. A number n > 0 instead of an enumerator is the mean over n heads, chosen for every query: those whose weights
 * on droppable rows have the largest sum (NaN first; equal sums: the lower head). */
typedef enum v2drop_heads { V2DROP_HEADS_MEAN = 0, V2DROP_HEADS_SUM = -1, V2DROP_HEADS_MAX = -2 } v2drop_heads;

/* The reduction over the queries of an item: the mean, or the square root of the sum of squares. */
typedef enum v2drop_queries { V2DROP_QUERIES_MEAN = 0, V2DROP_QUERIES_L2 = 1 } v2drop_queries;

/* Where equal scores of v2drop_soft_topk stand: by index, or all at the highest of their ranks. */
typedef enum v2drop_ties { V2DROP_TIES_INDEX = 0, V2DROP_TIES_RELEASED = 1 } v2drop_ties;

/* The output rows of v2drop_bipartite_pairs: as in the input, or as in ToMe's code: the protected rows, the even ones that stayed (by
 * descending cosine where no row is protected), the odd ones. */
typedef enum v2drop_merged_order { V2DROP_MERGED_POSITION = 0, V2DROP_MERGED_RELEASED = 1 } v2drop_merged_order;

typedef enum v2drop_place { V2DROP_CPU = 0, V2DROP_CUDA = 1 } v2drop_place;

/* How v2drop_drop_tokens is launched on CUDA, and by the last three also how v2drop_topk selects. The results are the same. */
typedef enum v2drop_launch_mode {
  V2DROP_LAUNCH_AUTO = 0, /* by size and device */
  V2DROP_LAUNCH_COOPERATIVE =
      1, /* one cooperative launch; V2DROP_ERROR_UNSUPPORTED where the device or the size does not allow it. With given
          * scores nothing precedes the gather: then it is V2DROP_LAUNCH_FUSED, or SEPARATE where that applies */
  V2DROP_LAUNCH_FUSED =
      2, /* score; then a gather whose blocks repeat the selection; up to 2048 competing rows in a segment, else separate */
  V2DROP_LAUNCH_SEPARATE = 3, /* score, select, gather */
  /* The same, and who selects from a segment of more than 2048 competing rows: one block, a thread-block cluster of 8, or up to 16 blocks
   * of a cooperative launch; V2DROP_ERROR_UNSUPPORTED where the device or the number of segments does not allow it. */
  V2DROP_LAUNCH_ONE_BLOCK = 4,
  V2DROP_LAUNCH_CLUSTER = 5,
  V2DROP_LAUNCH_GRID = 6
} v2drop_launch_mode;

#define V2DROP_MAX_DIMS 8

/* A strided view. `data` may be NULL when an extent is zero. */
typedef struct v2drop_tensor {
  void* data;
  int32_t dtype; /* v2drop_dtype */
  int32_t ndim;
  int64_t shape[V2DROP_MAX_DIMS];
  int64_t stride[V2DROP_MAX_DIMS]; /* in elements */
} v2drop_tensor;

/* A contiguous run of input rows inside one batch entry, and the output rows that it gives. Rows are numbered through the batch: entry *
 * rows + position. The input is n_prefix + n + n_suffix rows from src_start on; the output is pad_before + n_prefix + k + n_suffix +
 * pad_after rows from dst_start on: empty rows, the prefix, the k survivors by position, the suffix, empty rows. */
typedef struct v2drop_segment {
  int64_t src_start;  /* first input row */
  int64_t n_prefix;   /* rows at the start that are always kept */
  int64_t n;          /* rows that compete */
  int64_t n_suffix;   /* rows at the end that are always kept */
  int64_t k;          /* how many of the n are kept */
  int64_t dst_start;  /* first output row */
  int64_t pad_before; /* empty output rows at the start */
  int64_t pad_after;  /* empty output rows at the end */
} v2drop_segment;

/* One tensor to compact. Dimension `row_dim` of src has as many rows as the hidden states, and that of dst as many as `keep`; all other
 * extents of src and dst agree. `batch_dim` is another dimension, or -1 when there is none (a packed or shared tensor; `keep` then has one
 * entry). `fill` holds the bits written to every element of an empty row: its low bytes, so any two's complement integer may be given as it
 * is. */
typedef struct v2drop_gather {
  v2drop_tensor src, dst;
  int32_t batch_dim, row_dim;
  int64_t fill;
} v2drop_gather;

/* What rows are ranked by: either `scores` (a float dtype, [batch, rows] or [rows]), or `prev` and `cur`, the hidden states before and
 * after a layer ([batch, rows, dim] or [rows, dim], one float dtype, stride[dim] == 1), from which scores are computed. */
typedef struct v2drop_source {
  size_t size; /* sizeof(v2drop_source) */
  const v2drop_tensor* scores;
  const v2drop_tensor* prev;
  const v2drop_tensor* cur;
  const v2drop_tensor* mask; /* optional, BOOL, shaped like the scores; each function says what it does */
  int32_t metric;            /* v2drop_metric; ignored when scores are given */
  int32_t score_dtype; /* V2DROP_FLOAT32 (no rounding), or a 16-bit float to which the differences of l2 and l1 and every final score are
                        * rounded, half to even, as arithmetic in that dtype would; ignored when scores are given */
} v2drop_source;
#define V2DROP_SOURCE_INIT {sizeof(v2drop_source), NULL, NULL, NULL, NULL, V2DROP_L2, V2DROP_FLOAT32}

/* Where and how a call runs. A NULL context is the CPU with all threads, as is a V2DROP_CONTEXT_INIT. */
typedef struct v2drop_context {
  size_t size;         /* sizeof(v2drop_context) */
  int32_t place;       /* v2drop_place; the other fields hold for one of them */
  int32_t threads;     /* CPU: threads that the call may use; 0 is all */
  int32_t launch_mode; /* CUDA: v2drop_launch_mode */
  int32_t reserved;    /* 0 */
  void* stream;        /* CUDA: cudaStream_t of the current device; NULL is the legacy default stream */
  void* workspace;     /* CUDA: scratch memory on the device, aligned to 256 bytes, of any content. NULL will do where a call needs none:
                        * v2drop_variation_score and its backward, v2drop_compact, v2drop_compact_inplace, v2drop_key_norm and
                        * v2drop_cosine_to_pivots */
  int64_t workspace_bytes; /* CUDA: at least v2drop_workspace_bytes(...), or v2drop_attention_workspace_bytes(...) */
  /* CUDA, optional: a copy of the segments in device memory, such as v2drop_upload makes. Without it, segments that are not uniform (every
   * batch entry one segment, all alike) cost one more launch for every 128 of them, which carries them over as kernel arguments. */
  const v2drop_segment* device_segments;
} v2drop_context;
#define V2DROP_CONTEXT_INIT {sizeof(v2drop_context), V2DROP_CPU, 0, V2DROP_LAUNCH_AUTO, 0, NULL, NULL, 0, NULL}

/* The version of the library that is running, as V2DROP_VERSION encodes it. */
V2DROP_API int32_t v2drop_version(void);

/* The instruction set in use on the CPU: "avx512bf16", "avx512", "avx2" or "baseline". */
V2DROP_API const char* v2drop_isa(void);

/* The message of this thread's last failure; "" if there was none. Valid until this thread's next failure. */
V2DROP_API const char* v2drop_last_error(void);

/* The architectures that this build has CUDA kernels for, such as "80 86 90 100 120+ptx"; "" if there are none. */
V2DROP_API const char* v2drop_cuda_archs(void);

/* V2DROP_OK if a kernel of this build can run on the current device, else V2DROP_ERROR_UNSUPPORTED or V2DROP_ERROR_DEVICE, with the reason
 * in v2drop_last_error(). */
V2DROP_API v2drop_status v2drop_cuda_available(void);

/* Device scratch memory that suffices on CUDA for any call but v2drop_attention_score with so many rows (batch * rows) and segments;
 * `width` is the K of the results of v2drop_topk in V2DROP_ORDER_SCORE, else 0. At most 8 bytes a row + 8 a ranked result + 64 a segment +
 * 1 KB. 0 in a build without CUDA. */
V2DROP_API int64_t v2drop_workspace_bytes(int64_t rows, int64_t n_segments, int64_t width);

/* Device scratch memory for v2drop_attention_score on CUDA, of q [batch, heads, queries, dim] and `rows` keys: the weights of all queries
 * up to 64 MB, else of as many queries as fit in that, and of one at the least. With less the call works too, as long as it is enough for
 * one query, in more and smaller steps; the results are the same. 0 in a build without CUDA. */
V2DROP_API int64_t v2drop_attention_workspace_bytes(int64_t batch, int64_t heads, int64_t queries, int64_t rows);

/* In all functions below an optional argument may be NULL. */

/* scores: float32, [batch, rows] or [rows]. `source` gives prev and cur, and neither scores nor mask. */
V2DROP_API v2drop_status v2drop_variation_score(const v2drop_source* source, const v2drop_tensor* scores, const v2drop_context* context);

/* The gradient of v2drop_variation_score without rounding: score_dtype is ignored. grad: float32, shaped like the scores. grad_prev and
 * grad_cur: shape and dtype of prev, stride[dim] == 1; NULL for one that is not wanted. The subgradient where a score is not differentiable
 * is zero. */
V2DROP_API v2drop_status v2drop_variation_score_backward(const v2drop_tensor* grad, const v2drop_source* source,
                                                         const v2drop_tensor* grad_prev, const v2drop_tensor* grad_cur,
                                                         const v2drop_context* context);

/* The k best of the n competing rows of every segment, by (score descending, index ascending); NaN ranks above +inf, -0.0 equals 0.0. Rows
 * where the mask of the source is false are never returned. values [n_segments, K]: dtype of the given scores, else float32. indices
 * [n_segments, K]: INT64, positions inside the batch entry. Both contiguous, K >= every k; places left over hold -inf and -1. Of a segment
 * only src_start, n_prefix, n and k are used. cu_seqlens (optional, CUDA only; INT32, contiguous, [n_segments + 1], on the device; one
 * batch entry): lengths that only the device knows. Segment g is then rows cu_seqlens[g] to cu_seqlens[g + 1], all competing for min(k,
 * their number) places; of the segments only k is used. Offsets outside the rows are clamped. On the CPU the scores may also be FLOAT64. */
V2DROP_API v2drop_status v2drop_topk(const v2drop_source* source, const v2drop_segment* segments, int64_t n_segments,
                                     const v2drop_tensor* cu_seqlens, int32_t order, const v2drop_tensor* values,
                                     const v2drop_tensor* indices, const v2drop_context* context);

/* The whole step: score, select, and compact every tensor. keep (out): INT64, contiguous, [batch, out_rows] or [out_rows]; the positions
 * that survive, ascending, -1 in empty rows. Rows where the mask of the source is false are kept without competing, and k counts them. The
 * segments, in order, tile the output rows without gaps, and each stays inside one batch entry of both input and output. cu_seqlens
 * (optional, CUDA only) as in v2drop_topk, without a mask: what is kept lies end to end from the first row of `keep` on, and the rest of
 * its rows are empty. new_cu (out, INT32, contiguous, [n_segments + 1]) receives the offsets of the result; NULL where cu_seqlens is. */
V2DROP_API v2drop_status v2drop_drop_tokens(const v2drop_source* source, const v2drop_segment* segments, int64_t n_segments,
                                            const v2drop_tensor* cu_seqlens, const v2drop_tensor* keep, const v2drop_tensor* new_cu,
                                            const v2drop_gather* gathers, int64_t n_gathers, const v2drop_context* context);

/* dst[.., i, ..] = src[.., keep[i], ..] for every gather, its fill where keep[i] is negative. keep: INT64, contiguous, [batch, out_rows] or
 * [out_rows], in any order; an index that is not less than the rows of a tensor is an error. */
V2DROP_API v2drop_status v2drop_compact(const v2drop_tensor* keep, const v2drop_gather* gathers, int64_t n_gathers,
                                        const v2drop_context* context);

/* The transpose of v2drop_compact: src has the out_rows of keep, dst the `rows` of the input; dst[.., keep[i], ..] = src[.., i, ..], and
 * the fill in rows that were not kept. An index that occurs twice in an entry of keep is an error. */
V2DROP_API v2drop_status v2drop_compact_backward(const v2drop_tensor* keep, int64_t rows, const v2drop_gather* gathers, int64_t n_gathers,
                                                 const v2drop_context* context);

/* The same as v2drop_compact inside `src`: the rows at the non-negative entries of keep, which must ascend strictly within each batch
 * entry, move to the front of row_dim; later rows keep their content. dst and fill are ignored; src must not overlap itself. */
V2DROP_API v2drop_status v2drop_compact_inplace(const v2drop_tensor* keep, const v2drop_gather* gathers, int64_t n_gathers,
                                                const v2drop_context* context);

/* How much attention the queries pay to each key: q [batch, heads, queries, dim] and k [batch, kv_heads, rows, dim] of one float dtype,
 * stride[dim] == 1, heads a multiple of kv_heads (on CUDA at most 1024); head h reads the keys of kv_head h / (heads / kv_heads).
 * query_rows (INT64, [batch, queries]): the row of a query among the keys, negative where there is no query. key_mask (optional, BOOL,
 * [batch, rows]): keys where it is false are invisible. causal: so are those after the row of the query. droppable (optional, BOOL, [batch,
 * rows]): rows where it is false score 0. The products are multiplied by `scale`; mode is a v2drop_mode, heads a v2drop_heads, queries a
 * v2drop_queries. Invisible keys weigh 0; so does everything for a query that sees no key, and where there are no queries; the mean is over
 * the queries that exist. scores: float32, [batch, rows]. The keys are read once for every 64 MB of float32 weights, or once for every
 * query where its weights alone are more; on the CPU that is also the scratch memory. */
V2DROP_API v2drop_status v2drop_attention_score(const v2drop_tensor* q, const v2drop_tensor* k, const v2drop_tensor* query_rows,
                                                const v2drop_tensor* key_mask, const v2drop_tensor* droppable, int32_t causal, float scale,
                                                int32_t mode, int32_t heads, int32_t queries, const v2drop_tensor* scores,
                                                const v2drop_context* context);

/* The norm (V2DROP_L2 or V2DROP_L1) of a row of k [batch, kv_heads, rows, dim] over its heads and dim together; stride[dim] == 1. scores:
 * float32, [batch, rows]. */
V2DROP_API v2drop_status v2drop_key_norm(const v2drop_tensor* k, int32_t norm, const v2drop_tensor* scores, const v2drop_context* context);

/* The cosine of every row of x [batch, rows, dim] with some of them: pivots (INT64, [batch, n]), where a number outside the rows is no
 * pivot. cosines: float32, [batch, n, rows], stride[rows] == 1; 0 where either row is zero, or there is no pivot. The batch dimension of
 * all three may be left out together. */
V2DROP_API v2drop_status v2drop_cosine_to_pivots(const v2drop_tensor* x, const v2drop_tensor* pivots, const v2drop_tensor* cosines,
                                                 const v2drop_context* context);

/* out[b, k] = the sum over e from offsets[b, k] to offsets[b, k + 1] of weights[b, e] * x[b, rows[b, e]]; `mean` divides it by the sum of
 * these weights, and gives 0 where that is 0. x [batch, rows, dim], stride[dim] == 1; out [batch, targets, dim] of its dtype, stride[dim]
 * == 1; offsets (INT64, [batch, targets + 1]), rows (INT64, [batch, edges]) and weights (optional: 1; float32, [batch, edges]) contiguous.
 * The sum is float32, in the order of the edges. On the CPU, offsets that do not ascend within the edges and used edges from outside the
 * rows are an error; on CUDA nothing outside is read, and such an edge adds nothing. */
V2DROP_API v2drop_status v2drop_weighted_merge(const v2drop_tensor* x, const v2drop_tensor* offsets, const v2drop_tensor* rows,
                                               const v2drop_tensor* weights, int32_t mean, const v2drop_tensor* out,
                                               const v2drop_context* context);

/* The gradients of v2drop_weighted_merge. grad: like its out. grad_x: like x, and grad_weights: float32, contiguous, [batch, edges]; NULL
 * for one that is not wanted. On CUDA grad_x needs the edges by source row: back_edges (INT64, contiguous, [batch, edges]) are the numbers
 * of the edges, those of row n from back_offsets[b, n] to back_offsets[b, n + 1] (INT64, contiguous, [batch, rows + 1]), and a workspace of
 * 8 bytes an edge + 512; on the CPU both are NULL. Deterministic: no atomics. */
V2DROP_API v2drop_status v2drop_weighted_merge_backward(const v2drop_tensor* grad, const v2drop_tensor* x, const v2drop_tensor* offsets,
                                                        const v2drop_tensor* rows, const v2drop_tensor* weights, int32_t mean,
                                                        const v2drop_tensor* back_offsets, const v2drop_tensor* back_edges,
                                                        const v2drop_tensor* grad_x, const v2drop_tensor* grad_weights,
                                                        const v2drop_context* context);

/* Which pairs of rows bipartite_merge (ToMe) merges, on the CPU only: rows 0, 2, ... of features [batch, rows, dim], stride[dim] == 1, are
 * compared by cosine with rows 1, 3, ..., and the `merged` most similar even rows (the lower of equals first) each go to their most similar
 * odd row (the lowest of equals). merged: at most (rows - protected_rows) / 2; the first protected_rows take no part. order: a
 * v2drop_merged_order. All results INT64 and contiguous: keep [batch, rows - merged], the input row that each output row was; row [batch,
 * rows], the output row of each input row; offsets [batch, rows - merged + 1] and edges [batch, rows], the lists of v2drop_weighted_merge.
 */
V2DROP_API v2drop_status v2drop_bipartite_pairs(const v2drop_tensor* features, int64_t merged, int64_t protected_rows, int32_t order,
                                                const v2drop_tensor* keep, const v2drop_tensor* row, const v2drop_tensor* offsets,
                                                const v2drop_tensor* edges, const v2drop_context* context);

/* The differentiable top-k of HiDivDrop, on the CPU only. Of n valid scores (a float dtype, [batch, rows]) the one in place s of the order
 * of v2drop_topk has the normalised rank (n - s) / n, and the soft mask is sigmoid(temperature * (rank - ratio)); temperature 0 stands for
 * n. ratio: float32, [batch] or [1]. valid (optional, BOOL, [batch, rows]): the mask of other rows is 0. hard: 0 and 1 instead, by `ties`,
 * a v2drop_ties: the round((1 - ratio) n) first (half to even), or those whose rank exceeds the ratio, where equal scores share the highest
 * of their ranks. mask, slope (optional: the derivative of the soft mask in the rank): float32, and order (optional: the rows in that
 * order, those that are not valid last): INT64; all contiguous, [batch, rows]. */
V2DROP_API v2drop_status v2drop_soft_topk(const v2drop_tensor* scores, const v2drop_tensor* ratio, const v2drop_tensor* valid,
                                          float temperature, int32_t ties, int32_t hard, const v2drop_tensor* mask,
                                          const v2drop_tensor* slope, const v2drop_tensor* order, const v2drop_context* context);

/* The gradient of v2drop_soft_topk in the scores, by the nearest neighbours in rank, from its slope and order; on the CPU only. grad and
 * grad_scores: float32, contiguous, [batch, rows]. */
V2DROP_API v2drop_status v2drop_soft_topk_backward(const v2drop_tensor* grad, const v2drop_tensor* slope, const v2drop_tensor* scores,
                                                   const v2drop_tensor* order, const v2drop_tensor* valid, const v2drop_tensor* grad_scores,
                                                   const v2drop_context* context);

/* Random numbers in [0, 1), multiples of 2^-24, the same everywhere: scores (float32, contiguous, [batch, rows]). Column j is word j % 4 of
 * Philox4x32-10 with the counter (j / 4, item) and the key `seed`, 64 bits each, the low word first, without its 8 low bits. item: that of
 * item_seeds (optional, INT64, [batch]), or the number of the entry. */
V2DROP_API v2drop_status v2drop_random_score(int64_t seed, const v2drop_tensor* item_seeds, const v2drop_tensor* scores,
                                             const v2drop_context* context);

/* to[i] = values[i]. values: INT64, contiguous, [n], on the host wherever the call runs; to: INT64 or INT32 (which takes the low 32 bits),
 * contiguous, [n]. On CUDA the numbers travel as kernel arguments, 1024 a launch: nothing synchronises, the caller may change `values` once
 * the call has returned, and a captured graph writes the same numbers again whenever it is replayed. */
V2DROP_API v2drop_status v2drop_upload(const v2drop_tensor* values, const v2drop_tensor* to, const v2drop_context* context);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* V2DROP_H_ */
