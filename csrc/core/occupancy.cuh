// SPDX-License-Identifier: Apache-2.0
//
// How much of a kernel the current device holds at once.
#ifndef V2DROP_CORE_OCCUPANCY_CUH_
#define V2DROP_CORE_OCCUPANCY_CUH_

#include <array>
#include <atomic>

#include "launch.cuh"

namespace v2drop {

constexpr int kDevices = 64;

// What `ask` finds for the current device, once for each device and each type of `ask`.
template <class Ask>
int once_per_device(const Ask& ask) {
#if defined(V2DROP_EMULATED)
  return ask();  // a test may change the device
#else
  static std::array<std::atomic<int>, kDevices> known{};  // the answer + 1
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= kDevices) return ask();
  std::atomic<int>& answer = known[static_cast<size_t>(device)];
  int found = answer.load(std::memory_order_relaxed);
  if (found == 0) answer.store(found = ask() + 1, std::memory_order_relaxed);
  return found - 1;
#endif
}

// Blocks of a kernel.
template <auto kernel, int THREADS>
int64_t resident_blocks() {
  const int of_sm = once_per_device([] {
    int found = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, THREADS, 0), "occupancy");
    return found;
  });
  return static_cast<int64_t>(of_sm) * current_device().sms;
}

// Clusters of BLOCKS blocks of a kernel; 0 where the device, or the part of it that this process has, cannot launch one.
template <auto kernel, int THREADS, int BLOCKS>
int64_t active_clusters() {
  if (!current_device().dependent_launch) return 0;  // the kernels of this device were compiled without clusters, too
  return once_per_device([] {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {BLOCKS, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(BLOCKS);
    config.blockDim = dim3(THREADS);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int found = 0;
    if (cudaOccupancyMaxActiveClusters(&found, kernel, &config) == cudaSuccess) return found;
    cudaGetLastError();
    return 0;
  });
}

}  // namespace v2drop

#endif  // V2DROP_CORE_OCCUPANCY_CUH_
