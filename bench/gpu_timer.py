"""The clocks of the GPU benchmarks: all that needs a GPU stands in ``CudaTimer``; ``HostTimer`` is its twin for dry runs.

Both repeat calls, time such a run, list what a call launches and find the memory that it takes. Everything else of the suite runs
on either, so a dry run executes the very lines that a GPU run does, but for those of ``CudaTimer``.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]


def _loop(calls: Sequence[Call], count: int) -> Call:
    turns = [calls[i % len(calls)] for i in range(count)]

    def run() -> None:
        for call in turns:
            call()

    return run


class HostTimer:
    """Wall-clock times on the CPU, which say nothing about a GPU."""

    device = torch.device("cpu")
    cold_bytes = 1 << 13  # inputs are rotated over at least so much
    calls, many, rounds = 2, 4, 1  # calls in a run at least, calls in a run of short ones, runs at least

    def __init__(self) -> None:
        self.name = "dry"
        self.facts: dict[str, Any] = {"name": "none: a dry run on the CPU"}

    def synchronize(self) -> None:
        """Wait for all that was launched."""

    def graph(self, calls: Sequence[Call], count: int) -> Call:
        """``count`` calls, taken in turns, as something to replay."""
        return self.eager(calls, count)

    def eager(self, calls: Sequence[Call], count: int) -> Call:
        """The same calls, launched one by one."""
        for call in calls:
            call()
        return _loop(calls, count)

    def device_seconds(self, run: Call) -> float:
        """How long the device works on a run."""
        return harness.timed(run)

    def wall_seconds(self, run: Call) -> float:
        """From the start of a run until its last result is there."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def host_seconds(self, run: Call) -> float:
        """How long the host is busy with a run, whatever the device does."""
        self.synchronize()
        seconds = harness.timed(run)
        self.synchronize()
        return seconds

    def launches(self, call: Call) -> list[str]:
        """What one call launches: kernels, copies, fills."""
        call()
        self.synchronize()
        with profile(activities=self._activities()) as found:
            call()
            self.synchronize()
        return [event.name for event in found.events() if self._launched(event)]

    def extra_bytes(self, call: Call) -> int:
        """Device memory at the peak of a call, beyond what was there before and what it returns. Dry: none."""
        call()
        return 0

    def free_bytes(self) -> float:
        """Memory that can still be had."""
        return harness.available_memory()

    def _activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU]

    def _launched(self, event: Any) -> bool:
        return event.name.startswith("aten::") and event.cpu_parent is None


class CudaTimer(HostTimer):
    """GPU time of captured graphs by events, launches by the profiler, memory by the allocator."""

    device = torch.device("cuda", 0)
    calls, many, rounds = 20, 100, 9

    def __init__(self) -> None:
        torch.cuda.set_device(self.device)
        found = torch.cuda.get_device_properties(self.device)
        self.name = re.sub(r"[^a-z0-9]+", "-", found.name.lower()).strip("-")
        self.facts = {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
            "memory_bytes": found.total_memory,
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            "driver_and_clocks": _nvidia_smi(),
        }
        self.cold_bytes = max(180_000_000, 3 * found.L2_cache_size)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def graph(self, calls: Sequence[Call], count: int) -> Call:
        # The calls before a capture compile kernels and put tables on the device.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in (*calls, calls[0]):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            _loop(calls, count)()
        return captured.replay

    def device_seconds(self, run: Call) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        start.record()
        run()
        stop.record()
        self.synchronize()
        return start.elapsed_time(stop) * 1e-3

    def extra_bytes(self, call: Call) -> int:
        call()
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        self.synchronize()
        kept = torch.cuda.memory_allocated() - before
        del result
        return torch.cuda.max_memory_allocated() - before - kept

    def free_bytes(self) -> float:
        # What the allocator keeps without a tensor in it is given back before a large problem.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def _activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]

    def _launched(self, event: Any) -> bool:
        return event.device_type == torch.autograd.DeviceType.CUDA


def _nvidia_smi() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
