// SPDX-License-Identifier: Apache-2.0
//
// The ops behind the entry points: one table of functions for each place that requests may run on. Requests have been checked.
#ifndef V2DROP_CORE_OPS_H_
#define V2DROP_CORE_OPS_H_

#include <cstdint>

#include "request.h"
#include "request_merge.h"
#include "request_soft.h"

namespace v2drop {

struct Ops {
  void (*score)(const ScoreRequest&, const v2drop_context&);
  void (*score_backward)(const ScoreBackwardRequest&, const v2drop_context&);
  void (*topk)(const TopkRequest&, const v2drop_context&);
  void (*drop)(const DropRequest&, const v2drop_context&);
  void (*compact)(const CompactRequest&, const v2drop_context&);
  void (*compact_backward)(const CompactRequest&, const v2drop_context&);
  void (*compact_inplace)(const CompactRequest&, const v2drop_context&);
  void (*attention)(const AttentionRequest&, const v2drop_context&);
  void (*key_norm)(const NormRequest&, const v2drop_context&);
  void (*cosine_to_pivots)(const PivotsRequest&, const v2drop_context&);
  void (*upload)(const UploadRequest&, const v2drop_context&);
  void (*merge)(const MergeRequest&, const v2drop_context&);
  void (*merge_backward)(const MergeBackwardRequest&, const v2drop_context&);
  void (*bipartite_pairs)(const PairsRequest&, const v2drop_context&);
  void (*soft_topk)(const SoftRequest&, const v2drop_context&);
  void (*soft_topk_backward)(const SoftBackwardRequest&, const v2drop_context&);
  void (*random_score)(const RandomRequest&, const v2drop_context&);
};

// In cuda.cpp or, in a build without CUDA, cuda_missing.cpp, whose cuda_ops() throws.
const Ops& cuda_ops();

#define V2DROP_DECLARE_OPS                                                    \
  void score(const ScoreRequest&, const v2drop_context&);                     \
  void score_backward(const ScoreBackwardRequest&, const v2drop_context&);    \
  void topk(const TopkRequest&, const v2drop_context&);                       \
  void drop(const DropRequest&, const v2drop_context&);                       \
  void compact(const CompactRequest&, const v2drop_context&);                 \
  void compact_backward(const CompactRequest&, const v2drop_context&);        \
  void compact_inplace(const CompactRequest&, const v2drop_context&);         \
  void attention(const AttentionRequest&, const v2drop_context&);             \
  void key_norm(const NormRequest&, const v2drop_context&);                   \
  void cosine_to_pivots(const PivotsRequest&, const v2drop_context&);         \
  void upload(const UploadRequest&, const v2drop_context&);                   \
  void merge(const MergeRequest&, const v2drop_context&);                     \
  void merge_backward(const MergeBackwardRequest&, const v2drop_context&);    \
  void bipartite_pairs(const PairsRequest&, const v2drop_context&);           \
  void soft_topk(const SoftRequest&, const v2drop_context&);                  \
  void soft_topk_backward(const SoftBackwardRequest&, const v2drop_context&); \
  void random_score(const RandomRequest&, const v2drop_context&);

namespace cpu {
V2DROP_DECLARE_OPS
}
namespace cuda {
V2DROP_DECLARE_OPS
}
#undef V2DROP_DECLARE_OPS

// The table of the namespace where this stands. One file for each place has it, since a table needs every one of its functions, which
// the linker does not find for CUDA in a library without it.
#define V2DROP_OPS                                                                                                      \
  {score,       score_backward,   topk,   drop,  compact,        compact_backward, compact_inplace, attention,          \
   key_norm,    cosine_to_pivots, upload, merge, merge_backward, bipartite_pairs,  soft_topk,       soft_topk_backward, \
   random_score}

}  // namespace v2drop

#endif  // V2DROP_CORE_OPS_H_
