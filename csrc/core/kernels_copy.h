// SPDX-License-Identifier: Apache-2.0
//
// Copies that bypass the cache.
#ifndef V2DROP_CORE_KERNELS_COPY_H_
#define V2DROP_CORE_KERNELS_COPY_H_

#include <cstring>

#include "simd.h"

namespace v2drop {
namespace {  // internal linkage: see kernels.cpp

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
}  // namespace v2drop

#endif  // V2DROP_CORE_KERNELS_COPY_H_
