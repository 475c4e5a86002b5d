// SPDX-License-Identifier: Apache-2.0
//
// The inner loops. CMake compiles this file once per instruction set, with V2DROP_ISA naming it; all else has internal linkage, so that
// no code of a wider set can be linked into a narrower one.
//
// A row is summed in kLanes partial sums, whatever the vector width, and these are added pairwise in one fixed order. With
// -ffp-contract=off every instruction set then gives the same bits; the loop waits for memory, so fused multiply-adds would buy nothing.
#include "kernels.h"

#include "keys.h"
#include "simd.h"

#define V2DROP_UNROLL _Pragma("GCC unroll 16")

namespace v2drop {
namespace {

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

// 1 - cos from |x|^2, |y|^2 and |x - y|^2: for nearly parallel rows 1 - x.y/(|x||y|) would cancel, |x - y|^2 does not.
template <class R>
struct Cosine {
  static constexpr int kSums = 3;
  static void terms(F32 x, F32 y, F32 (&term)[kSums]) {
    const F32 d = y - x;
    term[0] = x * x;
    term[1] = y * y;
    term[2] = d * d;
  }
  static float score(const float (&sums)[kSums]) {
    if (sums[0] == 0 || sums[1] == 0) return 1.0f;
    const float a = __builtin_sqrtf(sums[0]), b = __builtin_sqrtf(sums[1]), gap = a - b;
    const float rest = sums[2] - gap * gap;
    return (rest < 0 ? 0.0f : rest) / (2 * a * b);  // NaN passes
  }

  // d(1 - cos)/dy = -(x / (|x||y|) - cos y / |y|^2), and the same with x and y exchanged.
  F32 cross, own_cur, own_prev;
  Cosine(float grad, const float (&sums)[kSums]) : cross(), own_cur(), own_prev() {
    if (sums[0] == 0 || sums[1] == 0) return;
    const float cosine = 1.0f - score(sums);
    cross = splat(-grad / (__builtin_sqrtf(sums[0]) * __builtin_sqrtf(sums[1])));
    own_cur = splat(grad * cosine / sums[1]);
    own_prev = splat(grad * cosine / sums[0]);
  }
  F32 to_cur(F32 x, F32 y) const { return cross * x + own_cur * y; }
  F32 to_prev(F32 x, F32 y) const { return cross * y + own_prev * x; }
};

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
  float sums[M::kSums];
  sum_row<M, T>(static_cast<const typename T::Element*>(prev), static_cast<const typename T::Element*>(cur), dim, sums);
  return round_one<R>(M::score(sums));
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
  using M = Metric<Float>;
  using Element = typename T::Element;
  const Element *x = static_cast<const Element*>(prev), *y = static_cast<const Element*>(cur);
  Element *to_x = static_cast<Element*>(grad_prev), *to_y = static_cast<Element*>(grad_cur);
  float sums[M::kSums];
  sum_row<M, T>(x, y, dim, sums);
  const M row(grad, sums);
  int64_t j = 0;
  for (; j + kLanes <= dim; j += kLanes) {  // the second read of the row: it is still in the cache
    backward_block<M, T>(row, x + j, y + j, to_x ? to_x + j : nullptr, to_y ? to_y + j : nullptr);
  }
  if (j < dim) {
    Element x_rest[kLanes] = {}, y_rest[kLanes] = {}, to_x_rest[kLanes], to_y_rest[kLanes];
    const size_t bytes = static_cast<size_t>(dim - j) * sizeof(Element);
    std::memcpy(x_rest, x + j, bytes);
    std::memcpy(y_rest, y + j, bytes);
    backward_block<M, T>(row, x_rest, y_rest, to_x_rest, to_y_rest);
    if (to_x) std::memcpy(to_x + j, to_x_rest, bytes);
    if (to_y) std::memcpy(to_y + j, to_y_rest, bytes);
  }
}

template <class T>
void keys_of(const void* scores, int64_t stride_bytes, int64_t n, int32_t* keys) {
  using Element = typename T::Element;
  Element block[kLanes] = {};
  uint32_t values[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const int m = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    const char* from = static_cast<const char*>(scores) + i * stride_bytes;
    if (stride_bytes == static_cast<int64_t>(sizeof(Element))) {
      std::memcpy(block, from, static_cast<size_t>(m) * sizeof(Element));
    } else {
      for (int l = 0; l < m; ++l) std::memcpy(&block[l], from + l * stride_bytes, sizeof(Element));
    }
    T::widen(block, values);
    for (int l = 0; l < m; ++l) keys[i + l] = key_of_bits(values[l]);
  }
}

void range(const int32_t* keys, int64_t n, int32_t* lo, int32_t* hi) {
  int32_t low = keys[0], high = keys[0];
  for (int64_t i = 1; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  *lo = low;
  *hi = high;
}

int64_t at_least(const int32_t* keys, int64_t n, int32_t threshold) {
  int64_t total = 0;
  for (int64_t i = 0; i < n;) {  // 32-bit counts fill a whole vector; a block is small enough for them
    const int64_t end = n - i < (1 << 30) ? n : i + (1 << 30);
    int32_t count = 0;
    for (; i < end; ++i) count += keys[i] >= threshold;
    total += count;
  }
  return total;
}

#if defined(__x86_64__)
// Stores that bypass the cache: writing a line needs no reading of it first, a third of the traffic of an ordinary copy.
#if defined(__AVX512F__)
using Line = __m512i;
inline void stream(Line* to, Line x) { _mm512_stream_si512(to, x); }
#elif defined(__AVX2__)
using Line = __m256i;
inline void stream(Line* to, Line x) { _mm256_stream_si256(to, x); }
#else
using Line = __m128i;
inline void stream(Line* to, Line x) { _mm_stream_si128(to, x); }
#endif

void copy_past_cache(void* to, const void* from, size_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  size_t head = -reinterpret_cast<uintptr_t>(out) & 63;  // streamed lines must be aligned, and whole to be worth it
  if (head > bytes) head = bytes;
  std::memcpy(out, in, head);
  size_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    V2DROP_UNROLL
    for (size_t j = 0; j < 64; j += sizeof(Line)) stream(reinterpret_cast<Line*>(out + i + j), load<Line>(in + i + j));
  }
  std::memcpy(out + i, in + i, bytes - i);
}
void store_fence() { _mm_sfence(); }
#else
void copy_past_cache(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void store_fence() {}
#endif

}  // namespace

#define V2DROP_TABLE_NAME_(isa) kernels_##isa
#define V2DROP_TABLE_NAME(isa) V2DROP_TABLE_NAME_(isa)
#define V2DROP_STRING_(x) #x
#define V2DROP_STRING(x) V2DROP_STRING_(x)
#define V2DROP_SCORE(M, T) {score_row<M, T, Float>, score_row<M, T, Half>, score_row<M, T, Bfloat>}
#define V2DROP_SCORES(M) {V2DROP_SCORE(M, Float), V2DROP_SCORE(M, Half), V2DROP_SCORE(M, Bfloat)}
#define V2DROP_BACKWARDS(M) {backward_row<M, Float>, backward_row<M, Half>, backward_row<M, Bfloat>}

extern const Kernels V2DROP_TABLE_NAME(V2DROP_ISA);
const Kernels V2DROP_TABLE_NAME(V2DROP_ISA) = {
    V2DROP_STRING(V2DROP_ISA),
    {V2DROP_SCORES(L2), V2DROP_SCORES(L1), V2DROP_SCORES(Cosine)},
    {V2DROP_BACKWARDS(L2), V2DROP_BACKWARDS(L1), V2DROP_BACKWARDS(Cosine)},
    {keys_of<Float>, keys_of<Half>, keys_of<Bfloat>},
    range,
    at_least,
    copy_past_cache,
    store_fence,
};

}  // namespace v2drop
