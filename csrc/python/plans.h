// SPDX-License-Identifier: Apache-2.0
//
// The table of a packed batch in which every item is one segment and keeps the same number of rows, without Python for every segment.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace python {

// The offsets as integers; false where they are neither a list or tuple of ints nor a contiguous int32 or int64 tensor in one dimension.
inline bool read_offsets(PyObject* object, std::vector<int64_t>& offsets) {
  if (PyList_CheckExact(object) || PyTuple_CheckExact(object)) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
    offsets.reserve(static_cast<size_t>(count));
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(object, i);
      if (!PyLong_CheckExact(item)) return false;
      offsets.push_back(PyLong_AsLongLong(item));
      if (offsets.back() == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
      }
    }
    return true;
  }
  const Tensor tensor(object);
  const v2drop_tensor* t = tensor;
  if (!t || t->ndim != 1 || (t->dtype != V2DROP_INT32 && t->dtype != V2DROP_INT64)) return false;
  if (t->shape[0] > 1 && t->stride[0] != 1) return false;
  offsets.resize(static_cast<size_t>(t->shape[0]));
  if (t->dtype == V2DROP_INT32) {
    std::copy_n(static_cast<const int32_t*>(t->data), offsets.size(), offsets.begin());
  } else {
    std::copy_n(static_cast<const int64_t*>(t->data), offsets.size(), offsets.begin());
  }
  return true;
}

// Fills `to` ([offsets - 1, 8] int64) with the segments of a selection of k rows of every item, and gives the largest number that one
// keeps. -1: the offsets are not what they should be, or of another kind, and the caller finds out why.
inline int64_t packed_segments(py::handle offsets, int64_t total, int64_t k, uintptr_t to, int64_t groups) {
  std::vector<int64_t> cu;
  if (!read_offsets(offsets.ptr(), cu) || static_cast<int64_t>(cu.size()) != groups + 1 || cu[0] != 0 || cu.back() != total) return -1;
  int64_t width = 0;
  for (size_t g = 0; g + 1 < cu.size(); ++g) {
    if (cu[g + 1] < cu[g]) return -1;
    width = std::max(width, std::min(k, cu[g + 1] - cu[g]));
  }
  auto* segments = reinterpret_cast<v2drop_segment*>(to);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t start = cu[static_cast<size_t>(g)], n = cu[static_cast<size_t>(g) + 1] - start, kept = std::min(k, n);
    segments[g] = {start, 0, n, 0, kept, g * width, 0, width - kept};
  }
  return width;
}

}  // namespace python
