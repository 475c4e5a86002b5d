// SPDX-License-Identifier: Apache-2.0
//
// The entry points: check the arguments, then run the op where the context says. The ops themselves are in one file for each place.
#include <cstdio>

#include "kernels.h"
#include "ops.h"
#include "status.h"

namespace v2drop {

namespace cpu {
static constexpr Ops kOps = V2DROP_OPS;
}

namespace {

thread_local char last_error[sizeof(Error::message)] = "";

// Checks the context, then the other arguments, which `check` returns as a request; then runs the op.
template <class Request, class Check>
v2drop_status run(void (*Ops::*op)(const Request&, const v2drop_context&), const v2drop_context* context, const Check& check) {
  return guard([&] {
    const v2drop_context where = check_context(context);
    const Ops& ops = where.place == V2DROP_CUDA ? cuda_ops() : cpu::kOps;
    (ops.*op)(check(where.place), where);
  });
}

}  // namespace

v2drop_status record(v2drop_status status, const char* message) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", message);
  return status;
}

}  // namespace v2drop

using namespace v2drop;

int32_t v2drop_version(void) { return V2DROP_VERSION; }
const char* v2drop_isa(void) { return kernels().isa; }
const char* v2drop_last_error(void) { return last_error; }

v2drop_status v2drop_variation_score(const v2drop_source* source, const v2drop_tensor* scores, const v2drop_context* context) {
  return run(&Ops::score, context, [&](int32_t) { return check_score(source, scores); });
}

v2drop_status v2drop_variation_score_backward(const v2drop_tensor* grad, const v2drop_source* source, const v2drop_tensor* grad_prev,
                                              const v2drop_tensor* grad_cur, const v2drop_context* context) {
  return run(&Ops::score_backward, context, [&](int32_t) { return check_score_backward(grad, source, grad_prev, grad_cur); });
}

v2drop_status v2drop_topk(const v2drop_source* source, const v2drop_segment* segments, int64_t n_segments, const v2drop_tensor* cu_seqlens,
                          int32_t order, const v2drop_tensor* values, const v2drop_tensor* indices, const v2drop_context* context) {
  return run(&Ops::topk, context,
             [&](int32_t place) { return check_topk(source, segments, n_segments, cu_seqlens, order, values, indices, place); });
}

v2drop_status v2drop_drop_tokens(const v2drop_source* source, const v2drop_segment* segments, int64_t n_segments,
                                 const v2drop_tensor* cu_seqlens, const v2drop_tensor* keep, const v2drop_tensor* new_cu,
                                 const v2drop_gather* gathers, int64_t n_gathers, const v2drop_context* context) {
  return run(&Ops::drop, context,
             [&](int32_t place) { return check_drop(source, segments, n_segments, cu_seqlens, keep, new_cu, gathers, n_gathers, place); });
}

v2drop_status v2drop_compact(const v2drop_tensor* keep, const v2drop_gather* gathers, int64_t n_gathers, const v2drop_context* context) {
  return run(&Ops::compact, context, [&](int32_t) { return check_compact(keep, gathers, n_gathers); });
}

v2drop_status v2drop_compact_backward(const v2drop_tensor* keep, int64_t rows, const v2drop_gather* gathers, int64_t n_gathers,
                                      const v2drop_context* context) {
  return run(&Ops::compact_backward, context, [&](int32_t) { return check_compact_backward(keep, rows, gathers, n_gathers); });
}

v2drop_status v2drop_compact_inplace(const v2drop_tensor* keep, const v2drop_gather* gathers, int64_t n_gathers,
                                     const v2drop_context* context) {
  return run(&Ops::compact_inplace, context, [&](int32_t) { return check_compact_inplace(keep, gathers, n_gathers); });
}

v2drop_status v2drop_attention_score(const v2drop_tensor* q, const v2drop_tensor* k, const v2drop_tensor* query_rows,
                                     const v2drop_tensor* key_mask, const v2drop_tensor* droppable, int32_t causal, float scale,
                                     int32_t mode, int32_t heads, int32_t queries, const v2drop_tensor* scores,
                                     const v2drop_context* context) {
  return run(&Ops::attention, context,
             [&](int32_t) { return check_attention(q, k, query_rows, key_mask, droppable, causal, scale, mode, heads, queries, scores); });
}

v2drop_status v2drop_key_norm(const v2drop_tensor* k, int32_t norm, const v2drop_tensor* scores, const v2drop_context* context) {
  return run(&Ops::key_norm, context, [&](int32_t) { return check_key_norm(k, norm, scores); });
}

v2drop_status v2drop_cosine_to_pivots(const v2drop_tensor* x, const v2drop_tensor* pivots, const v2drop_tensor* cosines,
                                      const v2drop_context* context) {
  return run(&Ops::cosine_to_pivots, context, [&](int32_t) { return check_pivots(x, pivots, cosines); });
}

v2drop_status v2drop_weighted_merge(const v2drop_tensor* x, const v2drop_tensor* offsets, const v2drop_tensor* rows,
                                    const v2drop_tensor* weights, int32_t mean, const v2drop_tensor* out, const v2drop_context* context) {
  return run(&Ops::merge, context, [&](int32_t) { return check_merge(x, offsets, rows, weights, mean, out); });
}

v2drop_status v2drop_weighted_merge_backward(const v2drop_tensor* grad, const v2drop_tensor* x, const v2drop_tensor* offsets,
                                             const v2drop_tensor* rows, const v2drop_tensor* weights, int32_t mean,
                                             const v2drop_tensor* back_offsets, const v2drop_tensor* back_edges,
                                             const v2drop_tensor* grad_x, const v2drop_tensor* grad_weights,
                                             const v2drop_context* context) {
  return run(&Ops::merge_backward, context, [&](int32_t place) {
    return check_merge_backward(grad, x, offsets, rows, weights, mean, back_offsets, back_edges, grad_x, grad_weights, place);
  });
}

v2drop_status v2drop_bipartite_pairs(const v2drop_tensor* features, int64_t merged, int64_t protected_rows, int32_t order,
                                     const v2drop_tensor* keep, const v2drop_tensor* row, const v2drop_tensor* offsets,
                                     const v2drop_tensor* edges, const v2drop_context* context) {
  return run(&Ops::bipartite_pairs, context,
             [&](int32_t) { return check_pairs(features, merged, protected_rows, order, keep, row, offsets, edges); });
}

v2drop_status v2drop_soft_topk(const v2drop_tensor* scores, const v2drop_tensor* ratio, const v2drop_tensor* valid, float temperature,
                               int32_t ties, int32_t hard, const v2drop_tensor* mask, const v2drop_tensor* slope,
                               const v2drop_tensor* order, const v2drop_context* context) {
  return run(&Ops::soft_topk, context,
             [&](int32_t) { return check_soft(scores, ratio, valid, temperature, ties, hard, mask, slope, order); });
}

v2drop_status v2drop_soft_topk_backward(const v2drop_tensor* grad, const v2drop_tensor* slope, const v2drop_tensor* scores,
                                        const v2drop_tensor* order, const v2drop_tensor* valid, const v2drop_tensor* grad_scores,
                                        const v2drop_context* context) {
  return run(&Ops::soft_topk_backward, context,
             [&](int32_t) { return check_soft_backward(grad, slope, scores, order, valid, grad_scores); });
}

v2drop_status v2drop_random_score(int64_t seed, const v2drop_tensor* item_seeds, const v2drop_tensor* scores,
                                  const v2drop_context* context) {
  return run(&Ops::random_score, context, [&](int32_t) { return check_random(seed, item_seeds, scores); });
}

v2drop_status v2drop_upload(const v2drop_tensor* values, const v2drop_tensor* to, const v2drop_context* context) {
  return run(&Ops::upload, context, [&](int32_t) { return check_upload(values, to); });
}
