// SPDX-License-Identifier: Apache-2.0
//
// Weighted sums of rows by lists of edges, and their gradients. An output row is summed by one thread in the order of its edges.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "thread_pool.h"

namespace v2drop {
namespace {

constexpr int64_t kBytesPerChunk = 256 << 10;

// The message is that of the public functions of Python, for the caller of either.
void check_lists(const Edges& edges, int64_t rows) {
  for (int64_t b = 0; b < edges.batch; ++b) {
    const int64_t *offsets = edges.offsets_of(b), *from = edges.rows_of(b);
    bool ascend = offsets[0] >= 0 && offsets[edges.targets] <= edges.count;
    for (int64_t k = 0; k < edges.targets; ++k) ascend &= offsets[k] <= offsets[k + 1];
    if (!ascend) fail("offsets must ascend from 0 to at most the %" PRId64 " edges, got others", edges.count);
    uint64_t most = 0;
    for (int64_t e = offsets[0]; e < offsets[edges.targets]; ++e) most = std::max(most, static_cast<uint64_t>(from[e]));
    if (offsets[0] == offsets[edges.targets] || most < static_cast<uint64_t>(rows)) continue;
    for (int64_t e = offsets[0]; e < offsets[edges.targets]; ++e) {
      if (from[e] < 0 || from[e] >= rows) fail("rows must lie in [0, %" PRId64 "), got %" PRId64, rows, from[e]);
    }
  }
}

// Calls body(entry, row) for the rows of all entries, in chunks of about kBytesPerChunk of what they move together.
template <class Body>
void for_each(int64_t batch, int64_t rows, int64_t bytes, int32_t threads, const Body& body) {
  const int64_t total = batch * rows;
  if (total == 0) return;
  const int64_t chunk = std::max<int64_t>(1, static_cast<int64_t>(kBytesPerChunk / std::max(1.0, static_cast<double>(bytes) / total)));
  parallel_for((total + chunk - 1) / chunk, useful_threads(threads, bytes), [&](int64_t c) {
    for (int64_t i = c * chunk; i < std::min(total, (c + 1) * chunk); ++i) body(i / rows, i % rows);
  });
}

// The sum of the weights of an output row; 0 makes its mean 0.
float whole_of(const float* weights, int64_t begin, int64_t end) {
  if (!weights) return static_cast<float>(end - begin);
  float whole = 0;
  for (int64_t e = begin; e < end; ++e) whole += weights[e];
  return whole;
}

// The edges of an entry in the order of their source rows, with the output row and the share of each.
struct Transposed {
  std::vector<int64_t> starts, targets;
  std::vector<float> shares;
};

Transposed transpose(const Edges& edges, int64_t entry, int64_t rows, const std::vector<float>& inverse) {
  const int64_t *offsets = edges.offsets_of(entry), *from = edges.rows_of(entry);
  const float* weights = edges.weights_of(entry);
  const int64_t first = offsets[0], last = offsets[edges.targets];
  Transposed found;
  found.starts.assign(static_cast<size_t>(rows) + 1, 0);
  found.targets.resize(static_cast<size_t>(last - first));
  found.shares.resize(static_cast<size_t>(last - first));
  for (int64_t e = first; e < last; ++e) ++found.starts[static_cast<size_t>(from[e]) + 1];
  for (int64_t n = 0; n < rows; ++n) found.starts[static_cast<size_t>(n) + 1] += found.starts[static_cast<size_t>(n)];
  std::vector<int64_t> next(found.starts.begin(), found.starts.end() - 1);
  for (int64_t k = 0; k < edges.targets; ++k) {
    for (int64_t e = offsets[k]; e < offsets[k + 1]; ++e) {
      const size_t at = static_cast<size_t>(next[static_cast<size_t>(from[e])]++);
      found.targets[at] = k;
      found.shares[at] = (weights ? weights[e] : 1.0f) * inverse[static_cast<size_t>(k)];
    }
  }
  return found;
}

// The gradients of the weights of one output row: a weight of a mean also lessens the share of its neighbours.
void weights_backward(const MergeBackwardRequest& r, int64_t b, int64_t k, float inverse) {
  const Edges& edges = r.edges;
  const auto dot = kernels().dot_row[r.x.dtype];
  const float* weights = edges.weights_of(b);
  float *to = r.grad_weights + b * edges.count, sum = 0;
  const int64_t begin = edges.offsets_of(b)[k], end = edges.offsets_of(b)[k + 1];
  for (int64_t e = begin; e < end; ++e) {
    to[e] = inverse * dot(r.x.at(b, edges.rows_of(b)[e]), r.grad.at(b, k), r.x.dim);
    sum += (weights ? weights[e] : 1.0f) * to[e];
  }
  if (!r.mean) return;
  for (int64_t e = begin; e < end; ++e) to[e] -= inverse * sum;
}

}  // namespace
namespace cpu {

void merge(const MergeRequest& r, const v2drop_context& context) {
  const Edges& edges = r.edges;
  check_lists(edges, r.x.rows);
  const auto merge_row = kernels().merge_row[r.x.dtype];
  const int64_t row_bytes = std::max<int64_t>(32, r.x.dim * kDtypeBytes[r.x.dtype]);
  for_each(edges.batch, edges.targets, (edges.count + edges.targets) * edges.batch * row_bytes, context.threads, [&](int64_t b, int64_t k) {
    const int64_t begin = edges.offsets_of(b)[k], end = edges.offsets_of(b)[k + 1];
    const float* weights = edges.weights_of(b);
    const float whole = r.mean ? whole_of(weights, begin, end) : 1.0f;
    merge_row(r.x.at(b, 0), r.x.row_stride, edges.rows_of(b) + begin, weights ? weights + begin : nullptr, whole == 0 ? 0 : end - begin,
              r.x.dim, whole == 0 ? 1.0f : whole, r.out.at(b, k));
  });
}

void merge_backward(const MergeBackwardRequest& r, const v2drop_context& context) {
  const Edges& edges = r.edges;
  check_lists(edges, r.x.rows);
  const int64_t bytes = edges.count * std::max<int64_t>(32, r.x.dim * kDtypeBytes[r.x.dtype]);
  for (int64_t b = 0; b < edges.batch; ++b) {
    const int64_t* offsets = edges.offsets_of(b);
    std::vector<float> inverse(static_cast<size_t>(edges.targets), 1.0f);
    for (int64_t k = 0; r.mean && k < edges.targets; ++k) {
      const float whole = whole_of(edges.weights_of(b), offsets[k], offsets[k + 1]);
      inverse[static_cast<size_t>(k)] = whole == 0 ? 0.0f : 1 / whole;
    }
    if (r.grad_weights) {
      float* to = r.grad_weights + b * edges.count;
      std::fill(to, to + offsets[0], 0.0f);
      std::fill(to + offsets[edges.targets], to + edges.count, 0.0f);
      for_each(1, edges.targets, 2 * bytes, context.threads,
               [&](int64_t, int64_t k) { weights_backward(r, b, k, inverse[static_cast<size_t>(k)]); });
    }
    if (!r.grad_x.data) continue;
    const Transposed back = transpose(edges, b, r.x.rows, inverse);
    for_each(1, r.x.rows, 2 * bytes, context.threads, [&](int64_t, int64_t n) {
      const int64_t begin = back.starts[static_cast<size_t>(n)], count = back.starts[static_cast<size_t>(n) + 1] - begin;
      kernels().merge_row[r.x.dtype](r.grad.at(b, 0), r.grad.row_stride, back.targets.data() + begin, back.shares.data() + begin, count,
                                     r.x.dim, 1.0f, r.grad_x.at(b, n));
    });
  }
}

}  // namespace cpu
}  // namespace v2drop
