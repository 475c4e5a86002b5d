// SPDX-License-Identifier: Apache-2.0
//
// Nested tuples and lists of tensors: what the checks of a call depend on, as bytes, and the same structure around other leaves.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "tensors.h"

namespace python {

class Signature {
 public:
  explicit Signature(bool differentiable) : differentiable_(differentiable) { bytes_.reserve(512); }

  // Whether everything in the tree can be described; the tensors are appended to `leaves`.
  bool add(PyObject* object, PyObject* leaves) {
    if (object == Py_None) {
      bytes_.push_back('N');
      return true;
    }
    if (Py_TYPE(object) == tensor_type) return add_tensor(object) && PyList_Append(leaves, object) == 0;
    const bool tuple = PyTuple_CheckExact(object);
    if (!tuple && !PyList_CheckExact(object)) return false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
    bytes_.push_back(tuple ? '(' : '[');
    put(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(object, i);
      if (item == Py_None || !add(item, leaves)) return false;
    }
    return true;
  }

  const std::string& bytes() const { return bytes_; }

 private:
  template <class T>
  void put(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  // Dtype, device, shape, strides, and to how many bytes (at most 16) the data is aligned.
  bool add_tensor(PyObject* object) {
    dlpack::Tensor t;
    if (tensor_api->tensor_from_py_object(object, &t)) {
      PyErr_Clear();
      return false;
    }
    // The table does not tell these; complex numbers may be conjugate views, and others negated views.
    const bool may_be_negated = t.code != dlpack::kBool;
    if (t.code == dlpack::kComplex || (may_be_negated && is_set(PyObject_CallMethodNoArgs(object, is_neg())))) return false;
    if (differentiable_ && is_set(PyObject_GetAttr(object, requires_grad()))) return false;
    const uintptr_t start = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
    const size_t before = bytes_.size();
    bytes_.push_back('T');
    put(t.code), put(t.bits), put(t.lanes), put(t.device_type), put(t.device_id), put(t.ndim);
    put(static_cast<uint8_t>(start & 15 ? start & -start : 16));
    for (int d = 0; d < t.ndim; ++d) put(t.shape[d]), put(t.strides[d]);
    // The layers of a cache are alike: one like the last tensor is one byte.
    if (bytes_.compare(before, std::string::npos, last_) == 0) {
      bytes_.resize(before);
      bytes_.push_back('S');
    } else {
      last_.assign(bytes_, before, std::string::npos);
    }
    return true;
  }

  // A flag of a tensor; an error counts as set.
  static bool is_set(PyObject* flag) {
    if (!flag) PyErr_Clear();
    const bool set = flag != Py_False;
    Py_XDECREF(flag);
    return set;
  }
  static PyObject* is_neg() {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    return name;
  }
  static PyObject* requires_grad() {
    static PyObject* const name = PyUnicode_InternFromString("requires_grad");
    return name;
  }

  bool differentiable_;
  std::string bytes_, last_;
};

// (bytes, list of tensors): two trees of equal bytes have the same structure, and their tensors the same dtypes, devices, shapes,
// strides and alignments (up to 16 bytes). None where there is a leaf that is no plain tensor of the type of set_tensor_type, that is
// conjugate or negated, or, with `differentiable`, that requires a gradient.
inline py::object signature(const py::handle& tree, bool differentiable) {
  if (!tensor_type) return py::none();
  Signature found(differentiable);
  py::list leaves;
  if (!PyTuple_CheckExact(tree.ptr())) throw py::type_error("expected a tuple");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tree.ptr()); ++i)
    if (!found.add(PyTuple_GET_ITEM(tree.ptr(), i), leaves.ptr())) return py::none();
  return py::make_tuple(py::bytes(found.bytes()), leaves);
}

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
// (slot, offset, slot, offset), `starts` a list of the addresses of the slots.
inline py::object encoded_addresses(const py::handle& starts, const py::handle& pairs) {
  if (!PyList_Check(starts.ptr())) throw py::type_error("expected a list of addresses");
  const auto encoded = [&](PyObject* slot, PyObject* offset) {
    const int64_t i = integer(slot);
    if (i < 0 || i >= PyList_GET_SIZE(starts.ptr())) throw py::index_error("there is no such slot");
    const int64_t at = integer(PyList_GET_ITEM(starts.ptr(), i)) + integer(offset);
    return PyLong_FromLongLong((int64_t{1} << 62) | (at << 1) | 1);
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
