/* SPDX-License-Identifier: Apache-2.0
 *
 * v2drop_drop_tokens from C against a memcpy of the same bytes, bfloat16, one third kept, one thread. The step reads 2 N D E (the score)
 * and k D E (the kept rows) and writes k D E; the copy reads N D E + k D E and writes as much: 2 N D E + 2 k D E bytes on either side, as
 * in bench/bars.py. Both sides run in turns in one process, on memory that was touched before; the ratio is that of the minima, which is
 * what survives a noisy machine. Nothing is asserted here. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime, aligned_alloc in strict C */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <v2drop/v2drop.h>

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void* filled(size_t bytes) {
  unsigned char* memory = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  uint32_t random = (uint32_t)bytes | 1;
  if (!memory) exit(2);
  for (size_t i = 0; i < bytes; ++i) memory[i] = (unsigned char)((random = random * 1664525u + 1013904223u) >> 24);
  return memory;
}

/* Random bits would hold NaN and infinities: this clears the top bit of each exponent. */
static uint16_t* hidden_states(int64_t elements) {
  uint16_t* values = filled((size_t)elements * 2);
  for (int64_t i = 0; i < elements; ++i) values[i] &= 0xbfff;
  return values;
}

static v2drop_tensor view(void* data, v2drop_dtype dtype, int64_t rows, int64_t dim) {
  v2drop_tensor tensor = {.data = data, .dtype = dtype, .ndim = dim ? 2 : 1, .shape = {rows, dim}, .stride = {dim ? dim : 1, 1}};
  return tensor;
}

static int compare(int64_t n, int64_t dim) {
  const int64_t k = n / 3;
  const size_t copied = (size_t)((n + k) * dim) * 2;
  uint16_t *prev_data = hidden_states(n * dim), *cur_data = hidden_states(n * dim), *hidden = filled((size_t)(k * dim) * 2);
  int64_t* keep_data = filled((size_t)k * sizeof *keep_data);
  char *from = filled(copied), *to = filled(copied);
  const v2drop_tensor prev = view(prev_data, V2DROP_BFLOAT16, n, dim), cur = view(cur_data, V2DROP_BFLOAT16, n, dim);
  const v2drop_tensor keep = view(keep_data, V2DROP_INT64, k, 0);
  const v2drop_segment segment = {.n = n, .k = k};
  const v2drop_gather gather = {.src = cur, .dst = view(hidden, V2DROP_BFLOAT16, k, dim), .batch_dim = -1};
  v2drop_source source = V2DROP_SOURCE_INIT;
  v2drop_context one_thread = V2DROP_CONTEXT_INIT;
  double ours = 1e9, copy = 1e9;
  const double end = seconds() + 4;
  int turns = 0;

  source.prev = &prev;
  source.cur = &cur;
  source.metric = V2DROP_L2;
  one_thread.threads = 1;

  for (; turns < 50 || seconds() < end; ++turns) {
    const double a = seconds();
    if (v2drop_drop_tokens(&source, &segment, 1, NULL, &keep, NULL, &gather, 1, &one_thread) != V2DROP_OK) {
      fprintf(stderr, "%s\n", v2drop_last_error());
      return 1;
    }
    const double b = seconds();
    memcpy(to, from, copied);
    const double c = seconds();
    from[turns % 7] = to[turns % 11]; /* or the copy might be left out */
    if (b - a < ours) ours = b - a;
    if (c - b < copy) copy = c - b;
  }
  /* A wrong result has no figure. */
  for (int64_t i = 0; i < k; ++i) {
    if (keep_data[i] < i || memcmp(hidden + i * dim, cur_data + keep_data[i] * dim, (size_t)dim * 2) != 0) {
      fprintf(stderr, "wrong result at kept row %lld\n", (long long)i);
      return 1;
    }
  }
  printf("B1-N%lld-D%lld-bfloat16-k%lld  drop_tokens %.1f us  memcpy %.1f us  ratio %.3f  (minima of %d turns)\n", (long long)n,
         (long long)dim, (long long)k, ours * 1e6, copy * 1e6, ours / copy, turns);
  free(prev_data), free(cur_data), free(hidden), free(keep_data), free(from), free(to);
  return 0;
}

int main(void) {
  printf("libv2drop %d, instruction set %s, one thread\n", (int)v2drop_version(), v2drop_isa());
  return compare(16384, 3584) || compare(576, 4096);
}
