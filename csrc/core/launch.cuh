// SPDX-License-Identifier: Apache-2.0
//
// The host's side of a launch: the device, its errors, scratch memory, and the tables that kernels read.
#ifndef V2DROP_CORE_LAUNCH_CUH_
#define V2DROP_CORE_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "request.h"

namespace v2drop {

struct Device {
  int sms;
  bool dependent_launch;  // programmatic dependent launch
  bool cooperative_launch;
};

// The properties of the current device, which are queried once.
const Device& current_device();

// Throws an Error for an error of the CUDA runtime, and clears it there, so that the caller's next check does not find it.
void check_cuda(cudaError_t error, const char* what);

enum class LaunchDependency { kNone, kDependent, kCooperative };

struct LaunchShape {
  int64_t blocks;
  int threads, cluster;  // blocks of a cluster, 0: none
};

// Starts `blocks` blocks; kDependent: as soon as the previous kernel of this call has triggered, if the device can.
template <class... Parameters, class... Arguments>
cudaError_t try_launch(void (*kernel)(Parameters...), const LaunchShape& shape, LaunchDependency dependency, void* stream,
                       Arguments&&... arguments) {
  if (shape.blocks == 0) return cudaSuccess;
  if (shape.blocks > INT32_MAX) fail("gathers: need more than 2^31 blocks in one launch");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (dependency == LaunchDependency::kDependent && current_device().dependent_launch) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  } else if (dependency == LaunchDependency::kCooperative) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    config.numAttrs = 1;
  }
  if (shape.cluster) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, LaunchDependency dependency, void* stream, Arguments&&... arguments) {
  check_cuda(try_launch(kernel, shape, dependency, stream, std::forward<Arguments>(arguments)...), "launch");
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, LaunchDependency dependency, void* stream,
            Arguments&&... arguments) {
  launch(kernel, LaunchShape{blocks, threads, 0}, dependency, stream, std::forward<Arguments>(arguments)...);
}

// Hands out the caller's scratch memory in pieces aligned to 256 bytes.
class Workspace {
 public:
  explicit Workspace(const v2drop_context& context) : next_(static_cast<char*>(context.workspace)), left_(context.workspace_bytes) {
    if (reinterpret_cast<uintptr_t>(context.workspace) % 256 != 0) fail("context.workspace: is not aligned to 256 bytes");
  }
  template <class T>
  T* take(int64_t count) {
    if (count == 0) return nullptr;
    if (!next_) fail("context.workspace: is NULL");
    if (count > (INT64_MAX - 255) / static_cast<int64_t>(sizeof(T))) fail("context.workspace: what the call needs exceeds 64 bits");
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    if (bytes > left_) fail("context.workspace: too small by %" PRId64 " bytes, see v2drop_workspace_bytes", bytes - left_);
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes;
    left_ -= bytes;
    return piece;
  }

  // How many more T there is room for.
  template <class T>
  int64_t left() const {
    return left_ / 256 * 256 / static_cast<int64_t>(sizeof(T));
  }

 private:
  char* next_;
  int64_t left_;
};

// Writes host integers to device memory: they travel as kernel arguments, for a copy from host memory would keep the caller's memory in use
// after the call, or synchronise, and a captured one would read that memory again at every replay. In upload_cuda.cu.
void launch_upload(const int64_t* values, int64_t count, int64_t* to, void* stream);

}  // namespace v2drop

#endif  // V2DROP_CORE_LAUNCH_CUH_
