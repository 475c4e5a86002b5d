// SPDX-License-Identifier: Apache-2.0
//
// Nested tuples and lists of tensors: what the checks of a call depend on, as bytes, and the same structure around other leaves.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <vector>

#include "tensors.h"

namespace python {

class Signature {
 public:
  explicit Signature(bool differentiable) : differentiable_(differentiable) { bytes_.reserve(512); }

  // Whether everything in the tree can be described; the tensors are appended to `leaves`.
  bool add(PyObject* object, PyObject* leaves, int depth) {
    if (object == Py_None) {
      bytes_.push_back('N');
      return true;
    }
    if (Py_TYPE(object) == tensor_type) return add_tensor(object) && PyList_Append(leaves, object) == 0;
    const bool tuple = PyTuple_CheckExact(object);
    if ((!tuple && !PyList_CheckExact(object)) || depth > kDepth) return false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
    bytes_.push_back(tuple ? '(' : '[');
    append(bytes_, count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      // Reading the flags of a tensor may let other threads run, which may change a list.
      if (i >= PySequence_Fast_GET_SIZE(object)) return false;
      const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(object, i));
      if (item.is_none() || !add(item.ptr(), leaves, depth + 1)) return false;
    }
    return true;
  }

  const std::string& bytes() const { return bytes_; }
  const std::string& addresses() const { return addresses_; }

 private:
  static constexpr int kDepth = 16;  // of lists in lists; one that contains itself has no end

  template <class T>
  static void append(std::string& to, const T& value) {
    to.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  // What a tensor is, but for its shape and strides; `alignment`: to how many bytes (at most 16) the data is aligned.
  struct Kind {
    const void* dtype;  // of integers of 8 bits: torch has such dtypes of 1 to 7 bits as well, which DLPack does not tell apart
    int32_t device_type, device_id, ndim;
    uint16_t lanes;
    uint8_t code, bits, alignment;
  };

  // Dtype, device, shape, strides, alignment and address.
  bool add_tensor(PyObject* object) {
    dlpack::Tensor t;
    if (tensor_api->tensor_from_py_object(object, &t)) {
      PyErr_Clear();
      return false;
    }
    // The table does not distinguish these; complex numbers may be conjugate views, and others negated views.
    const bool may_be_negated = t.code != dlpack::kBool;
    if (t.code == dlpack::kComplex || (may_be_negated && is_set(PyObject_CallOneArg(tensor_is_negated, object)))) return false;
    if (differentiable_ && is_set(read_attribute(tensor_needs_gradient, object))) return false;
    const uintptr_t start = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
    append(addresses_, start);
    Kind kind;
    std::memset(&kind, 0, sizeof kind);  // compared as bytes
    kind.device_type = t.device_type, kind.device_id = t.device_id, kind.ndim = t.ndim;
    kind.lanes = t.lanes, kind.code = t.code, kind.bits = t.bits;
    kind.alignment = static_cast<uint8_t>(start & 15 ? start & -start : 16);
    if ((t.code == dlpack::kInt || t.code == dlpack::kUInt) && t.bits == 8) {
      const auto dtype = py::reinterpret_steal<py::object>(read_attribute(tensor_dtype, object));
      if (!dtype) throw py::error_already_set();
      kind.dtype = dtype.ptr();  // there is one object for each dtype, for as long as the process
    }
    const size_t size = static_cast<size_t>(t.ndim) * sizeof(int64_t), count = static_cast<size_t>(t.ndim);
    // The layers of a cache are alike: one like the last tensor is one byte.
    if (!std::memcmp(&kind, &last_, sizeof kind) && !std::memcmp(t.shape, sizes_.data(), size) &&
        !std::memcmp(t.strides, sizes_.data() + count, size)) {
      bytes_.push_back('S');
      return true;
    }
    last_ = kind;
    sizes_.assign(t.shape, t.shape + count);
    sizes_.insert(sizes_.end(), t.strides, t.strides + count);
    bytes_.push_back('T');
    append(bytes_, kind);
    bytes_.append(reinterpret_cast<const char*>(sizes_.data()), 2 * size);
    return true;
  }

  // A flag of a tensor; an error counts as set.
  static bool is_set(PyObject* flag) {
    if (!flag) PyErr_Clear();
    const bool set = flag != Py_False;
    Py_XDECREF(flag);
    return set;
  }

  bool differentiable_;
  std::string bytes_, addresses_;
  Kind last_ = {};
  std::vector<int64_t> sizes_;  // shape and strides of the last tensor
};

// (bytes, list of tensors, their addresses): two trees of equal bytes have the same structure, and their tensors the same dtypes, devices,
// shapes, strides and alignments (up to 16 bytes). The addresses are bytes too, eight for each tensor. None where there is a leaf that is
// no plain tensor of the type of set_tensor_type, that is conjugate or negated, or, with `differentiable`, that requires a gradient.
inline py::object signature(const py::handle& tree, bool differentiable) {
  if (!tensor_type) return py::none();
  Signature found(differentiable);
  py::list leaves;
  if (!PyTuple_CheckExact(tree.ptr())) throw py::type_error("expected a tuple");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tree.ptr()); ++i)
    if (!found.add(PyTuple_GET_ITEM(tree.ptr(), i), leaves.ptr(), 0)) return py::none();
  return py::make_tuple(py::bytes(found.bytes()), leaves, py::bytes(found.addresses()));
}

// The addresses of the results of a known call, eight bytes each, behind `before`. `blocks` has the allocations, (address, how many results
// lie in it end to end, bytes of each).
inline py::object result_addresses(const py::handle& before, const py::handle& blocks) {
  if (!PyBytes_Check(before.ptr())) throw py::type_error("expected bytes");
  std::string found(PyBytes_AS_STRING(before.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(before.ptr())));
  PyObject** given = items(blocks.ptr(), -1);
  for (Py_ssize_t b = 0; b < PyTuple_GET_SIZE(blocks.ptr()); ++b) {
    PyObject** block = items(given[b], 3);
    int64_t at = integer(block[0]);
    const int64_t count = integer(block[1]), step = integer(block[2]);
    for (int64_t i = 0; i < count; ++i, at += step) found.append(reinterpret_cast<const char*>(&at), sizeof at);
  }
  return py::bytes(found);
}

// The addresses that bytes hold, eight for each.
class Addresses {
 public:
  explicit Addresses(PyObject* bytes) {
    if (!PyBytes_Check(bytes) || PyBytes_GET_SIZE(bytes) % static_cast<Py_ssize_t>(sizeof(int64_t)) != 0)
      throw py::type_error("expected addresses, eight bytes for each");
    data_ = PyBytes_AS_STRING(bytes);
    count_ = PyBytes_GET_SIZE(bytes) / static_cast<Py_ssize_t>(sizeof(int64_t));
  }
  int64_t count() const { return count_; }
  int64_t operator[](int64_t i) const {
    if (i < 0 || i >= count_) throw py::index_error("there is no such address");
    int64_t found;
    std::memcpy(&found, data_ + i * static_cast<int64_t>(sizeof found), sizeof found);
    return found;
  }

 private:
  const char* data_;
  int64_t count_;
};

inline PyObject* rebuilt(PyObject* tree, PyObject* leaves, Py_ssize_t& next) {
  const bool tuple = PyTuple_CheckExact(tree);
  if (tree == Py_None || (!tuple && !PyList_CheckExact(tree))) {
    PyObject* leaf = tree;
    if (tree != Py_None) {
      if (next >= PyList_GET_SIZE(leaves)) throw py::value_error("the tree has more leaves than were given");
      leaf = PyList_GET_ITEM(leaves, next++);
    }
    Py_INCREF(leaf);
    return leaf;
  }
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(tree);
  auto built = py::reinterpret_steal<py::object>(tuple ? PyTuple_New(count) : PyList_New(count));
  if (!built) throw py::error_already_set();
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = rebuilt(PySequence_Fast_GET_ITEM(tree, i), leaves, next);
    tuple ? PyTuple_SET_ITEM(built.ptr(), i, item) : PyList_SET_ITEM(built.ptr(), i, item);
  }
  return built.release().ptr();
}

// The tree with these leaves instead of its own, in their order; None stays None.
inline py::object rebuild(const py::handle& tree, const py::handle& leaves) {
  if (!PyList_Check(leaves.ptr())) throw py::type_error("expected a list of leaves");
  Py_ssize_t next = 0;
  return py::reinterpret_steal<py::object>(rebuilt(tree.ptr(), leaves.ptr(), next));
}

// A tuple of pairs of integers, as a Triton kernel decodes addresses (backends/launch.py: odd, with bit 62 set): `pairs` is a tuple of
// (slot, offset, slot, offset), `starts` the addresses of the slots.
inline py::object encoded_addresses(const py::handle& starts, const py::handle& pairs) {
  const Addresses at(starts.ptr());
  const auto encoded = [&](PyObject* slot, PyObject* offset) {
    return PyLong_FromLongLong((int64_t{1} << 62) | ((at[integer(slot)] + integer(offset)) << 1) | 1);
  };
  PyObject** given = items(pairs.ptr(), -1);
  const Py_ssize_t count = PyTuple_GET_SIZE(pairs.ptr());
  auto found = py::reinterpret_steal<py::object>(PyTuple_New(count));
  if (!found) throw py::error_already_set();
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject** pair = items(given[i], 4);
    PyObject* both = PyTuple_New(2);
    if (!both) throw py::error_already_set();
    PyTuple_SET_ITEM(found.ptr(), i, both);
    PyTuple_SET_ITEM(both, 0, encoded(pair[0], pair[1]));
    PyTuple_SET_ITEM(both, 1, encoded(pair[2], pair[3]));
  }
  return found;
}

}  // namespace python
