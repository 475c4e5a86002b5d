// SPDX-License-Identifier: Apache-2.0
//
// v2drop_kernels._C: the C interface for Python, free of torch. What the functions take:
//   tensor    (address, dtype code, shape, strides in elements), or None, or a tensor of the type given to set_tensor_type
//   source    (scores, prev, cur, mask, metric code, dtype code of the scores); the first four are tensors
//   segments  (address of an int64 table with the columns SEGMENT_FIELDS, number of rows)
//   gathers   list of (src, dst, batch_dim, row_dim, fill); src and dst are tensors. Or a tuple (what prepare_gathers returned, bytes):
//             the same with other addresses, eight bytes for each, of which the last are those of all src and then of all dst
//   context   (place, threads, stream, address of the workspace, its bytes, launch mode, address of the segments on the device)
// The caller keeps everything that is passed by address alive during the call. Tuples are read directly: calls on small tensors are common,
// and the conversion by pybind11 would cost more than their work.
#include <pybind11/pybind11.h>

#include <sys/mman.h>

#include <cstddef>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "plans.h"
#include "tensors.h"
#include "trees.h"
#include "v2drop/v2drop.h"

namespace py = pybind11;

namespace {

using namespace python;

class Source {
 public:
  explicit Source(const py::handle& object) : Source(items(object.ptr(), 6)) {}
  Source(const Source&) = delete;
  operator const v2drop_source*() const { return &source_; }

 private:
  explicit Source(PyObject** fields) : scores_(fields[0]), prev_(fields[1]), cur_(fields[2]), mask_(fields[3]) {
    source_ = {
        sizeof source_, scores_, prev_, cur_, mask_, static_cast<int32_t>(integer(fields[4])), static_cast<int32_t>(integer(fields[5]))};
  }

  Tensor scores_, prev_, cur_, mask_;
  v2drop_source source_;
};

class Context {
 public:
  explicit Context(const py::handle& object) {
    PyObject** fields = items(object.ptr(), 7);
    context_.place = static_cast<int32_t>(integer(fields[0]));
    context_.threads = static_cast<int32_t>(integer(fields[1]));
    context_.stream = address(fields[2]);
    context_.workspace = address(fields[3]);
    context_.workspace_bytes = integer(fields[4]);
    context_.launch_mode = static_cast<int32_t>(integer(fields[5]));
    context_.device_segments = static_cast<const v2drop_segment*>(address(fields[6]));
  }
  operator const v2drop_context*() const { return &context_; }

 private:
  v2drop_context context_ = V2DROP_CONTEXT_INIT;
};

struct Segments {
  const v2drop_segment* data;
  int64_t count;
  explicit Segments(const py::handle& object) {
    PyObject** fields = items(object.ptr(), 2);
    data = static_cast<const v2drop_segment*>(address(fields[0]));
    count = integer(fields[1]);
  }
};

constexpr const char* kPrepared = "v2drop_gathers";

class Gathers {
 public:
  explicit Gathers(const py::handle& object) {
    if (PyTuple_Check(object.ptr())) {
      read_prepared(items(object.ptr(), 2));
      return;
    }
    if (!PyList_Check(object.ptr())) throw py::type_error("expected a list of gathers");
    gathers_.reserve(PyList_GET_SIZE(object.ptr()));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(object.ptr()); ++i) {
      PyObject** fields = items(PyList_GET_ITEM(object.ptr(), i), 5);
      add(fields[0], fields[1], fields + 2);
    }
  }
  Gathers(const Gathers&) = delete;
  // The gathers for calls that give other addresses.
  py::object prepared() {
    for (v2drop_gather& gather : gathers_) gather.src.data = gather.dst.data = nullptr;
    return py::capsule(new std::vector<v2drop_gather>(std::move(gathers_)), kPrepared, [](PyObject* capsule) {
      delete static_cast<std::vector<v2drop_gather>*>(PyCapsule_GetPointer(capsule, kPrepared));
    });
  }
  const v2drop_gather* data() const { return gathers_.data(); }
  int64_t count() const { return static_cast<int64_t>(gathers_.size()); }

 private:
  void read_prepared(PyObject** fields) {
    const auto* prepared = static_cast<const std::vector<v2drop_gather>*>(PyCapsule_GetPointer(fields[0], kPrepared));
    if (!prepared) throw py::error_already_set();
    const Addresses addresses(fields[1]);
    const int64_t count = static_cast<int64_t>(prepared->size()), first = addresses.count() - 2 * count;
    if (first < 0) throw py::type_error("expected two addresses for each gather");
    gathers_ = *prepared;
    for (int64_t i = 0; i < count; ++i) {
      gathers_[i].src.data = reinterpret_cast<void*>(addresses[first + i]);
      gathers_[i].dst.data = reinterpret_cast<void*>(addresses[first + count + i]);
    }
  }
  void add(PyObject* source, PyObject* target, PyObject** dimensions) {
    const Tensor src(source), dst(target);
    if (!src) throw py::type_error("a gather has no src");
    gathers_.push_back({*src, dst ? *dst : v2drop_tensor{}, static_cast<int32_t>(integer(dimensions[0])),
                        static_cast<int32_t>(integer(dimensions[1])), integer(dimensions[2])});
  }

  std::vector<v2drop_gather> gathers_;
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

void variation_score(Handle source, Handle scores, Handle context) {
  const Source s(source);
  const Tensor out(scores);
  const Context where(context);
  call([&] { return v2drop_variation_score(s, out, where); });
}

void variation_score_backward(Handle grad, Handle source, Handle grad_prev, Handle grad_cur, Handle context) {
  const Source s(source);
  const Tensor g(grad), to_prev(grad_prev), to_cur(grad_cur);
  const Context where(context);
  call([&] { return v2drop_variation_score_backward(g, s, to_prev, to_cur, where); });
}

void topk(Handle source, Handle segments, Handle cu_seqlens, int order, Handle values, Handle indices, Handle context) {
  const Source s(source);
  const Segments table(segments);
  const Tensor cu(cu_seqlens), v(values), i(indices);
  const Context where(context);
  call([&] { return v2drop_topk(s, table.data, table.count, cu, order, v, i, where); });
}

void drop_tokens(Handle source, Handle segments, Handle cu_seqlens, Handle keep, Handle new_cu, Handle gathers, Handle context) {
  const Source s(source);
  const Segments table(segments);
  const Tensor cu(cu_seqlens), k(keep), n(new_cu);
  const Gathers g(gathers);
  const Context where(context);
  call([&] { return v2drop_drop_tokens(s, table.data, table.count, cu, k, n, g.data(), g.count(), where); });
}

void compact(Handle keep, Handle gathers, Handle context) {
  const Tensor k(keep);
  const Gathers g(gathers);
  const Context where(context);
  call([&] { return v2drop_compact(k, g.data(), g.count(), where); });
}

void compact_backward(Handle keep, int64_t rows, Handle gathers, Handle context) {
  const Tensor k(keep);
  const Gathers g(gathers);
  const Context where(context);
  call([&] { return v2drop_compact_backward(k, rows, g.data(), g.count(), where); });
}

void compact_inplace(Handle keep, Handle gathers, Handle context) {
  const Tensor k(keep);
  const Gathers g(gathers);
  const Context where(context);
  call([&] { return v2drop_compact_inplace(k, g.data(), g.count(), where); });
}

void attention_score(Handle q, Handle k, Handle query_rows, Handle key_mask, Handle droppable, bool causal, float scale, int mode,
                     int heads, int queries, Handle scores, Handle context) {
  const Tensor a(q), b(k), rows(query_rows), mask(key_mask), drop(droppable), out(scores);
  const Context where(context);
  call([&] { return v2drop_attention_score(a, b, rows, mask, drop, causal, scale, mode, heads, queries, out, where); });
}

void key_norm(Handle k, int norm, Handle scores, Handle context) {
  const Tensor a(k), out(scores);
  const Context where(context);
  call([&] { return v2drop_key_norm(a, norm, out, where); });
}

void cosine_to_pivots(Handle x, Handle pivots, Handle cosines, Handle context) {
  const Tensor a(x), p(pivots), out(cosines);
  const Context where(context);
  call([&] { return v2drop_cosine_to_pivots(a, p, out, where); });
}

void weighted_merge(Handle x, Handle offsets, Handle rows, Handle weights, bool mean, Handle out, Handle context) {
  const Tensor a(x), starts(offsets), from(rows), w(weights), to(out);
  const Context where(context);
  call([&] { return v2drop_weighted_merge(a, starts, from, w, mean, to, where); });
}

void weighted_merge_backward(Handle grad, Handle x, Handle offsets, Handle rows, Handle weights, bool mean, Handle back_offsets,
                             Handle back_edges, Handle grad_x, Handle grad_weights, Handle context) {
  const Tensor g(grad), a(x), starts(offsets), from(rows), w(weights), back(back_offsets), edges(back_edges), to(grad_x), of(grad_weights);
  const Context where(context);
  call([&] { return v2drop_weighted_merge_backward(g, a, starts, from, w, mean, back, edges, to, of, where); });
}

void bipartite_pairs(Handle features, int64_t merged, int64_t protected_rows, int order, Handle keep, Handle row, Handle offsets,
                     Handle edges, Handle context) {
  const Tensor a(features), k(keep), r(row), starts(offsets), e(edges);
  const Context where(context);
  call([&] { return v2drop_bipartite_pairs(a, merged, protected_rows, order, k, r, starts, e, where); });
}

void soft_topk(Handle scores, Handle ratio, Handle valid, float temperature, int ties, bool hard, Handle mask, Handle slope, Handle order,
               Handle context) {
  const Tensor s(scores), a(ratio), v(valid), m(mask), d(slope), o(order);
  const Context where(context);
  call([&] { return v2drop_soft_topk(s, a, v, temperature, ties, hard, m, d, o, where); });
}

void soft_topk_backward(Handle grad, Handle slope, Handle scores, Handle order, Handle valid, Handle grad_scores, Handle context) {
  const Tensor g(grad), d(slope), s(scores), o(order), v(valid), to(grad_scores);
  const Context where(context);
  call([&] { return v2drop_soft_topk_backward(g, d, s, o, v, to, where); });
}

void random_score(int64_t seed, Handle items, Handle scores, Handle context) {
  const Tensor i(items), to(scores);
  const Context where(context);
  call([&] { return v2drop_random_score(seed, i, to, where); });
}

void upload(Handle values, Handle to, Handle context) {
  const Tensor from(values), out(to);
  const Context where(context);
  call([&] { return v2drop_upload(from, out, where); });
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

std::string version() {
  const int v = v2drop_version();
  return std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." + std::to_string(v % 100);
}

// Advice to the operating system: where it is not followed, nothing changes.
void prefer_huge_pages(uintptr_t address, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 4096, begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

py::dict codes(std::initializer_list<std::pair<const char*, int>> words) {
  py::dict found;
  for (const auto& [word, code] : words) found[word] = code;
  return found;
}

// The enumerators of v2drop.h under the names that Python gives them, and the columns of a table of segments.
void add_names(py::module_& module) {
  module.attr("DTYPES") = codes({{"float32", V2DROP_FLOAT32},
                                 {"float16", V2DROP_FLOAT16},
                                 {"bfloat16", V2DROP_BFLOAT16},
                                 {"int64", V2DROP_INT64},
                                 {"bool", V2DROP_BOOL},
                                 {"bits8", V2DROP_BITS8},
                                 {"bits16", V2DROP_BITS16},
                                 {"bits32", V2DROP_BITS32},
                                 {"bits64", V2DROP_BITS64},
                                 {"bits128", V2DROP_BITS128},
                                 {"int32", V2DROP_INT32},
                                 {"float64", V2DROP_FLOAT64}});
  module.attr("METRICS") = codes({{"l2", V2DROP_L2}, {"l1", V2DROP_L1}, {"cosine", V2DROP_COSINE}});
  module.attr("ORDERS") = codes({{"position", V2DROP_ORDER_POSITION}, {"score", V2DROP_ORDER_SCORE}});
  module.attr("MODES") = codes({{"softmax", V2DROP_SOFTMAX}, {"dot", V2DROP_DOT}});
  module.attr("HEADS") = codes({{"mean", V2DROP_HEADS_MEAN}, {"sum", V2DROP_HEADS_SUM}, {"max", V2DROP_HEADS_MAX}});
  module.attr("QUERIES") = codes({{"mean", V2DROP_QUERIES_MEAN}, {"l2", V2DROP_QUERIES_L2}});
  module.attr("TIES") = codes({{"index", V2DROP_TIES_INDEX}, {"released", V2DROP_TIES_RELEASED}});
  module.attr("MERGED_ORDERS") = codes({{"position", V2DROP_MERGED_POSITION}, {"released", V2DROP_MERGED_RELEASED}});
  module.attr("PLACES") = codes({{"cpu", V2DROP_CPU}, {"cuda", V2DROP_CUDA}});
  module.attr("LAUNCH_MODES") = codes({{"auto", V2DROP_LAUNCH_AUTO},
                                       {"cooperative", V2DROP_LAUNCH_COOPERATIVE},
                                       {"fused", V2DROP_LAUNCH_FUSED},
                                       {"separate", V2DROP_LAUNCH_SEPARATE},
                                       {"one_block", V2DROP_LAUNCH_ONE_BLOCK},
                                       {"cluster", V2DROP_LAUNCH_CLUSTER},
                                       {"grid", V2DROP_LAUNCH_GRID}});

#define FIELD(index, name)                                                                                              \
  static_assert(offsetof(v2drop_segment, name) == (index) * sizeof(int64_t), "columns are in the order of the struct"); \
  fields[index] = #name
  py::tuple fields(sizeof(v2drop_segment) / sizeof(int64_t));
  FIELD(0, src_start);
  FIELD(1, n_prefix);
  FIELD(2, n);
  FIELD(3, n_suffix);
  FIELD(4, k);
  FIELD(5, dst_start);
  FIELD(6, pad_before);
  FIELD(7, pad_after);
  static_assert(sizeof(v2drop_segment) == 8 * sizeof(int64_t), "every field is a column");
#undef FIELD
  module.attr("SEGMENT_FIELDS") = fields;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C interface of libv2drop; see v2drop_kernels/native.py for its users.";
  add_names(module);
  module.def("set_tensor_type", [](Handle type) { return set_tensor_type(type.ptr()); });
  module.def("signature", [](Handle tree, bool differentiable) { return signature(tree, differentiable); });
  module.def("prepare_gathers", [](Handle gathers) { return Gathers(gathers).prepared(); });
  module.def("result_addresses", [](Handle before, Handle blocks) { return result_addresses(before, blocks); });
  module.def("encoded_addresses", [](Handle starts, Handle pairs) { return encoded_addresses(starts, pairs); });
  module.def("rebuild", [](Handle tree, Handle leaves) { return rebuild(tree, leaves); });
  module.def("packed_segments", &packed_segments);
  module.def("version", &version);
  module.def("isa", &v2drop_isa);
  module.def("cuda_archs", &v2drop_cuda_archs);
  module.def("cuda_available", &cuda_available);
  module.def("prefer_huge_pages", &prefer_huge_pages);
  module.def("workspace_bytes", &v2drop_workspace_bytes);
  module.def("attention_workspace_bytes", &v2drop_attention_workspace_bytes);
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
  module.def("weighted_merge", &weighted_merge);
  module.def("weighted_merge_backward", &weighted_merge_backward);
  module.def("bipartite_pairs", &bipartite_pairs);
  module.def("soft_topk", &soft_topk);
  module.def("soft_topk_backward", &soft_topk_backward);
  module.def("random_score", &random_score);
  module.def("upload", &upload);
}
