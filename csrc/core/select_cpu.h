// SPDX-License-Identifier: Apache-2.0
//
// Selection and gathering on the CPU, for top-k, drop and compaction.
#ifndef V2DROP_CORE_SELECT_CPU_H_
#define V2DROP_CORE_SELECT_CPU_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "request.h"

namespace v2drop {

// select_cpu.cpp

// The ordinals of all competing rows, segment after segment: those of segment g start at first[g].
struct Ordinals {
  std::unique_ptr<int32_t[]> data;
  std::vector<int64_t> first;
};

Ordinals make_ordinals(const ScoreSource& source, const Segments& segments, int32_t threads);

// Writes the indices of the k best ordinals, in ascending order, plus `offset`; returns how many (less than k only if ordinals are
// excluded).
int64_t select_best(const int32_t* ordinals, int64_t n, int64_t k, int64_t offset, int64_t* out);

// compact_cpu.cpp: dst row i = src row keep[i], or the fill; indices are known to be in range.
void gather(const Keep& keep, const std::vector<Copy>& copies, int32_t threads);

}  // namespace v2drop

#endif  // V2DROP_CORE_SELECT_CPU_H_
