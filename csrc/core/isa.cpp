// SPDX-License-Identifier: Apache-2.0
//
// Chooses the kernel table: the widest instruction set that the CPU has and V2DROP_ISA allows.
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "v2drop/v2drop.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace v2drop {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
#endif

namespace {

#if defined(__x86_64__)
bool has_pairs() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & bit_AVX512BF16);
}

// Whether products of bfloat16 by AVX512-BF16 have the bits of all other instruction sets, on numbers whose sums round at every step:
// the manual says so, a processor that rounded otherwise would have to do without.
bool pairs_agree() {
  constexpr int64_t kRows = 64, kVectors = 4, kDim = 128;
  uint16_t rows[(kRows + kVectors) * kDim];
  uint32_t random = 1;
  for (uint16_t& x : rows) {
    random = random * 1664525u + 1013904223u;
    x = static_cast<uint16_t>((random >> 16 & 0x807f) | (120 + (random >> 8) % 14) << 7);
  }
  float products[2][kVectors * kRows], packed[kVectors * kDim];
  const Kernels* const tables[] = {&kernels_avx512, &kernels_avx512bf16};
  for (int side = 0; side < 2; ++side) {
    const Kernels& k = *tables[side];
    for (int64_t v = 0; v < kVectors; ++v) k.pack[V2DROP_BFLOAT16](rows + (kRows + v) * kDim, kDim, packed + v * kDim);
    k.dots[V2DROP_BFLOAT16](rows, kDim * 2, kRows, packed, kVectors, kDim, 1.0f, products[side], kRows);
  }
  return std::memcmp(products[0], products[1], sizeof products[0]) == 0;
}
#endif

const Kernels& choose() {
#if defined(__x86_64__)
  const char* cap = std::getenv("V2DROP_ISA");
  if (!cap) cap = "";
  unsigned eax, ebx, ecx = 0, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  __builtin_cpu_init();  // its answers include whether the operating system saves the registers
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && std::strcmp(cap, "baseline") != 0;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && std::strcmp(cap, "avx2") != 0;
  if (avx512 && std::strcmp(cap, "avx512") != 0 && has_pairs() && pairs_agree()) return kernels_avx512bf16;
  if (avx512) return kernels_avx512;
  if (avx2) return kernels_avx2;
#endif
  return kernels_baseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace v2drop
