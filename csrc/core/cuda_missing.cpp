// SPDX-License-Identifier: Apache-2.0
//
// Replaces the CUDA ops in a library that was built without CUDA.
#include "ops.h"

namespace v2drop {

const Ops& cuda_ops() {
  fail_with(V2DROP_ERROR_UNSUPPORTED, "this libv2drop was built without CUDA (rebuild it where nvcc is found, or with V2DROP_CUDA=ON)");
}

}  // namespace v2drop

using namespace v2drop;

const char* v2drop_cuda_archs(void) { return ""; }
v2drop_status v2drop_cuda_available(void) {
  return guard([] { cuda_ops(); });
}
int64_t v2drop_workspace_bytes(int64_t, int64_t, int64_t) { return 0; }
int64_t v2drop_attention_workspace_bytes(int64_t, int64_t, int64_t, int64_t) { return 0; }
