"""The constants of the latency model that only a GPU can tell: launches, edges, a grid barrier, bandwidths, what L2 gives back.

Kernels in Triton, timed as replays of a graph. On the CPU the same kernels run in the interpreter, without instructions that it
does not have and with a single program where programs wait for each other; its numbers mean nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from gpu_timer import HostTimer

MB = 1 << 20


def measure(timer: HostTimer) -> dict[str, dict[str, Any]]:
    """Name to value, unit and how it was found; a constant that cannot be had has no entry but a reason."""
    found: dict[str, dict[str, Any]] = {}
    for name, (unit, how, fn) in CONSTANTS.items():
        try:
            found[name] = {"value": fn(timer), "unit": unit, "how": how}
        except Exception as error:  # an old Triton or device lacks some of it
            found[name] = {"value": float("nan"), "unit": unit, "how": f"not measured: {type(error).__name__}: {str(error)[:120]}"}
    return found


def _best(timer: HostTimer, run: Any) -> float:
    run()
    return min(timer.device_seconds(run) for _ in range(timer.rounds))


def _chain(timer: HostTimer, edge: bool) -> float:
    """Microseconds per kernel of a chain in which each reads what the one before wrote."""
    from gpu_kernels import small

    x, y = torch.zeros(128, device=timer.device), torch.zeros(128, device=timer.device)
    on_gpu = timer.device.type == "cuda"
    options: dict[str, Any] = {"launch_pdl": True} if edge and on_gpu else {}
    count = 5 * timer.calls

    def link(a: torch.Tensor, b: torch.Tensor) -> None:
        small[(1,)](b, a, EDGE=edge and on_gpu, num_warps=4, **options)

    run = timer.graph([functools.partial(link, x, y), functools.partial(link, y, x)], count)
    return _best(timer, run) / count * 1e6


def _barrier(timer: HostTimer) -> float:
    """Microseconds of one barrier of all multiprocessors, one program on each: the slope over many in one cooperative launch."""
    from gpu_kernels import barriers

    on_gpu = timer.device.type == "cuda"
    programs = int(timer.facts["multiprocessors"]) if on_gpu else 1  # programs of the interpreter run one after the other
    options: dict[str, Any] = {"launch_cooperative_grid": True} if on_gpu else {}
    counter = torch.zeros(1, dtype=torch.int32, device=timer.device)

    def launch(rounds: int) -> None:
        counter.zero_()
        barriers[(programs,)](counter, programs, ROUNDS=rounds, num_warps=8, **options)

    few, many = 1, 33
    times = [_best(timer, timer.graph([functools.partial(launch, n)], timer.calls)) / timer.calls for n in (few, many)]
    return (times[1] - times[0]) / (many - few) * 1e6


def _size(timer: HostTimer, megabytes: int) -> int:
    return megabytes * MB if timer.device.type == "cuda" else megabytes << 7


def _read(timer: HostTimer, megabytes: int, turns: int) -> float:
    """GB/s of a reduction over ``turns`` buffers, one after the other."""
    size = _size(timer, megabytes)
    xs = [torch.randn(size // 4, device=timer.device) for _ in range(turns)]
    count = max(timer.calls, turns)
    return size * count / _best(timer, timer.graph([functools.partial(torch.amax, x) for x in xs], count)) / 1e9


def _copy(timer: HostTimer) -> float:
    """GB/s, read and written together, of a copy of 1 GB."""
    source = torch.randn(_size(timer, 1024) // 4, device=timer.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes * timer.calls / _best(timer, timer.graph([functools.partial(target.copy_, source)], timer.calls)) / 1e9


def _ramp(timer: HostTimer) -> float:
    """Microseconds that a kernel over 8 MB of cold memory takes beyond its bytes at full speed and the edge before it."""
    size = _size(timer, 8)
    sources = [torch.randn(size // 4, device=timer.device) for _ in range(min(-(-timer.cold_bytes // size), 64))]
    target = torch.empty_like(sources[0])
    count = max(timer.calls, len(sources))
    # Not the driver's copy, which may be no kernel at all.
    run = timer.graph([functools.partial(torch.neg, s, out=target) for s in sources], count)
    each = _best(timer, run) / count * 1e6
    return each - 2 * size / _copy(timer) / 1e3 - _chain(timer, False)


def _reuse(timer: HostTimer, megabytes: int) -> float:
    """How much faster a buffer is read again at once than after others."""
    others = max(2, -(-3 * timer.cold_bytes // (megabytes * MB)))
    return _read(timer, megabytes, 1) / _read(timer, megabytes, min(others, 32))


CONSTANTS: dict[str, tuple[str, str, Any]] = {
    "kernel, plain edge": ("us", "chain of kernels of one block in a graph, per kernel", lambda m: _chain(m, False)),
    "kernel, PDL edge": ("us", "the same with programmatic dependent launch", lambda m: _chain(m, True)),
    "grid barrier": ("us", "atomic counter, one block of 256 threads per multiprocessor, slope over 32", _barrier),
    "ramp": ("us", "a kernel over 8 MB of cold memory, less its bytes at copy bandwidth and a plain edge", _ramp),
    "read bandwidth": ("GB/s", "maximum of 1 GB", lambda m: _read(m, 1024, 1)),
    "copy bandwidth": ("GB/s", "copy of 1 GB, bytes read and written", _copy),
    **{
        f"L2 reuse at {size} MB": ("x", "bandwidth of reading a buffer again over reading it after others",
                                   functools.partial(_reuse, megabytes=size))
        for size in (16, 30, 45, 60)
    },
}  # fmt: skip
