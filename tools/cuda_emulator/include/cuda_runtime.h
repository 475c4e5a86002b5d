// SPDX-License-Identifier: Apache-2.0
//
// The part of CUDA that our kernels and their launchers use, for ../emulate.cpp. What is missing here does not compile, which is meant:
// nothing but this part has been given its meaning on the CPU. Device memory is host memory; every stream is synchronous.
#ifndef V2DROP_TESTS_EMULATE_CUDA_RUNTIME_H_
#define V2DROP_TESTS_EMULATE_CUDA_RUNTIME_H_

#include <malloc.h>
#include <math.h>
#include <string.h>

#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <utility>

#include "../emulate.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// Vector types. may_alias, because kernels read arrays of anything through them.
#define EMULATE_VECTOR_2(name, type)                                  \
  struct __attribute__((may_alias, aligned(2 * sizeof(type)))) name { \
    type x, y;                                                        \
  };                                                                  \
  inline name make_##name(type x, type y) { return {x, y}; }
#define EMULATE_VECTOR_4(name, type)                                  \
  struct __attribute__((may_alias, aligned(4 * sizeof(type)))) name { \
    type x, y, z, w;                                                  \
  };                                                                  \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATE_VECTOR_2(int2, int)
EMULATE_VECTOR_2(uint2, unsigned)
EMULATE_VECTOR_2(float2, float)
EMULATE_VECTOR_4(int4, int)
EMULATE_VECTOR_4(uint4, unsigned)
EMULATE_VECTOR_4(float4, float)
#undef EMULATE_VECTOR_2
#undef EMULATE_VECTOR_4

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The scheduler sets them whenever it changes to another thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// Barriers and warps.

inline void __syncthreads() { emulate::block_barrier("__syncthreads"); }
inline int __syncthreads_count(int predicate) { return emulate::block_barrier("__syncthreads_count", predicate != 0); }
inline int __syncthreads_or(int predicate) { return emulate::block_barrier("__syncthreads_or", predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) { return emulate::block_barrier("__syncthreads_and", predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulate::warp_barrier("__syncwarp", mask); }

namespace emulate {

template <class T, class... Of>
constexpr bool is_one_of = (std::is_same<T, Of>::value || ...);

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable<To>::value, "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// `source(lane, first, last)` is the lane to read, of the segment of `width` lanes from first to last.
template <class T, class Source>
T shuffle(const char* name, unsigned mask, T value, int width, Source source) {
  static_assert(is_one_of<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double>,
                "this type is not emulated");
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("%s: the width is %d; it must be a power of two up to 32", name, width);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  const Lanes lanes = warp_barrier(name, mask, bits);
  const unsigned first = lanes.self & ~(width - 1u), from = source(lanes.self, first, first + width - 1u);
  if (from >= lanes.count) fail("%s: lane %u reads lane %u of a warp of %u", name, lanes.self, from, lanes.count);
  memcpy(&value, &lanes.values[from], sizeof value);
  return value;
}

template <class T, class Combine>
T reduce(const char* name, unsigned mask, T value, Combine combine) {
  const Lanes lanes = warp_barrier(name, mask, static_cast<unsigned>(value));
  value = static_cast<T>(lanes.values[0]);
  for (unsigned lane = 1; lane < lanes.count; ++lane) value = combine(value, static_cast<T>(lanes.values[lane]));
  return value;
}

inline unsigned ballot(const char* name, unsigned mask, bool predicate, unsigned* all = nullptr) {
  const Lanes lanes = warp_barrier(name, mask, predicate);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < lanes.count; ++lane) bits |= static_cast<unsigned>(lanes.values[lane]) << lane;
  if (all) *all = 0xffffffffu >> (32 - lanes.count);
  return bits;
}

}  // namespace emulate

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulate::shuffle("__shfl_sync", mask, value, width,
                          [=](unsigned, unsigned first, unsigned) { return first + (source & (width - 1u)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  return emulate::shuffle("__shfl_xor_sync", mask, value, width, [=](unsigned lane, unsigned, unsigned last) {
    const unsigned from = lane ^ flip;
    return from > last ? lane : from;
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulate::shuffle("__shfl_up_sync", mask, value, width,
                          [=](unsigned lane, unsigned first, unsigned) { return lane - first < delta ? lane : lane - delta; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulate::shuffle("__shfl_down_sync", mask, value, width,
                          [=](unsigned lane, unsigned, unsigned last) { return last - lane < delta ? lane : lane + delta; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulate::ballot("__ballot_sync", mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return emulate::ballot("__any_sync", mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  unsigned all;
  return emulate::ballot("__all_sync", mask, predicate != 0, &all) == all;
}

#define EMULATE_REDUCE(type)                                                                                \
  inline type __reduce_add_sync(unsigned mask, type value) {                                                \
    return emulate::reduce("__reduce_add_sync", mask, value,                                                \
                           [](type a, type b) { return static_cast<type>(static_cast<unsigned>(a) + b); }); \
  }                                                                                                         \
  inline type __reduce_min_sync(unsigned mask, type value) {                                                \
    return emulate::reduce("__reduce_min_sync", mask, value, [](type a, type b) { return a < b ? a : b; }); \
  }                                                                                                         \
  inline type __reduce_max_sync(unsigned mask, type value) {                                                \
    return emulate::reduce("__reduce_max_sync", mask, value, [](type a, type b) { return a < b ? b : a; }); \
  }
EMULATE_REDUCE(int)
EMULATE_REDUCE(unsigned)
#undef EMULATE_REDUCE

// Integers and floats.

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }

#define EMULATE_MIN_MAX(type)                                  \
  constexpr type min(type a, type b) { return a < b ? a : b; } \
  constexpr type max(type a, type b) { return a < b ? b : a; }
EMULATE_MIN_MAX(int)
EMULATE_MIN_MAX(unsigned)
EMULATE_MIN_MAX(long)
EMULATE_MIN_MAX(unsigned long)
EMULATE_MIN_MAX(long long)
EMULATE_MIN_MAX(unsigned long long)
#undef EMULATE_MIN_MAX

// Compile without contraction (-ffp-contract=off), or the compiler may fuse these where the processor can.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline int __float_as_int(float x) { return emulate::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return emulate::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return emulate::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return emulate::bits_as<float>(x); }

// Memory.

namespace emulate {

template <class T>
void check_access(const char* name, const T* at) {
  require_previous_launch(name);
  static_assert(is_one_of<T, char, signed char, unsigned char, short, unsigned short, int, unsigned, long, unsigned long, long long,
                          unsigned long long, float, int2, uint2, float2, int4, uint4, float4>,
                "this type is not emulated");
  if (reinterpret_cast<uintptr_t>(at) % alignof(T) != 0) fail("%s: address %p is not a multiple of %zu", name, (const void*)at, alignof(T));
}

template <class T>
T load(const char* name, const T* from) {
  check_access(name, from);
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
void store(const char* name, T* to, T value) {
  check_access(name, to);
  memcpy(to, &value, sizeof value);
}

// Fibers do not run at the same time, so read, change, write is atomic.
template <class T, class Change>
T atomic(const char* name, T* at, Change change) {
  const T old = load(name, at);
  store(name, at, static_cast<T>(change(old)));
  return old;
}

}  // namespace emulate

#define EMULATE_LOAD(name)             \
  template <class T>                   \
  T name(const T* from) {              \
    return emulate::load(#name, from); \
  }
EMULATE_LOAD(__ldg)
EMULATE_LOAD(__ldca)
EMULATE_LOAD(__ldcg)
EMULATE_LOAD(__ldcs)
#undef EMULATE_LOAD
#define EMULATE_STORE(name)                 \
  template <class T>                        \
  void name(T* to, std::decay_t<T> value) { \
    emulate::store(#name, to, value);       \
  }
EMULATE_STORE(__stcg)
EMULATE_STORE(__stcs)
#undef EMULATE_STORE

#define EMULATE_ATOMICS(type)                                                                                    \
  inline type atomicAdd(type* at, type x) {                                                                      \
    return emulate::atomic("atomicAdd", at, [=](type old) { return static_cast<unsigned long long>(old) + x; }); \
  }                                                                                                              \
  inline type atomicMin(type* at, type x) {                                                                      \
    return emulate::atomic("atomicMin", at, [=](type old) { return old < x ? old : x; });                        \
  }                                                                                                              \
  inline type atomicMax(type* at, type x) {                                                                      \
    return emulate::atomic("atomicMax", at, [=](type old) { return old < x ? x : old; });                        \
  }                                                                                                              \
  inline type atomicOr(type* at, type x) {                                                                       \
    return emulate::atomic("atomicOr", at, [=](type old) { return old | x; });                                   \
  }                                                                                                              \
  inline type atomicExch(type* at, type x) {                                                                     \
    return emulate::atomic("atomicExch", at, [=](type) { return x; });                                           \
  }                                                                                                              \
  inline type atomicCAS(type* at, type expected, type x) {                                                       \
    return emulate::atomic("atomicCAS", at, [=](type old) { return old == expected ? x : old; });                \
  }
EMULATE_ATOMICS(int)
EMULATE_ATOMICS(unsigned)
EMULATE_ATOMICS(unsigned long long)
#undef EMULATE_ATOMICS

inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emulate::fail("__trap()"); }

// Launches follow one another completely, so there is nothing to wait for; but a kernel that may start early and does not wait is an error.
inline void cudaGridDependencySynchronize() { emulate::wait_for_previous_launch(); }
inline void cudaTriggerProgrammaticLaunchCompletion() {}

// Host.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorStubLibrary = 34,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
  cudaErrorSystemDriverMismatch = 803,
  cudaErrorInvalidClusterSize = 912,
  cudaErrorUnknown = 999
};
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

typedef struct CUstream_st* cudaStream_t;

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = emulate::kMaxThreads;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = emulate::kSharedBytes;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = emulate::kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = emulate::kL2Bytes;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulate::kSharedBytes;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t) {
  if (threads < 1 || threads > emulate::kMaxThreads) return cudaErrorInvalidValue;
  *blocks = emulate::kBlocksPerMultiprocessor;
  return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  emulate::synchronises("cudaMalloc");
  *memory = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (posix_memalign(memory, 256, bytes) != 0) return cudaErrorMemoryAllocation;
  memset(*memory, 0xCD, bytes);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMalloc(T** memory, size_t bytes) {
  void* bare;
  const cudaError_t error = cudaMalloc(&bare, bytes);
  *memory = static_cast<T*>(bare);
  return error;
}
inline cudaError_t cudaFree(void* memory) {
  emulate::synchronises("cudaFree");
  if (memory) emulate::gives_back(memory, malloc_usable_size(memory));
  free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes); }
enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};
// All memory of the host is pageable here, so this waits for the copy as cudaMemcpy does.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t = nullptr) {
  if (kind != cudaMemcpyDeviceToDevice) emulate::synchronises("cudaMemcpyAsync");
  if (bytes) memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind);
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulate::is_capturing() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  emulate::synchronises("cudaStreamSynchronize");
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  emulate::synchronises("cudaDeviceSynchronize");
  return cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
union cudaLaunchAttributeValue {
  char pad[64];
  int cooperative;
  int programmaticStreamSerializationAllowed;
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulate {
cudaError_t launch(const cudaLaunchConfig_t& config, void (*thread)(const void*), const void* body, size_t bytes);
int active_clusters(const cudaLaunchConfig_t& config);
}  // namespace emulate

// How many clusters the device holds at once: none where it cannot launch them.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
  *clusters = emulate::active_clusters(*config);
  return cudaSuccess;
}

// The lambda converts the arguments to the types of the parameters, once; every thread then gets its own copies.
template <class... Exp, class... Act>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Exp...), Act&&... args) {
  return [&](Exp... parameters) {
    const auto call = [=] { kernel(parameters...); };
    static_assert(std::is_trivially_copyable_v<decltype(call)>, "a capture copies the bytes of the arguments");
    return emulate::launch(*config, [](const void* body) { (*static_cast<decltype(call)*>(body))(); }, &call, sizeof call);
  }(std::forward<Act>(args)...);
}

#endif  // V2DROP_TESTS_EMULATE_CUDA_RUNTIME_H_
