// SPDX-License-Identifier: Apache-2.0
#ifndef V2DROP_CORE_SCORE_CPU_H_
#define V2DROP_CORE_SCORE_CPU_H_

#include "request.h"

namespace v2drop {

// score_short_cpu.cpp: scores short rows that lie end to end, and tells whether these were.
bool score_short(const ScoreRequest& request, const v2drop_context& context);

}  // namespace v2drop

#endif  // V2DROP_CORE_SCORE_CPU_H_
