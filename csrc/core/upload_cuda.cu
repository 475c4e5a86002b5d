// SPDX-License-Identifier: Apache-2.0
//
// Host integers to device memory, as kernel arguments.
#include <algorithm>

#include "launch.cuh"
#include "ops.h"

namespace v2drop {
namespace {

constexpr int kUploadThreads = 128, kUploadValues = 8 * kUploadThreads;  // 8 KB of kernel arguments

struct UploadChunk {
  int64_t values[kUploadValues];
};

template <class T>
__global__ void __launch_bounds__(kUploadThreads) upload_kernel(T* to, const __grid_constant__ UploadChunk chunk, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kUploadThreads) to[i] = static_cast<T>(chunk.values[i]);
}

template <class T>
void upload(const int64_t* values, int64_t count, T* to, void* stream) {
  for (int64_t first = 0; first < count; first += kUploadValues) {
    UploadChunk chunk;
    const int64_t n = std::min<int64_t>(kUploadValues, count - first);
    std::copy_n(values + first, n, chunk.values);
    launch(upload_kernel<T>, 1, kUploadThreads, LaunchDependency::kNone, stream, to + first, chunk, static_cast<int>(n));
  }
}

}  // namespace

void launch_upload(const int64_t* values, int64_t count, int64_t* to, void* stream) { upload(values, count, to, stream); }

namespace cuda {

void upload(const UploadRequest& request, const v2drop_context& context) {
  if (request.dtype == V2DROP_INT64) {
    v2drop::upload(request.values, request.count, static_cast<int64_t*>(request.to), context.stream);
  } else {
    v2drop::upload(request.values, request.count, static_cast<int32_t*>(request.to), context.stream);
  }
}

}  // namespace cuda
}  // namespace v2drop
