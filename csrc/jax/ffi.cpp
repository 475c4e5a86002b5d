// SPDX-License-Identifier: Apache-2.0
//
// v2drop_kernels._xla: the C interface as custom calls of XLA, for v2drop_kernels/jax.py, which registers them.
//
// Arguments and results are buffers in row-major order, everything else comes as attributes. JAX has no int64 unless told so: row
// indices cross as int32 [.., 2], their low and high words. Every result list ends with the scratch memory of the GPU.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "v2drop/v2drop.h"
#include "xla/ffi/api/ffi.h"

namespace py = pybind11;
namespace ffi = xla::ffi;

namespace {

template <class T>
T value(const ffi::ErrorOr<T>& found) {
  if (!found.has_value()) throw std::invalid_argument(found.error().message());
  return found.value();
}

int32_t dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return V2DROP_FLOAT32;
    case ffi::F16:
      return V2DROP_FLOAT16;
    case ffi::BF16:
      return V2DROP_BFLOAT16;
    case ffi::PRED:
      return V2DROP_BOOL;
    case ffi::S32:
      return V2DROP_INT32;
    case ffi::S64:
      return V2DROP_INT64;
    default:
      break;
  }
  switch (ffi::ByteWidth(type)) {
    case 1:
      return V2DROP_BITS8;
    case 2:
      return V2DROP_BITS16;
    case 4:
      return V2DROP_BITS32;
    case 8:
      return V2DROP_BITS64;
    case 16:
      return V2DROP_BITS128;
    default:
      throw std::invalid_argument("an array has a dtype that is not made of bytes");
  }
}

v2drop_tensor view(const ffi::AnyBuffer& buffer) {
  const auto shape = buffer.dimensions();
  if (shape.size() > V2DROP_MAX_DIMS) throw std::invalid_argument("an array has more than 8 dimensions");
  v2drop_tensor tensor = {buffer.untyped_data(), dtype_of(buffer.element_type()), static_cast<int32_t>(shape.size()), {}, {}};
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d]) {
    tensor.shape[d] = shape[d];
    tensor.stride[d] = stride;
  }
  return tensor;
}

v2drop_tensor index_view(const ffi::AnyBuffer& buffer) {
  v2drop_tensor tensor = view(buffer);
  if (tensor.dtype != V2DROP_INT32 || tensor.ndim < 2 || tensor.shape[tensor.ndim - 1] != 2)
    throw std::invalid_argument("indices must be int32 [.., 2]");
  tensor.dtype = V2DROP_INT64;
  --tensor.ndim;
  for (int d = 0; d < tensor.ndim; ++d) tensor.stride[d] /= 2;
  return tensor;
}

class Call {
 public:
  Call(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs) : args_(args), rets_(rets), attrs_(attrs) {}

  v2drop_tensor in(size_t i) const { return view(value(args_.get<ffi::AnyBuffer>(i))); }
  v2drop_tensor out(size_t i) const { return view(result(i)); }
  v2drop_tensor indices_in(size_t i) const { return index_view(value(args_.get<ffi::AnyBuffer>(i))); }
  v2drop_tensor indices_out(size_t i) const { return index_view(result(i)); }
  int64_t number(const char* name) const { return value(attrs_.get<int64_t>(name)); }
  int32_t code(const char* name) const { return static_cast<int32_t>(number(name)); }
  ffi::Span<const int64_t> list(const char* name) const { return value(attrs_.get<ffi::Span<const int64_t>>(name)); }

  // The arrays from `first_in` and `first_out` on are the parts.
  std::vector<v2drop_part> parts(size_t first_in, size_t first_out) const {
    const auto batch_dims = list("batch_dims"), row_dims = list("row_dims"), fills = list("fills");
    std::vector<v2drop_part> parts;
    for (size_t i = 0; i < row_dims.size(); ++i) {
      parts.push_back(
          {in(first_in + i), out(first_out + i), static_cast<int32_t>(batch_dims[i]), static_cast<int32_t>(row_dims[i]), fills[i]});
    }
    return parts;
  }

  v2drop_cuda on(void* stream) const {
    const ffi::AnyBuffer scratch = result(rets_.size() - 1);
    // XLA aligns to 128 bytes; jax.py asks for 256 more than are needed.
    const uintptr_t begin = reinterpret_cast<uintptr_t>(scratch.untyped_data()), first = (begin + 255) / 256 * 256;
    return {stream, reinterpret_cast<void*>(first), static_cast<int64_t>(scratch.size_bytes() - (first - begin)), V2DROP_DESIGN_AUTO,
            nullptr};
  }

 private:
  ffi::AnyBuffer result(size_t i) const { return *value(rets_.get<ffi::AnyBuffer>(i)); }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  ffi::Dictionary attrs_;
};

constexpr int32_t kAllThreads = 0;

// What competes: scores, or both hidden states, in front of the other arguments.
struct Ranked {
  explicit Ranked(const Call& call) : count(static_cast<size_t>(call.number("ranked"))), first(call.in(0)) {
    if (count == 2) second = call.in(1);
    const auto list = call.list("stretches");
    static_assert(sizeof(v2drop_stretch) == 8 * sizeof(int64_t), "a stretch is eight numbers of the attribute");
    stretches = reinterpret_cast<const v2drop_stretch*>(list.begin());
    n_stretches = static_cast<int64_t>(list.size() / 8);
  }
  const v2drop_tensor* scores() const { return count == 1 ? &first : nullptr; }
  const v2drop_tensor* prev() const { return count == 2 ? &first : nullptr; }
  const v2drop_tensor* cur() const { return count == 2 ? &second : nullptr; }

  size_t count;
  v2drop_tensor first, second;
  const v2drop_stretch* stretches;
  int64_t n_stretches;
};

v2drop_status variation_score(const Call& call, const v2drop_cuda* on) {
  const v2drop_tensor prev = call.in(0), cur = call.in(1), scores = call.out(0);
  const int32_t metric = call.code("metric"), round_to = call.code("round_to");
  return on ? v2drop_variation_score_cuda(&prev, &cur, metric, round_to, &scores, on)
            : v2drop_variation_score(&prev, &cur, metric, round_to, &scores, kAllThreads);
}

v2drop_status variation_score_backward(const Call& call, const v2drop_cuda* on) {
  const v2drop_tensor grad = call.in(0), prev = call.in(1), cur = call.in(2), to_prev = call.out(0), to_cur = call.out(1);
  const int32_t metric = call.code("metric");
  return on ? v2drop_variation_score_backward_cuda(&grad, &prev, &cur, metric, &to_prev, &to_cur, on)
            : v2drop_variation_score_backward(&grad, &prev, &cur, metric, &to_prev, &to_cur, kAllThreads);
}

v2drop_status topk(const Call& call, const v2drop_cuda* on) {
  const Ranked r(call);
  const v2drop_tensor values = call.out(0), indices = call.indices_out(1);
  const int32_t order = call.code("order"), metric = call.code("metric"), round_to = call.code("round_to");
  return on ? v2drop_topk_cuda(r.scores(), r.prev(), r.cur(), nullptr, r.stretches, r.n_stretches, nullptr, order, metric, round_to,
                               &values, &indices, on)
            : v2drop_topk(r.scores(), r.prev(), r.cur(), nullptr, r.stretches, r.n_stretches, order, metric, round_to, &values, &indices,
                          kAllThreads);
}

v2drop_status drop_tokens(const Call& call, const v2drop_cuda* on) {
  const Ranked r(call);
  const v2drop_tensor keep = call.indices_out(0);
  const std::vector<v2drop_part> parts = call.parts(r.count, 1);
  const int32_t metric = call.code("metric"), round_to = call.code("round_to");
  const int64_t n_parts = static_cast<int64_t>(parts.size());
  return on ? v2drop_drop_tokens_cuda(r.scores(), r.prev(), r.cur(), nullptr, r.stretches, r.n_stretches, nullptr, metric, round_to, &keep,
                                      nullptr, parts.data(), n_parts, on)
            : v2drop_drop_tokens(r.scores(), r.prev(), r.cur(), nullptr, r.stretches, r.n_stretches, metric, round_to, &keep, parts.data(),
                                 n_parts, kAllThreads);
}

v2drop_status compact(const Call& call, const v2drop_cuda* on) {
  const v2drop_tensor keep = call.indices_in(0);
  const std::vector<v2drop_part> parts = call.parts(1, 0);
  const int64_t n_parts = static_cast<int64_t>(parts.size());
  return on ? v2drop_compact_cuda(&keep, parts.data(), n_parts, on) : v2drop_compact(&keep, parts.data(), n_parts, kAllThreads);
}

v2drop_status compact_backward(const Call& call, const v2drop_cuda* on) {
  const v2drop_tensor keep = call.indices_in(0);
  const int64_t rows = call.number("rows");
  const std::vector<v2drop_part> parts = call.parts(1, 0);
  const int64_t n_parts = static_cast<int64_t>(parts.size());
  return on ? v2drop_compact_backward_cuda(&keep, rows, parts.data(), n_parts, on)
            : v2drop_compact_backward(&keep, rows, parts.data(), n_parts, kAllThreads);
}

using Op = v2drop_status (*)(const Call&, const v2drop_cuda*);

ffi::Error answer(v2drop_status status) {
  if (status == V2DROP_OK) return ffi::Error::Success();
  const auto code = status == V2DROP_ERROR_ARGUMENT      ? ffi::ErrorCode::kInvalidArgument
                    : status == V2DROP_ERROR_MEMORY      ? ffi::ErrorCode::kResourceExhausted
                    : status == V2DROP_ERROR_UNSUPPORTED ? ffi::ErrorCode::kUnimplemented
                                                         : ffi::ErrorCode::kInternal;
  return ffi::Error(code, v2drop_last_error());
}

template <Op op>
ffi::Error on_cpu(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs) {
  try {
    return answer(op(Call(args, rets, attrs), nullptr));
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, error.what());
  }
}

template <Op op>
ffi::Error on_gpu(void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs) {
  try {
    const Call call(args, rets, attrs);
    const v2drop_cuda on = call.on(stream);
    return answer(op(call, &on));
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, error.what());
  }
}

template <Op op>
void add(py::dict& cpu, py::dict& gpu, const char* name) {
  XLA_FFI_DEFINE_HANDLER(for_cpu, on_cpu<op>, ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());
  // A call only enqueues, so XLA may record it into a CUDA graph.
  XLA_FFI_DEFINE_HANDLER(for_gpu, on_gpu<op>, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().RemainingArgs().RemainingRets().Attrs(),
                         {ffi::Traits::kCmdBufferCompatible});
  cpu[name] = py::capsule(reinterpret_cast<void*>(for_cpu));
  gpu[name] = py::capsule(reinterpret_cast<void*>(for_gpu));
}

}  // namespace

PYBIND11_MODULE(_xla, module) {
  module.doc() = "The C interface of libv2drop as custom calls of XLA; see v2drop_kernels/jax.py for its user.";
  py::dict cpu, gpu;
  add<variation_score>(cpu, gpu, "v2drop_variation_score");
  add<variation_score_backward>(cpu, gpu, "v2drop_variation_score_backward");
  add<topk>(cpu, gpu, "v2drop_topk");
  add<drop_tokens>(cpu, gpu, "v2drop_drop_tokens");
  add<compact>(cpu, gpu, "v2drop_compact");
  add<compact_backward>(cpu, gpu, "v2drop_compact_backward");
  module.attr("cpu") = cpu;
  module.attr("gpu") = gpu;
  module.def("cuda_archs", &v2drop_cuda_archs);
  module.def("workspace_bytes_cuda", &v2drop_workspace_bytes_cuda);
}
