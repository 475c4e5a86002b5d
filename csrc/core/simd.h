// SPDX-License-Identifier: Apache-2.0
//
// One vector of floats, as wide as the instruction set that this file is compiled for, and loads and stores of the three float dtypes.
// GCC's and Clang's vector types keep it one source for x86, Arm and the rest; intrinsics appear only where the compilers have no
// portable spelling. Everything is exact or rounds once, so all widths give the same bits.
#ifndef V2DROP_CORE_SIMD_H_
#define V2DROP_CORE_SIMD_H_

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define V2DROP_UNROLL _Pragma("GCC unroll 16")

namespace v2drop {
namespace {  // internal linkage: see ordinal.h

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using F32 = float __attribute__((vector_size(kWidth * 4)));
using U32 = uint32_t __attribute__((vector_size(kWidth * 4)));

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class V, class T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V, class T>
inline void store(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
inline F32 splat(float x) { return F32{} + x; }
// A comparison of vectors is a mask of zeros and ones.
template <class Mask>
inline U32 select(Mask mask, U32 yes, U32 no) {
  return (bits<U32>(mask) & yes) | (~bits<U32>(mask) & no);
}
inline F32 absolute(F32 x) { return bits<F32>(bits<U32>(x) & 0x7fffffffu); }
// A block is kLanes consecutive elements of a row, read as kPairs pairs of vectors. Which element meets which lane depends on the dtype
// (whatever is cheap) but not on the width: lane l of the block is lane l % kWidth of the pair's first vector for l < kLanes / 2, and of
// its second vector beyond. So sums over lanes are the same sums on every instruction set.
constexpr int kLanes = 64;
constexpr int kPairs = kLanes / 2 / kWidth;

struct Pair {
  F32 first, second;
};

// Lanes of the two operands, side by side and counted through, in any order.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define V2DROP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(V2DROP_SHUFFLE)
#define V2DROP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (decltype((a) == (b))){__VA_ARGS__})
#endif

// Dot products are summed in kDotLanes lanes over blocks of kDotBlock elements: short enough for the rows of attention heads.
constexpr int kDotBlock = 32;
constexpr int kDotLanes = kDotBlock / 2;
constexpr int kDotVectors = kDotLanes / kWidth;

// Each dtype: read pair i of a block (of any length) as floats; round floats to the dtype, to nearest even, as floats; write a pair of such
// floats back; widen a block to the bits of floats, in the order of its elements.
struct Float32 {
  using Element = float;
  template <int LENGTH = kLanes>
  static Pair read(const float* block, int i) {
    return {load<F32>(block + i * kWidth), load<F32>(block + LENGTH / 2 + i * kWidth)};
  }
  static F32 round(F32 x) { return x; }
  static void write(float* block, int i, Pair x) {
    store(block + i * kWidth, x.first);
    store(block + kLanes / 2 + i * kWidth, x.second);
  }
  static void widen(const float* block, uint32_t* to) { std::memcpy(to, block, kLanes * sizeof *to); }
};

// The upper half of a float. Even and odd elements part by a shift and a mask of the words that hold them, without a shuffle.
struct BFloat16 {
  using Element = uint16_t;
  template <int LENGTH = kLanes>
  static Pair read(const uint16_t* block, int i) {
    U32 words = load<U32>(block + 2 * i * kWidth);
    return {bits<F32>(words << 16), bits<F32>(words & 0xffff0000u)};
  }
  static F32 round(F32 x) {
    const U32 u = bits<U32>(x);
    const U32 rounded = (u + (0x7fffu + ((u >> 16) & 1u))) & 0xffff0000u;
    return bits<F32>(select(x == x, rounded, (u | 0x00400000u) & 0xffff0000u));
  }
  static void write(uint16_t* block, int i, Pair x) {
    store(block + 2 * i * kWidth, (bits<U32>(x.first) >> 16) | (bits<U32>(x.second) & 0xffff0000u));
  }
  static void widen(const uint16_t* block, uint32_t* to) {
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint32_t>(block[i]) << 16;
  }
};

struct Float16 {
  using Element = uint16_t;
#if defined(__AVX512F__)
  using Packed = __m256i;
  // The zero-masked forms with a full mask: GCC 12 warns that the plain ones read an uninitialised register.
  static F32 unpack(Packed x) { return bits<F32>(_mm512_maskz_cvtph_ps(0xffff, x)); }
  static Packed pack(F32 x) { return _mm512_maskz_cvtps_ph(0xffff, bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F32 round(F32 x) { return unpack(pack(x)); }
#elif defined(__F16C__)
  using Packed = __m128i;
  static F32 unpack(Packed x) { return bits<F32>(_mm256_cvtph_ps(x)); }
  static Packed pack(F32 x) { return _mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F32 round(F32 x) { return unpack(pack(x)); }
#else
  using Packed = uint16_t __attribute__((vector_size(kWidth * 2)));
  static F32 unpack(Packed x) {
    // Exponent and mantissa keep their places; a multiplication by 2^112 moves the exponent's bias, subnormals included, exactly.
    const U32 h = __builtin_convertvector(x, U32);
    const U32 magnitude = (h & 0x7fffu) << 13;
    const U32 finite = bits<U32>(bits<F32>(magnitude) * 0x1p112f);
    const U32 quiet = select((h & 0x3ffu) != 0u, U32{} + 0x00400000u, U32{});
    return bits<F32>(select((h & 0x7c00u) == 0x7c00u, magnitude | 0x7f800000u | quiet, finite) | ((h & 0x8000u) << 16));
  }
  static Packed pack(F32 x) {  // of a rounded float
    const U32 u = bits<U32>(x), sign = u & 0x80000000u, magnitude = u ^ sign;
    const U32 finite = bits<U32>(bits<F32>(magnitude) * 0x1p-112f) >> 13;
    const U32 special = 0x7c00u | ((magnitude >> 13) & 0x3ffu);
    return __builtin_convertvector(select(magnitude >= (U32{} + 0x7f800000u), special, finite) | (sign >> 16), Packed);
  }
  static F32 round(F32 x) {
    const U32 u = bits<U32>(x), sign = u & 0x80000000u, magnitude = u ^ sign;
    const U32 normal = (magnitude + (0xfffu + ((magnitude >> 13) & 1u))) & ~0x1fffu;
    // Below 2^-14 halves are multiples of 2^-24, the spacing of floats in [0.5, 1): the addition rounds.
    const U32 small = bits<U32>((bits<F32>(magnitude) + 0.5f) - 0.5f);
    U32 y = select(magnitude < (U32{} + 0x38800000u), small, normal);
    y = select(y > (U32{} + 0x477fe000u), U32{} + 0x7f800000u, y);
    return bits<F32>(select(x == x, y, (magnitude | 0x00400000u) & ~0x1fffu) | sign);
  }
#endif
  template <int LENGTH = kLanes>
  static Pair read(const uint16_t* block, int i) {
    return {unpack(load<Packed>(block + i * kWidth)), unpack(load<Packed>(block + LENGTH / 2 + i * kWidth))};
  }
  static void write(uint16_t* block, int i, Pair x) {
    store(block + i * kWidth, pack(x.first));
    store(block + kLanes / 2 + i * kWidth, pack(x.second));
  }
  static void widen(const uint16_t* block, uint32_t* to) {
    for (int i = 0; i < kLanes; i += kWidth) store(to + i, unpack(load<Packed>(block + i)));
  }
};

}  // namespace
}  // namespace v2drop

#endif  // V2DROP_CORE_SIMD_H_
