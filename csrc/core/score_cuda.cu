// SPDX-License-Identifier: Apache-2.0
//
// Variation scores and their gradients on the GPU.
#include "launch.cuh"
#include "ops.h"
#include "score_cuda.cuh"

namespace v2drop {
namespace {

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm) score_kernel(const __grid_constant__ Scored scored, int groups) {
  trigger_next();
  BlockCounts<kThreads> counts;
  RowSums sums;
  score_rows<T, ALIGNED>(scored, counts, sums, static_cast<int>(blockIdx.x) * groups * (kThreads / 32 / scored.warps), groups);
}

struct Gradients {
  const char* grad;
  int64_t grad_batch, grad_row;
  char *to_prev, *to_cur;  // NULL: not wanted
  int64_t prev_batch, prev_row, cur_batch, cur_row;
};

// d(score)/d(prev) and d(score)/d(cur), times grad, as factors of prev and cur.
struct Factors {
  float prev_of_prev, prev_of_cur, cur_of_prev, cur_of_cur;
};

__device__ Factors factors_of(const Sums& sums, float grad, int metric) {
  if (metric == V2DROP_COSINE) {
    // d(1 - cos)/dy = -(x / (|x||y|) - cos y / |y|^2), and the same with x and y exchanged.
    if (sums.prev == 0 || sums.cur == 0) return {0, 0, 0, 0};
    const float cosine = 1.0f - score_of(sums, metric);
    const float cross = __fdiv_rn(-grad, __fsqrt_rn(sums.prev) * __fsqrt_rn(sums.cur));
    return {__fdiv_rn(grad * cosine, sums.prev), cross, cross, __fdiv_rn(grad * cosine, sums.cur)};
  }
  const float scale = metric == V2DROP_L1 ? grad : sums.change == 0 ? 0.0f : __fdiv_rn(grad, __fsqrt_rn(sums.change));
  return {scale, -scale, -scale, scale};
}

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

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    score_backward_kernel(const __grid_constant__ Scored s, const __grid_constant__ Gradients to) {
  constexpr int kElements = Vector<T>::kElements;
  RowSums row_sums;
  const int lanes = 32 * s.warps, lane = thread_id() % lanes;
  const int slot = static_cast<int>(blockIdx.x) * (kThreads / lanes) + thread_id() / lanes;
  const bool inside = slot < s.slots;
  const int entry = inside ? slot / s.rows : 0, position = inside ? slot % s.rows : 0;
  const char *prev = s.prev.at(entry, position), *cur = s.cur.at(entry, position);
  Sums sums;
  if (s.metric != V2DROP_L1) {  // the second walk finds the row in L1 or L2
    sums = sum_row<T, ALIGNED, true>(prev, cur, s.dim, lane, lanes, inside, s.metric, V2DROP_FLOAT32);
    sums = row_sums.total(sums, s.warps, s.metric == V2DROP_COSINE);
  }
  if (!inside) return;
  const float grad = *reinterpret_cast<const float*>(to.grad + entry * to.grad_batch + position * to.grad_row);
  const Factors f = factors_of(sums, grad, s.metric);
  char* to_prev = to.to_prev ? to.to_prev + entry * to.prev_batch + position * to.prev_row : nullptr;
  char* to_cur = to.to_cur ? to.to_cur + entry * to.cur_batch + position * to.cur_row : nullptr;
  for (int j = lane * kElements; j < s.dim; j += lanes * kElements) {
    const Vector<T> x = load_vector<T, ALIGNED, false>(prev, j, s.dim), y = load_vector<T, ALIGNED, false>(cur, j, s.dim);
    Vector<T> gx, gy;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float a = T::widen(x.elements[e]), b = T::widen(y.elements[e]), d = b - a;
      float of_prev, of_cur;
      if (s.metric == V2DROP_COSINE) {
        of_prev = f.prev_of_prev * a + f.prev_of_cur * b;
        of_cur = f.cur_of_prev * a + f.cur_of_cur * b;
      } else {
        // NaN stays NaN, and the subgradient at a kink is 0.
        const float direction = s.metric == V2DROP_L2 ? d : d > 0 ? 1.0f : d < 0 ? -1.0f : d;
        of_cur = f.cur_of_cur * direction;
        of_prev = -of_cur;
      }
      gx.elements[e] = T::narrow(of_prev);
      gy.elements[e] = T::narrow(of_cur);
    }
    if (to_prev) store_vector<T, ALIGNED>(to_prev, j, s.dim, gx);
    if (to_cur) store_vector<T, ALIGNED>(to_cur, j, s.dim, gy);
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
    launch(score_kernel<decltype(type), decltype(is_aligned)::value>, score_blocks(scored, groups), kThreads, LaunchDependency::kNone,
           stream, scored, groups);
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
