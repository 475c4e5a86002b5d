// SPDX-License-Identifier: Apache-2.0
//
// The score of a row and its gradients. A row is summed in kLanes partial sums, whatever the vector width, and these are added pairwise in
// one fixed order.
#ifndef V2DROP_CORE_KERNELS_SCORE_H_
#define V2DROP_CORE_KERNELS_SCORE_H_

#include <type_traits>

#include "kernels_cosine.h"
#include "simd.h"

namespace v2drop {
namespace {  // internal linkage: see kernels.cpp

// Partial sums of a row, added pairwise at the end: lane l to lane l + half.
struct Sum {
  Pair lanes[kPairs] = {};

  float total() const {
    F32 v[kPairs];
    V2DROP_UNROLL
    for (int i = 0; i < kPairs; ++i) v[i] = lanes[i].first + lanes[i].second;
    V2DROP_UNROLL
    for (int half = kPairs / 2; half > 0; half /= 2) {
      V2DROP_UNROLL
      for (int i = 0; i < half; ++i) v[i] += v[i + half];
    }
    float f[kWidth];
    std::memcpy(f, v, sizeof f);
    V2DROP_UNROLL
    for (int half = kWidth / 2; half > 0; half /= 2) {
      V2DROP_UNROLL
      for (int i = 0; i < half; ++i) f[i] += f[i + half];
    }
    return f[0];
  }
};

template <class R>
inline float round_one(float x) {
  return R::round(splat(x))[0];
}

// Each metric: what it sums over a row (x from prev, y from cur), the score, and the two gradients given the finished sums.
template <class R>
struct L2 {
  static constexpr int kSums = 1;
  static void terms(F32 x, F32 y, F32 (&term)[kSums]) {
    const F32 d = R::round(y - x);
    term[0] = d * d;
  }
  static float score(const float (&sums)[kSums]) { return __builtin_sqrtf(sums[0]); }

  F32 scale;
  L2(float grad, const float (&sums)[kSums]) : scale(splat(sums[0] == 0 ? 0.0f : grad / __builtin_sqrtf(sums[0]))) {}
  F32 to_cur(F32 x, F32 y) const { return scale * (y - x); }
  F32 to_prev(F32 x, F32 y) const { return scale * (x - y); }
};

template <class R>
struct L1 {
  static constexpr int kSums = 1;
  static void terms(F32 x, F32 y, F32 (&term)[kSums]) { term[0] = absolute(R::round(y - x)); }
  static float score(const float (&sums)[kSums]) { return sums[0]; }

  F32 grad;
  L1(float grad, const float (&)[kSums]) : grad(splat(grad)) {}
  F32 to_cur(F32 x, F32 y) const {  // grad * sign(y - x); NaN stays NaN
    const F32 d = y - x;
    const U32 one = bits<U32>(splat(1.0f)) | (bits<U32>(d) & 0x80000000u);
    const U32 sign = select(absolute(d) > F32{}, one, bits<U32>(d));
    return grad * bits<F32>(sign);
  }
  F32 to_prev(F32 x, F32 y) const { return -to_cur(x, y); }
};

// 1 - cos, in double: in float the sums overflow beyond 1.8e19 and vanish below 1e-19, and differences of norms that are not alike cancel.
template <class R>
struct Cosine {};

using F64 = double __attribute__((vector_size(kWidth * 8)));

struct CosineSums {
  double prev, cur, dot, change;  // |x|^2, |y|^2, x.y, |x - y|^2

  double score() const {
    if (prev == 0 || cur == 0) return 1;
    const double a = __builtin_sqrt(prev), b = __builtin_sqrt(cur), gap = a - b;
    // For nearly parallel rows of like norms 1 - x.y/(|x||y|) would cancel, |x - y|^2 does not; for others it is the other way round.
    const double score = a <= 2 * b && b <= 2 * a ? (change - gap * gap) / (2 * a * b) : 1 - dot / (a * b);
    return score < 0 ? 0 : score > 2 ? 2 : score;  // NaN passes
  }
};

// d(1 - cos)/dy = -(x / (|x||y|) - cos y / |y|^2), and the same with x and y exchanged.
struct CosineGradient {
  double cross = 0, own_prev = 0, own_cur = 0;

  CosineGradient(float grad, const CosineSums& sums) {
    if (sums.prev == 0 || sums.cur == 0) return;
    const double cosine = 1 - sums.score();
    cross = -grad / (__builtin_sqrt(sums.prev) * __builtin_sqrt(sums.cur));
    own_cur = grad * cosine / sums.cur;
    own_prev = grad * cosine / sums.prev;
  }
  static F32 mix(double cross, F32 other, double own, F32 mine) {
    return __builtin_convertvector(__builtin_convertvector(other, F64) * cross + __builtin_convertvector(mine, F64) * own, F32);
  }
  F32 to_cur(F32 x, F32 y) const { return mix(cross, x, own_cur, y); }
  F32 to_prev(F32 x, F32 y) const { return mix(cross, y, own_prev, x); }
};

template <class T>
inline CosineSums cosine_sums(const typename T::Element* x, const typename T::Element* y, int64_t dim) {
  Lanes prev = {}, cur = {}, dot = {}, change = {};
  for (int64_t j = 0; j < dim; j += kLanes) {
    uint32_t u[kLanes], v[kLanes];
    widen_block<T>(x, j, dim, u);
    widen_block<T>(y, j, dim, v);
    for (int i = 0; i < kLanes; i += kCosineLanes) {
      Lanes a, b;
      widen_lanes(u + i, a);
      widen_lanes(v + i, b);
      const Lanes d = b - a;
      prev += a * a;  // products of floats are exact in double
      cur += b * b;
      dot += a * b;
      change += d * d;
    }
  }
  return {total(prev), total(cur), total(dot), total(change)};
}

template <class T, class R>
float cosine_row(const void* prev, const void* cur, int64_t dim) {
  using Element = typename T::Element;
  const CosineSums sums = cosine_sums<T>(static_cast<const Element*>(prev), static_cast<const Element*>(cur), dim);
  return round_one<R>(static_cast<float>(sums.score()));
}

template <class M, class T>
inline void add_block(Sum (&sums)[M::kSums], const typename T::Element* x, const typename T::Element* y) {
  V2DROP_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    const Pair u = T::read(x, i), v = T::read(y, i);
    F32 first[M::kSums], second[M::kSums];
    M::terms(u.first, v.first, first);
    M::terms(u.second, v.second, second);
    V2DROP_UNROLL
    for (int s = 0; s < M::kSums; ++s) {
      sums[s].lanes[i].first += first[s];
      sums[s].lanes[i].second += second[s];
    }
  }
}

template <class M, class T>
inline void sum_row(const typename T::Element* x, const typename T::Element* y, int64_t dim, float (&totals)[M::kSums]) {
  using Element = typename T::Element;
  Sum sums[M::kSums];
  int64_t j = 0;
  // No software prefetch: at 1, 2 and 4 KB ahead it cost 5 to 15 % of a score from memory (Zen 5, one thread, rows of 8 KB).
  for (; j + kLanes <= dim; j += kLanes) add_block<M, T>(sums, x + j, y + j);
  if (j < dim) {  // the rest, padded with zeros: they add nothing to any sum
    Element x_rest[kLanes] = {}, y_rest[kLanes] = {};
    std::memcpy(x_rest, x + j, static_cast<size_t>(dim - j) * sizeof(Element));
    std::memcpy(y_rest, y + j, static_cast<size_t>(dim - j) * sizeof(Element));
    add_block<M, T>(sums, x_rest, y_rest);
  }
  for (int s = 0; s < M::kSums; ++s) totals[s] = sums[s].total();
}

template <template <class> class Metric, class T, class R>
float score_row(const void* prev, const void* cur, int64_t dim) {
  using M = Metric<R>;
  if constexpr (std::is_same_v<M, Cosine<R>>)
    return cosine_row<T, R>(prev, cur, dim);
  else {
    float sums[M::kSums];
    sum_row<M, T>(static_cast<const typename T::Element*>(prev), static_cast<const typename T::Element*>(cur), dim, sums);
    return round_one<R>(M::score(sums));
  }
}

template <class M, class T>
inline void backward_block(const M& row, const typename T::Element* x, const typename T::Element* y, typename T::Element* to_x,
                           typename T::Element* to_y) {
  V2DROP_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    const Pair u = T::read(x, i), v = T::read(y, i);
    if (to_x) T::write(to_x, i, {T::round(row.to_prev(u.first, v.first)), T::round(row.to_prev(u.second, v.second))});
    if (to_y) T::write(to_y, i, {T::round(row.to_cur(u.first, v.first)), T::round(row.to_cur(u.second, v.second))});
  }
}

template <template <class> class Metric, class T>
void backward_row(float grad, const void* prev, const void* cur, void* grad_prev, void* grad_cur, int64_t dim) {
  using M = Metric<Float32>;
  using Element = typename T::Element;
  const Element *x = static_cast<const Element*>(prev), *y = static_cast<const Element*>(cur);
  Element *to_x = static_cast<Element*>(grad_prev), *to_y = static_cast<Element*>(grad_cur);
  const auto row = [&] {
    if constexpr (std::is_same_v<M, Cosine<Float32>>) {
      return CosineGradient(grad, cosine_sums<T>(x, y, dim));
    } else {
      float sums[M::kSums];
      sum_row<M, T>(x, y, dim, sums);
      return M(grad, sums);
    }
  }();
  using Row = decltype(row);
  int64_t j = 0;
  for (; j + kLanes <= dim; j += kLanes) {  // the second read of the row: it is still in the cache
    backward_block<Row, T>(row, x + j, y + j, to_x ? to_x + j : nullptr, to_y ? to_y + j : nullptr);
  }
  if (j < dim) {
    Element x_rest[kLanes] = {}, y_rest[kLanes] = {}, to_x_rest[kLanes], to_y_rest[kLanes];
    const size_t bytes = static_cast<size_t>(dim - j) * sizeof(Element);
    std::memcpy(x_rest, x + j, bytes);
    std::memcpy(y_rest, y + j, bytes);
    backward_block<Row, T>(row, x_rest, y_rest, to_x_rest, to_y_rest);
    if (to_x) std::memcpy(to_x + j, to_x_rest, bytes);
    if (to_y) std::memcpy(to_y + j, to_y_rest, bytes);
  }
}

}  // namespace
}  // namespace v2drop

#endif  // V2DROP_CORE_KERNELS_SCORE_H_
