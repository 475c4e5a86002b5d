"""What the CPU benchmarks measure: the ops, their cases and inputs, and the bytes that each op must move."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import torch
from harness import ALL_CORES, LLC

import v2drop_kernels as vk
from v2drop_kernels import reference

OPS = ("score", "select", "compact", "drop")


class Case(NamedTuple):
    """One problem: every token competes, ``k`` of ``n`` are kept per item, in bfloat16."""

    batch: int
    n: int
    d: int
    ratio: Fraction = Fraction(1, 3)
    dtype: torch.dtype = torch.bfloat16

    @property
    def k(self) -> int:
        return vk.n_keep(self.n, self.ratio)

    @property
    def row_bytes(self) -> int:
        return self.d * self.dtype.itemsize

    @property
    def input_bytes(self) -> int:
        return 2 * self.batch * self.n * self.row_bytes

    def __str__(self) -> str:
        return f"B{self.batch}-N{self.n}-D{self.d}-{str(self.dtype).removeprefix('torch.')}-k{self.k}"


# The shapes of a LLaVA image, a Qwen2-VL video and a long video; B=8 of the long video would not fit in 6 GB.
CASES = (Case(1, 576, 4096), Case(8, 576, 4096), Case(1, 6272, 3584), Case(8, 6272, 3584), Case(1, 65536, 4096))


DRY_CASES = (Case(1, 33, 64), Case(3, 17, 96))


def moved_bytes(op: str, case: Case) -> int:
    """Bytes that the op cannot avoid to move; the caches are not credited.

    With E bytes per element:
    score    2 B N D E read (both hidden states)             + 4 B N written (float32 scores)
    select   4 B N read                                      + 12 B k written (float32 values, int64 indices)
    compact  B k D E read, as much written                   + 8 B k read (the indices)
    drop     2 B N D E read, then B k D E read and written   + 8 B k written (the indices); scores stay in cache
    """
    b, n, k, row = case.batch, case.n, case.k, case.row_bytes
    return {
        "score": 2 * b * n * row + 4 * b * n,
        "select": 4 * b * n + 12 * b * k,
        "compact": 2 * b * k * row + 8 * b * k,
        "drop": 2 * b * n * row + 2 * b * k * row + 8 * b * k,
    }[op]


class Inputs(NamedTuple):
    """What the ops of a case are given; ``scores`` and ``keep`` are the reference's."""

    h_prev: torch.Tensor
    h_cur: torch.Tensor
    scores: torch.Tensor
    keep: torch.Tensor


class Expected(NamedTuple):
    """The reference's results, which ``verified`` compares with."""

    scores: torch.Tensor
    values: torch.Tensor
    keep: torch.Tensor
    hidden: torch.Tensor


@functools.lru_cache(maxsize=1)
def inputs_of(case: Case, seed: int = 0) -> tuple[Inputs, Expected]:
    """Normal hidden states and a change whose size varies from token to token, as a decoder layer's does."""
    g = torch.Generator().manual_seed(seed)
    block = torch.randn(min(257, case.batch * case.n), case.d, generator=g)
    tokens = case.batch * case.n
    size = torch.exp(0.5 * torch.randn(tokens, 1, generator=g)) * 0.1
    h_prev = torch.empty(tokens, case.d, dtype=case.dtype)
    h_cur = torch.empty_like(h_prev)
    for rows in torch.arange(tokens).split(4096):
        at = slice(int(rows[0]), int(rows[-1]) + 1)
        h_prev[at] = block[rows % len(block)].to(case.dtype)
        h_cur[at] = (h_prev[at].float() + size[at] * block[(rows * 3 + 1) % len(block)]).to(case.dtype)
    h_prev, h_cur = h_prev.view(case.batch, case.n, case.d), h_cur.view(case.batch, case.n, case.d)
    pieces = zip(h_prev.split(4096, dim=1), h_cur.split(4096, dim=1), strict=True)  # the float32 copies of all would be large
    scores = torch.cat([reference.variation_score(*piece) for piece in pieces], dim=1)
    values, keep = reference.segmented_topk(scores, case.k)
    hidden = reference.compact(keep, h_cur).hidden
    assert hidden is not None
    return Inputs(h_prev, h_cur, scores, keep), Expected(scores, values, keep, hidden)


def rotated(op: str, case: Case) -> list[Inputs]:
    """As many copies of the inputs as it takes for one turn of the op over all of them to move four last-level caches."""
    inputs, _ = inputs_of(case)
    copies = -(-4 * LLC // moved_bytes(op, case))
    return [inputs, *(Inputs(*(x.clone() for x in inputs)) for _ in range(copies - 1))]


def settings(op: str, case: Case) -> Iterator[tuple[int, str]]:
    """Threads and the state of the caches in which an op is measured.

    ``cold``: rotated inputs, so that they come from DRAM. ``warm``: the same inputs again and again, where they fit in half of
    the last-level cache; a selection always finds scores that were just written.
    """
    threads = [1, ALL_CORES] if op == "drop" and ALL_CORES > 1 else [1]
    for count in threads:
        if op != "select":
            yield count, "cold"
        if op == "select" or moved_bytes(op, case) <= LLC // 2:
            yield count, "warm"
