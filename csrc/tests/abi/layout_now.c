/* SPDX-License-Identifier: Apache-2.0 */
#include "v2drop/v2drop.h"

#include "layout.h"

const layout_row layout_now[] = LAYOUT_ROWS;
