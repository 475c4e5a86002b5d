"""Targets as data: a limit on a value that comes from the times of one group, judged once for each own backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Times = dict[str, float]  # candidate to median seconds, of one group in one mode


class Target(NamedTuple):
    """A limit on a value that comes from the times of a group, for one own backend."""

    number: str
    text: str
    sense: str  # "at most" or "at least"
    limit: float
    value: Callable[[Times, str], float]
    mode: str = "cold"


def faster(*names: str, own: str = "{}") -> Callable[[Times, str], float]:
    """How many times longer the fastest of ``names`` takes than ours."""
    return lambda t, o: min(t[n] for n in names if n in t) / t[own.format(o)]


def within(*names: str, own: str = "{}") -> Callable[[Times, str], float]:
    """How many times longer ours takes than the fastest of ``names``, which may themselves be ours."""
    return lambda t, o: t[own.format(o)] / min(t[n.format(o)] for n in names if n.format(o) in t)


def at_least(number: str, text: str, limit: float, value: Any, mode: str = "cold") -> Target:
    return Target(number, text, "at least", limit, value, mode)


def at_most(number: str, text: str, limit: float, value: Any, mode: str = "cold") -> Target:
    return Target(number, text, "at most", limit, value, mode)


# Baselines are named by what they do; where a target names several, the fastest one counts.
COPIES, READS = ("copy", "copy-kernel"), ("read-sum", "read-norm", "read-max")


COMPILED = ("compile", "compile-reduce-overhead", "compile-max-autotune")


# What the papers report, on other GPUs: V2Drop's Table 4 and its video table.
MODEL_LEVEL = (
    at_least("model", "LLaVA-1.5-7B with 128 of 576 tokens: throughput over no dropping", 1.22, None, mode=""),
    at_least("model", "LLaVA-OneVision-7B, video of 32 frames: throughput over no dropping", 1.38, None, mode=""),
)
