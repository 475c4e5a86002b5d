// SPDX-License-Identifier: Apache-2.0
//
// What Python gives as integers, tuples and tensors, read for the C interface.
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack.h"
#include "v2drop/v2drop.h"

namespace python {

namespace py = pybind11;

inline int64_t integer(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// The items of a tuple, whose length must be `size` unless that is negative.
inline PyObject** items(PyObject* object, Py_ssize_t size) {
  if (!PyTuple_Check(object) || (size >= 0 && PyTuple_GET_SIZE(object) != size))
    throw py::type_error("expected a tuple, as described in csrc/python/module.cpp");
  return &PyTuple_GET_ITEM(object, 0);
}

inline void* address(PyObject* object) {
  void* value = PyLong_AsVoidPtr(object);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// The type whose tensors are read through its exchange API: torch.Tensor. Null until set_tensor_type; subclasses are never read so.
inline PyTypeObject* tensor_type = nullptr;
inline const dlpack::ExchangeApi* tensor_api = nullptr;
// Its method is_neg and its attributes requires_grad and dtype, as the type holds them: looking them up by name takes longer than reading
// them.
inline PyObject *tensor_is_negated = nullptr, *tensor_needs_gradient = nullptr, *tensor_dtype = nullptr;

// An attribute of a tensor, by what its type holds.
inline PyObject* read_attribute(PyObject* attribute, PyObject* object) {
  return Py_TYPE(attribute)->tp_descr_get(attribute, object, nullptr);
}

// Whether the tensors of this type can be read directly: false where the type (torch before 2.10) has no exchange API of DLPack 1.
inline bool set_tensor_type(PyObject* type) {
  if (!PyType_Check(type)) throw py::type_error("expected a type");
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  if (!capsule) {
    PyErr_Clear();
    return false;
  }
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
  Py_DECREF(capsule);
  if (!api) PyErr_Clear();
  while (api && api->major > dlpack::kMajor) api = api->previous;
  if (!api || api->major != dlpack::kMajor) return false;
  auto is_negated = py::reinterpret_steal<py::object>(PyObject_GetAttrString(type, "is_neg"));
  auto needs_gradient = py::reinterpret_steal<py::object>(PyObject_GetAttrString(type, "requires_grad"));
  auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttrString(type, "dtype"));
  if (!is_negated || !needs_gradient || !dtype || !Py_TYPE(needs_gradient.ptr())->tp_descr_get || !Py_TYPE(dtype.ptr())->tp_descr_get) {
    PyErr_Clear();
    return false;
  }
  tensor_is_negated = is_negated.release().ptr();
  tensor_needs_gradient = needs_gradient.release().ptr();
  tensor_dtype = dtype.release().ptr();
  Py_INCREF(type);  // for as long as the process: there is one such type
  tensor_api = api;
  tensor_type = reinterpret_cast<PyTypeObject*>(type);
  return true;
}

// The code of the dtype of a tensor; one that the library does not interpret is raw bytes of its size. -1: no such size.
inline int32_t dtype_code(const dlpack::Tensor& t) {
  const int bits = t.bits * t.lanes;
  if (t.lanes == 1) {
    if (t.code == dlpack::kFloat && bits == 32) return V2DROP_FLOAT32;
    if (t.code == dlpack::kFloat && bits == 16) return V2DROP_FLOAT16;
    if (t.code == dlpack::kFloat && bits == 64) return V2DROP_FLOAT64;
    if (t.code == dlpack::kBfloat && bits == 16) return V2DROP_BFLOAT16;
    if (t.code == dlpack::kInt && bits == 64) return V2DROP_INT64;
    if (t.code == dlpack::kInt && bits == 32) return V2DROP_INT32;
    if (t.code == dlpack::kBool && bits == 8) return V2DROP_BOOL;
  }
  switch (bits) {
    case 8:
      return V2DROP_BITS8;
    case 16:
      return V2DROP_BITS16;
    case 32:
      return V2DROP_BITS32;
    case 64:
      return V2DROP_BITS64;
    case 128:
      return V2DROP_BITS128;
    default:
      return -1;
  }
}

class Tensor {
 public:
  explicit Tensor(PyObject* object) : given_(object != Py_None) {
    if (!given_) return;
    if (tensor_type && Py_TYPE(object) == tensor_type) {
      borrow(object);
      return;
    }
    PyObject** fields = items(object, 4);
    PyObject **shape = items(fields[2], -1), **stride = items(fields[3], PyTuple_GET_SIZE(fields[2]));
    tensor_.data = address(fields[0]);
    tensor_.dtype = static_cast<int32_t>(integer(fields[1]));
    set_dims(PyTuple_GET_SIZE(fields[2]));
    for (int d = 0; d < tensor_.ndim; ++d) {
      tensor_.shape[d] = integer(shape[d]);
      tensor_.stride[d] = integer(stride[d]);
    }
  }
  explicit Tensor(const py::handle& object) : Tensor(object.ptr()) {}
  operator const v2drop_tensor*() const { return given_ ? &tensor_ : nullptr; }

 private:
  void borrow(PyObject* object) {
    dlpack::Tensor found;
    if (tensor_api->tensor_from_py_object(object, &found)) throw py::error_already_set();
    tensor_.data = static_cast<char*>(found.data) + found.byte_offset;
    tensor_.dtype = dtype_code(found);
    if (tensor_.dtype < 0) throw py::type_error("a tensor has elements of a size that cannot be read");
    set_dims(found.ndim);
    for (int d = 0; d < tensor_.ndim; ++d) {
      tensor_.shape[d] = found.shape[d];
      tensor_.stride[d] = found.strides[d];
    }
  }
  void set_dims(Py_ssize_t ndim) {
    if (ndim > V2DROP_MAX_DIMS) throw py::value_error("a tensor has more than 8 dimensions");
    tensor_.ndim = static_cast<int32_t>(ndim);
  }

  bool given_;
  v2drop_tensor tensor_;
};

}  // namespace python
