// SPDX-License-Identifier: Apache-2.0
//
// The part of DLPack 1.x (https://dmlc.github.io/dlpack) that reads a tensor of another library without its Python attributes: the
// table of functions that a tensor type offers as `__dlpack_c_exchange_api__`, torch.Tensor since torch 2.10. Layout and meaning of
// the fields are those of the specification; functions that are not called here are void pointers.
#pragma once

#include <cstdint>

namespace dlpack {

enum Code : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  const ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  // Fills a tensor that borrows from the object; 0, or -1 with a Python exception set.
  int (*tensor_from_py_object)(void* object, Tensor* found);
};

constexpr uint32_t kMajor = 1;
constexpr const char* kCapsule = "dlpack_exchange_api";

}  // namespace dlpack
