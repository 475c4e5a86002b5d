/* SPDX-License-Identifier: Apache-2.0
 *
 * A C99 user of the header: small right answers, and every kind of bad argument, which must come back as a status whose message begins
 * with the name of the argument. */
#include <math.h>
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
static int64_t keep_data[3], ids_data[4] = {10, 11, 12, 13}, out_ids[3];
static unsigned char mask_data[4] = {1, 0, 1, 1};

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
  v2drop_stretch one = {0, 0, 4, 0, 2, 0, 0, 1}, forced = {0, 0, 4, 0, 3, 0, 0, 0}, top = {0, 0, 4, 0, 3, 0, 0, 0};
  v2drop_part parts[2];
  float values[3];
  int64_t indices[3], again[1] = {2};
  v2drop_tensor v = tensor(values, V2DROP_FLOAT32, 1, 3), i = tensor(indices, V2DROP_INT64, 1, 3), k1 = tensor(again, V2DROP_INT64, 1, 0);

  OK(v2drop_variation_score(&prev, &cur, V2DROP_L2, V2DROP_FLOAT32, &scores, 1));
  CHECK(score_data[0] == 3 && score_data[1] == 1 && score_data[2] == 5 && score_data[3] == 5);

  parts[0].src = cur;
  parts[0].dst = tensor(out_data, V2DROP_FLOAT32, 3, 2);
  parts[1].src = tensor(ids_data, V2DROP_INT64, 4, 0);
  parts[1].dst = tensor(out_ids, V2DROP_INT64, 3, 0);
  parts[0].batch_dim = parts[1].batch_dim = -1;
  parts[0].row_dim = parts[1].row_dim = 0;
  parts[0].fill = 0;
  parts[1].fill = -100;
  OK(v2drop_drop_tokens(NULL, &prev, &cur, NULL, &one, 1, V2DROP_L2, V2DROP_FLOAT32, &keep, parts, 2, 1));
  CHECK(keep_data[0] == 2 && keep_data[1] == 3 && keep_data[2] == -1);
  CHECK(out_ids[0] == 12 && out_ids[1] == 13 && out_ids[2] == -100);
  CHECK(out_data[0] == 3 && out_data[1] == 4 && out_data[2] == 4 && out_data[3] == -3 && out_data[4] == 0 && out_data[5] == 0);

  OK(v2drop_drop_tokens(NULL, &prev, &cur, &mask, &forced, 1, V2DROP_L1, V2DROP_FLOAT32, &keep, parts, 2, 0));
  CHECK(keep_data[0] == 1 && keep_data[1] == 2 && keep_data[2] == 3);

  OK(v2drop_drop_tokens(&scores, NULL, NULL, NULL, &one, 1, 0, 0, &keep, parts, 2, 1));
  CHECK(keep_data[0] == 2 && keep_data[1] == 3 && keep_data[2] == -1);
  OK(v2drop_drop_tokens(&scores, NULL, NULL, &mask, &forced, 1, 0, 0, &keep, parts, 2, 1));
  CHECK(keep_data[0] == 1 && keep_data[1] == 2 && keep_data[2] == 3);

  OK(v2drop_topk(&scores, NULL, NULL, &mask, &top, 1, V2DROP_ORDER_SCORE, 0, 0, &v, &i, 1));
  CHECK(indices[0] == 2 && indices[1] == 3 && indices[2] == 0 && values[2] == 3);
  top.k = 1;
  OK(v2drop_topk(NULL, &prev, &cur, NULL, &top, 1, V2DROP_ORDER_POSITION, V2DROP_L2, V2DROP_FLOAT32, &v, &i, 1));
  CHECK(indices[0] == 2 && indices[1] == -1 && values[0] == 5 && values[1] == -INFINITY);

  OK(v2drop_compact_backward(&keep, 4, &(v2drop_part){parts[1].dst, parts[1].src, -1, 0, -1}, 1, 1));
  CHECK(ids_data[0] == -1 && ids_data[1] == 11 && ids_data[2] == 12 && ids_data[3] == 13);
  OK(v2drop_compact_inplace(&k1, &parts[1], 1, 1));
  CHECK(ids_data[0] == 12 && ids_data[1] == 11);
}

static void test_bad_scores(void) {
  const v2drop_tensor prev = tensor(prev_data, V2DROP_FLOAT32, 4, 2), cur = tensor(cur_data, V2DROP_FLOAT32, 4, 2);
  const v2drop_tensor scores = tensor(score_data, V2DROP_FLOAT32, 4, 0);
  v2drop_tensor t;
#define SCORE(p, c, metric, round_to, s, threads) v2drop_variation_score(p, c, metric, round_to, s, threads)
  BAD("prev", SCORE(NULL, &cur, 0, 0, &scores, 1));
  BAD("cur", SCORE(&prev, NULL, 0, 0, &scores, 1));
  BAD("scores", SCORE(&prev, &cur, 0, 0, NULL, 1));
  BAD("metric", SCORE(&prev, &cur, 3, 0, &scores, 1));
  BAD("metric", SCORE(&prev, &cur, -1, 0, &scores, 1));
  BAD("round_to", SCORE(&prev, &cur, 0, V2DROP_INT64, &scores, 1));
  BAD("threads", SCORE(&prev, &cur, 0, 0, &scores, -1));
  t = cur, t.dtype = V2DROP_BFLOAT16;
  BAD("cur", SCORE(&prev, &t, 0, 0, &scores, 1));
  t = prev, t.dtype = 99;
  BAD("prev", SCORE(&t, &cur, 0, 0, &scores, 1));
  t = prev, t.dtype = V2DROP_INT64, t.data = keep_data;
  BAD("prev", SCORE(&t, &t, 0, 0, &scores, 1));
  t = cur, t.shape[1] = 1;
  BAD("cur", SCORE(&prev, &t, 0, 0, &scores, 1));
  t = cur, t.shape[0] = -1;
  BAD("cur", SCORE(&prev, &t, 0, 0, &scores, 1));
  t = cur, t.stride[1] = 2;
  BAD("cur", SCORE(&prev, &t, 0, 0, &scores, 1));
  t = cur, t.stride[0] = INT64_MAX / 2;
  BAD("cur", SCORE(&prev, &t, 0, 0, &scores, 1));
  t = cur, t.ndim = 9;
  BAD("cur", SCORE(&prev, &t, 0, 0, &scores, 1));
  t = cur, t.ndim = 1;
  BAD("cur", SCORE(&prev, &t, 0, 0, &scores, 1));
  t = cur, t.data = NULL;
  BAD("cur", SCORE(&prev, &t, 0, 0, &scores, 1));
  t = cur, t.data = (char*)cur_data + 1;
  BAD("cur", SCORE(&prev, &t, 0, 0, &scores, 1));
  t = scores, t.stride[0] = 0;
  BAD("scores", SCORE(&prev, &cur, 0, 0, &t, 1));
  t = scores, t.shape[0] = 3;
  BAD("scores", SCORE(&prev, &cur, 0, 0, &t, 1));
  t = scores, t.dtype = V2DROP_FLOAT16;
  BAD("scores", SCORE(&prev, &cur, 0, 0, &t, 1));
  BAD("grad", v2drop_variation_score_backward(NULL, &prev, &cur, 0, NULL, NULL, 1));
  BAD("grad_cur", v2drop_variation_score_backward(&scores, &prev, &cur, 0, NULL, &scores, 1));
  OK(v2drop_variation_score_backward(&scores, &prev, &cur, 0, NULL, NULL, 1));
}

static void test_bad_selection(void) {
  const v2drop_tensor prev = tensor(prev_data, V2DROP_FLOAT32, 4, 2), cur = tensor(cur_data, V2DROP_FLOAT32, 4, 2);
  const v2drop_tensor scores = tensor(score_data, V2DROP_FLOAT32, 4, 0), keep = tensor(keep_data, V2DROP_INT64, 3, 0);
  float values[2];
  int64_t indices[2];
  const v2drop_tensor v = tensor(values, V2DROP_FLOAT32, 1, 2), i = tensor(indices, V2DROP_INT64, 1, 2);
  const v2drop_stretch good = {0, 0, 4, 0, 2, 0, 0, 1};
  v2drop_stretch s;
  v2drop_tensor t;
#define TOPK(scores, prev, cur, mask, s, n, order, v, i) v2drop_topk(scores, prev, cur, mask, s, n, order, 0, 0, v, i, 1)
  BAD("prev", TOPK(NULL, NULL, NULL, NULL, &good, 1, 0, &v, &i));
  BAD("prev", TOPK(&scores, &prev, &cur, NULL, &good, 1, 0, &v, &i));
  BAD("mask", TOPK(&scores, NULL, NULL, &scores, &good, 1, 0, &v, &i));
  BAD("stretches", TOPK(&scores, NULL, NULL, NULL, NULL, 1, 0, &v, &i));
  BAD("n_stretches", TOPK(&scores, NULL, NULL, NULL, &good, -1, 0, &v, &i));
  BAD("order", TOPK(&scores, NULL, NULL, NULL, &good, 1, 2, &v, &i));
  BAD("values", TOPK(&scores, NULL, NULL, NULL, &good, 1, 0, &i, &i));
  BAD("indices", TOPK(&scores, NULL, NULL, NULL, &good, 1, 0, &v, &v));
  s = good, s.k = 3;
  BAD("indices", TOPK(&scores, NULL, NULL, NULL, &s, 1, 0, &v, &i));
  t = i, t.shape[1] = 2, t.stride[1] = 2;
  BAD("indices", TOPK(&scores, NULL, NULL, NULL, &good, 1, 0, &v, &t));

#define DROP(s, n, keep) v2drop_drop_tokens(NULL, &prev, &cur, NULL, s, n, 0, 0, keep, NULL, 0, 1)
  OK(DROP(&good, 1, &keep));
  BAD("cur", v2drop_drop_tokens(&scores, NULL, &cur, NULL, &good, 1, 0, 0, &keep, NULL, 0, 1));
  BAD("prev", v2drop_drop_tokens(NULL, NULL, &cur, NULL, &good, 1, 0, 0, &keep, NULL, 0, 1));
  s = good, s.row0 = -1;
  BAD("stretches[0]", DROP(&s, 1, &keep));
  s = good, s.row0 = 5;
  BAD("stretches[0]", DROP(&s, 1, &keep));
  s = good, s.n = 5;
  BAD("stretches[0]", DROP(&s, 1, &keep));
  s = good, s.n = INT64_MAX, s.pre = INT64_MAX;
  BAD("stretches[0]", DROP(&s, 1, &keep));
  s = good, s.post = 1;
  BAD("stretches[0]", DROP(&s, 1, &keep));
  s = good, s.k = 5;
  BAD("stretches[0]", DROP(&s, 1, &keep));
  s = good, s.k = -1;
  BAD("stretches[0]", DROP(&s, 1, &keep));
  s = good, s.out0 = 1;
  BAD("stretches[0]", DROP(&s, 1, &keep));
  s = good, s.pad_post = INT64_MAX;
  BAD("stretches[0]", DROP(&s, 1, &keep));
  s = good, s.pad_pre = -1;
  BAD("stretches[0]", DROP(&s, 1, &keep));
  s = good, s.pad_post = 0;
  BAD("stretches", DROP(&s, 1, &keep));
  BAD("keep", DROP(&good, 1, NULL));
  t = keep, t.dtype = V2DROP_BITS64;
  BAD("keep", DROP(&good, 1, &t));
  t = keep, t.stride[0] = 2;
  BAD("keep", DROP(&good, 1, &t));
}

static void test_bad_parts(void) {
  int64_t rows[3] = {0, 2, -1};
  const v2drop_tensor keep = tensor(rows, V2DROP_INT64, 3, 0);
  v2drop_part good, p;
  good.src = tensor(ids_data, V2DROP_INT64, 4, 0);
  good.dst = tensor(out_ids, V2DROP_INT64, 3, 0);
  good.batch_dim = -1;
  good.row_dim = 0;
  good.fill = 0;
#define COMPACT(p, n) v2drop_compact(&keep, p, n, 1)
  OK(COMPACT(&good, 1));
  BAD("keep", v2drop_compact(NULL, &good, 1, 1));
  BAD("parts", COMPACT(NULL, 1));
  BAD("n_parts", COMPACT(&good, -1));
  BAD("threads", v2drop_compact(&keep, &good, 1, -2));
  p = good, p.row_dim = 1;
  BAD("parts[0].row_dim", COMPACT(&p, 1));
  p = good, p.batch_dim = 0;
  BAD("parts[0].batch_dim", COMPACT(&p, 1));
  p = good, p.dst.shape[0] = 2;
  BAD("parts[0].dst", COMPACT(&p, 1));
  p = good, p.dst.dtype = V2DROP_BITS64;
  BAD("parts[0].dst", COMPACT(&p, 1));
  p = good, p.dst.stride[0] = 0;
  BAD("parts[0].dst", COMPACT(&p, 1));
  p = good, p.dst.ndim = 2, p.dst.shape[1] = 1;
  BAD("parts[0].dst", COMPACT(&p, 1));
  p = good, p.src.data = NULL;
  BAD("parts[0].src", COMPACT(&p, 1));

  rows[1] = 4;
  BAD("keep", COMPACT(&good, 1));
  BAD("keep", v2drop_compact_inplace(&keep, &good, 1, 1));
  rows[1] = 0;
  BAD("keep", v2drop_compact_inplace(&keep, &good, 1, 1));
  p.src = good.dst, p.dst = good.src, p.batch_dim = -1, p.row_dim = 0, p.fill = 0;
  BAD("keep", v2drop_compact_backward(&keep, 4, &p, 1, 1));
  rows[1] = 4;
  BAD("keep", v2drop_compact_backward(&keep, 4, &p, 1, 1));
  BAD("rows", v2drop_compact_backward(&keep, -1, &p, 1, 1));
}

int main(void) {
  CHECK(v2drop_version() == V2DROP_VERSION);
  CHECK(v2drop_last_error()[0] == '\0');
  test_answers();
  test_bad_scores();
  test_bad_selection();
  test_bad_parts();
  if (!failures) printf("c api: ok\n");
  return failures != 0;
}
