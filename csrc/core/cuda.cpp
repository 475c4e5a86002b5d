// SPDX-License-Identifier: Apache-2.0
//
// The CUDA ops of a library that was built with them.
#include "ops.h"

namespace v2drop {
namespace cuda {

void bipartite_pairs(const PairsRequest&, const v2drop_context&) {
  fail_with(V2DROP_ERROR_UNSUPPORTED, "v2drop_bipartite_pairs runs on the CPU only");
}
void soft_topk(const SoftRequest&, const v2drop_context&) { fail_with(V2DROP_ERROR_UNSUPPORTED, "v2drop_soft_topk runs on the CPU only"); }
void soft_topk_backward(const SoftBackwardRequest&, const v2drop_context&) {
  fail_with(V2DROP_ERROR_UNSUPPORTED, "v2drop_soft_topk_backward runs on the CPU only");
}

static constexpr Ops kOps = V2DROP_OPS;

}  // namespace cuda

const Ops& cuda_ops() { return cuda::kOps; }

}  // namespace v2drop
