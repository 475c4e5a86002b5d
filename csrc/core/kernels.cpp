// SPDX-License-Identifier: Apache-2.0
//
// The inner loops. CMake compiles this file once per instruction set, with V2DROP_ISA naming it; all else has internal linkage, so that
// no code of a wider set can be linked into a narrower one.
//
// A row is summed in kLanes partial sums, whatever the vector width, and these are added pairwise in one fixed order. With
// -ffp-contract=off every instruction set then gives the same bits; the loop waits for memory, so fused multiply-adds would buy nothing.
#include "kernels.h"

#include <type_traits>

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

static_assert(packed_dim(1) == kDotBlock, "packed vectors are whole blocks");

// Products of a packed vector and a row, and their sums, in kDotLanes lanes: lane l of a row meets lane l of the packed vector.
struct DotLanes {
  F32 v[kDotVectors] = {};
};

using F32x4 = float __attribute__((vector_size(16)));

// The totals of four, each added pairwise: lane l to lane l + half.
inline F32x4 totals(const DotLanes& a, const DotLanes& b, const DotLanes& c, const DotLanes& d) {
#if defined(__AVX512F__)
  const F32 ab = V2DROP_SHUFFLE(a.v[0], b.v[0], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                 V2DROP_SHUFFLE(a.v[0], b.v[0], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const F32 cd = V2DROP_SHUFFLE(c.v[0], d.v[0], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                 V2DROP_SHUFFLE(c.v[0], d.v[0], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  F32 x = V2DROP_SHUFFLE(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
          V2DROP_SHUFFLE(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  x += V2DROP_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  x += V2DROP_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  x = V2DROP_SHUFFLE(x, x, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  return load<F32x4>(&x);
#else
  F32x4 quarters[4];
  const DotLanes* const from[] = {&a, &b, &c, &d};
  V2DROP_UNROLL
  for (int r = 0; r < 4; ++r) {
#if defined(__AVX2__)
    const F32 half = from[r]->v[0] + from[r]->v[1];
    F32x4 parts[2];
    std::memcpy(parts, &half, sizeof parts);
    quarters[r] = parts[0] + parts[1];
#else
    quarters[r] = (from[r]->v[0] + from[r]->v[2]) + (from[r]->v[1] + from[r]->v[3]);
#endif
  }
  const F32x4 ab = V2DROP_SHUFFLE(quarters[0], quarters[1], 0, 1, 4, 5) + V2DROP_SHUFFLE(quarters[0], quarters[1], 2, 3, 6, 7);
  const F32x4 cd = V2DROP_SHUFFLE(quarters[2], quarters[3], 0, 1, 4, 5) + V2DROP_SHUFFLE(quarters[2], quarters[3], 2, 3, 6, 7);
  return V2DROP_SHUFFLE(ab, cd, 0, 2, 4, 6) + V2DROP_SHUFFLE(ab, cd, 1, 3, 5, 7);
#endif
}

// Rows that are multiplied together, `valid` of them; beyond the end, the last one again. As many streams as rows are too many for the
// hardware to follow, so every block prefetches what lies kAhead behind it: lines of memory in their order where rows are end to end.
constexpr int kTileRows = 4;

template <class Element>
struct Tile {
  static constexpr int64_t kBytesOfBlock = kDotBlock * sizeof(Element);
  static constexpr int64_t kAhead = 8 << 10;  // 4 KB and 16 KB were slower (Zen 5, rows of 256 and 512 bytes)
  const Element* rows[kTileRows];
  int64_t valid;
  uintptr_t prefetch[kTileRows];  // where a block's share of each row begins
  int64_t step;                   // from block to block

  Tile(const void* data, int64_t stride_bytes, int64_t i, int64_t n, int64_t dim) : valid(n - i < kTileRows ? n - i : kTileRows) {
    const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(Element)), tile_bytes = kTileRows * row_bytes;
    const bool dense = stride_bytes == row_bytes && tile_bytes <= kAhead;
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t row = i + (r < valid ? r : valid - 1);
      rows[r] = reinterpret_cast<const Element*>(static_cast<const char*>(data) + row * stride_bytes);
      prefetch[r] = dense ? reinterpret_cast<uintptr_t>(rows[0]) + kAhead + r * kBytesOfBlock
                          : reinterpret_cast<uintptr_t>(rows[r]) + static_cast<uintptr_t>(kTileRows * stride_bytes);
    }
    step = dense ? kTileRows * kBytesOfBlock : kBytesOfBlock;
  }
};

// Calls block(rows, j) for every block of elements of a tile; the last one, if it is short, from copies padded with zeros.
template <class Element, class Block>
inline void for_each_block(const Tile<Element>& tile, int64_t dim, const Block& block) {
  const Element* at[kTileRows];
  int64_t j = 0, ahead = 0;
  for (; j + kDotBlock <= dim; j += kDotBlock, ahead += tile.step) {
    V2DROP_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      at[r] = tile.rows[r] + j;
      V2DROP_UNROLL
      for (int64_t byte = 0; byte < tile.kBytesOfBlock; byte += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(tile.prefetch[r] + static_cast<uintptr_t>(ahead + byte)));
      }
    }
    block(at, j);
  }
  if (j < dim) {
    Element rest[kTileRows][kDotBlock] = {};
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(rest[r], tile.rows[r] + j, static_cast<size_t>(dim - j) * sizeof(Element));
      at[r] = rest[r];
    }
    block(at, j);
  }
}

template <class T>
void pack(const void* row, int64_t dim, float* packed) {
  using Element = typename T::Element;
  const Element* from = static_cast<const Element*>(row);
  for (int64_t j = 0; j < dim; j += kDotBlock) {
    Element block[kDotBlock] = {};
    std::memcpy(block, from + j, static_cast<size_t>(dim - j < kDotBlock ? dim - j : kDotBlock) * sizeof(Element));
    V2DROP_UNROLL
    for (int i = 0; i < kDotVectors; ++i) {
      const Pair x = T::template read<kDotBlock>(block, i);
      store(packed + j + i * kWidth, x.first);
      store(packed + j + kDotLanes + i * kWidth, x.second);
    }
  }
}

template <class T, int VECTORS>
inline void dots_tile(const Tile<typename T::Element>& tile, const float* packed, int64_t dim, float scale, float* out,
                      int64_t out_stride) {
  const int64_t pitch = packed_dim(dim);
  DotLanes sums[VECTORS][kTileRows];
  for_each_block(tile, dim, [&](const typename T::Element* const(&at)[kTileRows], int64_t j) {
    V2DROP_UNROLL
    for (int i = 0; i < kDotVectors; ++i) {
      Pair x[kTileRows];
      V2DROP_UNROLL
      for (int r = 0; r < kTileRows; ++r) x[r] = T::template read<kDotBlock>(at[r], i);
      V2DROP_UNROLL
      for (int v = 0; v < VECTORS; ++v) {
        const float* y = packed + v * pitch + j + i * kWidth;
        const F32 first = load<F32>(y), second = load<F32>(y + kDotLanes);
        V2DROP_UNROLL
        for (int r = 0; r < kTileRows; ++r) {
          sums[v][r].v[i] += x[r].first * first;
          sums[v][r].v[i] += x[r].second * second;
        }
      }
    }
  });
  V2DROP_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    const F32x4 found = totals(sums[v][0], sums[v][1], sums[v][2], sums[v][3]) * (F32x4{} + scale);
    std::memcpy(out + v * out_stride, &found, static_cast<size_t>(tile.valid) * sizeof(float));
  }
}

template <class T>
void dots(const void* rows, int64_t stride_bytes, int64_t n, const float* packed, int64_t vectors, int64_t dim, float scale, float* out,
          int64_t out_stride) {
  constexpr int kMost = kWidth == 16 ? 4 : 1;  // as many vectors share the reading of a tile as their sums leave registers for
  const int64_t pitch = packed_dim(dim);
  for (int64_t i = 0; i < n; i += kTileRows) {
    const Tile<typename T::Element> tile(rows, stride_bytes, i, n, dim);
    for (int64_t v = 0; v < vectors; v += kMost) {
      const auto with = [&](auto count) {
        dots_tile<T, decltype(count)::value>(tile, packed + v * pitch, dim, scale, out + v * out_stride + i, out_stride);
      };
      const int64_t left = vectors - v;
      if (left >= kMost) {
        with(std::integral_constant<int, kMost>());
      } else if (left == 3) {
        with(std::integral_constant < int, kMost<3 ? 1 : 3>());
      } else if (left == 2) {
        with(std::integral_constant < int, kMost<2 ? 1 : 2>());
      } else {
        with(std::integral_constant<int, 1>());
      }
    }
  }
}

template <bool SQUARES, class T>
void add_norms(const void* rows, int64_t stride_bytes, int64_t n, int64_t dim, float* sums) {
  const auto term = [](F32 x) { return SQUARES ? x * x : absolute(x); };
  for (int64_t i = 0; i < n; i += kTileRows) {
    const Tile<typename T::Element> tile(rows, stride_bytes, i, n, dim);
    DotLanes of_row[kTileRows];
    for_each_block(tile, dim, [&](const typename T::Element* const(&at)[kTileRows], int64_t) {
      V2DROP_UNROLL
      for (int v = 0; v < kDotVectors; ++v) {
        V2DROP_UNROLL
        for (int r = 0; r < kTileRows; ++r) {
          const Pair x = T::template read<kDotBlock>(at[r], v);
          of_row[r].v[v] += term(x.first);
          of_row[r].v[v] += term(x.second);
        }
      }
    });
    const F32x4 found = totals(of_row[0], of_row[1], of_row[2], of_row[3]);
    for (int r = 0; r < tile.valid; ++r) sums[i + r] += found[r];
  }
}

// e^x for x <= 0, or NaN. x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 p(r); p is a minimax fit that adds 0.05 ulp, the
// arithmetic the rest of 2. n ln 2 is subtracted in two parts, the first of so few bits that its product is exact.
inline F32 exponential(F32 x) {
  const F32 shift = splat(0x1.8p23f);  // adding it rounds to an integer, which then stands in the low bits
  const F32 shifted = x * splat(0x1.715476p0f) + shift, n = shifted - shift;
  const F32 r = (x - n * splat(0x1.63p-1f)) - n * splat(-0x1.bd0106p-13f);
  F32 p = splat(0x1.6a23cep-10f);
  p = p * r + splat(0x1.123a2p-7f);
  p = p * r + splat(0x1.5558f2p-5f);
  p = p * r + splat(0x1.555492p-3f);
  p = p * r + splat(0x1.fffffcp-2f);
  const F32 mantissa = splat(1.0f) + (r + (r * r) * p);
  const U32 scaled = bits<U32>(mantissa) + (bits<U32>(shifted) << 23);
  return bits<F32>(select(x < splat(-0x1.5d589ep6f), U32{}, select(x == x, scaled, bits<U32>(x))));
}

// A total of lanes as above, of a vector of numbers.
inline float total_of(const DotLanes& sums) { return totals(sums, sums, sums, sums)[0]; }

void exponentials(float* x, int64_t n, float* max, float* sum) {
  constexpr int kAtOnce = 4;  // comparisons wait for each other less
  F32 most[kAtOnce];
  for (F32& m : most) m = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kAtOnce * kWidth <= n; i += kAtOnce * kWidth) {
    V2DROP_UNROLL
    for (int m = 0; m < kAtOnce; ++m) {
      const F32 y = load<F32>(x + i + m * kWidth);
      most[m] = y > most[m] ? y : most[m];
    }
  }
  float ends[kAtOnce * kWidth];
  std::memcpy(ends, most, sizeof ends);
  for (; i < n; ++i) ends[i % kWidth] = x[i] > ends[i % kWidth] ? x[i] : ends[i % kWidth];
  V2DROP_UNROLL
  for (int half = kAtOnce * kWidth / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) ends[l] = ends[l + half] > ends[l] ? ends[l + half] : ends[l];
  }
  const float found = ends[0];
  const F32 base = splat(found == -__builtin_inff() ? 0.0f : found);

  DotLanes sums;
  for (i = 0; i < n; i += kDotLanes) {
    float rest[kDotLanes];
    float* at = x + i;
    const bool whole = n - i >= kDotLanes;
    if (!whole) {
      for (int l = 0; l < kDotLanes; ++l) rest[l] = l < n - i ? at[l] : -__builtin_inff();
      at = rest;
    }
    V2DROP_UNROLL
    for (int v = 0; v < kDotVectors; ++v) {
      const F32 e = exponential(load<F32>(at + v * kWidth) - base);
      store(at + v * kWidth, e);
      sums.v[v] += e;
    }
    if (!whole) std::memcpy(x + i, rest, static_cast<size_t>(n - i) * sizeof *rest);
  }
  *max = found;
  *sum = total_of(sums);
}

float sum_where(const float* x, const unsigned char* where, int64_t n) {
  float sums[kDotLanes] = {};
  for (int64_t i = 0; i < n; i += kDotLanes) {
    for (int64_t l = 0; l < kDotLanes && i + l < n; ++l) sums[l] += where[i + l] ? x[i + l] : 0.0f;
  }
  DotLanes lanes;
  std::memcpy(lanes.v, sums, sizeof sums);
  return total_of(lanes);
}

void add_scaled(float* __restrict to, const float* __restrict x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += factor * x[i];
}
void max_scaled(float* __restrict to, const float* __restrict x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float y = factor * x[i];
    to[i] = to[i] >= y || to[i] != to[i] ? to[i] : y;
  }
}
void add_squares(float* __restrict to, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += x[i] * x[i];
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
    {pack<Float>, pack<Half>, pack<Bfloat>},
    {dots<Float>, dots<Half>, dots<Bfloat>},
    {{add_norms<true, Float>, add_norms<true, Half>, add_norms<true, Bfloat>},
     {add_norms<false, Float>, add_norms<false, Half>, add_norms<false, Bfloat>}},
    exponentials,
    sum_where,
    add_scaled,
    max_scaled,
    add_squares,
    copy_past_cache,
    store_fence,
};

}  // namespace v2drop
