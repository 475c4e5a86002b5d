// SPDX-License-Identifier: Apache-2.0
//
// Variation scores and their gradients on the GPU.
#include "launch.cuh"
#include "ops.h"
#include "score_cuda.cuh"

namespace v2drop {
namespace {

template <class Sums, class T, bool ALIGNED>
__device__ void score_block(const Scored& scored, int groups) {
  trigger_next();
  BlockCounts<kThreads> counts;
  RowSums sums;
  score_rows<Sums, T, ALIGNED>(scored, counts, sums, static_cast<int>(blockIdx.x) * groups * (kThreads / 32 / scored.warps), groups);
}

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm) score_kernel(const __grid_constant__ Scored scored, int groups) {
  score_block<ChangeSums, T, ALIGNED>(scored, groups);
}

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm) cosine_score(const __grid_constant__ Scored scored, int groups) {
  score_block<CosineSums, T, ALIGNED>(scored, groups);
}

struct Gradients {
  const char* grad;
  int64_t grad_batch, grad_row;
  char *to_prev, *to_cur;  // NULL: not wanted
  int64_t prev_batch, prev_row, cur_batch, cur_row;
};

// The gradients of a row's elements, from the sums of the row and the gradient of its score.
class ChangeGradient {
 public:
  using Sums = ChangeSums;
  __device__ ChangeGradient(const Sums& sums, float grad, int metric) {
    metric_ = metric;
    scale_ = metric == V2DROP_L1 ? grad : sums.values[0] == 0 ? 0.0f : __fdiv_rn(grad, __fsqrt_rn(sums.values[0]));
  }
  __device__ float of_cur(float x, float y) const {
    const float d = y - x;
    // NaN stays NaN, and the subgradient at a kink is 0.
    return scale_ * (metric_ == V2DROP_L2 ? d : d > 0 ? 1.0f : d < 0 ? -1.0f : d);
  }
  __device__ float of_prev(float x, float y) const { return -of_cur(x, y); }

 private:
  int metric_;
  float scale_;
};

// d(1 - cos)/dy = -(x / (|x||y|) - cos y / |y|^2), and the same with x and y exchanged.
class CosineGradient {
 public:
  using Sums = CosineSums;
  __device__ CosineGradient(const Sums& sums, float grad, int) {
    if (sums.has_zero()) return;
    const double cosine = 1 - sums.distance();
    cross_ = __ddiv_rn(-grad, sums.product());
    own_prev_ = __ddiv_rn(grad * cosine, sums.values[0]);
    own_cur_ = __ddiv_rn(grad * cosine, sums.values[1]);
  }
  __device__ float of_cur(double x, double y) const { return static_cast<float>(x * cross_ + y * own_cur_); }
  __device__ float of_prev(double x, double y) const { return static_cast<float>(y * cross_ + x * own_prev_); }

 private:
  double cross_ = 0, own_prev_ = 0, own_cur_ = 0;
};

template <class T, bool ALIGNED>
__device__ void store_vector(char* row, int j, int dim, const Vector<T>& vector) {
  if constexpr (ALIGNED) {
    uint4 bits;
    memcpy(&bits, &vector, sizeof bits);
    *reinterpret_cast<uint4*>(row + static_cast<int64_t>(j) * sizeof(typename T::Element)) = bits;
  } else {
#pragma unroll
    for (int e = 0; e < Vector<T>::kElements; ++e) {
      if (j + e < dim) reinterpret_cast<typename T::Element*>(row)[j + e] = vector.elements[e];
    }
  }
}

// A row of the backward kernel, and where its gradients go: NULL where none is wanted.
struct BackwardRow {
  const char *prev, *cur;
  char *to_prev, *to_cur;
  float grad;
  int lane, lanes;
  bool inside;
};

template <class Gradient, class T, bool ALIGNED>
__device__ void backward_row(const Scored& s, const BackwardRow& row) {
  constexpr int kElements = Vector<T>::kElements;
  typename Gradient::Sums sums;
  if (s.metric != V2DROP_L1) {  // the second walk finds the row in L1 or L2
    sums = sum_row<typename Gradient::Sums, T, ALIGNED, true>(row.prev, row.cur, s.dim, row.lane, row.lanes, row.inside, s.metric,
                                                              V2DROP_FLOAT32);
    sums = RowSums().total(sums, s.warps);
  }
  if (!row.inside) return;
  const Gradient gradient(sums, row.grad, s.metric);
  for (int j = row.lane * kElements; j < s.dim; j += row.lanes * kElements) {
    const Vector<T> x = load_vector<T, ALIGNED, false>(row.prev, j, s.dim), y = load_vector<T, ALIGNED, false>(row.cur, j, s.dim);
    Vector<T> to;
    if (row.to_prev) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) to.elements[e] = T::narrow(gradient.of_prev(T::widen(x.elements[e]), T::widen(y.elements[e])));
      store_vector<T, ALIGNED>(row.to_prev, j, s.dim, to);
    }
    if (row.to_cur) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) to.elements[e] = T::narrow(gradient.of_cur(T::widen(x.elements[e]), T::widen(y.elements[e])));
      store_vector<T, ALIGNED>(row.to_cur, j, s.dim, to);
    }
  }
}

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    score_backward_kernel(const __grid_constant__ Scored s, const __grid_constant__ Gradients to) {
  const int lanes = 32 * s.warps;
  const int slot = static_cast<int>(blockIdx.x) * (kThreads / lanes) + thread_id() / lanes;
  const bool inside = slot < s.slots;
  const int entry = inside ? slot / s.rows : 0, position = inside ? slot % s.rows : 0;
  const BackwardRow row = {s.prev.at(entry, position),
                           s.cur.at(entry, position),
                           to.to_prev ? to.to_prev + entry * to.prev_batch + position * to.prev_row : nullptr,
                           to.to_cur ? to.to_cur + entry * to.cur_batch + position * to.cur_row : nullptr,
                           *reinterpret_cast<const float*>(to.grad + entry * to.grad_batch + position * to.grad_row),
                           thread_id() % lanes,
                           lanes,
                           inside};
  if (s.metric == V2DROP_COSINE) {
    backward_row<CosineGradient, T, ALIGNED>(s, row);
  } else {
    backward_row<ChangeGradient, T, ALIGNED>(s, row);
  }
}

// Calls body(T(), ALIGNED) for the dtype.
template <class Body>
void for_dtype(int32_t dtype, bool aligned, const Body& body) {
  const auto with = [&](auto type) {
    if (aligned) {
      body(type, std::true_type());
    } else {
      body(type, std::false_type());
    }
  };
  if (dtype == V2DROP_FLOAT32) {
    with(Float32());
  } else if (dtype == V2DROP_FLOAT16) {
    with(Float16());
  } else {
    with(BFloat16());
  }
}

}  // namespace

DeviceRows device_rows(const RowView& view) { return {view.data, view.batch_stride, view.row_stride}; }

bool is_aligned(const RowView& view) {
  const int64_t bits = reinterpret_cast<intptr_t>(view.data) | view.batch_stride | view.row_stride | view.dim * kDtypeBytes[view.dtype];
  return bits % 16 == 0;
}

Scored describe_scores(const Hidden& hidden) {
  const RowView& rows = hidden.prev;
  if (rows.dim > INT32_MAX / 2) fail("prev: rows of more than 2^30 elements");
  if (rows.batch * rows.rows > kMaxRows) fail("prev: more than 2^30 rows");
  Scored scored = {};
  scored.prev = device_rows(hidden.prev);
  scored.cur = device_rows(hidden.cur);
  scored.dim = static_cast<int32_t>(rows.dim);
  scored.metric = hidden.metric;
  scored.score_dtype = hidden.score_dtype;
  scored.rows = static_cast<int32_t>(rows.rows);
  scored.slots = static_cast<int32_t>(rows.batch * rows.rows);
  scored.segments.alike.n = rows.rows;
  const int64_t warp_bytes = 32 * 16 * kScoreLoads;
  scored.warps = 1;
  while (scored.warps < kThreads / 32 && scored.warps * warp_bytes < rows.dim * kDtypeBytes[rows.dtype]) scored.warps *= 2;
  return scored;
}

int64_t score_blocks(const Scored& scored, int groups) {
  const int64_t rows = static_cast<int64_t>(groups) * (kThreads / 32 / scored.warps);
  return (scored.slots + rows - 1) / rows;
}

LaunchDependency launch_score(const Scored& scored, int32_t dtype, bool aligned, void* stream) {
  const int groups = scored.segments.rows ? kTableRowGroups : 1;
  for_dtype(dtype, aligned, [&](auto type, auto is_aligned) {
    constexpr bool kAligned = decltype(is_aligned)::value;
    const auto kernel = scored.metric == V2DROP_COSINE ? cosine_score<decltype(type), kAligned> : score_kernel<decltype(type), kAligned>;
    launch(kernel, score_blocks(scored, groups), kThreads, LaunchDependency::kNone, stream, scored, groups);
  });
  return scored.slots > 0 ? LaunchDependency::kDependent : LaunchDependency::kNone;
}

namespace cuda {

void score(const ScoreRequest& request, const v2drop_context& context) {
  const Hidden& hidden = request.hidden;
  Scored scored = describe_scores(hidden);
  scored.scores = request.scores.data;
  scored.scores_batch = request.scores.batch_stride;
  scored.scores_row = request.scores.row_stride;
  launch_score(scored, hidden.prev.dtype, is_aligned(hidden.prev) && is_aligned(hidden.cur), context.stream);
}

void score_backward(const ScoreBackwardRequest& request, const v2drop_context& context) {
  const RowView &prev = request.hidden.prev, &cur = request.hidden.cur, &grad = request.grad;
  const RowView &to_prev = request.grad_prev, &to_cur = request.grad_cur;
  if (!to_prev.data && !to_cur.data) return;
  const Scored scored = describe_scores(request.hidden);
  const Gradients gradients = {grad.data,          grad.batch_stride,   grad.row_stride,  to_prev.data, to_cur.data, to_prev.batch_stride,
                               to_prev.row_stride, to_cur.batch_stride, to_cur.row_stride};
  const bool aligned =
      is_aligned(prev) && is_aligned(cur) && (!to_prev.data || is_aligned(to_prev)) && (!to_cur.data || is_aligned(to_cur));
  for_dtype(prev.dtype, aligned, [&](auto type, auto is_aligned) {
    launch(score_backward_kernel<decltype(type), decltype(is_aligned)::value>, score_blocks(scored, 1), kThreads, LaunchDependency::kNone,
           context.stream, scored, gradients);
  });
}

}  // namespace cuda
}  // namespace v2drop
