// SPDX-License-Identifier: Apache-2.0
//
// The table of inner loops. CMake compiles this file once per instruction set, with V2DROP_ISA naming it; everything else in the headers
// that it includes has internal linkage, so that no code of a wider instruction set can be linked into a narrower one.
//
// With -ffp-contract=off every instruction set gives the same bits: see the order of the sums in kernels_score.h and kernels_dots.h. The
// loops wait for memory, so fused multiply-adds would not make them faster.
#include "kernels.h"

#include "kernels_copy.h"
#include "kernels_cosine.h"
#include "kernels_dots.h"
#include "kernels_merge.h"
#include "kernels_more.h"
#include "kernels_score.h"
#include "kernels_select.h"
#include "kernels_softmax.h"

namespace v2drop {

#define V2DROP_TABLE_NAME_(isa) kernels_##isa
#define V2DROP_TABLE_NAME(isa) V2DROP_TABLE_NAME_(isa)
#define V2DROP_STRING_(x) #x
#define V2DROP_STRING(x) V2DROP_STRING_(x)
#define V2DROP_SCORE(M, T) {score_row<M, T, Float32>, score_row<M, T, Float16>, score_row<M, T, BFloat16>}
#define V2DROP_SCORES(M) {V2DROP_SCORE(M, Float32), V2DROP_SCORE(M, Float16), V2DROP_SCORE(M, BFloat16)}
#define V2DROP_BACKWARDS(M) {backward_row<M, Float32>, backward_row<M, Float16>, backward_row<M, BFloat16>}

extern const Kernels V2DROP_TABLE_NAME(V2DROP_ISA);
const Kernels V2DROP_TABLE_NAME(V2DROP_ISA) = {
    V2DROP_STRING(V2DROP_ISA),
    {V2DROP_SCORES(L2), V2DROP_SCORES(L1), V2DROP_SCORES(Cosine)},
    {V2DROP_BACKWARDS(L2), V2DROP_BACKWARDS(L1), V2DROP_BACKWARDS(Cosine)},
    {ordinals_of<Float32>, ordinals_of<Float16>, ordinals_of<BFloat16>},
    range,
    at_least,
    {pack<Float32>, pack<Float16>, pack<BFloat16>},
    {dots<Float32>, dots<Float16>, dots<BFloat16>},
    {{add_norms<true, Float32>, add_norms<true, Float16>, add_norms<true, BFloat16>},
     {add_norms<false, Float32>, add_norms<false, Float16>, add_norms<false, BFloat16>}},
    {widen_row<Float32>, widen_row<Float16>, widen_row<BFloat16>},
    {wide_dots<Float32>, wide_dots<Float16>, wide_dots<BFloat16>},
    {wide_squares<Float32>, wide_squares<Float16>, wide_squares<BFloat16>},
    exponentials,
    sum_where,
    add_scaled,
    max_scaled,
    add_squares,
    {merge_row<Float32>, merge_row<Float16>, merge_row<BFloat16>},
    {dot_row<Float32>, dot_row<Float16>, dot_row<BFloat16>},
    {score_short<true>, score_short<false>},
    {to_floats<Float32>, to_floats<Float16>, to_floats<BFloat16>},
    random_numbers,
    sigmoids,
    halves_of,
    copy_past_cache,
    store_fence,
};

}  // namespace v2drop
