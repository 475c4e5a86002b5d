// SPDX-License-Identifier: Apache-2.0
//
// The CUDA entry points of a library that was built without CUDA.
#include "status.h"

using namespace v2drop;

namespace {

v2drop_status missing() {
  return record(V2DROP_ERROR_UNSUPPORTED, "this libv2drop was built without CUDA (rebuild it where nvcc is found, or with V2DROP_CUDA=ON)");
}

}  // namespace

const char* v2drop_cuda_archs(void) { return ""; }
v2drop_status v2drop_cuda_available(void) { return missing(); }
int64_t v2drop_workspace_bytes_cuda(int64_t, int64_t, int64_t) { return 0; }

v2drop_status v2drop_variation_score_cuda(const v2drop_tensor*, const v2drop_tensor*, int32_t, int32_t, const v2drop_tensor*,
                                          const v2drop_cuda*) {
  return missing();
}

v2drop_status v2drop_variation_score_backward_cuda(const v2drop_tensor*, const v2drop_tensor*, const v2drop_tensor*, int32_t,
                                                   const v2drop_tensor*, const v2drop_tensor*, const v2drop_cuda*) {
  return missing();
}

v2drop_status v2drop_topk_cuda(const v2drop_tensor*, const v2drop_tensor*, const v2drop_tensor*, const v2drop_tensor*,
                               const v2drop_stretch*, int64_t, const v2drop_tensor*, int32_t, int32_t, int32_t, const v2drop_tensor*,
                               const v2drop_tensor*, const v2drop_cuda*) {
  return missing();
}

v2drop_status v2drop_drop_tokens_cuda(const v2drop_tensor*, const v2drop_tensor*, const v2drop_tensor*, const v2drop_tensor*,
                                      const v2drop_stretch*, int64_t, const v2drop_tensor*, int32_t, int32_t, const v2drop_tensor*,
                                      const v2drop_tensor*, const v2drop_part*, int64_t, const v2drop_cuda*) {
  return missing();
}

v2drop_status v2drop_compact_cuda(const v2drop_tensor*, const v2drop_part*, int64_t, const v2drop_cuda*) { return missing(); }

v2drop_status v2drop_compact_backward_cuda(const v2drop_tensor*, int64_t, const v2drop_part*, int64_t, const v2drop_cuda*) {
  return missing();
}

v2drop_status v2drop_compact_inplace_cuda(const v2drop_tensor*, const v2drop_part*, int64_t, const v2drop_cuda*) { return missing(); }

int64_t v2drop_attention_workspace_bytes_cuda(int64_t, int64_t, int64_t, int64_t) { return 0; }

v2drop_status v2drop_attention_score_cuda(const v2drop_tensor*, const v2drop_tensor*, const v2drop_tensor*, const v2drop_tensor*,
                                          const v2drop_tensor*, int32_t, float, int32_t, int32_t, int32_t, const v2drop_tensor*,
                                          const v2drop_cuda*) {
  return missing();
}

v2drop_status v2drop_key_norm_cuda(const v2drop_tensor*, int32_t, const v2drop_tensor*, const v2drop_cuda*) { return missing(); }

v2drop_status v2drop_cosine_to_pivots_cuda(const v2drop_tensor*, const v2drop_tensor*, const v2drop_tensor*, const v2drop_cuda*) {
  return missing();
}
