// SPDX-License-Identifier: Apache-2.0
//
// Selection from float64 scores: by the upper halves of their ordinals as from float32, and among equal ones by the lower halves.
#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels.h"
#include "ordinal.h"
#include "select_cpu.h"
#include "thread_pool.h"

namespace v2drop {
namespace {

struct Halves {
  std::vector<int32_t> high, low;
};

void make_halves(const ScoreSource& source, int64_t entry, int64_t position, int64_t n, Halves& to) {
  to.high.resize(static_cast<size_t>(n));
  to.low.resize(static_cast<size_t>(n));
  kernels().halves_of(source.scores.at(entry, position), source.scores.row_stride, n, to.high.data(), to.low.data());
  if (!source.has_mask) return;
  for (int64_t i = 0; i < n; ++i) {
    if (!*source.mask.at(entry, position + i)) to.high[static_cast<size_t>(i)] = kExcluded;
  }
}

// As select_best, with two halves.
int64_t select_halves(const Halves& halves, int64_t n, int64_t k, int64_t offset, int64_t* out) {
  if (n == 0) return 0;
  const Kernels& kernel = kernels();
  const int32_t *high = halves.high.data(), *low = halves.low.data();
  int32_t lo = 0, hi = 0;
  kernel.range(high, n, &lo, &hi);
  const Cut cut = find_cut(lo, hi, n, k, [&](int32_t threshold) { return kernel.at_least(high, n, threshold); });
  int64_t ties = cut.ties;  // of those equal in both halves
  int32_t least = INT32_MIN;
  std::vector<int32_t> equal;
  if (cut.ties > 0) {
    for (int64_t i = 0; i < n; ++i) {
      if (high[i] == cut.threshold) equal.push_back(low[i]);
    }
  }
  if (static_cast<int64_t>(equal.size()) > cut.ties) {
    const auto last = equal.begin() + (cut.ties - 1);
    std::nth_element(equal.begin(), last, equal.end(), std::greater<int32_t>());
    least = *last;
    ties -= std::count_if(equal.begin(), last, [&](int32_t x) { return x > least; });
  }
  int64_t found = 0, equals = 0;
  for (int64_t i = 0; i < n && found < k; ++i) {
    if (high[i] < cut.threshold || (high[i] == cut.threshold && (cut.ties == 0 || low[i] < least))) continue;
    if (high[i] == cut.threshold && low[i] == least && equals++ >= ties) continue;
    out[found++] = offset + i;
  }
  return found;
}

}  // namespace

void topk_double(const TopkRequest& request, const v2drop_context& context) {
  const ScoreSource& source = request.source;
  const Segments& segments = request.segments;
  int64_t total = 0;
  for (int64_t g = 0; g < segments.count; ++g) total += segments[g].n;
  parallel_for(segments.count, useful_threads(context.threads, total * 64), [&](int64_t g) {
    const v2drop_segment& s = segments[g];
    const int64_t row = s.src_start + s.n_prefix, entry = s.n ? row / source.rows : 0, offset = s.n ? row % source.rows : 0;
    thread_local Halves halves;
    make_halves(source, entry, offset, s.n, halves);
    int64_t* index = request.indices + g * request.width;
    char* value = request.values + g * request.width * 8;
    const int64_t found = select_halves(halves, s.n, s.k, offset, index);
    if (request.order == V2DROP_ORDER_SCORE) {
      std::sort(index, index + found, [&](int64_t a, int64_t b) {
        const size_t i = static_cast<size_t>(a - offset), j = static_cast<size_t>(b - offset);
        if (halves.high[i] != halves.high[j]) return halves.high[i] > halves.high[j];
        return halves.low[i] != halves.low[j] ? halves.low[i] > halves.low[j] : a < b;
      });
    }
    const double none = -__builtin_inf();
    for (int64_t i = 0; i < request.width; ++i) {
      if (i >= found) index[i] = -1;
      std::memcpy(value + i * 8, i < found ? static_cast<const void*>(source.scores.at(entry, index[i])) : &none, 8);
    }
  });
}

}  // namespace v2drop
