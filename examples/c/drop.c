/* SPDX-License-Identifier: Apache-2.0
 *
 * One drop step from C99: eight tokens, of which the first is a system prompt and the last is text. The six vision tokens between them
 * compete for three places by how much a layer changed them. Hidden states and position ids are compacted in the same call. */
#include <stdio.h>
#include <v2drop/v2drop.h>

enum { ROWS = 8, DIM = 4, KEPT = 3, OUT_ROWS = 1 + KEPT + 1 };

/* A contiguous view of memory that the caller owns: [rows, dim], or [rows] where dim is 0. */
static v2drop_tensor view(void* data, v2drop_dtype dtype, int64_t rows, int64_t dim) {
  v2drop_tensor tensor = {0};
  tensor.data = data;
  tensor.dtype = dtype;
  tensor.ndim = dim ? 2 : 1;
  tensor.shape[0] = rows;
  tensor.shape[1] = dim;
  tensor.stride[0] = dim ? dim : 1;
  tensor.stride[1] = 1;
  return tensor;
}

int main(void) {
  /* How far the layer moves each token. */
  static const float change[ROWS] = {0, 1, 9, 2, 7, 3, 8, 0};
  float before[ROWS][DIM], after[ROWS][DIM], hidden[OUT_ROWS][DIM];
  int64_t position_ids[ROWS], kept_ids[OUT_ROWS], keep[OUT_ROWS];
  int i, d;

  for (i = 0; i < ROWS; ++i) {
    position_ids[i] = 100 + i;
    for (d = 0; d < DIM; ++d) {
      before[i][d] = (float)i;
      after[i][d] = (float)i + change[i];
    }
  }

  {
    const v2drop_tensor prev = view(before, V2DROP_FLOAT32, ROWS, DIM), cur = view(after, V2DROP_FLOAT32, ROWS, DIM);
    const v2drop_tensor out = view(keep, V2DROP_INT64, OUT_ROWS, 0);
    /* From row 0: one row that is always kept, six that compete for three places, one that is always kept. */
    const v2drop_segment segment = {.n_prefix = 1, .n = ROWS - 2, .n_suffix = 1, .k = KEPT};
    /* Every tensor with one row per token goes into one list. There is no batch dimension here. */
    const v2drop_gather gathers[] = {
        {.src = cur, .dst = view(hidden, V2DROP_FLOAT32, OUT_ROWS, DIM), .batch_dim = -1, .row_dim = 0},
        {.src = view(position_ids, V2DROP_INT64, ROWS, 0), .dst = view(kept_ids, V2DROP_INT64, OUT_ROWS, 0), .batch_dim = -1},
    };
    /* No scores are given, so they are computed from prev and cur. A context of NULL is the CPU with all threads. */
    v2drop_source source = V2DROP_SOURCE_INIT;
    source.prev = &prev;
    source.cur = &cur;
    source.metric = V2DROP_L2;
    if (v2drop_drop_tokens(&source, &segment, 1, NULL, &out, NULL, gathers, 2, NULL) != V2DROP_OK) {
      fprintf(stderr, "v2drop: %s\n", v2drop_last_error());
      return 1;
    }
  }

  for (i = 0; i < OUT_ROWS; ++i) {
    printf("row %d, position %d, hidden %g\n", (int)keep[i], (int)kept_ids[i], (double)hidden[i][0]);
  }
  return 0;
}
