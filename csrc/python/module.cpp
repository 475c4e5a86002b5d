// SPDX-License-Identifier: Apache-2.0
//
// v2drop_kernels._C: the C interface for Python, free of torch. A tensor comes as a tuple (address, dtype code, shape, strides in
// elements), a part as (src, dst, batch_dim, row_dim, fill), a table of stretches as (address, rows), a v2drop_cuda as (stream, workspace
// address, workspace bytes, design, address of the stretches on the device or 0); whoever calls keeps them alive.
// Tuples are read directly: calls on small tensors are common, and their conversion would cost more than their work.
#include <pybind11/pybind11.h>

#include <sys/mman.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "v2drop/v2drop.h"

namespace py = pybind11;

namespace {

int64_t integer(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// The items of a tuple, whose length must be `size` unless that is negative.
PyObject** items(PyObject* object, Py_ssize_t size) {
  if (!PyTuple_Check(object) || (size >= 0 && PyTuple_GET_SIZE(object) != size))
    throw py::type_error("expected a tuple that describes a tensor");
  return &PyTuple_GET_ITEM(object, 0);
}

void* address(PyObject* object) {
  void* value = PyLong_AsVoidPtr(object);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

class Tensor {
 public:
  explicit Tensor(py::handle object) : given_(!object.is_none()) {
    if (!given_) return;
    PyObject** fields = items(object.ptr(), 4);
    PyObject **shape = items(fields[2], -1), **stride = items(fields[3], PyTuple_GET_SIZE(fields[2]));
    tensor_.data = address(fields[0]);
    tensor_.dtype = static_cast<int32_t>(integer(fields[1]));
    const Py_ssize_t ndim = PyTuple_GET_SIZE(fields[2]);
    if (ndim > V2DROP_MAX_DIMS) throw py::value_error("a tensor has more than 8 dimensions");
    tensor_.ndim = static_cast<int32_t>(ndim);
    for (Py_ssize_t d = 0; d < ndim; ++d) {
      tensor_.shape[d] = integer(shape[d]);
      tensor_.stride[d] = integer(stride[d]);
    }
  }
  operator const v2drop_tensor*() const { return given_ ? &tensor_ : nullptr; }

 private:
  bool given_;
  v2drop_tensor tensor_;
};

std::vector<v2drop_part> parts_of(const py::list& list) {
  std::vector<v2drop_part> parts;
  parts.reserve(list.size());
  for (const py::handle object : list) {
    PyObject** fields = items(object.ptr(), 5);
    const Tensor src(fields[0]), dst(fields[1]);
    if (!src) throw py::type_error("a part has no src");
    parts.push_back({*src, dst ? *dst : v2drop_tensor{}, static_cast<int32_t>(integer(fields[2])), static_cast<int32_t>(integer(fields[3])),
                     integer(fields[4])});
  }
  return parts;
}

struct Stretches {
  const v2drop_stretch* data;
  int64_t count;
  explicit Stretches(py::handle object) {
    PyObject** fields = items(object.ptr(), 2);
    data = static_cast<const v2drop_stretch*>(address(fields[0]));
    count = integer(fields[1]);
  }
};

class Cuda {
 public:
  explicit Cuda(py::handle object) {
    PyObject** fields = items(object.ptr(), 5);
    on_ = {address(fields[0]), address(fields[1]), integer(fields[2]), static_cast<int32_t>(integer(fields[3])),
           static_cast<const v2drop_stretch*>(address(fields[4]))};
  }
  operator const v2drop_cuda*() const { return &on_; }

 private:
  v2drop_cuda on_;
};

// Runs the work without the interpreter lock, and raises its error.
template <class Work>
void call(const Work& work) {
  v2drop_status status;
  {
    const py::gil_scoped_release unlocked;
    status = work();
  }
  if (status == V2DROP_OK) return;
  const char* message = v2drop_last_error();
  if (status == V2DROP_ERROR_ARGUMENT) throw py::value_error(message);
  if (status == V2DROP_ERROR_MEMORY) throw std::bad_alloc();
  throw std::runtime_error(message);
}

using Handle = const py::handle&;

void variation_score(Handle prev, Handle cur, int metric, int round_to, Handle scores, int threads) {
  const Tensor a(prev), b(cur), out(scores);
  call([&] { return v2drop_variation_score(a, b, metric, round_to, out, threads); });
}

void variation_score_backward(Handle grad, Handle prev, Handle cur, int metric, Handle grad_prev, Handle grad_cur, int threads) {
  const Tensor g(grad), a(prev), b(cur), to_a(grad_prev), to_b(grad_cur);
  call([&] { return v2drop_variation_score_backward(g, a, b, metric, to_a, to_b, threads); });
}

void topk(Handle scores, Handle prev, Handle cur, Handle mask, Handle stretches, int order, int metric, int round_to, Handle values,
          Handle indices, int threads) {
  const Tensor s(scores), a(prev), b(cur), m(mask), v(values), i(indices);
  const Stretches table(stretches);
  call([&] { return v2drop_topk(s, a, b, m, table.data, table.count, order, metric, round_to, v, i, threads); });
}

void drop_tokens(Handle scores, Handle prev, Handle cur, Handle mask, Handle stretches, int metric, int round_to, Handle keep,
                 const py::list& parts, int threads) {
  const Tensor s(scores), a(prev), b(cur), m(mask), k(keep);
  const Stretches table(stretches);
  const std::vector<v2drop_part> p = parts_of(parts);
  call([&] {
    return v2drop_drop_tokens(s, a, b, m, table.data, table.count, metric, round_to, k, p.data(), static_cast<int64_t>(p.size()), threads);
  });
}

// Advice only: where it is not taken, nothing changes.
void prefer_huge_pages(uintptr_t address, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 4096, begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

void compact(Handle keep, const py::list& parts, int threads) {
  const Tensor k(keep);
  const std::vector<v2drop_part> p = parts_of(parts);
  call([&] { return v2drop_compact(k, p.data(), static_cast<int64_t>(p.size()), threads); });
}

void compact_backward(Handle keep, int64_t rows, const py::list& parts, int threads) {
  const Tensor k(keep);
  const std::vector<v2drop_part> p = parts_of(parts);
  call([&] { return v2drop_compact_backward(k, rows, p.data(), static_cast<int64_t>(p.size()), threads); });
}

void compact_inplace(Handle keep, const py::list& parts, int threads) {
  const Tensor k(keep);
  const std::vector<v2drop_part> p = parts_of(parts);
  call([&] { return v2drop_compact_inplace(k, p.data(), static_cast<int64_t>(p.size()), threads); });
}

void attention_score(Handle q, Handle k, Handle query_rows, Handle key_mask, Handle droppable, bool causal, float scale, int mode,
                     int heads, int queries, Handle scores, int threads) {
  const Tensor a(q), b(k), rows(query_rows), mask(key_mask), drop(droppable), out(scores);
  call([&] { return v2drop_attention_score(a, b, rows, mask, drop, causal, scale, mode, heads, queries, out, threads); });
}

void key_norm(Handle k, int norm, Handle scores, int threads) {
  const Tensor a(k), out(scores);
  call([&] { return v2drop_key_norm(a, norm, out, threads); });
}

void cosine_to_pivots(Handle x, Handle pivots, Handle cosines, int threads) {
  const Tensor a(x), p(pivots), out(cosines);
  call([&] { return v2drop_cosine_to_pivots(a, p, out, threads); });
}

void cuda_variation_score(Handle prev, Handle cur, int metric, int round_to, Handle scores, Handle on) {
  const Tensor a(prev), b(cur), out(scores);
  const Cuda o(on);
  call([&] { return v2drop_variation_score_cuda(a, b, metric, round_to, out, o); });
}

void cuda_variation_score_backward(Handle grad, Handle prev, Handle cur, int metric, Handle grad_prev, Handle grad_cur, Handle on) {
  const Tensor g(grad), a(prev), b(cur), to_a(grad_prev), to_b(grad_cur);
  const Cuda o(on);
  call([&] { return v2drop_variation_score_backward_cuda(g, a, b, metric, to_a, to_b, o); });
}

void cuda_topk(Handle scores, Handle prev, Handle cur, Handle mask, Handle stretches, Handle cu_seqlens, int order, int metric,
               int round_to, Handle values, Handle indices, Handle on) {
  const Tensor s(scores), a(prev), b(cur), m(mask), cu(cu_seqlens), v(values), i(indices);
  const Stretches table(stretches);
  const Cuda o(on);
  call([&] { return v2drop_topk_cuda(s, a, b, m, table.data, table.count, cu, order, metric, round_to, v, i, o); });
}

void cuda_drop_tokens(Handle scores, Handle prev, Handle cur, Handle mask, Handle stretches, Handle cu_seqlens, int metric, int round_to,
                      Handle keep, Handle new_cu, const py::list& parts, Handle on) {
  const Tensor s(scores), a(prev), b(cur), m(mask), cu(cu_seqlens), k(keep), n(new_cu);
  const Stretches table(stretches);
  const std::vector<v2drop_part> p = parts_of(parts);
  const Cuda o(on);
  call([&] {
    return v2drop_drop_tokens_cuda(s, a, b, m, table.data, table.count, cu, metric, round_to, k, n, p.data(),
                                   static_cast<int64_t>(p.size()), o);
  });
}

void cuda_compact(Handle keep, const py::list& parts, Handle on) {
  const Tensor k(keep);
  const std::vector<v2drop_part> p = parts_of(parts);
  const Cuda o(on);
  call([&] { return v2drop_compact_cuda(k, p.data(), static_cast<int64_t>(p.size()), o); });
}

void cuda_compact_backward(Handle keep, int64_t rows, const py::list& parts, Handle on) {
  const Tensor k(keep);
  const std::vector<v2drop_part> p = parts_of(parts);
  const Cuda o(on);
  call([&] { return v2drop_compact_backward_cuda(k, rows, p.data(), static_cast<int64_t>(p.size()), o); });
}

void cuda_compact_inplace(Handle keep, const py::list& parts, Handle on) {
  const Tensor k(keep);
  const std::vector<v2drop_part> p = parts_of(parts);
  const Cuda o(on);
  call([&] { return v2drop_compact_inplace_cuda(k, p.data(), static_cast<int64_t>(p.size()), o); });
}

void cuda_attention_score(Handle q, Handle k, Handle query_rows, Handle key_mask, Handle droppable, bool causal, float scale, int mode,
                          int heads, int queries, Handle scores, Handle on) {
  const Tensor a(q), b(k), rows(query_rows), mask(key_mask), drop(droppable), out(scores);
  const Cuda o(on);
  call([&] { return v2drop_attention_score_cuda(a, b, rows, mask, drop, causal, scale, mode, heads, queries, out, o); });
}

void cuda_key_norm(Handle k, int norm, Handle scores, Handle on) {
  const Tensor a(k), out(scores);
  const Cuda o(on);
  call([&] { return v2drop_key_norm_cuda(a, norm, out, o); });
}

void cuda_cosine_to_pivots(Handle x, Handle pivots, Handle cosines, Handle on) {
  const Tensor a(x), p(pivots), out(cosines);
  const Cuda o(on);
  call([&] { return v2drop_cosine_to_pivots_cuda(a, p, out, o); });
}

// "" if kernels of this build run on the current device, else why not.
std::string cuda_available() {
  v2drop_status status;
  {
    const py::gil_scoped_release unlocked;  // the first call may start the driver
    status = v2drop_cuda_available();
  }
  return status == V2DROP_OK ? "" : v2drop_last_error();
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C interface of libv2drop; see v2drop_kernels/_native.py for its users.";
  module.def("version", [] {
    const int v = v2drop_version();
    return std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." + std::to_string(v % 100);
  });
  module.def("isa", &v2drop_isa);
  module.def("prefer_huge_pages", &prefer_huge_pages);
  module.def("variation_score", &variation_score);
  module.def("variation_score_backward", &variation_score_backward);
  module.def("topk", &topk);
  module.def("drop_tokens", &drop_tokens);
  module.def("compact", &compact);
  module.def("compact_backward", &compact_backward);
  module.def("compact_inplace", &compact_inplace);
  module.def("attention_score", &attention_score);
  module.def("key_norm", &key_norm);
  module.def("cosine_to_pivots", &cosine_to_pivots);
  module.def("cuda_archs", &v2drop_cuda_archs);
  module.def("cuda_available", &cuda_available);
  module.def("workspace_bytes_cuda", &v2drop_workspace_bytes_cuda);
  module.def("attention_workspace_bytes_cuda", &v2drop_attention_workspace_bytes_cuda);
  module.def("cuda_attention_score", &cuda_attention_score);
  module.def("cuda_key_norm", &cuda_key_norm);
  module.def("cuda_cosine_to_pivots", &cuda_cosine_to_pivots);
  module.def("cuda_variation_score", &cuda_variation_score);
  module.def("cuda_variation_score_backward", &cuda_variation_score_backward);
  module.def("cuda_topk", &cuda_topk);
  module.def("cuda_drop_tokens", &cuda_drop_tokens);
  module.def("cuda_compact", &cuda_compact);
  module.def("cuda_compact_backward", &cuda_compact_backward);
  module.def("cuda_compact_inplace", &cuda_compact_inplace);
}
