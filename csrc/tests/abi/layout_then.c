/* SPDX-License-Identifier: Apache-2.0 */
#include "v2drop_0_1_0.h"

#include "layout.h"

const layout_row layout_then[] = LAYOUT_ROWS;
