// SPDX-License-Identifier: Apache-2.0
//
// v2drop_kernels._xla: the C interface as custom calls of XLA, for v2drop_kernels/jax.py, which registers them.
//
// Arguments and results are buffers in row-major order; everything else comes as attributes. JAX has no int64 by default, so row indices
// are passed as int32 [.., 2], their low and high words. Every list of results ends with the scratch memory of the GPU.
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

  // The arrays from `first_in` and `first_out` on are gathered.
  std::vector<v2drop_gather> gathers(size_t first_in, size_t first_out) const {
    const auto batch_dims = list("batch_dims"), row_dims = list("row_dims"), fills = list("fills");
    std::vector<v2drop_gather> gathers;
    for (size_t i = 0; i < row_dims.size(); ++i) {
      gathers.push_back(
          {in(first_in + i), out(first_out + i), static_cast<int32_t>(batch_dims[i]), static_cast<int32_t>(row_dims[i]), fills[i]});
    }
    return gathers;
  }

  v2drop_context context_on(void* stream) const {
    const ffi::AnyBuffer scratch = result(rets_.size() - 1);
    // XLA aligns to 128 bytes; jax.py requests 256 more than are needed.
    const uintptr_t begin = reinterpret_cast<uintptr_t>(scratch.untyped_data()), first = (begin + 255) / 256 * 256;
    v2drop_context context = V2DROP_CONTEXT_INIT;
    context.place = V2DROP_CUDA;
    context.stream = stream;
    context.workspace = reinterpret_cast<void*>(first);
    context.workspace_bytes = static_cast<int64_t>(scratch.size_bytes() - (first - begin));
    return context;
  }

 private:
  ffi::AnyBuffer result(size_t i) const { return *value(rets_.get<ffi::AnyBuffer>(i)); }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  ffi::Dictionary attrs_;
};

// What rows are ranked by, scores or both hidden states, which come before the other arguments.
class Source {
 public:
  Source(const Call& call, size_t first, size_t count) : first_(call.in(first)) {
    if (count == 2) {
      second_ = call.in(first + 1);
      source_.prev = &first_;
      source_.cur = &second_;
    } else {
      source_.scores = &first_;
    }
    source_.metric = call.code("metric");
  }
  Source(const Source&) = delete;
  void round_scores_to(int32_t dtype) { source_.score_dtype = dtype; }
  operator const v2drop_source*() const { return &source_; }

 private:
  v2drop_tensor first_, second_;
  v2drop_source source_ = V2DROP_SOURCE_INIT;
};

// The source and the segments of a selection.
struct Ranked {
  explicit Ranked(const Call& call) : count(static_cast<size_t>(call.number("ranked"))), source(call, 0, count) {
    source.round_scores_to(call.code("score_dtype"));
    const auto list = call.list("segments");
    static_assert(sizeof(v2drop_segment) == 8 * sizeof(int64_t), "a segment is eight numbers of the attribute");
    segments = reinterpret_cast<const v2drop_segment*>(list.begin());
    n_segments = static_cast<int64_t>(list.size() / 8);
  }

  size_t count;
  Source source;
  const v2drop_segment* segments;
  int64_t n_segments;
};

v2drop_status variation_score(const Call& call, const v2drop_context* context) {
  Source source(call, 0, 2);
  source.round_scores_to(call.code("score_dtype"));
  const v2drop_tensor scores = call.out(0);
  return v2drop_variation_score(source, &scores, context);
}

v2drop_status variation_score_backward(const Call& call, const v2drop_context* context) {
  const Source source(call, 1, 2);
  const v2drop_tensor grad = call.in(0), to_prev = call.out(0), to_cur = call.out(1);
  return v2drop_variation_score_backward(&grad, source, &to_prev, &to_cur, context);
}

v2drop_status topk(const Call& call, const v2drop_context* context) {
  const Ranked r(call);
  const v2drop_tensor values = call.out(0), indices = call.indices_out(1);
  return v2drop_topk(r.source, r.segments, r.n_segments, nullptr, call.code("order"), &values, &indices, context);
}

v2drop_status drop_tokens(const Call& call, const v2drop_context* context) {
  const Ranked r(call);
  const v2drop_tensor keep = call.indices_out(0);
  const std::vector<v2drop_gather> gathers = call.gathers(r.count, 1);
  return v2drop_drop_tokens(r.source, r.segments, r.n_segments, nullptr, &keep, nullptr, gathers.data(),
                            static_cast<int64_t>(gathers.size()), context);
}

v2drop_status compact(const Call& call, const v2drop_context* context) {
  const v2drop_tensor keep = call.indices_in(0);
  const std::vector<v2drop_gather> gathers = call.gathers(1, 0);
  return v2drop_compact(&keep, gathers.data(), static_cast<int64_t>(gathers.size()), context);
}

v2drop_status compact_backward(const Call& call, const v2drop_context* context) {
  const v2drop_tensor keep = call.indices_in(0);
  const std::vector<v2drop_gather> gathers = call.gathers(1, 0);
  return v2drop_compact_backward(&keep, call.number("rows"), gathers.data(), static_cast<int64_t>(gathers.size()), context);
}

using Op = v2drop_status (*)(const Call&, const v2drop_context*);

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
    const v2drop_context context = call.context_on(stream);
    return answer(op(call, &context));
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
  module.def("workspace_bytes", &v2drop_workspace_bytes);
}
