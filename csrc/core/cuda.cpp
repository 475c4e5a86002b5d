// SPDX-License-Identifier: Apache-2.0
//
// The CUDA ops of a library that was built with them.
#include "ops.h"

namespace v2drop {

namespace cuda {
static constexpr Ops kOps = V2DROP_OPS;
}

const Ops& cuda_ops() { return cuda::kOps; }

}  // namespace v2drop
