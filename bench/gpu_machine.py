"""GPUs as data (gpu_machines.json), and times as sums of constants.

A ``Time`` says how much of each constant goes into a time: microseconds of a launch edge count 1 for each edge; bytes count the
microseconds that they would take at the published bandwidth, times the inverse of the share of it that is reached. So every time is
linear in what is not known yet, and gpu_fit can solve for it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

MACHINES = Path(__file__).with_name("gpu_machines.json")
# Terms of a Time that are the inverse of shares of the bandwidth, and those shares.
SHARES = {"copy": ("copy_share",), "kernel": ("copy_share", "kernel_share"), "read": ("read_share",), "l2": ("l2_share",)}
# Constants that are the coefficients of a Time as they stand, in microseconds or as a factor.
TERMS = (
    "plain_edge", "pdl_edge", "ramp", "grid_barrier", "cooperative", "select", "host_cuda", "host_triton", "host_torch_op",
    "torch_topk", "torch_sort",
)  # fmt: skip
CLOCKS = ("barrier_clocks", "cluster_clocks", "load_clocks")  # inside what "select" scales

Time = Counter  # of terms; Counter[str] with fractions


class Machine(NamedTuple):
    """Published figures of one GPU."""

    name: str
    sms: int
    clock_ghz: float
    dram_gb_s: float
    l2_mb: float
    registers: int
    shared_kb: int
    threads: int
    blocks: int
    pdl: bool
    clusters: bool

    def resident(self, registers: int, shared: int, threads: int) -> int:
        """Blocks of a kernel that one multiprocessor holds at once; a warp's registers are given out by 256."""
        warps = -(-threads // 32)
        by_registers = self.registers // (-(-registers * 32 // 256) * 256 * warps) if registers else self.blocks
        by_shared = self.shared_kb * 1024 // (shared + 1024)  # 1 KB of each block is the system's
        return max(1, min(by_registers, by_shared, self.threads // (32 * warps), self.blocks))

    def dram_us(self, nbytes: float) -> float:
        """Microseconds of so many bytes at the published bandwidth."""
        return nbytes / self.dram_gb_s / 1e3

    def clock_us(self, clocks: float) -> float:
        return clocks / self.clock_ghz / 1e3


class Constants(NamedTuple):
    """Values by name, as in gpu_machines.json, and where each comes from."""

    values: Mapping[str, float]
    sources: Mapping[str, str]
    units: Mapping[str, str]

    def theta(self) -> dict[str, float]:
        """What a Time is multiplied with."""
        shares = {term: 1 / math.prod(self.values[name] for name in names) for term, names in SHARES.items()}
        return shares | {name: self.values[name] for name in TERMS}

    def us(self, time: Mapping[str, float]) -> float:
        """Microseconds."""
        theta = self.theta()
        return sum(theta[term] * amount for term, amount in time.items())

    def replaced(self, theta: Mapping[str, float], source: str) -> Constants:
        """With these terms instead."""
        values = dict(self.values)
        values |= {name: theta[name] for name in TERMS if name in theta}
        for term, (first, *rest) in SHARES.items():
            if term in theta:
                values[rest[0] if rest else first] = 1 / theta[term] / (values[first] if rest else 1.0)
        changed = {name for name in values if values[name] != self.values[name]}
        return self._replace(values=values, sources={n: source if n in changed else s for n, s in self.sources.items()})


def machines(path: Path = MACHINES) -> dict[str, Machine]:
    """Every GPU of the file, by name."""
    found = json.loads(path.read_text())["machines"]
    return {name: Machine(name, *(facts[field] for field in Machine._fields[1:])) for name, facts in found.items()}


def constants(path: Path = MACHINES) -> Constants:
    """The constants of the file."""
    found = json.loads(path.read_text())["constants"]
    pick = lambda key: {name: entry[key] for name, entry in found.items()}
    return Constants(pick("value"), pick("source"), pick("unit"))


def machine_of(name: str) -> Machine | None:
    """The machine whose name stands in what the driver calls a device, such as "NVIDIA H200"."""
    return next((m for m in machines().values() if m.name.lower() in name.lower()), None)
