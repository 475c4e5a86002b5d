"""Measured beside predicted, and the constants of the performance model solved for by least squares.

Every predicted time is a sum of constants, each with a known factor (gpu_machine.Time), so measured times give the constants: the
squares of the relative errors become as small as possible, and a constant of which the times say little stays near the one before.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from gpu_machine import Constants, Machine, Time
from gpu_predict import Predictor
from gpu_registry import Group, steps
from tables import Row, table

HOLD = 1e-3  # how much a relative change of a constant weighs against a relative error of a time
TURNS = 5  # a time that another limit decides is made of other constants, so the solution is repeated
COLUMNS = (
    "group", "mode", "provider", "measured_us", "predicted_us", "fitted_us", "measured_over_predicted", "measured_over_fitted",
)  # fmt: skip
# What gpu_constants measures, as a term; bandwidths in GB/s are the inverse of a share of the published one.
DIRECT = {
    "kernel, plain edge": "plain_edge", "kernel, PDL edge": "pdl_edge", "grid barrier": "grid_barrier", "ramp": "ramp",
    "copy bandwidth": "copy", "read bandwidth": "read",
}  # fmt: skip


class Measured(NamedTuple):
    """A time that was taken, or a constant (``mode`` is empty)."""

    group: str
    mode: str
    provider: str
    us: float


def groups() -> dict[str, Group]:
    """The groups of the GPU check by name."""
    return {one.name: one for step in steps().values() for one in step if isinstance(one, Group)}


def measured(rows: Iterable[Row], constants: Mapping[str, Mapping[str, Any]], machine: Machine) -> list[Measured]:
    """What a results folder knows: rows with a time, and measured constants."""
    found = [Measured(row["group"], row["mode"], row["provider"], float(row["median_us"])) for row in rows if row["median_us"]]
    for name, term in DIRECT.items():
        value = float(constants.get(name, {}).get("value", math.nan))
        if value > 0:
            found.append(Measured(name, "", term, machine.dram_gb_s / value if term in ("copy", "read") else value))
    return found


def times_of(found: Sequence[Measured], p: Predictor) -> list[Time[str] | None]:
    """The prediction of each, None where the model has none."""
    known, made = groups(), dict[tuple[str, str], dict[str, Time[str]]]()
    times: list[Time[str] | None] = []
    for one in found:
        if not one.mode:
            times.append(Time({one.provider: 1}))
            continue
        group = known.get(one.group)
        if group is None or one.mode not in group.modes:
            times.append(None)
            continue
        if (one.group, one.mode) not in made:
            made[one.group, one.mode] = p.times(group, one.mode)
        times.append(made[one.group, one.mode].get(one.provider))
    return times


def fitted(found: Sequence[Measured], machine: Machine, before: Constants) -> Constants:
    """The constants that explain what was measured best."""
    after = before
    prior = before.theta()
    for _ in range(TURNS):
        pairs = [(one.us, t) for one, t in zip(found, times_of(found, Predictor(machine, after)), strict=True) if t and one.us > 0]
        terms = sorted({term for _, t in pairs for term, amount in t.items() if amount and prior[term] > 0})
        if not terms:
            return before
        # Unknowns are factors of the constants before, so that all are of one size.
        left = numpy.array([[t[term] * prior[term] / us for term in terms] for us, t in pairs])
        rest = numpy.array([sum(prior[term] * n for term, n in t.items() if term not in terms) / us for us, t in pairs])
        left = numpy.vstack([left, HOLD * numpy.eye(len(terms))])
        right = numpy.concatenate([1 - rest, numpy.full(len(terms), HOLD)])
        solved = numpy.linalg.lstsq(left, right, rcond=None)[0]
        factors = dict(zip(terms, numpy.maximum(solved, 1e-3), strict=True))
        after = before.replaced({term: prior[term] * float(f) for term, f in factors.items()}, "fitted to measured times")
    return after


def comparison(found: Sequence[Measured], machine: Machine, before: Constants, after: Constants) -> list[Row]:
    """One row for everything that was measured and predicted."""
    rows = []
    old, new = Predictor(machine, before), Predictor(machine, after)
    for one, was, now in zip(found, times_of(found, old), times_of(found, new), strict=True):
        if was is None or now is None:
            continue
        a, b = before.us(was), after.us(now)
        rows.append({
            "group": one.group, "mode": one.mode, "provider": one.provider, "measured_us": f"{one.us:.4g}",
            "predicted_us": f"{a:.4g}", "fitted_us": f"{b:.4g}",
            "measured_over_predicted": f"{one.us / a:.3f}" if a else "", "measured_over_fitted": f"{one.us / b:.3f}" if b else "",
        })  # fmt: skip
    return rows


def write(
    folder: Path, rows: Sequence[Row], constants: Mapping[str, Mapping[str, Any]], machine: Machine, before: Constants
) -> Constants:
    """Measured beside predicted into predictions.csv, and the constants into fitted.json; returns them."""
    found = measured(rows, constants, machine)
    after = fitted(found, machine, before)
    with (folder / "predictions.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(comparison(found, machine, before, after))
    changed = {name: value for name, value in after.values.items() if value != before.values[name]}
    content = {"machine": machine.name, "times": len(found), "constants": changed}
    (folder / "fitted.json").write_text(json.dumps(content, indent=1) + "\n")
    return after


def page(rows: Sequence[Row], before: Constants, after: Constants) -> str:
    """Markdown for the report: the constants that changed, and times beside their predictions."""
    changed = [[name, f"{before.values[name]:.4g}", f"{value:.4g}", after.units[name]]
               for name, value in after.values.items() if value != before.values[name]]  # fmt: skip
    head = ["group", "mode", "provider", "measured us", "predicted us", "fitted us", "measured over predicted", "over fitted"]
    parts = [table(["constant", "before", "fitted", "unit"], changed)] if changed else []
    return "\n\n".join([*parts, table(head, [[row[name] for name in COLUMNS] for row in rows])])
