// SPDX-License-Identifier: Apache-2.0
//
// Weighted sums of rows by lists of edges on the GPU, and their gradients. A thread sums one vector of an output row over its edges, in
// their order: no atomics, so the result does not depend on scheduling. What the lists hold is clamped, for the host cannot look at it.
#include <algorithm>

#include "dots_cuda.cuh"
#include "launch.cuh"
#include "ops.h"

namespace v2drop {
namespace {

struct Rows {
  char* data;
  int64_t batch_stride, row_stride;

  __device__ char* at(int64_t entry, int64_t position) const { return data + entry * batch_stride + position * row_stride; }
};

Rows rows_of(const RowView& x) { return {x.data, x.batch_stride, x.row_stride}; }

// The edges of a sum: `offsets` [batch, targets + 1] into lists [batch, edges].
struct Lists {
  const int64_t *offsets, *rows;
  const float* weights;
  int64_t targets, edges, sources;  // of an entry; sources: rows that an edge may name
};

__device__ void bounds(const Lists& l, int64_t entry, int64_t target, int64_t* begin, int64_t* end) {
  const int64_t* at = l.offsets + entry * (l.targets + 1) + target;
  *begin = at[0] < 0 ? 0 : at[0];
  *end = at[1] < l.edges ? at[1] : l.edges;
}

template <class T, bool ALIGNED>
__device__ void store_vector(char* row, int j, int dim, const float (&sums)[Vector<T>::kElements]) {
  using Element = typename T::Element;
  if constexpr (ALIGNED) {
    Vector<T> packed;
#pragma unroll
    for (int e = 0; e < Vector<T>::kElements; ++e) packed.elements[e] = T::narrow(sums[e]);
    uint4 bits;
    memcpy(&bits, &packed, sizeof bits);
    *reinterpret_cast<uint4*>(row + static_cast<int64_t>(j) * sizeof(Element)) = bits;
  } else {
#pragma unroll
    for (int e = 0; e < Vector<T>::kElements; ++e) {
      if (j + e < dim) reinterpret_cast<Element*>(row)[j + e] = T::narrow(sums[e]);
    }
  }
}

template <class T>
__device__ void add_scaled(float (&sums)[Vector<T>::kElements], const Vector<T>& x, float weight) {
#pragma unroll
  for (int e = 0; e < Vector<T>::kElements; ++e) sums[e] = __fadd_rn(sums[e], __fmul_rn(weight, T::widen(x.elements[e])));
}

struct Merge {
  Rows x, out;
  Lists lists;
  int32_t dim, vectors, mean;  // vectors: of a row
  int64_t all;                 // vectors of all output rows
};

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Merge m) {
  const int64_t flat = static_cast<int64_t>(blockIdx.x) * kThreads + thread_id();
  if (flat >= m.all) return;
  const int64_t row = flat / m.vectors, entry = row / m.lists.targets;
  const int j = static_cast<int>(flat % m.vectors) * Vector<T>::kElements;
  int64_t edge, end;
  bounds(m.lists, entry, row % m.lists.targets, &edge, &end);
  float sums[Vector<T>::kElements] = {}, whole = 0;
  for (; edge < end; ++edge) {
    const int64_t at = entry * m.lists.edges + edge, from = m.lists.rows[at];
    if (from < 0 || from >= m.lists.sources) continue;
    const float weight = m.lists.weights ? m.lists.weights[at] : 1.0f;
    add_scaled<T>(sums, load_vector<T, ALIGNED, true>(m.x.at(entry, from), j, m.dim), weight);
    whole += weight;
  }
  if (m.mean) {
#pragma unroll
    for (int e = 0; e < Vector<T>::kElements; ++e) sums[e] = whole == 0 ? 0.0f : __fdiv_rn(sums[e], whole);
  }
  store_vector<T, ALIGNED>(m.out.at(entry, row % m.lists.targets), j, m.dim, sums);
}

struct Shares {
  Rows x, grad;
  Lists lists;
  int32_t dim, mean;
  int64_t all;  // output rows of all entries, at least one for each
  // By edge: its share of its output row, that row (-1: none), and the gradient of its weight (or null).
  float* shares;
  int32_t* targets;
  float* grad_weights;
};

__device__ void no_share(const Shares& s, int64_t at) {
  s.shares[at] = 0;
  s.targets[at] = -1;
  if (s.grad_weights) s.grad_weights[at] = 0;
}

template <class T, bool ALIGNED>
__device__ float row_dot(const char* x, const char* y, int dim) {
  float sum[1] = {};
  for (int j = lane_id() * Vector<T>::kElements; j < dim; j += 32 * Vector<T>::kElements) {
    sum[0] = add_dot<T>(sum[0], load_vector<T, ALIGNED, true>(x, j, dim), load_vector<T, ALIGNED, true>(y, j, dim));
  }
  sum_over_lanes<32>(sum);
  return sum[0];
}

// A warp takes one output row and its edges; the first and the last of an entry also those that belong to none.
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads) shares_kernel(const __grid_constant__ Shares s) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_id();
  if (row >= s.all) return;
  const Lists& l = s.lists;
  if (l.targets == 0) {  // a warp for every entry, whose edges are all unused
    for (int64_t e = lane_id(); e < l.edges; e += 32) no_share(s, row * l.edges + e);
    return;
  }
  const int64_t entry = row / l.targets, target = row % l.targets, base = entry * l.edges;
  int64_t begin, end;
  bounds(l, entry, target, &begin, &end);
  if (target == 0) {
    for (int64_t e = lane_id(); e < (begin < l.edges ? begin : l.edges); e += 32) no_share(s, base + e);
  }
  if (target == l.targets - 1) {
    for (int64_t e = (end > 0 ? end : 0) + lane_id(); e < l.edges; e += 32) no_share(s, base + e);
  }
  const auto weight = [&](int64_t e) { return l.weights ? l.weights[base + e] : 1.0f; };
  const auto there = [&](int64_t e) { return l.rows[base + e] >= 0 && l.rows[base + e] < l.sources; };
  float inverse = 1;
  if (s.mean) {
    float whole[1] = {};
    for (int64_t e = begin + lane_id(); e < end; e += 32) whole[0] += there(e) ? weight(e) : 0.0f;
    sum_over_lanes<32>(whole);
    inverse = whole[0] == 0 ? 0.0f : __fdiv_rn(1.0f, whole[0]);
  }
  for (int64_t e = begin + lane_id(); e < end; e += 32) {
    s.shares[base + e] = __fmul_rn(weight(e), inverse);
    s.targets[base + e] = there(e) ? static_cast<int32_t>(target) : -1;
  }
  if (!s.grad_weights) return;
  float sum = 0;
  for (int64_t e = begin; e < end; ++e) {
    const bool used = there(e);
    const char* x = s.x.at(entry, used ? l.rows[base + e] : 0);
    const float dot = used ? __fmul_rn(inverse, row_dot<T, ALIGNED>(x, s.grad.at(entry, target), s.dim)) : 0.0f;
    sum += __fmul_rn(weight(e), dot);
    if (lane_id() == 0) s.grad_weights[base + e] = dot;
  }
  if (!s.mean) return;
  __syncwarp();
  for (int64_t e = begin + lane_id(); e < end; e += 32) {
    if (there(e)) s.grad_weights[base + e] -= __fmul_rn(inverse, sum);
  }
}

struct Back {
  Rows grad, grad_x;
  Lists lists;  // offsets by source row, and `rows` the numbers of edges
  const float* shares;
  const int32_t* targets;
  int64_t grad_rows;
  int32_t dim, vectors;
  int64_t all;
};

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads) back_kernel(const __grid_constant__ Back b) {
  const int64_t flat = static_cast<int64_t>(blockIdx.x) * kThreads + thread_id();
  if (flat >= b.all) return;
  const int64_t row = flat / b.vectors, entry = row / b.lists.targets, base = entry * b.lists.edges;
  const int j = static_cast<int>(flat % b.vectors) * Vector<T>::kElements;
  int64_t i, end;
  bounds(b.lists, entry, row % b.lists.targets, &i, &end);
  float sums[Vector<T>::kElements] = {};
  for (; i < end; ++i) {
    const int64_t edge = b.lists.rows[base + i];
    if (edge < 0 || edge >= b.lists.edges) continue;
    const int64_t target = b.targets[base + edge];
    if (target < 0 || target >= b.grad_rows) continue;
    add_scaled<T>(sums, load_vector<T, ALIGNED, true>(b.grad.at(entry, target), j, b.dim), b.shares[base + edge]);
  }
  store_vector<T, ALIGNED>(b.grad_x.at(entry, row % b.lists.targets), j, b.dim, sums);
}

int64_t blocks_of(int64_t work, int64_t of_block) { return (work + of_block - 1) / of_block; }

int32_t vectors_of(const RowView& x) { return static_cast<int32_t>((x.dim * kDtypeBytes[x.dtype] + 15) / 16); }

void check_sizes(const RowView& x, const Edges& edges) {
  check_dim("x", x.dim);
  if (edges.targets > INT32_MAX) fail("offsets: more than 2^31 output rows");
}

}  // namespace
namespace cuda {

void merge(const MergeRequest& r, const v2drop_context& context) {
  const Edges& e = r.edges;
  check_sizes(r.x, e);
  const int32_t vectors = vectors_of(r.x);
  const Merge m = {rows_of(r.x),
                   rows_of(r.out),
                   {e.offsets, e.rows, e.weights, e.targets, e.count, r.x.rows},
                   static_cast<int32_t>(r.x.dim),
                   vectors,
                   r.mean,
                   e.batch * e.targets * vectors};
  for_row_type(r.x.dtype, r.x.dim, is_aligned(r.x) && is_aligned(r.out), [&](auto type, auto, auto aligned) {
    launch(merge_kernel<decltype(type), decltype(aligned)::value>, blocks_of(m.all, kThreads), kThreads, LaunchDependency::kNone,
           context.stream, m);
  });
}

void merge_backward(const MergeBackwardRequest& r, const v2drop_context& context) {
  const Edges& e = r.edges;
  check_sizes(r.x, e);
  Workspace workspace(context);
  const int64_t edges = e.batch * e.count;
  const Shares s = {rows_of(r.x),
                    rows_of(r.grad),
                    {e.offsets, e.rows, e.weights, e.targets, e.count, r.x.rows},
                    static_cast<int32_t>(r.x.dim),
                    r.mean,
                    e.batch * std::max<int64_t>(e.targets, 1),
                    workspace.take<float>(edges),
                    workspace.take<int32_t>(edges),
                    r.grad_weights};
  const bool aligned_rows = is_aligned(r.x) && is_aligned(r.grad) && (!r.grad_x.data || is_aligned(r.grad_x));
  for_row_type(r.x.dtype, r.x.dim, aligned_rows, [&](auto type, auto, auto aligned) {
    using T = decltype(type);
    constexpr bool kAligned = decltype(aligned)::value;
    launch(shares_kernel<T, kAligned>, blocks_of(s.all, kThreads / 32), kThreads, LaunchDependency::kNone, context.stream, s);
    if (!r.grad_x.data) return;
    const int32_t vectors = vectors_of(r.x);
    const Back b = {rows_of(r.grad),
                    rows_of(r.grad_x),
                    {r.back_offsets, r.back_edges, nullptr, r.x.rows, e.count, e.count},
                    s.shares,
                    s.targets,
                    e.targets,
                    static_cast<int32_t>(r.x.dim),
                    vectors,
                    e.batch * r.x.rows * vectors};
    launch(back_kernel<T, kAligned>, blocks_of(b.all, kThreads), kThreads, LaunchDependency::kNone, context.stream, b);
  });
}

}  // namespace cuda
}  // namespace v2drop
