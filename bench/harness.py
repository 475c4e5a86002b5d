"""How time is taken: the allocator, the machine line, the noise gate and interleaved minima.

A measurement on a shared machine is believed only when a fixed loop beside it ran at its best speed just before and just
after; then the minima of two interleaved calls are compared. Imported before torch by every entry point of this folder.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its worker processes would run beside what is measured

import numpy
import provenance
import torch

import v2drop_kernels as vk

ROOT = Path(__file__).resolve().parent.parent
PAUSE = 0.01  # seconds; the threads of libgomp look for work for some milliseconds
ALL_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def recycle_memory() -> str:
    """Keep freed memory in the process, and say what holds from now on.

    glibc maps and unmaps every large temporary. A fresh page costs more than the arithmetic on it (first writes ran at 5 to
    8 GB/s on a Zen 5 server), so eager PyTorch would be measured by its page faults. Afterwards only the first call of
    anything meets fresh pages.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return "the C library's own (large temporaries may page-fault on every call)"
    m_trim_threshold, m_mmap_max = -1, -4
    if not (libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, 2**31 - 1)):
        return "glibc's own (mallopt was refused; large temporaries may page-fault on every call)"
    return "glibc, told to keep freed pages (M_MMAP_MAX=0), so no provider pays page faults"


def release_memory() -> None:
    """Give the pages that were kept for one measurement back before the next, so that the largest one sets the peak."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def available_memory() -> float:
    """Bytes that can be had without swapping; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), float("inf"))


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core sees; 32 MiB where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes, default=32 << 20)


LLC = last_level_cache()


def machine() -> str:
    """The machine in words: processor, cores, memory, last-level cache."""
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}; {ALL_CORES} cores; {ram:.0f} GiB RAM; {LLC / 2**20:.0f} MiB last-level cache"


def versions() -> str:
    """What was measured, in versions."""
    return (
        f"v2drop_kernels {vk.__version__}; torch {torch.__version__}; numpy {numpy.__version__}; python {platform.python_version()}"
    )


def isa() -> str:
    """The instruction set of the C++ backend, or why there is none."""
    from v2drop_kernels import native

    served, reason = native.available()
    return native.isa() if served else reason.split(":")[0]


def conditions(run: str, native: bool = True) -> dict[str, str]:
    """The columns that every row of every CSV ends with. ``run`` is full, ungated (noise was let pass) or dry.

    ``native=False`` leaves the native library alone, which may still be being built, and the column ``isa`` empty.
    """
    return {
        "run": run,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": provenance.commit(),
        "isa": isa() if native else "",
        "machine": machine(),
        "versions": versions(),
    }


T = TypeVar("T")
CONDITIONS = ("run", "date", "commit", "isa", "machine", "versions")


def touch(*tensors: torch.Tensor) -> None:
    """Write every page once."""
    for t in tensors:
        t.zero_()


def timed(fn: Callable[[], Any]) -> float:
    """Seconds of one call; its result is freed inside the clock, as its caller would."""
    start = time.perf_counter_ns()
    fn()
    return (time.perf_counter_ns() - start) * 1e-9


class Sample(NamedTuple):
    """One run of the gate's loop: seconds of its two halves, when, and the CPU seconds of the machine and of this process."""

    cache: float
    dram: float
    at: float
    machine: float
    process: float


def _busy() -> float:
    """CPU seconds that all processes have used, and that the hypervisor gave to others; 0 where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, interrupts, soft_interrupts, steal = map(int, fields)
    return (user + nice + system + interrupts + soft_interrupts + steal) / os.sysconf("SC_CLK_TCK")


DRY_GATE = {"copied": 1 << 16, "seconds": 0.0002}  # of a dry run, which measures nothing


class NoiseGate:
    """A fixed loop of about 20 ms, half arithmetic in cache and half copies in DRAM, as a witness of quiet.

    Quiet is what lies between two samples in which either half missed the best that it ever reached in this process by at most
    ``tolerance``. Steady noise would raise that best as well, so other processes may not use more than this share of a core.
    """

    def __init__(self, tolerance: float = 0.10, copied: int = 0, seconds: float = 0.010) -> None:
        """``copied`` bytes are copied at a time (0: twice the last-level cache); each half of the loop takes ``seconds``."""
        self.tolerance = tolerance
        self._square = torch.ones(256, 256)
        elements = (copied or min(2 * LLC, 128 << 20)) // 4
        self._from, self._to = torch.ones(elements), torch.ones(elements)
        self._loops = (1, 1)
        self.best = (float("inf"), float("inf"))
        for _ in range(5):
            self.sample()
        self._loops = (max(1, round(seconds / self.best[0])), max(1, round(seconds / self.best[1])))
        self.best = (float("inf"), float("inf"))
        for _ in range(10):
            self.sample()

    def sample(self) -> Sample:
        """Run the loop once."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            first = time.perf_counter()
            for _ in range(self._loops[0]):
                torch.mm(self._square, self._square)
            second = time.perf_counter()
            for _ in range(self._loops[1]):
                self._to.copy_(self._from)
            third = time.perf_counter()
        finally:
            torch.set_num_threads(threads)
        own = os.times()
        process = own.user + own.system + own.children_user + own.children_system
        found = Sample(second - first, third - second, third, _busy(), process)
        self.best = (min(self.best[0], found.cache), min(self.best[1], found.dram))
        return found

    def fast(self, sample: Sample, in_cache: bool = False) -> bool:
        """Whether the loop ran near its best, as far as that is known by now; what works in cache is no concern of DRAM's."""
        within = 1 + self.tolerance
        return sample.cache <= self.best[0] * within and (in_cache or sample.dram <= self.best[1] * within)

    def quiet(self, before: Sample, after: Sample, in_cache: bool = False) -> bool:
        """Whether to believe what was measured between two samples."""
        others = (after.machine - before.machine) - (after.process - before.process)
        # The kernel counts in hundredths of a second, for each core apart.
        alone = others <= self.tolerance * (after.at - before.at) + 0.02 * ALL_CORES
        return self.fast(before, in_cache) and self.fast(after, in_cache) and alone

    def settle(self, seconds: float) -> Sample:
        """A sample at full speed, or the last one after so many seconds."""
        end = time.monotonic() + seconds
        while True:
            found = self.sample()
            if self.fast(found) or time.monotonic() >= end:
                return found
            time.sleep(0.2)


def interleaved(
    calls: Sequence[Callable[[], Any]], repetitions: int = 50, seconds: float = 2.0, burst: int = 1
) -> list[list[float]]:
    """Seconds of every call, taken in turns (the order reversed every other turn) until both minimums are reached.

    A turn is one call, or a ``burst`` of several after a pause: the threads of the side before have gone to sleep by then, and
    those of this one have not between its calls.
    """
    for fn in calls:
        fn()
        fn()
    times: list[list[float]] = [[] for _ in calls]
    turns = list(range(len(calls)))
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.monotonic() + seconds
        while len(times[0]) < repetitions or time.monotonic() < end:
            for i in turns:
                if burst > 1:
                    time.sleep(PAUSE)
                times[i] += [timed(calls[i]) for _ in range(burst)]
            turns.reverse()
    finally:
        if collecting:
            gc.enable()
    return times


def quantile(times: Sequence[float], q: float) -> float:
    """The value below which a share ``q`` of the times lies."""
    return float(numpy.quantile(numpy.asarray(times), q))


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, with a progress bar where both outputs are a terminal and rich is installed."""
    items = list(items)
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        yield from items
        return
    console = Console(stderr=True)
    # While the bar is shown, rich sends what is printed to its console: a redirected output would lose it.
    shown = console.is_terminal and sys.stdout.isatty()
    yield from track(items, description=what, console=console, disable=not shown, transient=True)
