/* SPDX-License-Identifier: Apache-2.0
 *
 * A program of the time of version 0.1.0: it knows only that header, and runs with the library of today. It calls every function. */
#include "v2drop_0_1_0.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static int failures = 0;
#define CHECK(condition)                                                                   \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      printf("line %d: %s (last error: %s)\n", __LINE__, #condition, v2drop_last_error()); \
      ++failures;                                                                          \
    }                                                                                      \
  } while (0)
#define OK(call) CHECK((call) == V2DROP_OK)

static v2drop_tensor tensor(void* data, int32_t dtype, int32_t ndim, int64_t a, int64_t b) {
  v2drop_tensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.dtype = dtype;
  t.ndim = ndim;
  t.shape[0] = a, t.shape[1] = b;
  t.stride[0] = ndim == 2 ? b : 1, t.stride[1] = 1;
  return t;
}

int main(void) {
  /* The changes of the four rows are 3, 1, 5 and 5. */
  float before[8] = {0}, after[8] = {3, 0, 0, 1, 3, 4, 4, -3}, score[4], hidden[4], grad[8], values[2], norms[4], cosines[8];
  int64_t kept[2], found[2], ids[4] = {10, 11, 12, 13}, some_ids[2], query_row[1] = {3}, pivot[2] = {0, 2};
  const v2drop_tensor prev = tensor(before, V2DROP_FLOAT32, 2, 4, 2), cur = tensor(after, V2DROP_FLOAT32, 2, 4, 2);
  const v2drop_tensor scores = tensor(score, V2DROP_FLOAT32, 1, 4, 0), keep = tensor(kept, V2DROP_INT64, 1, 2, 0);
  const v2drop_tensor top = tensor(values, V2DROP_FLOAT32, 2, 1, 2), where = tensor(found, V2DROP_INT64, 2, 1, 2);
  const v2drop_tensor to_cur = tensor(grad, V2DROP_FLOAT32, 2, 4, 2), x = cur, at = tensor(pivot, V2DROP_INT64, 1, 2, 0);
  const v2drop_tensor similar = tensor(cosines, V2DROP_FLOAT32, 2, 2, 4);
  v2drop_tensor k, q, row, norm;
  v2drop_segment segment;
  v2drop_gather gathers[2], back;
  v2drop_source source = V2DROP_SOURCE_INIT, given = V2DROP_SOURCE_INIT;
  v2drop_context context = V2DROP_CONTEXT_INIT;

  CHECK(v2drop_version() >= 100 && v2drop_isa()[0] && v2drop_cuda_archs());
  memset(&segment, 0, sizeof segment);
  segment.n = 4, segment.k = 2;
  source.prev = &prev, source.cur = &cur, source.metric = V2DROP_L2;
  given.scores = &scores;
  context.threads = 1;

  OK(v2drop_variation_score(&source, &scores, &context));
  CHECK(score[0] == 3 && score[1] == 1 && score[2] == 5 && score[3] == 5);
  OK(v2drop_topk(&given, &segment, 1, NULL, V2DROP_ORDER_SCORE, &top, &where, NULL));
  CHECK(found[0] == 2 && found[1] == 3 && values[0] == 5);
  OK(v2drop_variation_score_backward(&scores, &source, NULL, &to_cur, &context));
  CHECK(grad[0] == 3 && fabsf(grad[5] - 4) < 1e-6f);

  memset(gathers, 0, sizeof gathers);
  gathers[0].src = cur, gathers[0].dst = tensor(hidden, V2DROP_FLOAT32, 2, 2, 2);
  gathers[1].src = tensor(ids, V2DROP_INT64, 1, 4, 0), gathers[1].dst = tensor(some_ids, V2DROP_INT64, 1, 2, 0);
  gathers[0].batch_dim = gathers[1].batch_dim = -1;
  OK(v2drop_drop_tokens(&source, &segment, 1, NULL, &keep, NULL, gathers, 2, &context));
  CHECK(kept[0] == 2 && kept[1] == 3 && some_ids[0] == 12 && some_ids[1] == 13 && hidden[0] == 3 && hidden[3] == -3);
  kept[0] = 0;
  OK(v2drop_compact(&keep, gathers, 2, &context));
  CHECK(some_ids[0] == 10 && some_ids[1] == 13 && hidden[0] == 3 && hidden[2] == 4);
  back = gathers[1], back.src = gathers[1].dst, back.dst = gathers[1].src, back.fill = -1;
  OK(v2drop_compact_backward(&keep, 4, &back, 1, &context));
  CHECK(ids[0] == 10 && ids[1] == -1 && ids[2] == -1 && ids[3] == 13);
  OK(v2drop_compact_inplace(&keep, &gathers[1], 1, &context));
  CHECK(ids[0] == 10 && ids[1] == 13);

  k = cur, k.ndim = 4;
  k.shape[0] = k.shape[1] = 1, k.shape[2] = 4, k.shape[3] = 2;
  k.stride[0] = k.stride[1] = 8, k.stride[2] = 2, k.stride[3] = 1;
  q = k, q.shape[2] = 1;
  row = tensor(query_row, V2DROP_INT64, 2, 1, 1);
  norm = tensor(norms, V2DROP_FLOAT32, 2, 1, 4);
  OK(v2drop_attention_score(&q, &k, &row, NULL, NULL, 1, 1.0f, V2DROP_DOT, V2DROP_HEADS_MEAN, V2DROP_QUERIES_MEAN, &norm, &context));
  CHECK(norms[0] == 9 && norms[1] == 0 && norms[2] == 9 && norms[3] == 12);
  OK(v2drop_key_norm(&k, V2DROP_L1, &norm, &context));
  CHECK(norms[0] == 3 && norms[1] == 1 && norms[2] == 7 && norms[3] == 7);
  OK(v2drop_cosine_to_pivots(&x, &at, &similar, &context));
  CHECK(cosines[0] == 1 && cosines[1] == 0 && fabsf(cosines[2] - 0.6f) < 1e-6f && fabsf(cosines[6] - 1) < 1e-6f);

  source.metric = 99;
  CHECK(v2drop_variation_score(&source, &scores, &context) == V2DROP_ERROR_ARGUMENT && !strncmp(v2drop_last_error(), "metric", 6));
  CHECK(v2drop_workspace_bytes(4, 1, 0) >= 0 && v2drop_attention_workspace_bytes(1, 1, 1, 4) >= 0);
  context.place = V2DROP_CUDA;
  if (v2drop_cuda_available() != V2DROP_OK) {
    CHECK(v2drop_last_error()[0] && v2drop_key_norm(&k, V2DROP_L1, &norm, &context) != V2DROP_OK);
  }
  if (!failures) printf("built against 0.1.0, run with %d: ok\n", (int)v2drop_version());
  return failures != 0;
}
