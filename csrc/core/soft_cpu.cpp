// SPDX-License-Identifier: Apache-2.0
//
// soft_topk and its gradient in the scores, and random scores. An entry is the work of one thread.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "ordinal.h"
#include "select_cpu.h"
#include "thread_pool.h"

namespace v2drop {
namespace {

constexpr float kDensityCap = 16.0f;  // see soft_topk in v2drop_kernels/ops/soft_topk/reference.py

bool is_valid(const RowView& valid, int64_t entry, int64_t i) { return !valid.data || *valid.at(entry, i) != 0; }

// Rows by (score descending, index ascending), those that are not valid last; gives the number of valid ones.
int64_t ranked(const RowView& scores, const RowView& valid, int64_t entry, std::vector<int32_t>& ordinals, std::vector<uint32_t>& order) {
  const int64_t n = scores.rows;
  ordinals.resize(static_cast<size_t>(n));
  kernels().ordinals_of[scores.dtype](scores.at(entry, 0), scores.row_stride, n, ordinals.data());
  std::vector<uint64_t> keys, spare;
  keys.reserve(static_cast<size_t>(n));
  std::vector<uint32_t> rest;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t falling = ~(static_cast<uint32_t>(ordinals[static_cast<size_t>(i)]) ^ 0x80000000u);
    if (is_valid(valid, entry, i)) {
      keys.push_back((falling & 0xffffffffu) << 32 | static_cast<uint64_t>(i));
    } else {
      rest.push_back(static_cast<uint32_t>(i));
    }
  }
  if (keys.size() <= 96) {
    std::sort(keys.begin(), keys.end());
  } else {  // by bytes, the lowest first: each pass keeps the order of the one before
    spare.resize(keys.size());
    for (int shift = 32; shift < 64; shift += 8) {
      size_t starts[257] = {};
      for (const uint64_t key : keys) ++starts[(key >> shift & 255) + 1];
      for (int b = 0; b < 256; ++b) starts[b + 1] += starts[b];
      for (const uint64_t key : keys) spare[starts[key >> shift & 255]++] = key;
      keys.swap(spare);
    }
  }
  order.clear();
  for (const uint64_t key : keys) order.push_back(static_cast<uint32_t>(key));
  order.insert(order.end(), rest.begin(), rest.end());
  return static_cast<int64_t>(keys.size());
}

// How many of n are kept, as torch.round counts: half to even.
float kept_of(float ratio, int64_t n) { return std::nearbyint((1.0f - ratio) * static_cast<float>(n)); }

// 0 and 1 without a sort: the best ones of the index order.
void hard_mask(const SoftRequest& r, int64_t entry, float ratio) {
  const int64_t n = r.scores.rows;
  float* to = r.mask + entry * n;
  int64_t valid = n;
  std::vector<int32_t> ordinals(static_cast<size_t>(n));
  kernels().ordinals_of[r.scores.dtype](r.scores.at(entry, 0), r.scores.row_stride, n, ordinals.data());
  for (int64_t i = 0; r.valid.data && i < n; ++i) {
    if (is_valid(r.valid, entry, i)) continue;
    ordinals[static_cast<size_t>(i)] = kExcluded;
    --valid;
  }
  if (ratio != ratio) {
    for (int64_t i = 0; i < n; ++i) to[i] = is_valid(r.valid, entry, i) ? ratio : 0.0f;
    return;
  }
  const float wanted = std::min(std::max(kept_of(ratio, valid), 0.0f), static_cast<float>(valid));
  std::vector<int64_t> chosen(static_cast<size_t>(wanted));
  const int64_t found = select_best(ordinals.data(), n, static_cast<int64_t>(wanted), 0, chosen.data());
  std::fill(to, to + n, 0.0f);
  for (int64_t i = 0; i < found; ++i) to[chosen[static_cast<size_t>(i)]] = 1.0f;
}

void soft_mask(const SoftRequest& r, int64_t entry, float ratio) {
  const int64_t rows = r.scores.rows;
  std::vector<int32_t> ordinals;
  std::vector<uint32_t> order;
  const int64_t n = ranked(r.scores, r.valid, entry, ordinals, order);
  const float count = static_cast<float>(n), sharpness = r.temperature == 0 ? count : r.temperature;
  std::vector<float> rank(static_cast<size_t>(rows)), soft(static_cast<size_t>(rows));
  int64_t upto = n;
  for (int64_t slot = 0; slot < n; ++slot) {
    const size_t i = static_cast<size_t>(slot);
    const bool equal = slot > 0 && ordinals[order[i]] == ordinals[order[i - 1]] && ordinals[order[i]] != kNaN;
    if (!r.released || !equal) upto = n - slot;
    rank[i] = static_cast<float>(upto) / count;
    soft[i] = (rank[i] - ratio) * sharpness;
  }
  kernels().sigmoids(soft.data(), n);
  const float kept = kept_of(ratio, n);
  for (int64_t slot = 0; slot < rows; ++slot) {
    const size_t i = static_cast<size_t>(slot);
    const int64_t at = entry * rows + order[i];
    const bool inside = slot < n;
    const float chosen = !r.hard          ? soft[i]
                         : ratio != ratio ? ratio
                         : r.released     ? static_cast<float>(rank[i] > ratio)
                                          : static_cast<float>(static_cast<float>(slot) < kept);
    r.mask[at] = inside ? chosen : 0.0f;
    if (r.slope) r.slope[at] = inside ? sharpness * soft[i] * (1 - soft[i]) : 0.0f;
    if (r.order) r.order[entry * rows + slot] = order[i];
  }
}

void soft_gradient(const SoftBackwardRequest& r, int64_t entry) {
  const int64_t rows = r.scores.rows, base = entry * rows;
  const int64_t* order = r.order + base;
  int64_t n = rows;
  for (int64_t i = 0; r.valid.data && i < rows; ++i) n -= !is_valid(r.valid, entry, i);
  for (int64_t i = 0; i < rows; ++i) {
    if (order[i] < 0 || order[i] >= rows) fail("order: %" PRId64 " is outside the %" PRId64 " rows", order[i], rows);
  }
  std::fill(r.grad_scores + base, r.grad_scores + base + rows, 0.0f);
  if (n == 0) return;
  std::vector<float> value(static_cast<size_t>(n)), own(static_cast<size_t>(n)), share(static_cast<size_t>(n));
  std::vector<int32_t> bits(static_cast<size_t>(rows));
  kernels().ordinals_of[r.scores.dtype](r.scores.at(entry, 0), r.scores.row_stride, rows, bits.data());
  for (size_t i = 0; i < value.size(); ++i) {
    const int32_t ordinal = bits[static_cast<size_t>(order[i])];
    const uint32_t back = bits_of_ordinal(ordinal);
    std::memcpy(&value[i], &back, sizeof back);
    if (ordinal == kNaN) value[i] = __builtin_nanf("");
  }
  const int64_t last = n - 1, window = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(n)) / 2));
  const auto between = [&](int64_t low, int64_t high) { return value[static_cast<size_t>(low)] - value[static_cast<size_t>(high)]; };
  const float middle = between(last / 4, last - last / 4), spread = 2 * (middle > 0 ? middle : between(0, last) / 2);
  std::vector<double> sums(static_cast<size_t>(n) + 1, 0.0);
  const auto low_of = [&](int64_t slot) { return std::max<int64_t>(slot - window, 0); };
  const auto high_of = [&](int64_t slot) { return std::min(slot + window, last); };
  for (int64_t slot = 0; slot < n; ++slot) {
    const size_t i = static_cast<size_t>(slot);
    const int64_t low = low_of(slot), high = high_of(slot);
    const float neighbours = static_cast<float>(high - low), raw = neighbours / static_cast<float>(n) / between(low, high);
    const float density = raw != raw ? raw : std::min(raw, kDensityCap / spread);
    const int64_t at = base + order[i];
    own[i] = spread > 0 && std::isfinite(density) ? density * (r.grad[at] * r.slope[at]) : 0.0f;
    share[i] = own[i] / std::max(neighbours, 1.0f);
    sums[i + 1] = sums[i] + static_cast<double>(share[i]);
  }
  for (int64_t slot = 0; slot < n; ++slot) {
    const size_t i = static_cast<size_t>(slot);
    const double window_sum = sums[static_cast<size_t>(high_of(slot)) + 1] - sums[static_cast<size_t>(low_of(slot))];
    r.grad_scores[base + order[i]] = own[i] - (static_cast<float>(window_sum) - share[i]);
  }
}

}  // namespace
namespace cpu {

void soft_topk(const SoftRequest& r, const v2drop_context& context) {
  const bool by_selection = r.hard && !r.released && !r.slope && !r.order;
  parallel_for(r.scores.batch, useful_threads(context.threads, r.scores.batch * r.scores.rows * 64), [&](int64_t entry) {
    const float ratio = r.ratio[r.ratios == 1 ? 0 : entry];
    by_selection ? hard_mask(r, entry, ratio) : soft_mask(r, entry, ratio);
  });
}

void soft_topk_backward(const SoftBackwardRequest& r, const v2drop_context&) {
  for (int64_t entry = 0; entry < r.scores.batch; ++entry) soft_gradient(r, entry);
}

void random_score(const RandomRequest& r, const v2drop_context& context) {
  const int64_t n = r.scores.rows;
  parallel_for(r.scores.batch, useful_threads(context.threads, r.scores.batch * n * 16), [&](int64_t entry) {
    int64_t item = entry;
    if (r.items.data) std::memcpy(&item, r.items.at(0, entry), sizeof item);
    kernels().random_numbers(r.seed, static_cast<uint64_t>(item), n, reinterpret_cast<float*>(r.scores.data) + entry * n);
  });
}

}  // namespace cpu
}  // namespace v2drop
