// SPDX-License-Identifier: Apache-2.0
//
// How much attention some queries pay to every key, in one reading of the keys. All query heads and queries of a block of keys are
// processed while it is in the cache; what remains of it is its exponentials beside the block's own maximum, and their sum. Once the maxima
// of all blocks are known, a second pass scales these to weights and reduces them. Blocks have a fixed size and every sum a fixed order, so
// results do not depend on the threads, nor on how queries and entries are grouped to bound the scratch memory.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "ordinal.h"
#include "thread_pool.h"

namespace v2drop {
namespace {

constexpr int64_t kBlock = 256;              // keys: 64 KB of 128 bfloat16, within the second-level cache
constexpr int64_t kGroupBytes = 4 << 20;     // weights of several entries that are processed together
constexpr int64_t kScratchBytes = 64 << 20;  // weights of several queries of one entry
constexpr int64_t kVectors = 32;             // packed queries that stay in the first-level cache while a block of keys passes

// Scratch memory that vectors are read from, not initialised. Large pieces use huge pages: faulting in
// fresh small pages would take longer than the computation on them.
struct Free {
  void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats floats(int64_t count) {
  constexpr size_t kHuge = 2 << 20;
  const size_t bytes = static_cast<size_t>(count) * sizeof(float), align = bytes >= 2 * kHuge ? kHuge : 64;
  void* memory = nullptr;
  if (posix_memalign(&memory, align, std::max(bytes, align)) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (align == kHuge) madvise(memory, bytes / kHuge * kHuge, MADV_HUGEPAGE);
#endif
  return Floats(static_cast<float*>(memory));
}

// The queries of an entry that exist (those with a row), in order.
struct Present {
  std::vector<int64_t> query, row;
};

// One step: some queries of some entries.
class Step {
 public:
  Step(const AttentionRequest& a, int64_t entry0, int64_t entries, int64_t query0, int64_t most, const std::vector<Present>& present,
       float* scores)
      : a_(a), k_(kernels()), entry0_(entry0), entries_(entries), present_(present), query0_(query0), scores_(scores) {
    group_ = a.q.heads / a.k.heads;
    blocks_ = (a.k.rows + kBlock - 1) / kBlock;
    pitch_ = packed_dim(a.q.dim);
    for (int64_t e = 0; e < entries; ++e) queries_ = std::max(queries_, count(e));
    queries_ = std::min(queries_, most);
    const int64_t vectors = entries * a.q.heads * queries_, stats = vectors * blocks_;
    weights_ = floats(stats * kBlock);
    packed_ = floats(vectors * pitch_);
    factors_ = floats(stats);
    sums_ = floats(stats);
    if (a.heads > 0) chosen_by_ = floats(stats);
    for (int64_t e = 0; e < entries; ++e) {
      for (int64_t h = 0; h < a.q.heads; ++h) {
        for (int64_t i = 0; i < queries(e); ++i) {
          k_.pack[a.q.dtype](a.q.at(entry0 + e, h, present[entry0 + e].query[query0 + i]), a.q.dim,
                             packed_.get() + vector(e, h, i) * pitch_);
        }
      }
    }
  }

  // Entry e's queries of this step.
  int64_t queries(int64_t e) const { return std::min(count(e), queries_); }

  void run(int threads, bool last) {
    // In the order of the keys in memory. Where heads lie one after the other, block after block of all heads jumped to another place
    // every 64 KB and took 7 to 35 % longer (Zen 5, one thread, 128 MB of keys in 8 and 32 heads).
    const int64_t heads = a_.k.heads, items = blocks_ * heads;
    const bool by_head = a_.k.head_stride >= a_.k.row_stride;
    const Phase weigh_all = {entries_ * items, [&](int64_t item) {
                               const int64_t at = item % items;
                               weigh(item / items, by_head ? at / blocks_ : at % heads, by_head ? at % blocks_ : at / heads);
                             }};
    const Phase scale_all = {entries_ * queries_, [&](int64_t item) {
                               if (item % queries_ < queries(item / queries_)) scale(item / queries_, item % queries_);
                             }};
    const Phase reduce_all = {entries_ * blocks_, [&](int64_t item) { reduce(item / blocks_, item % blocks_, last); }};
    parallel({weigh_all, scale_all, reduce_all}, threads);
  }

 private:
  int64_t count(int64_t e) const { return static_cast<int64_t>(present_[entry0_ + e].row.size()) - query0_; }
  int64_t vector(int64_t e, int64_t head, int64_t i) const { return (e * a_.q.heads + head) * queries_ + i; }
  // Weights of a block lie together: [entry][block][head][query][key of the block].
  float* weights(int64_t e, int64_t head, int64_t i, int64_t block) const {
    return weights_.get() + (((e * blocks_ + block) * a_.q.heads + head) * queries_ + i) * kBlock;
  }
  // Whether each of n keys from `first` on is one.
  void read_mask(const RowView& mask, int64_t e, int64_t first, int64_t n, unsigned char* to) const {
    for (int64_t i = 0; i < n; ++i) to[i] = !mask.data || *mask.at(entry0_ + e, first + i) != 0;
  }
  // How many of the n keys from `first` on are not after the query.
  int64_t reach(int64_t e, int64_t i, int64_t first, int64_t n) const {
    return a_.causal ? std::max<int64_t>(0, std::min(n, present_[entry0_ + e].row[query0_ + i] + 1 - first)) : n;
  }

  // The exponentials, or products, of one block of keys of one kv head.
  void weigh(int64_t e, int64_t kv, int64_t block) {
    const int64_t first = block * kBlock, n = std::min(kBlock, a_.k.rows - first), vectors = group_ * queries_;
    unsigned char visible[kBlock], counts[kBlock];
    if (a_.key_mask.data) read_mask(a_.key_mask, e, first, n, visible);
    if (a_.heads > 0) read_mask(a_.droppable, e, first, n, counts);
    // A softmax gives 1 in total: what gives least to the other keys gives most, and exactly 0 where there are none.
    for (int64_t i = 0; a_.heads > 0 && !a_.dot && i < n; ++i) counts[i] = !counts[i];
    float* const out = weights(e, kv * group_, 0, block);
    int64_t reached = 0;
    for (int64_t i = 0; i < queries(e); ++i) reached = std::max(reached, reach(e, i, first, n));
    const char* keys = a_.k.at(entry0_ + e, kv, first);
    for (int64_t v = 0; v < vectors; v += kVectors) {
      k_.dots[a_.k.dtype](keys, a_.k.row_stride, reached, packed_.get() + (vector(e, kv * group_, 0) + v) * pitch_,
                          std::min(kVectors, vectors - v), a_.k.dim, a_.scale, out + v * kBlock, kBlock);
    }
    const float nothing = a_.dot ? 0.0f : -std::numeric_limits<float>::infinity();
    for (int64_t v = 0; v < vectors; ++v) {
      if (v % queries_ >= queries(e)) continue;
      float* x = out + v * kBlock;
      const int64_t seen = reach(e, v % queries_, first, n);
      std::fill(x + seen, x + n, nothing);
      if (a_.key_mask.data) {
        for (int64_t i = 0; i < seen; ++i) x[i] = visible[i] ? x[i] : nothing;
      }
      const int64_t at = (vector(e, kv * group_, 0) + v) * blocks_ + block;
      if (!a_.dot) k_.exponentials(x, n, &factors_[at], &sums_[at]);
      if (a_.heads > 0) chosen_by_[at] = k_.sum_where(x, counts, n);
    }
  }

  // From maxima and sums of blocks to what each block's exponentials are multiplied with, for all heads of a query.
  void scale(int64_t e, int64_t i) {
    const int64_t heads = a_.q.heads, chosen = a_.heads > 0 ? a_.heads : a_.heads == V2DROP_HEADS_MEAN ? heads : 1;
    std::vector<int32_t> totals(static_cast<size_t>(a_.heads > 0 ? heads : 0));
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = vector(e, h, i) * blocks_;
      float *factors = &factors_[at], scale = 1.0f / static_cast<float>(chosen), total = 0;
      if (a_.dot) {
        std::fill(factors, factors + blocks_, 1.0f);
      } else {
        float most, all = 0, unused;
        k_.exponentials(factors, blocks_, &most, &unused);
        for (int64_t j = 0; j < blocks_; ++j) all += sums_[at + j] * factors[j];
        scale = most == -std::numeric_limits<float>::infinity() && all == 0 ? 0.0f : scale / all;
      }
      if (a_.heads > 0) {
        for (int64_t j = 0; j < blocks_; ++j) total += chosen_by_[at + j] * factors[j];
        total *= a_.dot ? scale : -scale;
        uint32_t bits;
        __builtin_memcpy(&bits, &total, sizeof bits);
        totals[static_cast<size_t>(h)] = ordinal_of_bits(bits);
      }
      for (int64_t j = 0; j < blocks_; ++j) factors[j] *= scale;
    }
    if (a_.heads == 0 || totals.empty()) return;
    std::vector<int64_t> order(static_cast<size_t>(heads));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return totals[size_t(x)] > totals[size_t(y)]; });
    for (int64_t rank = chosen; rank < heads; ++rank) {
      float* factors = &factors_[vector(e, order[static_cast<size_t>(rank)], i) * blocks_];
      std::fill(factors, factors + blocks_, 0.0f);
    }
  }

  // The weights of one block of keys, over heads and queries, to their scores.
  void reduce(int64_t e, int64_t block, bool last) {
    const int64_t first = block * kBlock, n = std::min(kBlock, a_.k.rows - first);
    float* const total = scores_ + e * a_.k.rows + first;
    const bool most = a_.heads == V2DROP_HEADS_MAX;
    for (int64_t i = 0; i < queries(e); ++i) {
      float of_query[kBlock];
      std::fill(of_query, of_query + n, most && a_.dot ? -std::numeric_limits<float>::infinity() : 0.0f);
      for (int64_t h = 0; h < a_.q.heads; ++h) {
        const float factor = factors_[vector(e, h, i) * blocks_ + block];
        if (factor != factor) {  // a NaN among the keys that the query sees makes these NaN, and no others
          unsigned char visible[kBlock];
          const int64_t seen = reach(e, i, first, n);
          read_mask(a_.key_mask, e, first, seen, visible);
          for (int64_t j = 0; j < seen; ++j) of_query[j] = visible[j] ? factor : of_query[j];
        } else if (factor != 0) {
          (most ? k_.max_scaled : k_.add_scaled)(of_query, weights(e, h, i, block), factor, n);
        }
      }
      (a_.queries == V2DROP_QUERIES_L2 ? k_.add_squares(total, of_query, n) : k_.add_scaled(total, of_query, 1.0f, n));
    }
    if (!last) return;
    const float there = static_cast<float>(std::max<size_t>(1, present_[entry0_ + e].row.size()));
    for (int64_t j = 0; j < n; ++j) {
      float score = a_.queries == V2DROP_QUERIES_L2 ? std::sqrt(total[j]) : total[j] / there;
      if (a_.droppable.data && !*a_.droppable.at(entry0_ + e, first + j)) score = 0;
      __builtin_memcpy(a_.scores.at(entry0_ + e, first + j), &score, sizeof score);
    }
  }

  const AttentionRequest& a_;
  const Kernels& k_;
  const int64_t entry0_, entries_;
  const std::vector<Present>& present_;
  const int64_t query0_;
  float* const scores_;
  int64_t group_, blocks_, pitch_, queries_ = 0;
  // [entry][head][query][block]: maxima that become factors, sums, and the sums by which heads are chosen.
  Floats weights_, packed_, factors_, sums_, chosen_by_;
};

}  // namespace

namespace cpu {

void attention(const AttentionRequest& a, const v2drop_context& context) {
  std::vector<Present> present(static_cast<size_t>(a.q.batch));
  int64_t most = 1;
  for (int64_t b = 0; b < a.q.batch; ++b) {
    Present& of_entry = present[static_cast<size_t>(b)];
    for (int64_t i = 0; i < a.q.rows; ++i) {
      int64_t row;
      __builtin_memcpy(&row, a.query_rows.at(b, i), sizeof row);
      if (row < 0) continue;
      of_entry.query.push_back(i);
      of_entry.row.push_back(std::min(row, a.k.rows));
    }
    most = std::max(most, static_cast<int64_t>(of_entry.row.size()));
  }
  const int64_t query_bytes = a.q.heads * std::max<int64_t>(1, a.k.rows) * static_cast<int64_t>(sizeof(float));
  const int64_t queries = std::min(most, std::max<int64_t>(1, kScratchBytes / query_bytes));
  const int64_t entries = queries < most ? 1 : std::max<int64_t>(1, kGroupBytes / (query_bytes * queries));
  const int useful = useful_threads(context.threads, a.k.bytes());
  for (int64_t entry = 0; entry < a.q.batch; entry += entries) {
    const int64_t n = std::min(entries, a.q.batch - entry);
    const Floats scores = floats(n * a.k.rows);
    std::fill_n(scores.get(), n * a.k.rows, 0.0f);
    for (int64_t query = 0; query < most; query += queries) {
      Step(a, entry, n, query, queries, present, scores.get()).run(useful, query + queries >= most);
    }
  }
}

}  // namespace cpu
}  // namespace v2drop
