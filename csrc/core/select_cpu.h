// SPDX-License-Identifier: Apache-2.0
//
// Selection and gathering on the CPU, for top-k, drop and compaction: phases that one parallel region runs.
#ifndef V2DROP_CORE_SELECT_CPU_H_
#define V2DROP_CORE_SELECT_CPU_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "request.h"
#include "thread_pool.h"

namespace v2drop {

// select_cpu.cpp

// The ordinals of all competing rows, segment after segment: those of segment g start at first[g].
struct Ordinals {
  std::unique_ptr<int32_t[]> data;
  std::vector<int64_t> first;
};

// Their places, without values.
Ordinals place_ordinals(const Segments& segments);

// Writes them. `bytes` is added what it reads.
Phase make_ordinals(const ScoreSource& source, const Segments& segments, const Ordinals& ordinals, int64_t* bytes);

// Selection passes over its ordinals some twenty times, in the cache: what one takes, as bytes that are moved.
constexpr int64_t kSelectBytes = 32;

// Writes the indices of the k best ordinals, in ascending order, plus `offset`; returns how many (less than k only if ordinals are
// excluded).
int64_t select_best(const int32_t* ordinals, int64_t n, int64_t k, int64_t offset, int64_t* out);

// Calls select(g) for every segment g, several short ones as one item.
Phase for_each_segment(const Segments& segments, const Ordinals& ordinals, std::function<void(int64_t)> select);

// compact_cpu.cpp: dst row i = src row keep[i], or the fill; indices are known to be in range. `bytes` is added what it moves.
Phase gather(const Keep& keep, const std::vector<Copy>& copies, int64_t* bytes);

// select_double_cpu.cpp: the top-k of float64 scores.
void topk_double(const TopkRequest& request, const v2drop_context& context);

}  // namespace v2drop

#endif  // V2DROP_CORE_SELECT_CPU_H_
