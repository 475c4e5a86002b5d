// SPDX-License-Identifier: Apache-2.0
//
// What the CPU ops lend each other. Arguments have been checked.
#ifndef V2DROP_CORE_OPS_H_
#define V2DROP_CORE_OPS_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"

namespace v2drop {

// select_cpu.cpp

// Where keys come from: given scores or, without them, hidden states; and an optional mask whose false rows get `masked_key` and are not
// read.
struct KeySource {
  bool has_scores, has_mask;
  Rows scores, mask;
  Hidden hidden;
  int32_t masked_key;
  int64_t batch, rows;
};

KeySource check_source(const v2drop_tensor* scores, const v2drop_tensor* prev, const v2drop_tensor* cur, int32_t metric, int32_t round_to,
                       const v2drop_tensor* mask, int32_t masked_key);

// Where a top-k goes: values [n_stretches, width] of `dtype`, and indices.
struct TopkRows {
  char* values;
  int64_t* indices;
  int64_t width;
  int32_t dtype;
};

TopkRows check_topk(const v2drop_tensor* scores, const v2drop_stretch* stretches, int64_t n_stretches, int32_t order,
                    const v2drop_tensor* values, const v2drop_tensor* indices);

// The keys of all competing rows, stretch after stretch: those of stretch g start at first[g].
struct Keys {
  std::unique_ptr<int32_t[]> data;
  std::vector<int64_t> first;
};

Keys make_keys(const KeySource& source, const v2drop_stretch* stretches, int64_t n_stretches, int32_t threads);

// Writes the indices of the k best keys, in ascending order, plus `offset`; returns how many (less than k only if keys are excluded).
int64_t select_best(const int32_t* keys, int64_t n, int64_t k, int64_t offset, int64_t* out);

// compact_cpu.cpp

// keep[entry * count + i] is the source row of output row i, or negative.
struct Keep {
  int64_t* data;
  int64_t batch, count;
};

Keep check_keep(const v2drop_tensor* keep);

// drop_cpu.cpp: the stretches must write every row of keep exactly once, each within the entry that it reads from.
void check_tiling(const v2drop_stretch* stretches, int64_t n_stretches, int64_t rows, const Keep& keep);

// One part, reduced to what moving it takes; strides in bytes. All dimensions but the row's and the innermost contiguous ones are planes.
struct Copy {
  struct Dim {
    int64_t size, src, dst;
    bool is_batch;
  };
  char *src, *dst;
  int64_t src_rows, dst_rows, src_row, dst_row;
  int64_t inner;  // contiguous bytes of a row
  Dim dims[V2DROP_MAX_DIMS];
  int n_dims;
  int64_t planes;
  char fill[16];  // the fill, repeated

  // The start of a plane in both tensors, and the batch entry it belongs to.
  struct Plane {
    char *src, *dst;
    int64_t entry;
  };
  Plane plane(int64_t index) const;
};

// Checks parts whose dst has dst_rows rows and whose src has src_rows (negative: any number). In place, dst is not looked at.
std::vector<Copy> check_parts(const v2drop_part* parts, int64_t n_parts, int64_t batch, int64_t src_rows, int64_t dst_rows, bool in_place);

// dst row i = src row keep[i], or the fill; indices are known to be in range.
void gather(const Keep& keep, const std::vector<Copy>& copies, int32_t threads);

}  // namespace v2drop

#endif  // V2DROP_CORE_OPS_H_
