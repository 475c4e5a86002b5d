"""The columns of results.csv, the same for a CPU and for a GPU. A cell that does not apply to one of them is empty.

``group``: the problem of the GPU check that a row belongs to. ``threads``: of the CPU. ``mode``: "cold" takes rotated inputs, so
that they come from DRAM; "warm" takes the same inputs again and again; "eager" is the wall time of calls that are not captured in
a graph, "host" the time until they return. ``check``: "equal" where the result equalled the reference's, "none" where there is
nothing to compare, else why there is no time. Times are microseconds of one call: the minimum, the median and two quantiles of
``rounds`` samples with ``calls`` calls each (empty: one). ``bytes``: what the op must move; ``gb_s``: these bytes over the median;
``copy_share``: the median of a copy of as many bytes over that of the row. ``quiet``: whether the noise gate found the machine
idle. The last columns tell where, when and with what a row was measured.
"""

from __future__ import annotations

from harness import CONDITIONS

RESULTS = (
    "group", "op", "B", "N", "D", "dtype", "k", "threads", "mode", "provider", "check", "min_us", "median_us", "p20_us", "p80_us",
    "rounds", "calls", "bytes", "gb_s", "copy_share", "quiet", "gpu", *CONDITIONS,
)  # fmt: skip
