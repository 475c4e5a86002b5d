"""Candidates: this package's backends, and the copies, reads and PyTorch code that they are compared with.

Baselines are named by what they do; where a target names several, the fastest one counts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from gpu_checks import same
from gpu_inputs import FP32, bind
from gpu_timer import Call, HostTimer
from registry import Case, Inputs

import v2drop_kernels as vk
from v2drop_kernels.backends import choice
from v2drop_kernels.backends.native import launch_mode

LAUNCH_MODES = ("cooperative", "fused", "separate")
TEAM_MODES = ("one_block", "cluster", "grid")  # who selects from more rows
LAUNCH_MODE_ROWS = 2048  # kFusedSelect of csrc/core/tuning_cuda.h


class Candidate(NamedTuple):
    """One side of a comparison. ``check`` says what is wrong with a result; None: it computes nothing that could be."""

    name: str
    calls: Sequence[Call] = ()
    check: Callable[[Any], str | None] | None = None
    captured: bool = True  # False: it brings a graph of its own, so its calls are launched one by one
    missing: str | None = None

    @property
    def backend(self) -> str:
        """The backend whose tests must be green; "" for others than ours."""
        first = self.name.split("@")[0].split("-")[0]
        return first if first in ("triton", "cuda", "reference") else ""


def own(case: Case, timer: HostTimer, launch_modes: bool = False) -> Iterator[tuple[str, str, Callable[[], Any], str | None]]:
    """(name, backend, context of a call, why it is missing) of this package's own candidates."""
    for backend in own_backends(timer):
        why = choice.why_not(backend, timer.device.type, case.dtype)
        yield backend, backend, contextlib.nullcontext, why
        if launch_modes and backend == "cuda":
            for mode in LAUNCH_MODES if case.n <= LAUNCH_MODE_ROWS else TEAM_MODES:
                yield f"cuda-{mode}", "cuda", functools.partial(launch_mode, mode), why


class OwnBackends:
    """The backends of this package that are judged, without those in ``pending``, whose library is still being built."""

    def __init__(self) -> None:
        self.pending: set[str] = set()

    def __call__(self, timer: HostTimer) -> tuple[str, ...]:
        """Without a GPU the reference stands in for them, beside Triton's interpreter and an emulated library."""
        names = ("triton", "cuda") if timer.device.type == "cuda" else ("reference", "triton", "cuda")
        return tuple(name for name in names if name not in self.pending)


own_backends = OwnBackends()


def ours(
    case: Case, timer: HostTimer, xs: Sequence[Any], fn: Callable[[str, Any], Any], check: Callable[[Any], str | None],
    suffix: str = "", launch_modes: bool = False,
) -> list[Candidate]:  # fmt: skip
    """This package's candidates for ``fn(backend, inputs)``."""

    def call(backend: str, context: Callable[[], Any], x: Any) -> Any:
        with context():
            return fn(backend, x)

    def plain(backend: str, x: Any) -> Any:  # eager times are the user's: without a context around the call
        return fn(backend, x)

    made = []
    for name, backend, context, why in own(case, timer, launch_modes):
        run = functools.partial(plain, backend) if name == backend else functools.partial(call, backend, context)
        made.append(Candidate(name + suffix, bind(run, xs), check, missing=why))
    return made


def copies(timer: HostTimer, size: int, count: int, name: str = "copy") -> list[Candidate]:
    """Copies that read and write ``size`` bytes together, by the driver's copy and by an elementwise kernel."""
    words = max(size // 8, 1)
    sources = [torch.randint(-1000, 1000, (words,), dtype=torch.int32, device=timer.device) for _ in range(count)]
    target = torch.empty_like(sources[0])
    check = same(sources[0], "copied words")
    plain = [functools.partial(target.copy_, s) for s in sources]
    kernel = [functools.partial(torch.bitwise_or, s, 0, out=target) for s in sources]
    return [Candidate(name, plain, check), Candidate(f"{name}-kernel", kernel, check)]


def one_block(timer: HostTimer) -> Candidate:
    """A kernel of one thread block that copies 1 KB: what a launch costs in a graph."""
    source = torch.randn(256, device=timer.device)
    target = torch.empty_like(source)
    return Candidate("one-block", [functools.partial(torch.mul, source, 1.0, out=target)], same(source, "copied floats"))


def reads(xs: Sequence[Sequence[torch.Tensor]]) -> list[Candidate]:
    """Reductions that read all tensors of an ``x`` and write next to nothing."""
    sets = [[t.view(-1).view(FP32) for t in x] for x in xs]
    makers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "read-sum": torch.sum, "read-norm": torch.linalg.vector_norm, "read-max": torch.amax,
    }  # fmt: skip

    def call(reduce: Callable[[torch.Tensor], torch.Tensor], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [reduce(t) for t in tensors]

    return [Candidate(name, [functools.partial(call, fn, s) for s in sets]) for name, fn in makers.items()]


def eager_score(x: Inputs) -> torch.Tensor:
    """Views only, in the type of the input: reads both, writes and reads the difference."""
    return torch.linalg.vector_norm(x.h_cur - x.h_prev, dim=-1, dtype=FP32)


def eager_select(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


def eager_gather(h: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    b, n, d = h.shape
    rows = keep if b == 1 else keep + torch.arange(0, b * n, n, device=h.device)[:, None]
    return h.view(b * n, d).index_select(0, rows.flatten()).view(b, -1, d)


def eager_drop(k: int, x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    keep = eager_select(eager_score(x), k)
    return keep, eager_gather(x.h_cur, keep)


def published_drop(k: int, tokens: torch.Tensor, x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """As V2Drop publishes it, item by item: copies both hidden states, subtracts and takes the norm in their type."""
    keeps = []
    for cur, prev in zip(x.h_cur, x.h_prev, strict=True):
        scores = torch.norm(cur[tokens] - prev[tokens], p=2, dim=-1)
        keeps.append(torch.cat([tokens[:0], tokens[scores.topk(k).indices], tokens[len(tokens) :]]).sort().values)
    return torch.stack(keeps), torch.stack([cur[keep] for cur, keep in zip(x.h_cur, keeps, strict=True)])


def run_drop(k: int, backend: str, x: Inputs, **given: Any) -> Any:
    out = vk.drop_tokens(x.h_prev, x.h_cur, k, backend=backend, **given)
    return out.keep, out.hidden, out.position_ids, out.kv


def flashinfer(case: Case, xs: Sequence[Inputs], check: Any) -> list[Candidate]:
    if importlib.util.find_spec("flashinfer") is None:
        return [Candidate("flashinfer+gather", missing="flashinfer is not installed")]

    def run(x: Inputs) -> Any:
        import flashinfer

        chosen = flashinfer.top_k(x.scores, case.k)[1].long()
        return chosen, eager_gather(x.h_cur, chosen)

    return [Candidate("flashinfer+gather", bind(run, xs), check)]


def peers(case: Case, scores: torch.Tensor, check: Any) -> list[Candidate]:
    """Top-k of jax and cupy on the same scores, where they are installed and see the device; never inside our graphs."""

    def jax_topk() -> Call:
        import jax

        operand = jax.dlpack.from_dlpack(scores)
        fn = jax.jit(lambda x: jax.lax.top_k(x, case.k)[1])
        return lambda: torch.from_dlpack(jax.block_until_ready(fn(operand))).long()

    def cupy_topk() -> Call:
        import cupy

        operand = cupy.from_dlpack(scores)
        return lambda: torch.from_dlpack(cupy.argpartition(operand, case.n - case.k, axis=-1)[..., case.n - case.k :]).long()

    made = []
    for name, build in (("jax.lax.top_k", jax_topk), ("cupy.argpartition", cupy_topk)):
        try:
            made.append(Candidate(name, [build()], check, captured=False))
        except Exception as error:  # whatever keeps another framework from this device is no fault of ours
            made.append(Candidate(name, missing=f"{type(error).__name__}: {str(error)[:100]}"))
    return made
