// SPDX-License-Identifier: Apache-2.0
#ifndef V2DROP_TESTS_EMULATE_COOPERATIVE_GROUPS_H_
#define V2DROP_TESTS_EMULATE_COOPERATIVE_GROUPS_H_

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const { emulate::grid_barrier(); }
};
inline grid_group this_grid() { return {}; }

struct cluster_group {
  static void sync() { emulate::cluster_barrier(); }
  static unsigned block_rank() { return emulate::cluster_rank(); }
  static unsigned num_blocks() { return emulate::cluster_blocks(); }
  template <class T>
  static T* map_shared_rank(T* own, int rank) {
    return static_cast<T*>(emulate::shared_of_rank(own, static_cast<unsigned>(rank)));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

#endif  // V2DROP_TESTS_EMULATE_COOPERATIVE_GROUPS_H_
