"""Strategies: tensors of every dtype, content and memory layout, and batches with every way to say what may be dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import v2drop_kernels as vk

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CONTENTS = ("normal", "ties", "special", "constant", "wide")
SPECIAL = (0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 6e-8, 65504.0, 3e38)


def dtypes(backend: str) -> Any:
    """The floating point dtypes of a backend: only the reference takes float64."""
    return st.sampled_from((*FLOATS, torch.float64) if backend == "reference" else FLOATS)


def numbers(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, contents: tuple[str, ...] = CONTENTS) -> torch.Tensor:
    """Contiguous numbers of the dtype."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="content seed"))
    content = draw(st.sampled_from(contents), label="content")
    if content == "normal":
        x = rng.standard_normal(shape)
    elif content == "ties":
        x = rng.integers(-2, 3, shape) * rng.choice([1.0, -1.0], shape)
    elif content == "special":
        x = rng.choice(SPECIAL, shape)
    elif content == "wide":
        x = rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 5, shape)
    else:
        x = np.full(shape, rng.standard_normal())
    return torch.from_numpy(np.asarray(x, dtype=np.float64)).to(dtype)


LAYOUTS = ("contiguous", "inside", "transposed", "stepped", "shifted", "negative")


def laid_out(draw: Any, x: torch.Tensor) -> torch.Tensor:
    """The same values in another memory layout."""
    layout = draw(st.sampled_from(LAYOUTS), label="layout")
    if x.dim() == 0 or layout == "contiguous":
        return x
    if layout == "inside":  # a slice of larger rows
        whole = torch.zeros([n + 3 for n in x.shape], dtype=x.dtype)
        part = whole[tuple(slice(1, 1 + n) for n in x.shape)]
        return part.copy_(x)
    if layout == "transposed":
        axes = draw(st.permutations(range(x.dim())), label="axes")
        back = [axes.index(i) for i in range(x.dim())]
        return x.permute(axes).contiguous().permute(back)
    if layout == "stepped":
        whole = torch.zeros([*x.shape[:-1], 2 * x.shape[-1]], dtype=x.dtype)
        return whole[..., ::2].copy_(x)
    if layout == "negative" and x.is_floating_point():
        return torch._neg_view(-x)
    offset = draw(st.integers(1, 5), label="offset")
    whole = torch.zeros(x.numel() + offset, dtype=x.dtype)
    return whole[offset:].view(x.shape).copy_(x)


def as_numpy(x: torch.Tensor) -> np.ndarray:
    """The values; bfloat16 as float32."""
    x = x.detach().resolve_neg().resolve_conj()
    return (x.float() if x.dtype == torch.bfloat16 else x).contiguous().numpy()


@dataclass
class Batch:
    """Items, their real rows and segments (rows along ``N``, or along ``T`` when packed), and the arguments that say so."""

    packed: bool
    rows: int  # N or T
    real: list[list[int]]
    segments: list[list[list[int]]]
    side: str
    droppable: Any
    cu_seqlens: Any
    k: Any
    ks: list[int]

    @property
    def items(self) -> int:
        return len(self.real)

    @property
    def flat(self) -> list[tuple[int, list[int]]]:
        """Every segment with its item."""
        return [(i, rows) for i, item in enumerate(self.segments) for rows in item]

    def kept(self, scores: np.ndarray) -> list[list[int]]:
        """The rows of every item that survive a drop by ``scores [B, N]`` or ``[T]``."""
        from oracles import best

        found, left = [], iter(self.ks)
        for i in range(self.items):
            mine = scores if self.packed else scores[i]
            competing = {r for rows in self.segments[i] for r in rows}
            survivors = {r for rows in self.segments[i] for r in best(mine, rows, next(left))}
            found.append([r for r in self.real[i] if r not in competing or r in survivors])
        return found


def _spans(draw: Any, n: int) -> list[tuple[int, int]]:
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=6, unique=True), label="cuts"))
    return list(zip(cuts[::2], cuts[1::2], strict=False))


@st.composite
def batches(draw: Any, *, most: int = 40, segments_only: bool = False) -> Batch:
    """A batch; ``segments_only`` leaves out what only drops understand (padding)."""
    packed = draw(st.booleans(), label="packed")
    items = draw(st.integers(1, 4), label="items")
    lengths = [draw(st.integers(0, most), label="length") for _ in range(items)]
    n = max(*lengths, draw(st.integers(0, most), label="N")) if items > 1 else max(lengths[0], 0)
    form = draw(st.sampled_from(["all", "pair", "spans", "mask", "layout", "mask layout"]), label="droppable")
    side = draw(st.sampled_from(["right", "left"]), label="side")
    padded = form in ("layout", "mask layout") and not packed
    if not packed and not padded:
        lengths = [n] * items
    first = [0] * items
    if packed:
        first = [sum(lengths[:i]) for i in range(items)]
        side = "right"
    elif padded and side == "left":
        first = [n - length for length in lengths]
    elif not padded:
        side = "right"
    real = [list(range(a, a + length)) for a, length in zip(first, lengths, strict=True)]
    cu: Any = [0, *np.cumsum(lengths).tolist()] if packed else None
    rows = sum(lengths) if packed else n
    if packed and draw(st.booleans(), label="cu tensor"):
        cu = torch.tensor(cu, dtype=torch.int32)
    droppable: Any = None
    if form == "all":
        segments = [[list(r)] for r in real]
    elif form == "pair":
        least = min(lengths)
        a = draw(st.integers(0, least), label="start")
        b = draw(st.integers(a, least), label="stop")
        droppable, segments = (a, b), [[r[a:b]] for r in real]
    elif form in ("spans", "layout"):
        spans = [_spans(draw, length) for length in lengths]
        segments = [[r[a:b] for a, b in item] for r, item in zip(real, spans, strict=True)]
        if form == "spans":
            droppable = spans
        elif packed:
            droppable = vk.TokenLayout.packed(spans, cu)
        else:
            at = [[(a + f, b + f) for a, b in item] for item, f in zip(spans, first, strict=True)]
            droppable = vk.TokenLayout.padded(at, n, lengths=lengths, padding_side=side)
    else:
        rng = np.random.default_rng(draw(st.integers(0, 2**16), label="mask seed"))
        segments = [[[row for row in r if rng.random() < 0.6]] for r in real]
        mask = torch.zeros((rows,) if packed else (items, n), dtype=torch.bool)
        for i, (chosen,) in enumerate(segments):
            (mask if packed else mask[i])[chosen] = True
        droppable = mask
        if form == "mask layout":
            counts = [len(chosen) for (chosen,) in segments] if draw(st.booleans(), label="counts") else None
            given = {"cu_seqlens": cu} if packed else {"lengths": lengths, "padding_side": side}
            droppable = vk.TokenLayout.from_mask(mask, counts, **given)
    if packed and form in ("layout", "mask layout"):
        cu = None  # the layout holds the offsets
    total = sum(len(item) for item in segments)
    if draw(st.booleans(), label="one k"):
        k: Any = draw(st.integers(0, most + 3), label="k")
        ks = [k] * total
    else:
        ks = [draw(st.integers(0, most + 3), label="k") for _ in range(total)]
        k = torch.tensor(ks) if ks and draw(st.booleans(), label="k tensor") else ks
    return Batch(packed, rows, real, segments, side, droppable, cu, k, ks)
