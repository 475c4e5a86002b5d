"""attention_score and key_norm_score beside one reading of the keys, and beside eager PyTorch: ``bench/run.py --suite attention``.

The keys fill four last-level caches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy
import torch
from harness import ALL_CORES, LLC
from targets import Call, Target, Unavailable, fastest
from verify import WrongResult

import v2drop_kernels as vk
from v2drop_kernels import reference
from v2drop_kernels.backends import choice


class Case(NamedTuple):
    """One query, that of the last row, over cached keys ``[batch, kv_heads, rows, 128]``."""

    heads: int
    kv_heads: int
    rows: int
    dtype: torch.dtype
    batch: int = 1
    dim: int = 128

    @property
    def input_bytes(self) -> int:
        return self.batch * self.kv_heads * self.rows * self.dim * self.dtype.itemsize

    def __str__(self) -> str:
        return f"B{self.batch}-H{self.heads}-Hkv{self.kv_heads}-S{self.rows}-Dh{self.dim}-{str(self.dtype).removeprefix('torch.')}"


def cases(dry: bool) -> Iterator[Case]:
    for heads, kv_heads in ((32, 8), (32, 32), (28, 4)):
        for dtype in (torch.bfloat16, torch.float32):
            row_bytes = kv_heads * 128 * dtype.itemsize
            yield Case(heads, kv_heads, 33 if dry else -(-4 * LLC // row_bytes // 1024) * 1024, dtype)


def targets(dry: bool = False) -> Iterator[Target[Case]]:
    """The targets of the one-query case, asserted for groups of four heads and, beside the reading, for none: there eager PyTorch
    repeats no keys and reads them once, too. The rest is reported."""
    for case in cases(dry):
        for threads in (1, ALL_CORES) if ALL_CORES > 1 else (1,):
            read = 1.25 if case.kv_heads in (8, 32) else None
            eager = 3.0 if case.kv_heads == 8 else None
            yield Target("attention_score against reading the keys once", "attention", case, read, "at most", _read, threads)
            yield Target("attention_score over repeat_kv and softmax", "attention", case, eager, "at least", _eager, threads)
            yield Target("key_norm_score against reading the keys once", "norm", case, None, "at most", _read, threads)


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(case.batch, case.heads, 1, case.dim, generator=g).to(case.dtype)
    block = torch.randn(case.batch, case.kv_heads, min(1009, case.rows), case.dim, generator=g).to(case.dtype)
    return q, block[:, :, torch.arange(case.rows) % block.shape[2]].contiguous()


def _repeat_kv(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """As transformers computes attention weights when it is asked for them, of one query; then their mean over heads."""
    b, h_kv, s, d = k.shape
    k = k[:, :, None].expand(b, h_kv, q.shape[1] // h_kv, s, d).reshape(b, q.shape[1], s, d)
    return (q @ k.transpose(2, 3) * d**-0.5).softmax(-1, dtype=torch.float32).mean(1)[:, 0]


def _ours(target: Target[Case]) -> Call:
    q, k = _inputs(target.case)
    if why := choice.why_not("cpu", "cpu", k.dtype):
        raise Unavailable(f"native: {why}")
    if target.op == "norm":
        call, want = functools.partial(vk.key_norm_score, k, norm="l2", backend="cpu"), reference.key_norm(k, "l2")
    else:
        call, want = functools.partial(vk.attention_score, q, k, backend="cpu"), reference.attention_score(q, k)
    for got in (call(), call()):  # the second call finds memory that has been used
        _same(got, want, 1e-4, "native")
    return call


def _same(got: torch.Tensor, want: torch.Tensor, relative: float, name: str) -> None:
    """``relative``: float32 sums of 128 products in another order move a logit, and so its exponential, by some 1e-5."""
    off = ((got - want).abs() / want).max().item()
    if not off <= relative:
        raise WrongResult(f"{name}: scores are off by {off:.1e}")


def _read(target: Target[Case]) -> tuple[str, Call, str, Call]:
    ours, flat = _ours(target), _inputs(target.case)[1].view(-1)
    as_float, as_int = flat.view(torch.float32), flat.view(torch.int64)
    candidates: dict[str, Call] = {"torch.sum float32": as_float.sum, "torch.sum int64": as_int.sum}
    if target.threads == 1:  # numpy has one thread
        candidates["numpy.sum int64"] = functools.partial(numpy.add.reduce, as_int.numpy())
    return "native", ours, *fastest(candidates)


def _eager(target: Target[Case]) -> tuple[str, Call, str, Call]:
    q, k = _inputs(target.case)
    # It rounds logits to the dtype of the keys: 2^-9 of a logit of up to 5 or so.
    _same(_repeat_kv(q, k), reference.attention_score(q, k), 1e-4 if k.dtype == torch.float32 else 0.05, "eager")
    return "native", _ours(target), "eager", functools.partial(_repeat_kv, q, k)
