"""The problems of the GPU check and their inputs, made on the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from gpu_timer import Call, HostTimer
from registry import Case, Inputs

from v2drop_kernels import reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


QUARTER = Fraction(1, 4)


IMAGE, IMAGES = Case(1, 576, 4096, QUARTER), Case(8, 576, 4096, QUARTER)


VIDEO, VIDEOS, LONG = Case(1, 6272, 3584, QUARTER), Case(8, 6272, 3584, QUARTER), Case(1, 65536, 4096, QUARTER)


def scaled(case: Case, timer: HostTimer, clustered: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal hidden states and a change whose size varies from token to token; clustered: large in runs of 32 tokens."""
    g = torch.Generator(timer.device).manual_seed(0)
    shape = (case.batch, case.n, case.d)
    size = torch.exp(0.5 * torch.randn(case.batch, case.n, 1, generator=g, device=timer.device)) * 0.1
    if clustered:
        runs = torch.randn(case.batch, -(-case.n // 32), 1, generator=g, device=timer.device)
        size *= 1 + 20 * torch.sigmoid(40 * runs).repeat_interleave(32, dim=1)[:, : case.n]
    h_prev = torch.empty(shape, dtype=case.dtype, device=timer.device)
    h_cur = torch.empty_like(h_prev)
    for b in range(case.batch):  # one item at a time: the float32 copies of all would be large
        h_prev[b] = torch.randn(shape[1:], generator=g, device=timer.device)
        h_cur[b] = h_prev[b].float() + size[b] * torch.randn(shape[1:], generator=g, device=timer.device)
    return h_prev, h_cur


def scored(case: Case, h_prev: torch.Tensor, h_cur: torch.Tensor) -> Inputs:
    scores = torch.cat([reference.variation_score(a[None], b[None]) for a, b in zip(h_prev, h_cur, strict=True)])
    return Inputs(h_prev, h_cur, scores, reference.segmented_topk(scores, case.k).indices)


def rotated(x: Inputs, timer: HostTimer, size: int) -> list[Inputs]:
    """Copies of the inputs, so that one turn over all of them reads more than the caches hold."""
    copies = min(-(-timer.cold_bytes // max(size, 1)), 64)
    return [x, *(Inputs(*(t.clone() for t in x)) for _ in range(copies - 1))]


def rotations(case: Case, timer: HostTimer) -> list[Inputs]:
    x = scored(case, *scaled(case, timer))
    return rotated(x, timer, case.input_bytes)


def bind(fn: Callable[..., Any], xs: Sequence[Any]) -> list[Call]:
    return [functools.partial(fn, x) for x in xs]


def tiny(case: Case) -> Case:
    """The same problem in a size for which an interpreter takes a moment; larger stays larger."""
    return Case(min(case.batch, 2), 16 + 8 * round(math.log2(case.n)) // 3, 32 if case.d > 1 else 1, case.ratio, case.dtype)
