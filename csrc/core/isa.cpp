// SPDX-License-Identifier: Apache-2.0
//
// Chooses the kernel table: the widest instruction set that the CPU has and V2DROP_ISA allows.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace v2drop {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

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
