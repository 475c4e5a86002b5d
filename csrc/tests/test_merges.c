/* SPDX-License-Identifier: Apache-2.0
 *
 * Merges, their pairs, soft_topk, random scores and float64 selection through the C interface: small known answers, and every argument
 * wrong in turn. */
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

/* Rows 1 and 2 with weights 1 and 3 go to output row 0, none to output row 1; the first edge is unused. */
static void test_merge(void) {
  float rows_of[6] = {9, 9, 1, 2, 4, 8}, out[4], grad[4] = {1, 1, 5, 5}, to_x[6], to_w[3], shares[3] = {7, 1, 3};
  int64_t starts[3] = {1, 3, 3}, from[3] = {0, 1, 2}, wrong[3] = {0, -1, 3};
  const v2drop_tensor x = tensor(rows_of, V2DROP_FLOAT32, 3, 2), offsets = tensor(starts, V2DROP_INT64, 3, 0);
  const v2drop_tensor rows = tensor(from, V2DROP_INT64, 3, 0), w = tensor(shares, V2DROP_FLOAT32, 3, 0);
  const v2drop_tensor to = tensor(out, V2DROP_FLOAT32, 2, 2), g = tensor(grad, V2DROP_FLOAT32, 2, 2);
  const v2drop_tensor gx = tensor(to_x, V2DROP_FLOAT32, 3, 2), gw = tensor(to_w, V2DROP_FLOAT32, 3, 0);
  const v2drop_tensor outside = tensor(wrong, V2DROP_INT64, 3, 0);
  v2drop_tensor t;
  OK(v2drop_weighted_merge(&x, &offsets, &rows, &w, 0, &to, NULL));
  CHECK(out[0] == 13 && out[1] == 26 && out[2] == 0 && out[3] == 0);
  OK(v2drop_weighted_merge(&x, &offsets, &rows, &w, 1, &to, NULL));
  CHECK(out[0] == 3.25f && out[1] == 6.5f && out[2] == 0);
  OK(v2drop_weighted_merge(&x, &offsets, &rows, NULL, 0, &to, NULL));
  CHECK(out[0] == 5 && out[1] == 10);
  OK(v2drop_weighted_merge_backward(&g, &x, &offsets, &rows, &w, 0, NULL, NULL, &gx, &gw, NULL));
  CHECK(to_x[0] == 0 && to_x[2] == 1 && to_x[4] == 3 && to_w[0] == 0 && to_w[1] == 3 && to_w[2] == 12);
  OK(v2drop_weighted_merge_backward(&g, &x, &offsets, &rows, &w, 1, NULL, NULL, &gx, &gw, NULL));
  CHECK(to_x[2] == 0.25f && to_x[4] == 0.75f && fabs(to_w[1] + 27.0 / 16) < 1e-6 && fabs(to_w[2] - 9.0 / 16) < 1e-6);

  BAD("x", v2drop_weighted_merge(NULL, &offsets, &rows, &w, 0, &to, NULL));
  BAD("x", v2drop_weighted_merge(&rows, &offsets, &rows, &w, 0, &to, NULL));
  BAD("offsets", v2drop_weighted_merge(&x, &w, &rows, &w, 0, &to, NULL));
  BAD("offsets", v2drop_weighted_merge(&x, &outside, &rows, &w, 0, &to, NULL));
  BAD("rows", v2drop_weighted_merge(&x, &offsets, &w, &w, 0, &to, NULL));
  BAD("rows", v2drop_weighted_merge(&x, &offsets, &outside, &w, 0, &to, NULL));
  BAD("weights", v2drop_weighted_merge(&x, &offsets, &rows, &rows, 0, &to, NULL));
  t = w, t.shape[0] = 2;
  BAD("weights", v2drop_weighted_merge(&x, &offsets, &rows, &t, 0, &to, NULL));
  BAD("out", v2drop_weighted_merge(&x, &offsets, &rows, &w, 0, &x, NULL));
  t = to, t.dtype = V2DROP_FLOAT16;
  BAD("out", v2drop_weighted_merge(&x, &offsets, &rows, &w, 0, &t, NULL));
  t = to, t.stride[0] = 0;
  BAD("out", v2drop_weighted_merge(&x, &offsets, &rows, &w, 0, &t, NULL));
  BAD("grad", v2drop_weighted_merge_backward(&x, &x, &offsets, &rows, &w, 0, NULL, NULL, &gx, &gw, NULL));
  BAD("grad_x", v2drop_weighted_merge_backward(&g, &x, &offsets, &rows, &w, 0, NULL, NULL, &g, &gw, NULL));
  BAD("grad_weights", v2drop_weighted_merge_backward(&g, &x, &offsets, &rows, &w, 0, NULL, NULL, &gx, &rows, NULL));
  BAD("back_offsets", v2drop_weighted_merge_backward(&g, &x, &offsets, &rows, &w, 0, &rows, &rows, &gx, &gw, NULL));
  BAD("rows", v2drop_weighted_merge_backward(&g, &x, &offsets, &outside, &w, 0, NULL, NULL, &gx, &gw, NULL));
}

/* Row 0 is like row 3, row 2 like no odd row. */
static void test_pairs(void) {
  float features[8] = {0, 1, 1, 0, 1, 1, 0, 2};
  int64_t keep[3], row[4], offsets[4], edges[4];
  const v2drop_tensor f = tensor(features, V2DROP_FLOAT32, 4, 2), k = tensor(keep, V2DROP_INT64, 3, 0), r = tensor(row, V2DROP_INT64, 4, 0);
  const v2drop_tensor o = tensor(offsets, V2DROP_INT64, 4, 0), e = tensor(edges, V2DROP_INT64, 4, 0);
  OK(v2drop_bipartite_pairs(&f, 1, 0, V2DROP_MERGED_POSITION, &k, &r, &o, &e, NULL));
  CHECK(keep[0] == 1 && keep[1] == 2 && keep[2] == 3 && row[0] == 2 && row[1] == 0 && row[2] == 1 && row[3] == 2);
  CHECK(offsets[1] == 1 && offsets[2] == 2 && offsets[3] == 4 && edges[2] == 0 && edges[3] == 3);
  OK(v2drop_bipartite_pairs(&f, 1, 0, V2DROP_MERGED_RELEASED, &k, &r, &o, &e, NULL));
  CHECK(keep[0] == 2 && keep[1] == 1 && keep[2] == 3);
  BAD("features", v2drop_bipartite_pairs(NULL, 1, 0, 0, &k, &r, &o, &e, NULL));
  BAD("merged", v2drop_bipartite_pairs(&f, 3, 0, 0, &k, &r, &o, &e, NULL));
  BAD("merged", v2drop_bipartite_pairs(&f, 2, 1, 0, &k, &r, &o, &e, NULL));
  BAD("protected_rows", v2drop_bipartite_pairs(&f, 1, -1, 0, &k, &r, &o, &e, NULL));
  BAD("order", v2drop_bipartite_pairs(&f, 1, 0, 2, &k, &r, &o, &e, NULL));
  BAD("keep", v2drop_bipartite_pairs(&f, 1, 0, 0, &r, &r, &o, &e, NULL));
  BAD("row", v2drop_bipartite_pairs(&f, 1, 0, 0, &k, &k, &o, &e, NULL));
  BAD("offsets", v2drop_bipartite_pairs(&f, 1, 0, 0, &k, &r, &k, &e, NULL));
  BAD("edges", v2drop_bipartite_pairs(&f, 1, 0, 0, &k, &r, &o, &k, NULL));
}

static void test_soft(void) {
  float score[4] = {1, 3, 2, 3}, a[1] = {0.5f}, bad[1] = {-1}, mask_of[4], slope_of[4], grad[4] = {1, 0, 0, 0}, to[4];
  int64_t rank[4];
  unsigned char there[4] = {1, 1, 0, 1};
  const v2drop_tensor s = tensor(score, V2DROP_FLOAT32, 4, 0), ratio = tensor(a, V2DROP_FLOAT32, 1, 0);
  const v2drop_tensor mask = tensor(mask_of, V2DROP_FLOAT32, 4, 0), slope = tensor(slope_of, V2DROP_FLOAT32, 4, 0);
  const v2drop_tensor order = tensor(rank, V2DROP_INT64, 4, 0), valid = tensor(there, V2DROP_BOOL, 4, 0);
  const v2drop_tensor g = tensor(grad, V2DROP_FLOAT32, 4, 0), d = tensor(to, V2DROP_FLOAT32, 4, 0);
  OK(v2drop_soft_topk(&s, &ratio, NULL, 0, V2DROP_TIES_INDEX, 1, &mask, NULL, NULL, NULL));
  CHECK(mask_of[0] == 0 && mask_of[1] == 1 && mask_of[2] == 0 && mask_of[3] == 1);
  OK(v2drop_soft_topk(&s, &ratio, &valid, 1, V2DROP_TIES_INDEX, 0, &mask, &slope, &order, NULL));
  CHECK(rank[0] == 1 && rank[1] == 3 && rank[2] == 0 && rank[3] == 2 && mask_of[2] == 0);
  CHECK(fabs(mask_of[1] - 1 / (1 + exp(-0.5))) < 1e-6 && fabs(slope_of[1] - mask_of[1] * (1 - mask_of[1])) < 1e-6);
  OK(v2drop_soft_topk_backward(&g, &slope, &s, &order, &valid, &d, NULL));
  CHECK(to[2] == 0 && fabs(to[0] + to[1] + to[3]) < 1e-6 && to[0] > 0);
  BAD("scores", v2drop_soft_topk(&order, &ratio, NULL, 0, 0, 1, &mask, NULL, NULL, NULL));
  BAD("ratio", v2drop_soft_topk(&s, &mask, NULL, 0, 0, 1, &mask, NULL, NULL, NULL));
  BAD("valid", v2drop_soft_topk(&s, &ratio, &mask, 0, 0, 1, &mask, NULL, NULL, NULL));
  BAD("temperature", v2drop_soft_topk(&s, &ratio, NULL, bad[0], 0, 1, &mask, NULL, NULL, NULL));
  BAD("ties", v2drop_soft_topk(&s, &ratio, NULL, 0, 2, 1, &mask, NULL, NULL, NULL));
  BAD("mask", v2drop_soft_topk(&s, &ratio, NULL, 0, 0, 1, &ratio, NULL, NULL, NULL));
  BAD("slope", v2drop_soft_topk(&s, &ratio, NULL, 0, 0, 1, &mask, &order, NULL, NULL));
  BAD("order", v2drop_soft_topk(&s, &ratio, NULL, 0, 0, 1, &mask, NULL, &slope, NULL));
  BAD("grad", v2drop_soft_topk_backward(&ratio, &slope, &s, &order, NULL, &d, NULL));
  BAD("grad_scores", v2drop_soft_topk_backward(&g, &slope, &s, &order, NULL, &ratio, NULL));
  rank[0] = 4;
  BAD("order", v2drop_soft_topk_backward(&g, &slope, &s, &order, NULL, &d, NULL));
}

/* The numbers of Philox4x32-10 for a counter and a key of 0 are published. */
static void test_random(void) {
  float found[4];
  int64_t item[1] = {0}, two[2] = {0, 0};
  const v2drop_tensor scores = tensor(found, V2DROP_FLOAT32, 1, 4), items = tensor(item, V2DROP_INT64, 1, 0);
  const v2drop_tensor many = tensor(two, V2DROP_INT64, 2, 0), integers = tensor(two, V2DROP_INT64, 1, 2);
  OK(v2drop_random_score(0, &items, &scores, NULL));
  CHECK(found[0] == (float)0x6627e8 / 16777216 && found[1] == (float)0xe169c5 / 16777216);
  CHECK(found[2] == (float)0xbc57ac / 16777216 && found[3] == (float)0x9b00db / 16777216);
  BAD("scores", v2drop_random_score(0, &items, &integers, NULL));
  BAD("item_seeds", v2drop_random_score(0, &many, &scores, NULL));
  BAD("item_seeds", v2drop_random_score(0, &scores, &scores, NULL));
}

static void test_doubles(void) {
  double score[4] = {1, 1 + 1e-12, NAN, 1}, values[2];
  int64_t indices[2];
  const v2drop_tensor s = tensor(score, V2DROP_FLOAT64, 4, 0), v = tensor(values, V2DROP_FLOAT64, 1, 2),
                      i = tensor(indices, V2DROP_INT64, 1, 2);
  const v2drop_segment all = {0, 0, 4, 0, 2, 0, 0, 0};
  v2drop_source source = V2DROP_SOURCE_INIT;
  source.scores = &s;
  OK(v2drop_topk(&source, &all, 1, NULL, V2DROP_ORDER_SCORE, &v, &i, NULL));
  CHECK(indices[0] == 2 && indices[1] == 1 && values[1] == 1 + 1e-12);
  OK(v2drop_topk(&source, &all, 1, NULL, V2DROP_ORDER_POSITION, &v, &i, NULL));
  CHECK(indices[0] == 1 && indices[1] == 2);
  source.prev = &s;
  BAD("prev", v2drop_topk(&source, &all, 1, NULL, 0, &v, &i, NULL));
}

int main(void) {
  test_merge();
  test_pairs();
  test_soft();
  test_random();
  test_doubles();
  if (!failures) printf("merges, soft_topk and random scores: ok\n");
  return failures != 0;
}
