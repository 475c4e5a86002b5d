"""The columns of results.csv and targets.csv, the same for a CPU and for a GPU. A cell that does not apply is empty.

Of results.csv:

``group``: the problem of the GPU check that a row belongs to. ``threads``: of the CPU. ``mode``: "cold" takes rotated inputs, so
that they come from DRAM; "warm" takes the same inputs again and again; "eager" is the wall time of calls that are not captured in
a graph, "host" the time until they return. ``check``: "equal" where the result equalled the reference's, "none" where there is
nothing to compare, else why there is no time. Times are microseconds of one call: the minimum, the median and two quantiles of
``rounds`` samples with ``calls`` calls each (empty: one). ``bytes``: what the op must move; ``gb_s``: these bytes over the median;
``copy_share``: the median of a copy of as many bytes over that of the row. ``quiet``: whether the noise gate found the machine
idle. The last columns say where, when and with what a row was measured.

Of targets.csv, and of the files of other ops: ``target`` is the name of the ratio, or its number in the list of GPU targets, whose
text is ``what``. ``a`` and ``b`` are the two sides on a CPU, with their times; ``backend`` is what was measured on a GPU. ``value``
is in ``unit``; ``status`` compares it with ``limit``, if there is one (``asserted``).
"""

from __future__ import annotations

from harness import CONDITIONS

RESULTS = (
    "group", "op", "B", "N", "D", "dtype", "k", "threads", "mode", "provider", "check", "min_us", "median_us", "p20_us", "p80_us",
    "rounds", "calls", "bytes", "gb_s", "copy_share", "quiet", "gpu", *CONDITIONS,
)  # fmt: skip

TARGETS = (
    "target", "what", "asserted", "op", "group", "case", "threads", "mode", "backend", "a", "a_min_us", "a_median_us", "b",
    "b_min_us", "b_median_us", "value", "unit", "limit", "status", "attempts", "quiet_attempts", "gpu", *CONDITIONS,
)  # fmt: skip
