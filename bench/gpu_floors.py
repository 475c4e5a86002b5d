"""The byte and latency model of a drop with the constants that were measured on the device, beside what was measured.

FLOOR is bytes over measured bandwidth without any latency: with cold inputs nothing can be faster. A MODEL adds what launches,
barriers, the start of a kernel and the exposed select were measured to take; it explains a time, it is none. Where a constant or
a time is missing there is a dash, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from tables import Row, duration, table

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
OWN = ("triton", "cuda", "reference")


class Constants(NamedTuple):
    """What gpu_constants measured, in microseconds and GB/s; NaN where it could not."""

    copy: float
    read: float
    plain: float
    pdl: float
    barrier: float
    ramp: float
    reuse: Mapping[int, float]  # MB of a buffer to how much faster it is read again

    @classmethod
    def of(cls, found: Mapping[str, Mapping[str, Any]]) -> Constants:
        value = lambda name: float(found.get(name, {}).get("value", math.nan))
        reuse = {int(name.split()[-2]): value(name) for name in found if name.startswith("L2 reuse")}
        names = ("copy bandwidth", "read bandwidth", "kernel, plain edge", "kernel, PDL edge", "grid barrier", "ramp")
        return cls(*map(value, names), reuse)

    def again(self, nbytes: float) -> float:
        """GB/s of reading what was read shortly before: as the largest buffer that was tried and is as large, else from memory."""
        sizes = [size for size in self.reuse if size * (1 << 20) >= nbytes]
        return self.read * max(self.reuse[min(sizes)], 1.0) if sizes else self.read


def us(nbytes: float, gb_s: float) -> float:
    return nbytes / gb_s / 1e3


def floor_us(row: Row, c: Constants) -> float:
    """Bytes that must move, once each: both hidden states in, the kept rows out; or what the group says that its op moves."""
    if row["op"] in ("score", "attention"):
        return us(float(row["bytes"]), c.read)
    if row["op"] != "drop":
        return us(float(row["bytes"]), c.copy)
    b, n, k, width = int(row["B"]), int(row["N"]), int(row["k"]), int(row["D"]) * SIZES[row["dtype"]]
    return us(b * (2 * n + k) * width, c.copy)


def models(row: Row, c: Constants, select: float) -> dict[str, float]:
    """GPU time of a drop per launch mode; ``select`` is what a select of this size took, in a kernel of its own."""
    b, n, k, width = int(row["B"]), int(row["N"]), int(row["k"]), int(row["D"]) * SIZES[row["dtype"]]
    read, write, again = us(2 * b * n * width, c.read), us(b * k * width, c.copy), us(b * k * width, c.again(b * n * width))
    exposed = select - c.plain  # the launch of the select is an edge of its own below
    edge = c.plain if math.isnan(c.pdl) else c.pdl  # there are devices without dependent launches
    return {
        "one launch": c.plain + c.ramp + read + c.barrier + exposed + again + write,
        "two launches": c.plain + c.ramp + read + edge + exposed + c.ramp + again + write,
        "three launches": c.plain + c.ramp + read + 2 * edge + exposed + c.ramp + again + write,
    }


def floors_table(results: list[Row], constants: Mapping[str, Mapping[str, Any]]) -> str:
    """Every cold group with known bytes: floor, models of a drop, times, and the share of the floor that was reached."""
    c = Constants.of(constants)
    groups: dict[str, dict[str, Row]] = {}
    selects: dict[tuple[str, str], float] = {}
    for row in results:
        alone = row["op"] != "drop" or row["group"].startswith("drop ")  # other groups repeat its shapes beside something else
        if row["median_us"] and row["mode"] == "cold" and row["bytes"] and alone:
            groups.setdefault(row["group"], {})[row["provider"]] = row
        if row["median_us"] and row["op"] == "select" and row["mode"] == "warm" and row["provider"] in OWN:
            key = (row["B"], row["N"])
            selects[key] = min(selects.get(key, math.inf), float(row["median_us"]))
    lines = []
    for group, by in groups.items():
        mine = {name: float(r["median_us"]) for name, r in by.items() if name.split("@")[0].split("-")[0] in OWN}
        if not mine:
            continue
        best = min(mine, key=lambda name: mine[name])
        row = by[best]
        floor = floor_us(row, c)
        copy = min((float(r["median_us"]) for name, r in by.items() if name in ("copy", "copy-kernel")), default=math.nan)
        model = models(row, c, selects.get((row["B"], row["N"]), math.nan)) if row["op"] == "drop" else {}
        lines.append([
            group, _us(floor), *(_us(model.get(mode, math.nan)) for mode in ("one launch", "two launches", "three launches")),
            _us(copy), best, _us(mine[best]), "-" if math.isnan(floor) else f"{100 * floor / mine[best]:.0f} %",
        ])  # fmt: skip
    if not lines:
        return "Nothing to compare yet."
    head = ["group", "floor", "model: one launch", "two", "three", "measured: copy", "ours", "time", "of the floor"]
    return table(head, lines)


def _us(value: float) -> str:
    return "-" if math.isnan(value) else duration(str(value))
