/* SPDX-License-Identifier: Apache-2.0
 *
 * The numbers that version 0.1.0 fixed, by its header and by the one of today. Only v2drop_source and v2drop_context may have grown. */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "layout.h"

int main(void) {
  int i, failures = 0;
  for (i = 0; layout_then[i].name; ++i) {
    const char* name = layout_then[i].name;
    const int may_grow = !strcmp(name, "sizeof(v2drop_source)") || !strcmp(name, "sizeof(v2drop_context)");
    const long long then = layout_then[i].number, now = layout_now[i].number;
    if (now == then || (may_grow && now > then)) continue;
    printf("%s was %lld in version 0.1.0 and is %lld\n", name, then, now);
    ++failures;
  }
  if (!failures) printf("layout: %d numbers of version 0.1.0 unchanged\n", i);
  return failures != 0;
}
