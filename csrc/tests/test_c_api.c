/* SPDX-License-Identifier: Apache-2.0
 *
 * A C99 user of the header: small examples with known results, and every kind of invalid argument, which must come back as a status whose
 * message begins with the name of the argument. Everything runs on the CPU and, where the kernels are emulated (so that host memory serves
 * as device memory), on CUDA. In other builds a call on CUDA must return that it is not supported. */
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "v2drop/v2drop.h"

static int failures = 0;

static void check(int ok, int line, const char* what) {
  if (ok) return;
  printf("line %d: %s (last error: %s)\n", line, what, v2drop_last_error());
  ++failures;
}
#define CHECK(condition) check((condition) != 0, __LINE__, #condition)
#define OK(call) CHECK((call) == V2DROP_OK)
#define BAD(name, call)                                                                                  \
  do {                                                                                                   \
    check((call) == V2DROP_ERROR_ARGUMENT, __LINE__, #call);                                             \
    check(!strncmp(v2drop_last_error(), name, strlen(name)), __LINE__, "the message begins with " name); \
  } while (0)

/* Four rows of two: the changes are 3, 1, 5 and 5. */
static float prev_data[8] = {0, 0, 0, 0, 0, 0, 0, 0};
static float cur_data[8] = {3, 0, 0, 1, 3, 4, 4, -3};
static float out_data[6], score_data[4];
static int64_t keep_data[3], ids_data[4], out_ids[3];
static unsigned char mask_data[4] = {1, 0, 1, 1};

/* Where the calls of the tests run. */
static v2drop_context context = V2DROP_CONTEXT_INIT;
static union {
  char bytes[1 << 14];
  long double align;
} memory;

static v2drop_source source_of(const v2drop_tensor* scores, const v2drop_tensor* prev, const v2drop_tensor* cur, const v2drop_tensor* mask,
                               int32_t metric, int32_t score_dtype) {
  v2drop_source source = V2DROP_SOURCE_INIT;
  source.scores = scores;
  source.prev = prev;
  source.cur = cur;
  source.mask = mask;
  source.metric = metric;
  source.score_dtype = score_dtype;
  return source;
}

static v2drop_status score(const v2drop_tensor* prev, const v2drop_tensor* cur, int32_t metric, int32_t score_dtype,
                           const v2drop_tensor* scores) {
  const v2drop_source source = source_of(NULL, prev, cur, NULL, metric, score_dtype);
  return v2drop_variation_score(&source, scores, &context);
}
static v2drop_status score_backward(const v2drop_tensor* grad, const v2drop_tensor* prev, const v2drop_tensor* cur, int32_t metric,
                                    const v2drop_tensor* grad_prev, const v2drop_tensor* grad_cur) {
  const v2drop_source source = source_of(NULL, prev, cur, NULL, metric, V2DROP_FLOAT32);
  return v2drop_variation_score_backward(grad, &source, grad_prev, grad_cur, &context);
}
static v2drop_status topk(const v2drop_tensor* scores, const v2drop_tensor* prev, const v2drop_tensor* cur, const v2drop_tensor* mask,
                          const v2drop_segment* segments, int64_t n_segments, int32_t order, int32_t metric, int32_t score_dtype,
                          const v2drop_tensor* values, const v2drop_tensor* indices) {
  const v2drop_source source = source_of(scores, prev, cur, mask, metric, score_dtype);
  return v2drop_topk(&source, segments, n_segments, NULL, order, values, indices, &context);
}
static v2drop_status drop(const v2drop_tensor* scores, const v2drop_tensor* prev, const v2drop_tensor* cur, const v2drop_tensor* mask,
                          const v2drop_segment* segments, int64_t n_segments, int32_t metric, int32_t score_dtype,
                          const v2drop_tensor* keep, const v2drop_gather* gathers, int64_t n_gathers) {
  const v2drop_source source = source_of(scores, prev, cur, mask, metric, score_dtype);
  return v2drop_drop_tokens(&source, segments, n_segments, NULL, keep, NULL, gathers, n_gathers, &context);
}
static v2drop_status compact(const v2drop_tensor* keep, const v2drop_gather* gathers, int64_t n_gathers) {
  return v2drop_compact(keep, gathers, n_gathers, &context);
}
static v2drop_status compact_backward(const v2drop_tensor* keep, int64_t rows, const v2drop_gather* gathers, int64_t n_gathers) {
  return v2drop_compact_backward(keep, rows, gathers, n_gathers, &context);
}
static v2drop_status compact_inplace(const v2drop_tensor* keep, const v2drop_gather* gathers, int64_t n_gathers) {
  return v2drop_compact_inplace(keep, gathers, n_gathers, &context);
}
static v2drop_status attention(const v2drop_tensor* q, const v2drop_tensor* k, const v2drop_tensor* query_rows,
                               const v2drop_tensor* key_mask, const v2drop_tensor* droppable, int32_t causal, int32_t mode, int32_t heads,
                               int32_t queries, const v2drop_tensor* scores) {
  return v2drop_attention_score(q, k, query_rows, key_mask, droppable, causal, 1.0f, mode, heads, queries, scores, &context);
}
static v2drop_status key_norm(const v2drop_tensor* k, int32_t norm, const v2drop_tensor* scores) {
  return v2drop_key_norm(k, norm, scores, &context);
}
static v2drop_status cosines(const v2drop_tensor* x, const v2drop_tensor* pivots, const v2drop_tensor* to) {
  return v2drop_cosine_to_pivots(x, pivots, to, &context);
}

static v2drop_tensor tensor(void* data, int32_t dtype, int64_t rows, int64_t dim) {
  v2drop_tensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.dtype = dtype;
  t.ndim = dim ? 2 : 1;
  t.shape[0] = rows;
  t.shape[1] = dim;
  t.stride[0] = dim ? dim : 1;
  t.stride[1] = 1;
  return t;
}

static void test_answers(void) {
  v2drop_tensor prev = tensor(prev_data, V2DROP_FLOAT32, 4, 2), cur = tensor(cur_data, V2DROP_FLOAT32, 4, 2);
  v2drop_tensor scores = tensor(score_data, V2DROP_FLOAT32, 4, 0), keep = tensor(keep_data, V2DROP_INT64, 3, 0);
  v2drop_tensor mask = tensor(mask_data, V2DROP_BOOL, 4, 0);
  v2drop_segment one = {0, 0, 4, 0, 2, 0, 0, 1}, forced = {0, 0, 4, 0, 3, 0, 0, 0}, top = {0, 0, 4, 0, 3, 0, 0, 0};
  v2drop_gather gathers[2];
  float values[3];
  int64_t indices[3], again[1] = {2}, row;
  v2drop_tensor v = tensor(values, V2DROP_FLOAT32, 1, 3), i = tensor(indices, V2DROP_INT64, 1, 3), k1 = tensor(again, V2DROP_INT64, 1, 0);

  for (row = 0; row < 4; ++row) ids_data[row] = 10 + row;
  OK(score(&prev, &cur, V2DROP_L2, V2DROP_FLOAT32, &scores));
  CHECK(score_data[0] == 3 && score_data[1] == 1 && score_data[2] == 5 && score_data[3] == 5);

  gathers[0].src = cur;
  gathers[0].dst = tensor(out_data, V2DROP_FLOAT32, 3, 2);
  gathers[1].src = tensor(ids_data, V2DROP_INT64, 4, 0);
  gathers[1].dst = tensor(out_ids, V2DROP_INT64, 3, 0);
  gathers[0].batch_dim = gathers[1].batch_dim = -1;
  gathers[0].row_dim = gathers[1].row_dim = 0;
  gathers[0].fill = 0;
  gathers[1].fill = -100;
  OK(drop(NULL, &prev, &cur, NULL, &one, 1, V2DROP_L2, V2DROP_FLOAT32, &keep, gathers, 2));
  CHECK(keep_data[0] == 2 && keep_data[1] == 3 && keep_data[2] == -1);
  CHECK(out_ids[0] == 12 && out_ids[1] == 13 && out_ids[2] == -100);
  CHECK(out_data[0] == 3 && out_data[1] == 4 && out_data[2] == 4 && out_data[3] == -3 && out_data[4] == 0 && out_data[5] == 0);

  OK(drop(NULL, &prev, &cur, &mask, &forced, 1, V2DROP_L1, V2DROP_FLOAT32, &keep, gathers, 2));
  CHECK(keep_data[0] == 1 && keep_data[1] == 2 && keep_data[2] == 3);

  OK(drop(&scores, NULL, NULL, NULL, &one, 1, 0, 0, &keep, gathers, 2));
  CHECK(keep_data[0] == 2 && keep_data[1] == 3 && keep_data[2] == -1);
  OK(drop(&scores, NULL, NULL, &mask, &forced, 1, 0, 0, &keep, gathers, 2));
  CHECK(keep_data[0] == 1 && keep_data[1] == 2 && keep_data[2] == 3);

  OK(topk(&scores, NULL, NULL, &mask, &top, 1, V2DROP_ORDER_SCORE, 0, 0, &v, &i));
  CHECK(indices[0] == 2 && indices[1] == 3 && indices[2] == 0 && values[2] == 3);
  top.k = 1;
  OK(topk(NULL, &prev, &cur, NULL, &top, 1, V2DROP_ORDER_POSITION, V2DROP_L2, V2DROP_FLOAT32, &v, &i));
  CHECK(indices[0] == 2 && indices[1] == -1 && values[0] == 5 && values[1] == -INFINITY);

  OK(compact_backward(&keep, 4, &(v2drop_gather){gathers[1].dst, gathers[1].src, -1, 0, -1}, 1));
  CHECK(ids_data[0] == -1 && ids_data[1] == 11 && ids_data[2] == 12 && ids_data[3] == 13);
  OK(compact_inplace(&k1, &gathers[1], 1));
  CHECK(ids_data[0] == 12 && ids_data[1] == 11);
}

/* [rows, batch, dim]: the batch dimension comes after the rows, and what is contiguous behind a row spans several entries. */
static void test_batch_behind_rows(void) {
  int64_t rows[2][2] = {{0, 2}, {1, -1}}, from[3][2][2], to[2][2][2], back[3][2][2];
  const v2drop_tensor keep = {rows, V2DROP_INT64, 2, {2, 2}, {2, 1}};
  v2drop_gather gather = {{from, V2DROP_INT64, 3, {3, 2, 2}, {4, 2, 1}}, {to, V2DROP_INT64, 3, {2, 2, 2}, {4, 2, 1}}, 1, 0, -7};
  const v2drop_gather transposed = {gather.dst, {back, V2DROP_INT64, 3, {3, 2, 2}, {4, 2, 1}}, 1, 0, -9};
  int r, b, d;
  for (r = 0; r < 3; ++r) {
    for (b = 0; b < 2; ++b) {
      for (d = 0; d < 2; ++d) from[r][b][d] = 100 * r + 10 * b + d;
    }
  }
  OK(compact(&keep, &gather, 1));
  OK(compact_backward(&keep, 3, &transposed, 1));
  for (d = 0; d < 2; ++d) {
    CHECK(to[0][0][d] == d && to[1][0][d] == 200 + d && to[0][1][d] == 110 + d && to[1][1][d] == -7);
    CHECK(back[0][0][d] == d && back[1][0][d] == -9 && back[2][0][d] == 200 + d);
    CHECK(back[0][1][d] == -9 && back[1][1][d] == 110 + d && back[2][1][d] == -9);
  }
  /* Without a last dimension a row is one element in either layout. */
  gather.src.ndim = gather.dst.ndim = 2;
  memset(to, 0, sizeof to);
  OK(compact(&keep, &gather, 1));
  CHECK(to[0][0][0] == 0 && to[1][0][0] == 200 && to[0][1][0] == 110 && to[1][1][0] == -7);
  gather.src.ndim = gather.dst.ndim = 3;
  OK(compact_inplace(&keep, &gather, 1));
  for (d = 0; d < 2; ++d) CHECK(from[0][0][d] == d && from[1][0][d] == 200 + d && from[0][1][d] == 110 + d && from[1][1][d] == 110 + d);
}

/* [1, heads, rows, dim] */
static v2drop_tensor heads_of(float* data, int64_t heads, int64_t rows, int64_t dim) {
  v2drop_tensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.ndim = 4;
  t.shape[0] = 1, t.shape[1] = heads, t.shape[2] = rows, t.shape[3] = dim;
  t.stride[0] = heads * rows * dim, t.stride[1] = rows * dim, t.stride[2] = dim, t.stride[3] = 1;
  return t;
}

/* Four keys of one head, two query heads with two queries each, of which the second is not there. */
static float key_data[8] = {1, 0, 0, 1, 1, 0, 5, 5}, query_data[8] = {2, 0, 9, 9, 0, 0, 9, 9};
static int64_t row_data[2] = {2, -1}, pivot_data[2] = {3, -1};

static void test_attention(void) {
  const v2drop_tensor k = heads_of(key_data, 1, 4, 2), q = heads_of(query_data, 2, 2, 2), scores = tensor(score_data, V2DROP_FLOAT32, 4, 0);
  const v2drop_tensor rows = tensor(row_data, V2DROP_INT64, 2, 0), mask = tensor(mask_data, V2DROP_BOOL, 4, 0);
  const v2drop_tensor pivots = tensor(pivot_data, V2DROP_INT64, 2, 0), x = tensor(key_data, V2DROP_FLOAT32, 4, 2);
  const double e = exp(2.0), all = 2 * e + 1;
  float found[8];
  v2drop_tensor to = tensor(found, V2DROP_FLOAT32, 2, 4), t;
  OK(attention(&q, &k, &rows, NULL, NULL, 1, V2DROP_SOFTMAX, V2DROP_HEADS_MEAN, V2DROP_QUERIES_MEAN, &scores));
  CHECK(fabs(score_data[0] - (e / all + 1.0 / 3) / 2) < 1e-6 && fabs(score_data[1] - (1 / all + 1.0 / 3) / 2) < 1e-6);
  CHECK(score_data[2] == score_data[0] && score_data[3] == 0);
  OK(attention(&q, &k, &rows, &mask, NULL, 1, V2DROP_SOFTMAX, V2DROP_HEADS_SUM, V2DROP_QUERIES_L2, &scores));
  CHECK(fabs(score_data[0] - 1) < 1e-6 && score_data[1] == 0 && score_data[3] == 0);
  OK(attention(&q, &k, &rows, NULL, &mask, 0, V2DROP_DOT, V2DROP_HEADS_MAX, V2DROP_QUERIES_MEAN, &scores));
  CHECK(score_data[0] == 2 && score_data[1] == 0 && score_data[2] == 2 && score_data[3] == 10);
  OK(attention(&q, &k, &rows, NULL, &mask, 0, V2DROP_DOT, 1, V2DROP_QUERIES_MEAN, &scores));
  CHECK(score_data[0] == 2 && score_data[1] == 0 && score_data[2] == 2 && score_data[3] == 10);
  OK(key_norm(&k, V2DROP_L1, &scores));
  CHECK(score_data[0] == 1 && score_data[1] == 1 && score_data[2] == 1 && score_data[3] == 10);
  OK(key_norm(&k, V2DROP_L2, &scores));
  CHECK(fabs(score_data[3] - sqrt(50.0)) < 1e-5);
  OK(cosines(&x, &pivots, &to));
  CHECK(fabs(found[0] - sqrt(0.5)) < 1e-6 && fabs(found[3] - 1) < 1e-6 && found[4] == 0 && found[7] == 0);

#define ATTENTION(q, k, rows, mask, droppable, scores) attention(q, k, rows, mask, droppable, 1, 0, 0, 0, scores)
  BAD("q", ATTENTION(NULL, &k, &rows, NULL, NULL, &scores));
  BAD("k", ATTENTION(&q, NULL, &rows, NULL, NULL, &scores));
  BAD("query_rows", ATTENTION(&q, &k, NULL, NULL, NULL, &scores));
  BAD("scores", ATTENTION(&q, &k, &rows, NULL, NULL, NULL));
  t = q, t.ndim = 3;
  BAD("q", ATTENTION(&t, &k, &rows, NULL, NULL, &scores));
  t = q, t.dtype = V2DROP_INT64;
  BAD("q", ATTENTION(&t, &k, &rows, NULL, NULL, &scores));
  t = q, t.stride[3] = 2;
  BAD("q", ATTENTION(&t, &k, &rows, NULL, NULL, &scores));
  t = k, t.dtype = V2DROP_FLOAT16;
  BAD("k", ATTENTION(&q, &t, &rows, NULL, NULL, &scores));
  t = k, t.shape[0] = 2;
  BAD("k", ATTENTION(&q, &t, &rows, NULL, NULL, &scores));
  t = k, t.shape[3] = 1;
  BAD("k", ATTENTION(&q, &t, &rows, NULL, NULL, &scores));
  t = heads_of(key_data, 3, 4, 2), t.stride[1] = 0;
  BAD("q", ATTENTION(&q, &t, &rows, NULL, NULL, &scores));
  t = k, t.shape[1] = 0;
  BAD("q", ATTENTION(&q, &t, &rows, NULL, NULL, &scores));
  t = k, t.data = (char*)key_data + 1;
  BAD("k", ATTENTION(&q, &t, &rows, NULL, NULL, &scores));
  t = rows, t.dtype = V2DROP_INT32;
  BAD("query_rows", ATTENTION(&q, &k, &t, NULL, NULL, &scores));
  t = rows, t.shape[0] = 1;
  BAD("query_rows", ATTENTION(&q, &k, &t, NULL, NULL, &scores));
  t = mask, t.dtype = V2DROP_BITS8;
  BAD("key_mask", ATTENTION(&q, &k, &rows, &t, NULL, &scores));
  BAD("droppable", ATTENTION(&q, &k, &rows, NULL, &t, &scores));
  t = mask, t.shape[0] = 3;
  BAD("key_mask", ATTENTION(&q, &k, &rows, &t, NULL, &scores));
  t = scores, t.shape[0] = 3;
  BAD("scores", ATTENTION(&q, &k, &rows, NULL, NULL, &t));
  t = scores, t.stride[0] = 0;
  BAD("scores", ATTENTION(&q, &k, &rows, NULL, NULL, &t));
  BAD("mode", attention(&q, &k, &rows, NULL, NULL, 1, 2, 0, 0, &scores));
  BAD("heads", attention(&q, &k, &rows, NULL, NULL, 1, 0, 3, 0, &scores));
  BAD("heads", attention(&q, &k, &rows, NULL, NULL, 1, 0, -3, 0, &scores));
  BAD("queries", attention(&q, &k, &rows, NULL, NULL, 1, 0, 0, 2, &scores));
  BAD("k", key_norm(&x, V2DROP_L2, &scores));
  BAD("norm", key_norm(&k, V2DROP_COSINE, &scores));
  BAD("scores", key_norm(&k, V2DROP_L2, &rows));
  BAD("x", cosines(&pivots, &pivots, &to));
  t = pivots, t.dtype = V2DROP_FLOAT32;
  BAD("pivots", cosines(&x, &t, &to));
  t = to, t.shape[0] = 1;
  BAD("cosines", cosines(&x, &pivots, &t));
  t = to, t.dtype = V2DROP_FLOAT16;
  BAD("cosines", cosines(&x, &pivots, &t));
  t = to, t.stride[1] = 2;
  BAD("cosines", cosines(&x, &pivots, &t));
}

static void test_bad_scores(void) {
  const v2drop_tensor prev = tensor(prev_data, V2DROP_FLOAT32, 4, 2), cur = tensor(cur_data, V2DROP_FLOAT32, 4, 2);
  const v2drop_tensor scores = tensor(score_data, V2DROP_FLOAT32, 4, 0);
  v2drop_tensor t;
  BAD("prev", score(NULL, &cur, 0, 0, &scores));
  BAD("cur", score(&prev, NULL, 0, 0, &scores));
  BAD("scores", score(&prev, &cur, 0, 0, NULL));
  BAD("metric", score(&prev, &cur, 3, 0, &scores));
  BAD("metric", score(&prev, &cur, -1, 0, &scores));
  BAD("score_dtype", score(&prev, &cur, 0, V2DROP_INT64, &scores));
  t = cur, t.dtype = V2DROP_BFLOAT16;
  BAD("cur", score(&prev, &t, 0, 0, &scores));
  t = prev, t.dtype = 99;
  BAD("prev", score(&t, &cur, 0, 0, &scores));
  t = prev, t.dtype = V2DROP_INT64, t.data = keep_data;
  BAD("prev", score(&t, &t, 0, 0, &scores));
  t = cur, t.shape[1] = 1;
  BAD("cur", score(&prev, &t, 0, 0, &scores));
  t = cur, t.shape[0] = -1;
  BAD("cur", score(&prev, &t, 0, 0, &scores));
  t = cur, t.stride[1] = 2;
  BAD("cur", score(&prev, &t, 0, 0, &scores));
  t = cur, t.stride[0] = INT64_MAX / 2;
  BAD("cur", score(&prev, &t, 0, 0, &scores));
  t = cur, t.ndim = 9;
  BAD("cur", score(&prev, &t, 0, 0, &scores));
  t = cur, t.ndim = 1;
  BAD("cur", score(&prev, &t, 0, 0, &scores));
  t = cur, t.data = NULL;
  BAD("cur", score(&prev, &t, 0, 0, &scores));
  t = cur, t.data = (char*)cur_data + 1;
  BAD("cur", score(&prev, &t, 0, 0, &scores));
  t = scores, t.stride[0] = 0;
  BAD("scores", score(&prev, &cur, 0, 0, &t));
  t = scores, t.shape[0] = 3;
  BAD("scores", score(&prev, &cur, 0, 0, &t));
  t = scores, t.dtype = V2DROP_FLOAT16;
  BAD("scores", score(&prev, &cur, 0, 0, &t));
  BAD("grad", score_backward(NULL, &prev, &cur, 0, NULL, NULL));
  BAD("grad_cur", score_backward(&scores, &prev, &cur, 0, NULL, &scores));
  OK(score_backward(&scores, &prev, &cur, 0, NULL, NULL));
}

static void test_bad_selection(void) {
  const v2drop_tensor prev = tensor(prev_data, V2DROP_FLOAT32, 4, 2), cur = tensor(cur_data, V2DROP_FLOAT32, 4, 2);
  const v2drop_tensor scores = tensor(score_data, V2DROP_FLOAT32, 4, 0), keep = tensor(keep_data, V2DROP_INT64, 3, 0);
  float values[2];
  int64_t indices[2];
  const v2drop_tensor v = tensor(values, V2DROP_FLOAT32, 1, 2), i = tensor(indices, V2DROP_INT64, 1, 2);
  const v2drop_segment good = {0, 0, 4, 0, 2, 0, 0, 1};
  v2drop_segment s;
  v2drop_tensor t;
#define TOPK(scores, prev, cur, mask, s, n, order, v, i) topk(scores, prev, cur, mask, s, n, order, 0, 0, v, i)
  BAD("prev", TOPK(NULL, NULL, NULL, NULL, &good, 1, 0, &v, &i));
  BAD("prev", TOPK(&scores, &prev, &cur, NULL, &good, 1, 0, &v, &i));
  BAD("mask", TOPK(&scores, NULL, NULL, &scores, &good, 1, 0, &v, &i));
  BAD("segments", TOPK(&scores, NULL, NULL, NULL, NULL, 1, 0, &v, &i));
  BAD("n_segments", TOPK(&scores, NULL, NULL, NULL, &good, -1, 0, &v, &i));
  BAD("order", TOPK(&scores, NULL, NULL, NULL, &good, 1, 2, &v, &i));
  BAD("values", TOPK(&scores, NULL, NULL, NULL, &good, 1, 0, &i, &i));
  BAD("indices", TOPK(&scores, NULL, NULL, NULL, &good, 1, 0, &v, &v));
  s = good, s.k = 3;
  BAD("indices", TOPK(&scores, NULL, NULL, NULL, &s, 1, 0, &v, &i));
  t = i, t.shape[1] = 2, t.stride[1] = 2;
  BAD("indices", TOPK(&scores, NULL, NULL, NULL, &good, 1, 0, &v, &t));

#define DROP(s, n, keep) drop(NULL, &prev, &cur, NULL, s, n, 0, 0, keep, NULL, 0)
  OK(DROP(&good, 1, &keep));
  BAD("cur", drop(&scores, NULL, &cur, NULL, &good, 1, 0, 0, &keep, NULL, 0));
  BAD("prev", drop(NULL, NULL, &cur, NULL, &good, 1, 0, 0, &keep, NULL, 0));
  s = good, s.src_start = -1;
  BAD("segments[0]", DROP(&s, 1, &keep));
  s = good, s.src_start = 5;
  BAD("segments[0]", DROP(&s, 1, &keep));
  s = good, s.n = 5;
  BAD("segments[0]", DROP(&s, 1, &keep));
  s = good, s.n = INT64_MAX, s.n_prefix = INT64_MAX;
  BAD("segments[0]", DROP(&s, 1, &keep));
  s = good, s.n_suffix = 1;
  BAD("segments[0]", DROP(&s, 1, &keep));
  s = good, s.k = 5;
  BAD("segments[0]", DROP(&s, 1, &keep));
  s = good, s.k = -1;
  BAD("segments[0]", DROP(&s, 1, &keep));
  s = good, s.dst_start = 1;
  BAD("segments[0]", DROP(&s, 1, &keep));
  s = good, s.pad_after = INT64_MAX;
  BAD("segments[0]", DROP(&s, 1, &keep));
  s = good, s.pad_before = -1;
  BAD("segments[0]", DROP(&s, 1, &keep));
  s = good, s.pad_after = 0;
  BAD("segments", DROP(&s, 1, &keep));
  BAD("keep", DROP(&good, 1, NULL));
  t = keep, t.dtype = V2DROP_BITS64;
  BAD("keep", DROP(&good, 1, &t));
  t = keep, t.stride[0] = 2;
  BAD("keep", DROP(&good, 1, &t));
}

static void test_bad_gathers(void) {
  int64_t rows[3] = {0, 2, -1};
  const v2drop_tensor keep = tensor(rows, V2DROP_INT64, 3, 0);
  v2drop_gather good, p;
  good.src = tensor(ids_data, V2DROP_INT64, 4, 0);
  good.dst = tensor(out_ids, V2DROP_INT64, 3, 0);
  good.batch_dim = -1;
  good.row_dim = 0;
  good.fill = 0;
#define COMPACT(p, n) compact(&keep, p, n)
  OK(COMPACT(&good, 1));
  BAD("keep", compact(NULL, &good, 1));
  BAD("gathers", COMPACT(NULL, 1));
  BAD("n_gathers", COMPACT(&good, -1));
  p = good, p.row_dim = 1;
  BAD("gathers[0].row_dim", COMPACT(&p, 1));
  p = good, p.batch_dim = 0;
  BAD("gathers[0].batch_dim", COMPACT(&p, 1));
  p = good, p.dst.shape[0] = 2;
  BAD("gathers[0].dst", COMPACT(&p, 1));
  p = good, p.dst.dtype = V2DROP_BITS64;
  BAD("gathers[0].dst", COMPACT(&p, 1));
  p = good, p.dst.stride[0] = 0;
  BAD("gathers[0].dst", COMPACT(&p, 1));
  p = good, p.dst.ndim = 2, p.dst.shape[1] = 1;
  BAD("gathers[0].dst", COMPACT(&p, 1));
  p = good, p.src.data = NULL;
  BAD("gathers[0].src", COMPACT(&p, 1));

  p.src = good.dst, p.dst = good.src, p.batch_dim = -1, p.row_dim = 0, p.fill = 0;
  BAD("rows", compact_backward(&keep, -1, &p, 1));
  if (context.place == V2DROP_CUDA) return; /* the values of keep lie on the device and are not checked */
  rows[1] = 4;
  BAD("keep", COMPACT(&good, 1));
  BAD("keep", compact_inplace(&keep, &good, 1));
  BAD("keep", compact_backward(&keep, 4, &p, 1));
  rows[1] = 0;
  BAD("keep", compact_inplace(&keep, &good, 1));
  BAD("keep", compact_backward(&keep, 4, &p, 1));
}

/* A result shares memory with an input or another result; the halves of a workspace and the columns of a matrix do not. */
static void test_overlap(void) {
  float room[64] = {0};
  int64_t rows[3] = {0, 2, -1};
  const v2drop_tensor keep = tensor(rows, V2DROP_INT64, 3, 0);
  v2drop_tensor prev = tensor(room, V2DROP_FLOAT32, 4, 2), cur = tensor(room + 8, V2DROP_FLOAT32, 4, 2);
  v2drop_tensor scores = tensor(room + 16, V2DROP_FLOAT32, 4, 0), other = tensor(room + 20, V2DROP_FLOAT32, 4, 2);
  v2drop_gather p[3];
  int i;
  OK(score(&prev, &cur, V2DROP_L2, V2DROP_FLOAT32, &scores));
  OK(score(&prev, &prev, V2DROP_L2, V2DROP_FLOAT32, &scores)); /* inputs may be one tensor */
  scores.data = room + 15;
  BAD("scores: shares memory with cur", score(&prev, &cur, V2DROP_L2, V2DROP_FLOAT32, &scores));
  scores.data = room + 16;
  OK(score_backward(&scores, &prev, &cur, V2DROP_L2, &other, NULL));
  BAD("grad_cur: shares memory with cur", score_backward(&scores, &prev, &cur, V2DROP_L2, &other, &cur));
  BAD("grad_prev: shares memory with grad_cur", score_backward(&scores, &prev, &cur, V2DROP_L2, &other, &other));
  for (i = 0; i < 3; ++i) {
    p[i].src = tensor(room + 8 * i, V2DROP_FLOAT32, 4, 2);
    p[i].dst = tensor(room + 24 + 6 * i, V2DROP_FLOAT32, 3, 2);
    p[i].batch_dim = -1;
    p[i].row_dim = 0;
    p[i].fill = 0;
  }
  OK(compact(&keep, p, 3));
  p[2].dst.data = room + 24 + 6 + 5;
  BAD("gathers[1].dst: shares memory with gathers[2].dst", compact(&keep, p, 3));
  p[2].dst.data = room + 21;
  BAD("gathers[2].dst: shares memory with gathers[2].src", compact(&keep, p, 3));
  p[2].dst.data = room + 36;
  BAD("gathers[0].src: shares memory with gathers[1].src", (p[1].src.data = room + 7, compact_inplace(&keep, p, 2)));
  p[1].src.data = room + 8;
  p[1].dst.data = rows;
  BAD("gathers[1].dst: shares memory with keep", compact(&keep, p, 2));
  /* The columns of a matrix of four lie between one another: 0 and 1, 2 and 3; 1 and 2 meet both. From the last row to the first too. */
  for (i = 0; i < 2; ++i) p[i].dst = tensor(room + 40 + 2 * i, V2DROP_FLOAT32, 3, 2), p[i].dst.stride[0] = 4;
  OK(compact(&keep, p, 2));
  p[1].dst.data = room + 50, p[1].dst.stride[0] = -4;
  OK(compact(&keep, p, 2));
  p[1].dst.data = room + 49;
  BAD("gathers[0].dst: shares memory with gathers[1].dst", compact(&keep, p, 2));
  /* 0 1, 3 4, 6 7 are apart although 3 is no multiple of 2; steps of 1 are not. Nor do 0 3, 2 5 and 4 7 meet, which do not nest. */
  p[0].dst = tensor(room + 40, V2DROP_FLOAT32, 3, 2), p[0].dst.stride[0] = 3;
  OK(compact(&keep, p, 1));
  p[0].dst.stride[0] = 1;
  BAD("gathers[0].dst: elements share memory", compact(&keep, p, 1));
  p[0].dst.stride[0] = 2, p[0].dst.stride[1] = 3;
  OK(compact(&keep, p, 1));
  p[0].dst.stride[1] = 4;
  BAD("gathers[0].dst: elements share memory", compact(&keep, p, 1));
}

/* Both structs that may grow: their size, and fields of later versions. */
static void test_sizes(void) {
  const v2drop_tensor prev = tensor(prev_data, V2DROP_FLOAT32, 4, 2), cur = tensor(cur_data, V2DROP_FLOAT32, 4, 2);
  const v2drop_tensor scores = tensor(score_data, V2DROP_FLOAT32, 4, 0);
  const v2drop_source source = source_of(NULL, &prev, &cur, NULL, V2DROP_L2, V2DROP_FLOAT32);
  struct {
    v2drop_source known;
    int64_t later;
  } newer_source;
  struct {
    v2drop_context known;
    int64_t later;
  } newer_context;
  v2drop_source s = source;
  v2drop_context c = context;
  memset(&newer_source, 0, sizeof newer_source);
  memset(&newer_context, 0, sizeof newer_context);
  newer_source.known = source, newer_source.known.size = sizeof newer_source;
  newer_context.known = context, newer_context.known.size = sizeof newer_context;
  OK(v2drop_variation_score(&newer_source.known, &scores, &newer_context.known));
  newer_source.later = 1;
  CHECK(v2drop_variation_score(&newer_source.known, &scores, &context) == V2DROP_ERROR_UNSUPPORTED);
  CHECK(!strncmp(v2drop_last_error(), "source", 6));
  newer_context.later = INT64_MIN;
  CHECK(v2drop_variation_score(&source, &scores, &newer_context.known) == V2DROP_ERROR_UNSUPPORTED);
  CHECK(!strncmp(v2drop_last_error(), "context", 7));

  s.size = 0;
  BAD("source", v2drop_variation_score(&s, &scores, &context));
  s.size = sizeof s - 1;
  BAD("source", v2drop_variation_score(&s, &scores, &context));
  s.size = (size_t)-1;
  BAD("source", v2drop_variation_score(&s, &scores, &context));
  BAD("source", v2drop_variation_score(NULL, &scores, &context));
  BAD("source", v2drop_variation_score_backward(&scores, NULL, NULL, NULL, &context));
  BAD("source", v2drop_topk(NULL, NULL, 0, NULL, 0, &scores, &scores, &context));
  BAD("source", v2drop_drop_tokens(NULL, NULL, 0, NULL, &scores, NULL, NULL, 0, &context));
  c.size = sizeof c - 1;
  BAD("context", v2drop_variation_score(&source, &scores, &c));
  s = source, s.scores = &scores;
  BAD("scores", v2drop_variation_score(&s, &scores, &context));
  s = source, s.mask = &scores;
  BAD("mask", v2drop_variation_score(&s, &scores, &context));
}

static void test_bad_context(void) {
  const v2drop_tensor prev = tensor(prev_data, V2DROP_FLOAT32, 4, 2), cur = tensor(cur_data, V2DROP_FLOAT32, 4, 2);
  const v2drop_tensor scores = tensor(score_data, V2DROP_FLOAT32, 4, 0), keep = tensor(keep_data, V2DROP_INT64, 3, 0);
  const v2drop_tensor k = heads_of(key_data, 1, 4, 2), rows = tensor(ids_data, V2DROP_INT64, 4, 0);
  const v2drop_tensor pivot = tensor(keep_data, V2DROP_INT64, 1, 0), to = tensor(score_data, V2DROP_FLOAT32, 1, 4);
  const v2drop_segment good = {0, 0, 4, 0, 2, 0, 0, 1};
  const v2drop_source hidden = source_of(NULL, &prev, &cur, NULL, 0, 0), given = source_of(&scores, NULL, NULL, NULL, 0, 0);
  v2drop_context bad[5] = {V2DROP_CONTEXT_INIT, V2DROP_CONTEXT_INIT, V2DROP_CONTEXT_INIT, V2DROP_CONTEXT_INIT, V2DROP_CONTEXT_INIT};
  int c;
  bad[0].threads = -1, bad[1].place = 2, bad[2].place = -1, bad[3].launch_mode = V2DROP_LAUNCH_GRID + 1, bad[4].reserved = 1;
  for (c = 0; c < 5; ++c) {
    BAD("context", v2drop_variation_score(&hidden, &scores, &bad[c]));
    BAD("context", v2drop_variation_score_backward(&scores, &hidden, NULL, NULL, &bad[c]));
    BAD("context", v2drop_topk(&given, &good, 1, NULL, 0, &scores, &keep, &bad[c]));
    BAD("context", v2drop_drop_tokens(&given, &good, 1, NULL, &keep, NULL, NULL, 0, &bad[c]));
    BAD("context", v2drop_compact(&keep, NULL, 0, &bad[c]));
    BAD("context", v2drop_compact_backward(&keep, 4, NULL, 0, &bad[c]));
    BAD("context", v2drop_compact_inplace(&keep, NULL, 0, &bad[c]));
    BAD("context", v2drop_attention_score(&k, &k, &rows, NULL, NULL, 1, 1.0f, 0, 0, 0, &scores, &bad[c]));
    BAD("context", v2drop_key_norm(&k, 0, &scores, &bad[c]));
    BAD("context", v2drop_cosine_to_pivots(&cur, &pivot, &to, &bad[c]));
  }
  /* NULL is the CPU. */
  OK(v2drop_variation_score(&hidden, &scores, NULL));
  CHECK(score_data[0] == 3 && score_data[1] == 1 && score_data[2] == 5 && score_data[3] == 5);
  {
    int32_t offsets[2] = {0, 4};
    const v2drop_tensor cu = tensor(offsets, V2DROP_INT32, 2, 0);
    BAD("cu_seqlens", v2drop_topk(&given, &good, 1, &cu, 0, &scores, &keep, NULL));
    BAD("cu_seqlens", v2drop_drop_tokens(&given, &good, 1, &cu, &keep, &cu, NULL, 0, NULL));
    BAD("new_cu", v2drop_drop_tokens(&given, &good, 1, NULL, &keep, &cu, NULL, 0, NULL));
  }
}

/* What only CUDA has: launches, scratch memory, and lengths on the device. */
static void test_cuda_only(void) {
  const v2drop_tensor prev = tensor(prev_data, V2DROP_FLOAT32, 4, 2), cur = tensor(cur_data, V2DROP_FLOAT32, 4, 2);
  const v2drop_tensor scores = tensor(score_data, V2DROP_FLOAT32, 4, 0), keep = tensor(keep_data, V2DROP_INT64, 3, 0);
  float values[2];
  int64_t indices[2], places[4];
  const v2drop_tensor v = tensor(values, V2DROP_FLOAT32, 1, 2), i = tensor(indices, V2DROP_INT64, 1, 2);
  const v2drop_segment good = {0, 0, 4, 0, 2, 0, 0, 1};
  const v2drop_context usual = context;
  const v2drop_gather gather = {cur, tensor(out_data, V2DROP_FLOAT32, 3, 2), -1, 0, 0};
  static union {
    struct {
      float before[16], after[16], out[12];
    } rows;
    long double align;
  } aligned;
  int mode;
#define DROP_HERE drop(NULL, &prev, &cur, NULL, &good, 1, 0, 0, &keep, &gather, 1)
  context = usual, context.workspace = NULL;
  BAD("context.workspace", DROP_HERE);
  BAD("context.workspace", topk(NULL, &prev, &cur, NULL, &good, 1, 0, 0, 0, &v, &i));
  context = usual, context.workspace = (char*)usual.workspace + 8;
  BAD("context.workspace", DROP_HERE);
  context = usual, context.workspace_bytes = 8;
  BAD("context.workspace", DROP_HERE);
  context = usual, context.workspace_bytes = -1;
  BAD("context.workspace", DROP_HERE);
  /* As much as the header asks for is enough in every launch mode; these rows are too narrow for one of them. */
  context = usual, context.workspace_bytes = v2drop_workspace_bytes(4, 1, 0);
  CHECK(context.workspace_bytes <= 4 * 8 + 64 + 1024);
  context.launch_mode = V2DROP_LAUNCH_COOPERATIVE;
  CHECK(DROP_HERE == V2DROP_ERROR_UNSUPPORTED);
  for (mode = V2DROP_LAUNCH_AUTO; mode <= V2DROP_LAUNCH_GRID; ++mode) {
    const v2drop_tensor still = tensor(aligned.rows.before, V2DROP_FLOAT32, 4, 4), moved = tensor(aligned.rows.after, V2DROP_FLOAT32, 4, 4);
    const v2drop_gather rows = {moved, tensor(aligned.rows.out, V2DROP_FLOAT32, 3, 4), -1, 0, 0};
    aligned.rows.after[5] = 2, aligned.rows.after[14] = -3;
    aligned.rows.out[1] = aligned.rows.out[11] = 9;
    context.launch_mode = mode;
    OK(drop(NULL, &still, &moved, NULL, &good, 1, 0, 0, &keep, &rows, 1));
    CHECK(keep_data[0] == 1 && keep_data[1] == 3 && keep_data[2] == -1);
    CHECK(aligned.rows.out[0] == 0 && aligned.rows.out[1] == 2 && aligned.rows.out[6] == -3 && aligned.rows.out[11] == 0);
  }
  context = usual;

  { /* What one query needs is enough for any number of them. */
    const v2drop_tensor k = heads_of(key_data, 1, 4, 2), q = heads_of(query_data, 1, 4, 2), rows = tensor(ids_data, V2DROP_INT64, 4, 0);
    float whole[4];
    memset(ids_data, 0, sizeof ids_data);
    OK(attention(&q, &k, &rows, NULL, NULL, 0, 0, 0, 0, &scores));
    memcpy(whole, score_data, sizeof whole);
    context.workspace_bytes = v2drop_attention_workspace_bytes(1, 1, 1, 4);
    CHECK(context.workspace_bytes > 0 && context.workspace_bytes < v2drop_attention_workspace_bytes(1, 1, 4, 4));
    OK(attention(&q, &k, &rows, NULL, NULL, 0, 0, 0, 0, &scores));
    CHECK(!memcmp(whole, score_data, sizeof whole));
    context.workspace_bytes = 255;
    BAD("context.workspace", attention(&q, &k, &rows, NULL, NULL, 0, 0, 0, 0, &scores));
    context = usual;
    context.workspace = NULL;
    BAD("context.workspace", attention(&q, &k, &rows, NULL, NULL, 0, 0, 0, 0, &scores));
    OK(key_norm(&k, V2DROP_L2, &scores));
    context = usual;
    CHECK(v2drop_attention_workspace_bytes(INT64_MAX, INT64_MAX, INT64_MAX, INT64_MAX) > 0);
    CHECK(v2drop_attention_workspace_bytes(-1, 1, 1, 1) == 0);
  }

  { /* One segment of rows 0 to 3, one that is empty, and one whose end is outside and is clamped. */
    int32_t offsets[4] = {0, 3, 3, 9}, new_offsets[4], wrong[5] = {0, 3, 3, 4, 4};
    v2drop_segment table[3];
    v2drop_tensor cu = tensor(offsets, V2DROP_INT32, 4, 0), new_cu = tensor(new_offsets, V2DROP_INT32, 4, 0), t;
    const v2drop_tensor four = tensor(places, V2DROP_INT64, 4, 0);
    memset(table, 0, sizeof table);
    table[0].k = table[1].k = table[2].k = 1;
    const v2drop_source source = source_of(NULL, &prev, &cur, NULL, 0, 0);
#define LENGTHS(cu, keep, new_cu) v2drop_drop_tokens(&source, table, 3, cu, keep, new_cu, NULL, 0, &context)
    OK(LENGTHS(&cu, &four, &new_cu));
    CHECK(places[0] == 2 && places[1] == 3 && places[2] == -1 && places[3] == -1);
    CHECK(new_offsets[0] == 0 && new_offsets[1] == 1 && new_offsets[2] == 1 && new_offsets[3] == 2);
    BAD("new_cu", LENGTHS(&cu, &four, NULL));
    BAD("new_cu", LENGTHS(NULL, &four, &new_cu));
    t = new_cu, t.dtype = V2DROP_INT64, t.data = places;
    BAD("new_cu", LENGTHS(&cu, &four, &t));
    t = new_cu, t.shape[0] = 3;
    BAD("new_cu", LENGTHS(&cu, &four, &t));
    t = cu, t.dtype = V2DROP_BITS32;
    BAD("cu_seqlens", LENGTHS(&t, &four, &new_cu));
    t = tensor(wrong, V2DROP_INT32, 5, 0);
    BAD("cu_seqlens", LENGTHS(&t, &four, &new_cu));
    t = cu, t.shape[0] = 2, t.stride[0] = 2;
    BAD("cu_seqlens", LENGTHS(&t, &four, &new_cu));
    t = cu, t.data = NULL;
    BAD("cu_seqlens", LENGTHS(&t, &four, &new_cu));
    table[1].k = -1;
    BAD("segments[1]", LENGTHS(&cu, &four, &new_cu));
  }
}

/* No kernel can run: every call on CUDA returns so, whatever its arguments. */
static void test_no_cuda(void) {
  const v2drop_status why = v2drop_cuda_available();
  const v2drop_tensor prev = tensor(prev_data, V2DROP_FLOAT32, 4, 2), cur = tensor(cur_data, V2DROP_FLOAT32, 4, 2);
  const v2drop_tensor scores = tensor(score_data, V2DROP_FLOAT32, 4, 0), keep = tensor(keep_data, V2DROP_INT64, 3, 0);
  float values[2], grads[2][8];
  int64_t indices[2];
  const v2drop_tensor v = tensor(values, V2DROP_FLOAT32, 1, 2), i = tensor(indices, V2DROP_INT64, 1, 2);
  const v2drop_tensor to_prev = tensor(grads[0], V2DROP_FLOAT32, 4, 2), to_cur = tensor(grads[1], V2DROP_FLOAT32, 4, 2);
  const v2drop_segment good = {0, 0, 4, 0, 2, 0, 0, 1};
  const v2drop_gather gather = {cur, tensor(out_data, V2DROP_FLOAT32, 3, 2), -1, 0, 0}, back = {gather.dst, gather.src, -1, 0, 0};
#define REFUSES(call)                                                           \
  do {                                                                          \
    const v2drop_status status = (call);                                        \
    CHECK(status == V2DROP_ERROR_UNSUPPORTED || status == V2DROP_ERROR_DEVICE); \
    CHECK(v2drop_last_error()[0] != '\0');                                      \
  } while (0)
  CHECK(why == V2DROP_ERROR_UNSUPPORTED || why == V2DROP_ERROR_DEVICE);
  CHECK(v2drop_last_error()[0] != '\0');
  REFUSES(score(&prev, &cur, 0, 0, &scores));
  REFUSES(score_backward(&scores, &prev, &cur, 0, &to_prev, &to_cur));
  REFUSES(topk(&scores, NULL, NULL, NULL, &good, 1, 0, 0, 0, &v, &i));
  REFUSES(drop(NULL, &prev, &cur, NULL, &good, 1, 0, 0, &keep, &gather, 1));
  REFUSES(compact(&keep, &gather, 1));
  REFUSES(compact_backward(&keep, 4, &back, 1));
  REFUSES(compact_inplace(&keep, &gather, 1));
  {
    const v2drop_tensor k = heads_of(key_data, 1, 4, 2), rows = tensor(row_data, V2DROP_INT64, 4, 0);
    float found[12];
    const v2drop_tensor to = tensor(found, V2DROP_FLOAT32, 3, 4);
    REFUSES(attention(&k, &k, &rows, NULL, NULL, 1, 0, 0, 0, &scores));
    REFUSES(key_norm(&k, 0, &scores));
    REFUSES(cosines(&cur, &keep, &to));
  }
}

static void test_all(void) {
  test_answers();
  test_batch_behind_rows();
  test_attention();
  test_bad_scores();
  test_bad_selection();
  test_bad_gathers();
  test_overlap();
  test_sizes();
}

int main(void) {
  const char* archs = v2drop_cuda_archs();
  CHECK(v2drop_version() == V2DROP_VERSION);
  CHECK(v2drop_last_error()[0] == '\0');
  context.threads = 1;
  test_all();
  test_bad_context();

  context.place = V2DROP_CUDA;
  context.workspace = memory.bytes + (256 - (size_t)memory.bytes % 256);
  context.workspace_bytes = (int64_t)sizeof memory.bytes - 256;
  if (!strcmp(archs, "emulated")) {
    OK(v2drop_cuda_available());
    test_all();
    test_cuda_only();
  } else if (v2drop_cuda_available() != V2DROP_OK) {
    test_no_cuda();
  } else {
    archs = "a GPU, tested from Python";
  }
  if (!failures) printf("c api: ok (CUDA: %s)\n", archs[0] ? archs : "none");
  return failures != 0;
}
