// SPDX-License-Identifier: Apache-2.0
//
// The pairs that bipartite_merge merges: every even row with the odd row of highest cosine, the most similar pairs first.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "ordinal.h"
#include "thread_pool.h"

namespace v2drop {
namespace {

// Rows of length 1 (or of zeros) as float32, `pitch` apart; the lengths in float64, so that no square leaves the range.
std::vector<float> unit_rows(const RowView& x, int64_t entry, int64_t first, int64_t pitch) {
  const int64_t n = (x.rows - first + 1) / 2;
  std::vector<float> unit(static_cast<size_t>(std::max<int64_t>(n, 0) * pitch));
  std::vector<uint32_t> wide(static_cast<size_t>(pitch));
  for (int64_t i = 0; i < n; ++i) {
    float* to = unit.data() + i * pitch;
    kernels().to_floats[x.dtype](x.at(entry, first + 2 * i), x.dim, to);
    double squares = 0;
    for (int64_t j = 0; j < x.dim; ++j) squares += static_cast<double>(to[j]) * static_cast<double>(to[j]);
    const double norm = std::sqrt(squares);
    for (int64_t j = 0; j < x.dim; ++j) to[j] = norm == 0 ? 0.0f : static_cast<float>(static_cast<double>(to[j]) / norm);
  }
  return unit;
}

struct Best {
  std::vector<float> cosine;
  std::vector<int64_t> partner;  // the number of the odd row
};

// A NaN counts as the highest, and the first of equals wins, as in torch.max.
Best best_partners(const PairsRequest& r, int64_t entry) {
  const int64_t dim = r.features.dim, pitch = packed_dim(dim);
  const std::vector<float> even = unit_rows(r.features, entry, 0, pitch), odd = unit_rows(r.features, entry, 1, pitch);
  const int64_t evens = (r.features.rows + 1) / 2, odds = r.features.rows / 2, first = r.protected_rows / 2;
  Best best = {std::vector<float>(static_cast<size_t>(evens), -__builtin_inff()), std::vector<int64_t>(static_cast<size_t>(evens), 0)};
  constexpr int64_t kVectors = 8;
  std::vector<float> packed(static_cast<size_t>(kVectors * pitch)), products(static_cast<size_t>(kVectors * std::max<int64_t>(odds, 1)));
  for (int64_t i = (r.protected_rows + 1) / 2; i < evens; i += kVectors) {
    const int64_t vectors = std::min(kVectors, evens - i);
    for (int64_t v = 0; v < vectors; ++v) {
      std::fill_n(packed.data() + v * pitch, pitch, 0.0f);
      kernels().pack[V2DROP_FLOAT32](even.data() + (i + v) * pitch, dim, packed.data() + v * pitch);
    }
    kernels().dots[V2DROP_FLOAT32](odd.data(), pitch * 4, odds, packed.data(), vectors, dim, 1.0f, products.data(), odds);
    for (int64_t v = 0; v < vectors; ++v) {
      float& most = best.cosine[static_cast<size_t>(i + v)];
      for (int64_t j = first; j < odds && most == most; ++j) {
        const float cosine = products[static_cast<size_t>(v * odds + j)];
        if (cosine > most || cosine != cosine) most = cosine, best.partner[static_cast<size_t>(i + v)] = j;
      }
    }
  }
  return best;
}

// Even rows by (cosine descending, row ascending).
std::vector<int64_t> proposals(const Best& best) {
  std::vector<uint64_t> keys(best.cosine.size());
  for (size_t i = 0; i < keys.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &best.cosine[i], sizeof bits);
    keys[i] = static_cast<uint64_t>(~(static_cast<uint32_t>(ordinal_of_bits(bits)) ^ 0x80000000u)) << 32 | i;
  }
  std::sort(keys.begin(), keys.end());
  std::vector<int64_t> found(keys.size());
  std::transform(keys.begin(), keys.end(), found.begin(), [](uint64_t key) { return static_cast<int64_t>(key & 0xffffffffu); });
  return found;
}

// The rows that stay, in the order of the result.
std::vector<int64_t> staying(const PairsRequest& r, const std::vector<int64_t>& order) {
  std::vector<int64_t> even, odd, keep;
  for (size_t i = static_cast<size_t>(r.merged); i < order.size(); ++i) even.push_back(2 * order[i]);
  for (int64_t row = 1; row < r.features.rows; row += 2) odd.push_back(row);
  if (!r.released || r.protected_rows) std::sort(even.begin(), even.end());
  if (!r.released) {
    keep.resize(even.size() + odd.size());
    std::merge(even.begin(), even.end(), odd.begin(), odd.end(), keep.begin());
    return keep;
  }
  keep = even;
  keep.insert(keep.end(), odd.begin(), odd.end());
  std::stable_sort(keep.begin(), keep.end(),
                   [&](int64_t a, int64_t b) { return std::min(a, r.protected_rows) < std::min(b, r.protected_rows); });
  return keep;
}

void find_pairs(const PairsRequest& r, int64_t entry) {
  const int64_t rows = r.features.rows, left = rows - r.merged;
  const Best best = best_partners(r, entry);
  const std::vector<int64_t> order = proposals(best), keep = staying(r, order);
  std::copy(keep.begin(), keep.end(), r.keep + entry * left);
  int64_t* row = r.row + entry * rows;
  for (int64_t i = 0; i < left; ++i) row[keep[static_cast<size_t>(i)]] = i;
  for (int64_t i = 0; i < r.merged; ++i) {
    const int64_t even = order[static_cast<size_t>(i)];
    row[2 * even] = row[2 * best.partner[static_cast<size_t>(even)] + 1];
  }
  int64_t *offsets = r.offsets + entry * (left + 1), *edges = r.edges + entry * rows;
  std::fill(offsets, offsets + left + 1, int64_t{0});
  for (int64_t i = 0; i < rows; ++i) ++offsets[row[i] + 1];
  for (int64_t i = 0; i < left; ++i) offsets[i + 1] += offsets[i];
  std::vector<int64_t> next(offsets, offsets + left);
  for (int64_t i = 0; i < rows; ++i) edges[next[static_cast<size_t>(row[i])]++] = i;
}

}  // namespace
namespace cpu {

void bipartite_pairs(const PairsRequest& r, const v2drop_context& context) {
  const int64_t work = r.features.batch * r.features.rows * r.features.rows / 4 * std::max<int64_t>(r.features.dim, 16);
  parallel_for(r.features.batch, useful_threads(context.threads, work), [&](int64_t entry) { find_pairs(r, entry); });
}

}  // namespace cpu
}  // namespace v2drop
