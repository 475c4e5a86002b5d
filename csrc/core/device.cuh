// SPDX-License-Identifier: Apache-2.0
//
// What the kernels share: memory of a block, counts over a block, numbers of any float dtype, and the edges between launches.
#ifndef V2DROP_CORE_DEVICE_CUH_
#define V2DROP_CORE_DEVICE_CUH_

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ordinal.h"
#include "v2drop/v2drop.h"

#if defined(V2DROP_EMULATED)
#include "emulate.h"
#endif

namespace v2drop {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int thread_id() { return static_cast<int>(threadIdx.x); }
__device__ inline int lane_id() { return thread_id() & 31; }
__device__ inline int warp_id() { return thread_id() >> 5; }

// One T in the shared memory of the block, not initialised. A kernel has one of each type, so give every use a type of its own.
template <class T>
__device__ inline T& block_shared() {
#if defined(V2DROP_EMULATED)
  static const char key = 0;
  return *static_cast<T*>(emulate::shared(sizeof(T), alignof(T), &key));
#else
  __shared__ T storage;
  return storage;
#endif
}

// Programmatic dependent launch: a kernel that triggers lets the next one of the call start once all its own blocks run; the next one
// waits for the whole of its predecessor before it touches memory. The first kernel of a call never waits, so a call begins after all
// that came before it in the stream.
__device__ inline void trigger_next() {
#if defined(V2DROP_EMULATED) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ inline void wait_for_previous() {
#if defined(V2DROP_EMULATED) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  cudaGridDependencySynchronize();
#endif
}

// Keeps a kernel argument that is found by an index in a register. The compiler would rather load it again for every use, one load after
// the other, and what waits for it with them.
template <class T>
__device__ T in_register(T x) {
#if !defined(V2DROP_EMULATED)
  if constexpr (sizeof(T) == 8) {
    asm("" : "+l"(x));
  } else {
    asm("" : "+r"(x));
  }
#endif
  return x;
}

// Counts over a block, one barrier each: calls alternate between two buffers, so a warp that is late to read one finds it untouched.
// A kernel creates one of these and passes it on.
template <int THREADS>
class BlockCounts {
 public:
  __device__ int sum(int x) { return total(__reduce_add_sync(kAllLanes, x), kWarps); }

  // The sum over the warps before this one, of a value that all lanes of a warp agree on; and over all warps.
  __device__ int sum_before(int of_warp, int* all) {
    const int before = total(of_warp, warp_id());
    *all = __reduce_add_sync(kAllLanes, read(turn_ ^ 1));
    return before;
  }

  __device__ void range(int lo, int hi, int* block_lo, int* block_hi) {
    Shared& shared = block_shared<Shared>();
    lo = __reduce_min_sync(kAllLanes, lo);
    hi = __reduce_max_sync(kAllLanes, hi);
    if (lane_id() == 0) {
      shared.lo[warp_id()] = lo;
      shared.hi[warp_id()] = hi;
    }
    __syncthreads();
    const int lane = lane_id() < kWarps ? lane_id() : 0;
    *block_lo = __reduce_min_sync(kAllLanes, shared.lo[lane]);
    *block_hi = __reduce_max_sync(kAllLanes, shared.hi[lane]);
    __syncthreads();  // these have one buffer only
  }

 private:
  static constexpr int kWarps = THREADS / 32;
  struct Shared {
    int count[2][kWarps], lo[kWarps], hi[kWarps];
  };

  __device__ int read(int turn) const { return lane_id() < kWarps ? block_shared<Shared>().count[turn][lane_id()] : 0; }

  __device__ int total(int of_warp, int warps) {
    if (lane_id() == 0) block_shared<Shared>().count[turn_][warp_id()] = of_warp;
    __syncthreads();
    const int mine = read(turn_);
    turn_ ^= 1;
    return __reduce_add_sync(kAllLanes, lane_id() < warps ? mine : 0);
  }

  int turn_ = 0;
};

// Numbers of a float dtype, and float32 rounded to one.
struct Float32 {
  using Element = uint32_t;
  static __device__ float widen(Element x) { return __uint_as_float(x); }
  static __device__ Element narrow(float x) { return __float_as_uint(x); }
};
struct Float16 {
  using Element = uint16_t;
  static __device__ float widen(Element x) { return __half2float(__ushort_as_half(x)); }
  static __device__ Element narrow(float x) { return __half_as_ushort(__float2half_rn(x)); }
};
struct BFloat16 {
  using Element = uint16_t;
  static __device__ float widen(Element x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
  static __device__ Element narrow(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
};

__device__ inline float round_to_dtype(float x, int dtype) {
  if (dtype == V2DROP_FLOAT16) return Float16::widen(Float16::narrow(x));
  if (dtype == V2DROP_BFLOAT16) return BFloat16::widen(BFloat16::narrow(x));
  return x;
}

__device__ inline float load_float(const char* from, int dtype) {
  if (dtype == V2DROP_FLOAT16) return Float16::widen(*reinterpret_cast<const uint16_t*>(from));
  if (dtype == V2DROP_BFLOAT16) return BFloat16::widen(*reinterpret_cast<const uint16_t*>(from));
  return *reinterpret_cast<const float*>(from);
}

}  // namespace v2drop

#endif  // V2DROP_CORE_DEVICE_CUH_
