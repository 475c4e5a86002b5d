// SPDX-License-Identifier: Apache-2.0
//
// Dot products of rows with packed vectors, and norms of rows.
#ifndef V2DROP_CORE_KERNELS_DOTS_H_
#define V2DROP_CORE_KERNELS_DOTS_H_

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace v2drop {
namespace {  // internal linkage: see kernels.cpp

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

inline void write_products(float* out, F32x4 found, int64_t valid) {
  if (valid == kTileRows) return store(out, found);  // a copy of a size that is not constant would be a call
  for (int r = 0; r < valid; ++r) out[r] = found[r];
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
    write_products(out + v * out_stride, found, tile.valid);
  }
}

#if defined(__AVX512BF16__)
// Products of bfloat16 by the instruction that adds two of them to a lane: first that of the upper halves of two words, then that of the
// lower ones, each rounded once with its addition. It counts subnormals as 0. Where all operands have exponents from kLeast on, below
// kLeast + kExponents, products are exact in float32 and no sum is subnormal: then these are the bits of a multiplication followed by an
// addition, which take every other tile. The words are rotated, so that the even element comes first here, too.
constexpr int kPairVectors = 4;
constexpr int64_t kPairDim = 512;                       // a tile's packed vectors stay in the first-level cache
constexpr int kLeast = 127 - 40, kExponents = 40 + 50;  // powers of two from -40 to 49: sums of kPairDim products are below 2^128

struct PairVectors {
  alignas(64) uint32_t words[kPairVectors][kPairDim / 2];
};

// Whether packed vectors are of bfloat16 with such exponents, or 0; and their words.
inline bool pack_pairs(const float* packed, int64_t vectors, int64_t dim, PairVectors* pairs) {
  const int64_t pitch = packed_dim(dim);
  if (pitch > kPairDim) return false;
  U32 bad = {};
  for (int64_t v = 0; v < vectors; ++v) {
    for (int64_t j = 0; j < pitch; j += kDotBlock) {
      const U32 even = load<U32>(packed + v * pitch + j), odd = load<U32>(packed + v * pitch + j + kDotLanes);
      const U32 both[] = {even, odd};
      for (const U32 x : both) {
        const U32 magnitude = x & 0x7fffffffu;
        bad |= (x & 0xffffu) | bits<U32>((magnitude != 0u) & (magnitude - (uint32_t{kLeast} << 23) >= (uint32_t{kExponents} << 23)));
      }
      store(pairs->words[v] + j / 2, even | odd >> 16);
    }
  }
  return _mm512_test_epi32_mask(bits<__m512i>(bad), bits<__m512i>(bad)) == 0;
}

// As dots_tile, of whole blocks; false, and nothing is written, if an operand's exponent is out of range. Zeros are, too.
template <int VECTORS, bool CHECK>
inline bool pairs_tile(const Tile<uint16_t>& tile, const PairVectors& pairs, int64_t dim, float scale, float* out, int64_t out_stride) {
  __m512 sums[VECTORS][kTileRows] = {};
  __m512i most = _mm512_setzero_si512();
  const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(kLeast << 8));
  for_each_block(tile, dim, [&](const uint16_t* const(&at)[kTileRows], int64_t j) {
    __m512i x[kTileRows];
    V2DROP_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const U32 words = load<U32>(at[r]);
      if (CHECK) most = _mm512_max_epu16(most, _mm512_sub_epi16(_mm512_add_epi16(bits<__m512i>(words), bits<__m512i>(words)), least));
      x[r] = bits<__m512i>(words << 16 | words >> 16);
    }
    V2DROP_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const __m512i y = load<__m512i>(pairs.words[v] + j / 2);
      V2DROP_UNROLL
      for (int r = 0; r < kTileRows; ++r) sums[v][r] = _mm512_dpbf16_ps(sums[v][r], bits<__m512bh>(x[r]), bits<__m512bh>(y));
    }
  });
  if (CHECK && _mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(static_cast<int16_t>(kExponents << 8)))) return false;
  V2DROP_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    DotLanes lanes[kTileRows];
    V2DROP_UNROLL
    for (int r = 0; r < kTileRows; ++r) lanes[r].v[0] = bits<F32>(sums[v][r]);
    write_products(out + v * out_stride, totals(lanes[0], lanes[1], lanes[2], lanes[3]) * (F32x4{} + scale), tile.valid);
  }
  return true;
}

template <bool CHECK>
inline bool pairs_of_tile(const Tile<uint16_t>& tile, const PairVectors& pairs, int64_t vectors, int64_t dim, float scale, float* out,
                          int64_t out_stride) {
  switch (vectors) {
    case 1:
      return pairs_tile<1, CHECK>(tile, pairs, dim, scale, out, out_stride);
    case 2:
      return pairs_tile<2, CHECK>(tile, pairs, dim, scale, out, out_stride);
    case 3:
      return pairs_tile<3, CHECK>(tile, pairs, dim, scale, out, out_stride);
    default:
      return pairs_tile<kPairVectors, CHECK>(tile, pairs, dim, scale, out, out_stride);
  }
}
#endif

// Products of one tile with all vectors.
template <class T>
inline void dots_of_tile(const Tile<typename T::Element>& tile, const float* packed, int64_t vectors, int64_t dim, float scale, float* out,
                         int64_t out_stride) {
  constexpr int kMost = kWidth == 16 ? 4 : 1;  // as many vectors share the reading of a tile as their sums leave registers for
  const int64_t pitch = packed_dim(dim);
  for (int64_t v = 0; v < vectors; v += kMost) {
    const auto with = [&](auto count) {
      dots_tile<T, decltype(count)::value>(tile, packed + v * pitch, dim, scale, out + v * out_stride, out_stride);
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

template <class T>
void dots(const void* rows, int64_t stride_bytes, int64_t n, const float* packed, int64_t vectors, int64_t dim, float scale, float* out,
          int64_t out_stride) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    constexpr int64_t kMost = 2 * kPairVectors;
    PairVectors pairs[2];
    if (vectors > 1 && vectors <= kMost && dim % kDotBlock == 0) {
      const int64_t first = vectors < kPairVectors ? vectors : kPairVectors, second = vectors - first;
      const bool paired = pack_pairs(packed, first, dim, &pairs[0]) && pack_pairs(packed + first * dim, second, dim, &pairs[1]);
      for (int64_t i = 0; i < n; i += kTileRows) {
        const Tile<uint16_t> tile(rows, stride_bytes, i, n, dim);
        if (!paired || !pairs_of_tile<true>(tile, pairs[0], first, dim, scale, out + i, out_stride)) {
          dots_of_tile<T>(tile, packed, vectors, dim, scale, out + i, out_stride);
        } else if (second > 0) {
          pairs_of_tile<false>(tile, pairs[1], second, dim, scale, out + first * out_stride + i, out_stride);
        }
      }
      return;
    }
  }
#endif
  for (int64_t i = 0; i < n; i += kTileRows) {
    const Tile<typename T::Element> tile(rows, stride_bytes, i, n, dim);
    dots_of_tile<T>(tile, packed, vectors, dim, scale, out + i, out_stride);
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

}  // namespace
}  // namespace v2drop

#endif  // V2DROP_CORE_KERNELS_DOTS_H_
