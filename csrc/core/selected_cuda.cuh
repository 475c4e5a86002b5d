// SPDX-License-Identifier: Apache-2.0
//
// Where selections on the GPU write: the rows that a drop keeps, or the indices and values of a top-k.
#ifndef V2DROP_CORE_SELECTED_CUDA_CUH_
#define V2DROP_CORE_SELECTED_CUDA_CUH_

#include "select_cuda.cuh"

namespace v2drop {

// Where the segments select to.
struct Selected {
  KeptRows kept;     // of a drop, or
  int64_t* indices;  // of a top-k [groups, width]
  char* values;      // NULL: the rank kernel writes them
  int64_t width;
  int32_t dtype;
};

__device__ inline int item_bytes(int dtype) { return dtype == V2DROP_FLOAT32 ? 4 : 2; }

__device__ inline void store_bits(char* to, uint32_t bits, int dtype) {
  if (dtype == V2DROP_FLOAT32) {
    *reinterpret_cast<uint32_t*>(to) = bits;
  } else {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bits);
  }
}

__device__ inline void store_value(char* to, const DeviceOrdinals& ordinals, int64_t entry, int64_t position, int dtype) {
  if (ordinals.ordinals) return store_bits(to, bits_of_ordinal(ordinals.at(entry, position)), V2DROP_FLOAT32);
  const char* from = ordinals.scores + entry * ordinals.scores_batch + position * ordinals.scores_row;
  store_bits(to, dtype == V2DROP_FLOAT32 ? *reinterpret_cast<const uint32_t*>(from) : *reinterpret_cast<const uint16_t*>(from), dtype);
}

__device__ inline void store_nothing(int64_t* index, char* value, int dtype) {
  *index = -1;
  if (value) store_bits(value, dtype == V2DROP_FLOAT32 ? 0xff800000u : dtype == V2DROP_FLOAT16 ? 0xfc00u : 0xff80u, dtype);
}

// Selects from every segment, in one launch; the longest has max_n competing rows. What `workspace` has left may be used.
void launch_select(const Table& table, const DeviceOrdinals& ordinals, const Selected& to, int64_t max_n, LaunchDependency dependency,
                   Workspace& workspace, const v2drop_context& context);

}  // namespace v2drop

#endif  // V2DROP_CORE_SELECTED_CUDA_CUH_
