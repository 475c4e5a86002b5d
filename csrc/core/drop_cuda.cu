// SPDX-License-Identifier: Apache-2.0
//
// The whole step on the GPU, in one to three launches: score, select, gather. Where competitions are small the gather's blocks repeat the
// select, and where all rows fit the GPU at once a grid barrier takes the place of the launch in between.
#include <algorithm>
#include <array>
#include <atomic>

#include "gather_cuda.cuh"
#include "occupancy.cuh"
#include "ops.h"
#include "score_cuda.cuh"
#include "selected_cuda.cuh"

#if !defined(V2DROP_CUDA_ARCHS_STRING)
#error "V2DROP_CUDA_ARCHS_STRING must name the architectures of this build"
#endif

namespace v2drop {
namespace {

template <bool COMPUTED>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    select_and_gather_kernel(const __grid_constant__ CopyBatch work, const __grid_constant__ Selection selection) {
  BlockCounts<kThreads> counts;
  wait_for_previous();
  gather_tile<true, COMPUTED>(work, &selection, counts, blockIdx.x);
}

template <class Sums, class T>
__device__ void drop_block(const Scored& scored, const CopyBatch& work, const Selection& selection, int groups, int tiles) {
  {
    BlockCounts<kThreads> counts;
    RowSums sums;
    const int rows = groups * (kThreads / 32 / scored.warps), first = static_cast<int>(blockIdx.x) * rows;
    if (first < scored.slots) score_rows<Sums, T, true>(scored, counts, sums, first, groups);
  }
  cooperative_groups::this_grid().sync();
  BlockCounts<kThreads> counts;
  if (static_cast<int>(blockIdx.x) < tiles) gather_tile<true, true>(work, &selection, counts, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kCooperativeBlocksOfSm)
    drop_kernel(const __grid_constant__ Scored scored, const __grid_constant__ CopyBatch work, const __grid_constant__ Selection selection,
                int groups, int tiles) {
  drop_block<ChangeSums, T>(scored, work, selection, groups, tiles);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kCooperativeBlocksOfSm)
    cosine_drop(const __grid_constant__ Scored scored, const __grid_constant__ CopyBatch work, const __grid_constant__ Selection selection,
                int groups, int tiles) {
  drop_block<CosineSums, T>(scored, work, selection, groups, tiles);
}

// The drop in one launch. False if the device cannot hold it.
template <auto KERNEL>
bool launch_cooperative(const Scored& scored, CopyBatch work, const Selection& selection, void* stream) {
  const int64_t resident = resident_blocks<KERNEL, kThreads>();
  fit_into(work, resident);
  const int64_t tiles = blocks_of(work);
  if (tiles > resident) return false;
  const int groups = static_cast<int>(std::max<int64_t>(1, (score_blocks(scored, 1) + resident - 1) / resident));
  const cudaError_t error = try_launch(KERNEL, LaunchShape{std::max(tiles, score_blocks(scored, groups)), kThreads, 0},
                                       LaunchDependency::kCooperative, stream, scored, work, selection, groups, static_cast<int>(tiles));
  if (error == cudaErrorCooperativeLaunchTooLarge) {  // the process has a share of the device only (MPS)
    cudaGetLastError();
    return false;
  }
  check_cuda(error, "launch");
  return true;
}

template <class T>
bool launch_cooperative_of(const Scored& scored, const CopyBatch& work, const Selection& selection, void* stream) {
  if (scored.metric == V2DROP_COSINE) return launch_cooperative<cosine_drop<T>>(scored, work, selection, stream);
  return launch_cooperative<drop_kernel<T>>(scored, work, selection, stream);
}

bool launch_cooperative(int32_t dtype, const Scored& scored, const CopyBatch& work, const Selection& selection, void* stream) {
  if (dtype == V2DROP_FLOAT32) return launch_cooperative_of<Float32>(scored, work, selection, stream);
  if (dtype == V2DROP_FLOAT16) return launch_cooperative_of<Float16>(scored, work, selection, stream);
  return launch_cooperative_of<BFloat16>(scored, work, selection, stream);
}

// Whether the kernels that run here wait for their predecessors: not where they were translated from the PTX of an older architecture.
bool kernels_wait() {
#if defined(V2DROP_EMULATED)
  return true;
#else
  cudaFuncAttributes attributes = {};
  check_cuda(cudaFuncGetAttributes(&attributes, select_and_gather_kernel<true>), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
#endif
}

// Whether launches on this stream are recorded into a graph.
bool is_captured(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();
  return false;
}

Device ask_device(int device) {
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
  };
  return {ask(cudaDevAttrMultiProcessorCount), kernels_wait(), ask(cudaDevAttrCooperativeLaunch) != 0};
}

}  // namespace

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  const bool no_code =
      error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction || error == cudaErrorUnsupportedPtxVersion;
  const bool no_device = no_code || error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver;
  fail_with(no_device ? V2DROP_ERROR_UNSUPPORTED : V2DROP_ERROR_DEVICE, "%s: %s (%s)%s%s", what, cudaGetErrorString(error),
            cudaGetErrorName(error), no_code ? "; built for " : "", no_code ? V2DROP_CUDA_ARCHS_STRING : "");
}

const Device& current_device() {
  static std::array<Device, kDevices> devices;
  static std::array<std::atomic<bool>, kDevices> known{};
  static std::atomic_flag busy = ATOMIC_FLAG_INIT;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= kDevices) fail_with(V2DROP_ERROR_UNSUPPORTED, "device %d is beyond the %d that libv2drop numbers", device, kDevices);
  const size_t i = static_cast<size_t>(device);
  if (!known[i].load(std::memory_order_acquire)) {
    const Device found = ask_device(device);
    while (busy.test_and_set(std::memory_order_acquire)) {
    }
    if (!known[i].load(std::memory_order_relaxed)) devices[i] = found;  // others may be reading it
    known[i].store(true, std::memory_order_release);
    busy.clear(std::memory_order_release);
  }
  return devices[i];
}

namespace cuda {

void drop(const DropRequest& request, const v2drop_context& context) {
  const ScoreSource& source = request.source;
  const Segments& segments = request.segments;
  const Keep& keep = request.keep;
  const bool host_knows = !segments.cu_seqlens;
  const int32_t mode = context.launch_mode;

  std::vector<CopyBatch> batches = plan_batches(request.copies, keep);
  const int64_t max_n = host_knows ? segments.largest() : source.rows;
  const bool can_fuse = host_knows && max_n <= kFusedSelect && !batches.empty() && mode < V2DROP_LAUNCH_SEPARATE;
  const bool small = source.has_scores || source.hidden.prev.bytes() <= kSmallBytes;
  CopyBatch one_wave = {};
  if (can_fuse) {
    const int64_t resident = resident_blocks<select_and_gather_kernel<true>, kThreads>();
    fit_into(one_wave = batches[0], small ? std::min<int64_t>(resident, current_device().sms) : resident);
  }
  const bool few = can_fuse && segments.count * one_wave.tile_rows <= kSegmentsOfTile * keep.batch * keep.count;
  const bool fused = can_fuse && ((few && small) || mode != V2DROP_LAUNCH_AUTO);
  if (fused) batches[0] = one_wave;
  if (keep.batch * keep.count == 0 && host_knows) return;
  if (segments.count == 0) {  // every row of the result is empty
    const cudaStream_t stream = static_cast<cudaStream_t>(context.stream);
    check_cuda(cudaMemsetAsync(request.new_cu, 0, sizeof *request.new_cu, stream), "cudaMemsetAsync");
    if (keep.count == 0) return;
    check_cuda(cudaMemsetAsync(keep.data, 0xff, static_cast<size_t>(keep.count) * sizeof *keep.data, stream), "cudaMemsetAsync");
    return launch_gather(batches, 0, LaunchDependency::kNone, context.stream);
  }
  Workspace workspace(context);
  const Table table = make_table(segments, source, keep.count, true, context, workspace);
  Selection selection = {table, {}};
  LaunchDependency dependency = LaunchDependency::kNone;
  if (source.has_scores) {
    selection.ordinals = device_ordinals(source, nullptr);
  } else {
    const Hidden& hidden = source.hidden;
    const Scored scored = describe_ordinals(source, segments, table, workspace);
    selection.ordinals = device_ordinals(source, scored.ordinals);
    const bool aligned = is_aligned(hidden.prev) && is_aligned(hidden.cur);
    const bool can = fused && aligned && current_device().cooperative_launch;
    if (mode == V2DROP_LAUNCH_COOPERATIVE || (mode == V2DROP_LAUNCH_AUTO && can && !is_captured(context.stream))) {
      if (can && launch_cooperative(hidden.prev.dtype, scored, batches[0], selection, context.stream)) {
        return launch_gather(batches, 1, LaunchDependency::kNone, context.stream);
      }
      if (mode == V2DROP_LAUNCH_COOPERATIVE) {
        fail_with(V2DROP_ERROR_UNSUPPORTED,
                  "context.launch_mode: a cooperative drop takes at most %d competing rows in a segment, known to the host, "
                  "rows aligned to 16 bytes, something to move, and a device that can",
                  kFusedSelect);
      }
    }
    dependency = launch_score(scored, hidden.prev.dtype, aligned, context.stream);
  }
  if (fused) {
    const auto kernel = source.has_scores ? select_and_gather_kernel<false> : select_and_gather_kernel<true>;
    launch(kernel, blocks_of(batches[0]), kThreads, dependency, context.stream, batches[0], selection);
    return launch_gather(batches, 1, LaunchDependency::kNone, context.stream);
  }
  const KeptRows kept = {keep.data, segments.cu_seqlens, request.new_cu};
  launch_select(table, selection.ordinals, Selected{kept, nullptr, nullptr, 0, V2DROP_FLOAT32}, max_n, dependency, workspace, context);
  launch_gather(batches, 0, LaunchDependency::kDependent, context.stream);
}

}  // namespace cuda
}  // namespace v2drop

using namespace v2drop;

const char* v2drop_cuda_archs(void) { return V2DROP_CUDA_ARCHS_STRING; }

v2drop_status v2drop_cuda_available(void) {
  return guard([] {
    int count = 0;
    check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    if (count == 0) fail_with(V2DROP_ERROR_UNSUPPORTED, "there is no CUDA device");
    resident_blocks<select_and_gather_kernel<true>, kThreads>();
  });
}

int64_t v2drop_workspace_bytes(int64_t rows, int64_t n_segments, int64_t width) {
  // The ordinals and a table, and indices to rank; or the inverse of keep. Each piece is rounded up to 256 bytes.
  return 8 * rows + 64 * n_segments + 8 * n_segments * width + 1024;
}
