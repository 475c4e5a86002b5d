// SPDX-License-Identifier: Apache-2.0
#ifndef V2DROP_TESTS_EMULATE_COOPERATIVE_GROUPS_H_
#define V2DROP_TESTS_EMULATE_COOPERATIVE_GROUPS_H_

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const { emulate::grid_barrier(); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups

#endif  // V2DROP_TESTS_EMULATE_COOPERATIVE_GROUPS_H_
