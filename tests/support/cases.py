"""The one list of inputs: every backend, in every process, is tested on these."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import zlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import v2drop_kernels as vk
from support.pairs import all_pairs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = "V2DROP_NATIVE_MODULE" in os.environ
FULL = os.environ.get("V2DROP_TEST_FULL") == "1" and not INTERPRETED

SIZES = [1, 3, 63, 576, 577, 1025]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# 1, 1, 2, 4, 8, 8 and 16 bytes per element.
COPIED = [torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float32, torch.int64, torch.float64, torch.complex128]
STRIDES = ["contiguous", "inner", "rows", "batch", "transposed"]
SCORES = ["random", "equal", "three", "special", "ascending", "descending"]
KS = ["0", "1", "n-1", "n", "n+5"]
ORDERS = ["position", "score"]
METRICS = ["l2", "l1", "cosine"]

_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
          torch.float8_e4m3fn: "fp8", torch.complex128: "c128"}  # fmt: skip


def _label(name: str, value: Any) -> str:
    if isinstance(value, torch.dtype):
        return _SHORT.get(value, str(value).removeprefix("torch."))
    if name in ("k", "N", "B", "D", "T"):
        return f"{name}{value}"
    return value if isinstance(value, str) else f"{name}_{value}" if isinstance(value, bool | int) else str(value)


def cross(rounds: int = 1, together: str = "", **axes: list[Any]) -> Any:
    """Parametrise over cases that hold every pair of values of any two axes.

    The axes named in ``together`` (by spaces) occur in every combination of their values: name three where a mistake would need all
    three. ``V2DROP_TEST_FULL=1`` takes the full product of all axes. The slow interpreter takes a few cases that hold every value
    ``rounds`` times.
    """
    values = list(axes.values())
    if FULL:
        combinations = list(itertools.product(*values))
    elif INTERPRETED:
        combinations = [
            tuple(x[(i + j * (i // len(x))) % len(x)] for j, x in enumerate(values)) for i in range(rounds * max(map(len, values)))
        ]
    else:
        combinations = all_pairs(values, [list(axes).index(name) for name in together.split()])
    params = [
        pytest.param(*c, id="-".join(_label(name, x) for name, x in zip(axes, c, strict=True))) for c in dict.fromkeys(combinations)
    ]
    return pytest.mark.parametrize(",".join(axes), params)


def fewer(full: list[Any], few: list[Any]) -> list[Any]:
    """``full``, or ``few`` where the interpreter takes seconds per case."""
    return few if INTERPRETED else full


# Of torch.compile: the interpreter and the emulator see the launches of one length as of all, and torch traces the same op.
DYNAMIC = [False] if INTERPRETED or EMULATED else [False, True]


def seeded(*key: Any) -> torch.Generator:
    """The same random numbers in every process."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def integers(shape: tuple[int, ...], dtype: torch.dtype, *key: Any, high: int = 8) -> torch.Tensor:
    """Integers in [-high, high]: sums of their squares are exact in float32 in any order, so scores are equal bit by
    bit."""
    return torch.randint(-high, high + 1, shape, generator=seeded(*key, shape)).to(dtype)


def hidden_pair(shape: tuple[int, ...], dtype: torch.dtype, *key: Any, device: str = "cpu") -> list[torch.Tensor]:
    """h_prev, h_cur with integer values; rows differ in few elements, so that scores tie often."""
    prev = integers(shape, dtype, *key, "prev")
    change = integers(shape, dtype, *key, "change", high=1) * (integers(shape, dtype, *key, "where", high=2) == 0)
    return [prev.to(device), (prev + change).to(device)]


def normal(shape: tuple[int, ...], dtype: torch.dtype, *key: Any) -> torch.Tensor:
    """Real values; scores of these agree between backends within rounding only."""
    return torch.randn(shape, generator=seeded(*key, shape)).to(dtype)


def scores(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Scores with the ties and the special values that a selection must order."""
    gen = seeded(kind, shape)
    if kind == "random":
        return torch.randn(shape, generator=gen).to(dtype)
    if kind == "equal":
        return torch.full(shape, 1.5, dtype=dtype)
    if kind == "three":
        return torch.randint(0, 3, shape, generator=gen).to(dtype)
    if kind == "special":
        values = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8])
        return values[torch.randint(0, len(values), shape, generator=gen)].to(dtype)
    n = torch.arange(shape[-1]).expand(shape) / max(shape[-1], 1)
    return (n if kind == "ascending" else -n).to(dtype)


def count(k: str, n: int) -> int:
    """The named count of a segment of n tokens."""
    return max({"0": 0, "1": 1, "n-1": n - 1, "n": n, "n+5": n + 5, "n/3": n // 3}[k], 0)


def random_bytes(shape: Any, dtype: torch.dtype, *key: Any) -> torch.Tensor:
    """Any bit pattern, NaN payloads included: a copy must not interpret them."""
    if dtype == torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=seeded(*key, shape)).bool()
    if 0 in shape:
        return torch.empty(tuple(shape), dtype=dtype)
    *outer, last = shape
    return torch.randint(0, 256, (*outer, last * dtype.itemsize), generator=seeded(*key, shape)).to(torch.uint8).view(dtype)


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The values of x in other memory: surrounded by garbage that a wrong stride would read."""
    if kind == "contiguous":
        return x.contiguous()
    if kind == "transposed":
        return x.transpose(0, min(1, x.dim() - 1)).contiguous().transpose(0, min(1, x.dim() - 1))
    index = [slice(None)] * x.dim()
    shape = list(x.shape)
    if kind == "inner":
        shape[-1], index[-1] = 2 * shape[-1], slice(None, None, 2)
    elif kind == "batch":
        shape[0], index[0] = 2 * shape[0], slice(1, None, 2)
    else:  # rows that begin at odd addresses, with a pitch
        row = min(1, x.dim() - 1)
        shape[row], index[row] = 3 * shape[row], slice(2, None, 3)
        if row != x.dim() - 1:
            shape[-1], index[-1] = shape[-1] + 5, slice(3, -2)
    out = random_bytes(shape, x.dtype, "garbage").to(x.device)[tuple(index)]
    out.copy_(x)
    return out


def same(got: Any, want: Any) -> None:
    """Equal: every byte of the data; structure, shape and dtype; +0.0 and -0.0, and any two NaN, are told apart too."""
    if isinstance(want, list | tuple):
        assert type(got) is type(want)
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            same(g, w)
    elif isinstance(want, torch.Tensor):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert torch.equal(_bytes(got), _bytes(want))
    else:
        assert got == want


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8)


def same_values(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal numbers: NaN payloads and the sign of zero may differ."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=0, atol=0, equal_nan=True)


def to(x: Any, device: str) -> Any:
    """Nested tensors on a device; strides stay."""
    if isinstance(x, list | tuple):
        return type(x)(to(y, device) for y in x)
    if isinstance(x, vk.TokenLayout) and x.mask is not None:
        return vk.TokenLayout(**{**vars(x), "mask": x.mask.to(device)})
    return x.to(device) if isinstance(x, torch.Tensor) else x


@contextlib.contextmanager
def untouched_memory():
    """``vast`` tensors only: reading them gives zeros, and pages that are not touched cost nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def vast(numel: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor with gigabytes of addresses; on the CPU, of zero pages that take no memory until they are touched."""
    if device != "cpu":
        with untouched_memory():
            return torch.empty(numel, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch: the arguments that describe it, and the same facts spelt out for the oracle.

    ``real`` and ``segments`` hold rows (along N, or along T when packed); ``segments`` per item.
    """

    name: str
    batch: int
    rows: int
    droppable: Any
    real: list[range]
    segments: list[list[list[int]]]
    cu_seqlens: Any = None
    side: str = "right"

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None or getattr(self.droppable, "is_packed", False)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dimensions of its tensors."""
        return (self.rows,) if self.packed else (self.batch, self.rows)

    @property
    def flat(self) -> list[list[int]]:
        return [s for item in self.segments for s in item]

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        found = {"droppable": to(self.droppable, device)}
        return found if self.cu_seqlens is None else {**found, "cu_seqlens": to(self.cu_seqlens, device)}

    def spans(self, device: str = "cpu") -> dict[str, Any]:
        """``arguments`` that say which tokens compete even where all do."""
        found = self.arguments(device)
        return {"droppable": (0, self.rows)} if not self.packed and self.droppable is None else found

    def k(self, kind: str) -> Any:
        """A count named relative to the largest segment, or one per segment as a list or a tensor."""
        sizes = [len(s) for s in self.flat]
        if kind not in ("list", "tensor"):
            return count(kind, max(sizes, default=0))
        ks = [(n // 2, 0, n, n + 3, 1)[i % 5] for i, n in enumerate(sizes)]
        return ks if kind == "list" else torch.tensor(ks, dtype=torch.int64)

    def ks(self, kind: str) -> list[int]:
        k = self.k(kind)
        return [k] * len(self.flat) if isinstance(k, int) else list(map(int, k))

    def __str__(self) -> str:
        return self.name


def _padded(name: str, n: int, spans: list[list[tuple[int, int]]], droppable: Any = None, **kw: Any) -> Batch:
    lengths, side = kw.get("lengths"), kw.get("padding_side", "right")
    batch = len(spans)
    real = [range(n)] * batch
    if lengths is not None:
        real = [range(n - m, n) if side == "left" else range(m) for m in lengths]
        droppable = vk.TokenLayout.padded(spans, n, lengths=lengths, padding_side=side)
    segments = [[list(range(a, b)) for a, b in item] for item in spans]
    return Batch(name, batch, n, droppable, real, segments, side=side)


def _masked(name: str, n: int, batch: int, *, layout: bool = False, lengths: Any = None, side: str = "right") -> Batch:
    mask = torch.rand(batch, n, generator=seeded(name)) < 0.6
    real = [range(n)] * batch
    if lengths is not None:
        real = [range(n - m, n) if side == "left" else range(m) for m in lengths]
    for i in range(batch):
        mask[i, [j for j in range(n) if j not in real[i]]] = False
    mask[-1] = False  # a text-only item
    segments = [[mask[i].nonzero().flatten().tolist()] for i in range(batch)]
    droppable = mask
    if layout:
        counts = mask.sum(1).tolist()
        droppable = vk.TokenLayout.from_mask(strided(mask, "rows"), counts, lengths=lengths, padding_side=side)
    return Batch(name, batch, n, droppable, real, segments, side=side)


def _packed(name: str, cu: list[int], spans: Any = None, *, tensor: bool = False, layout: bool = False) -> Batch:
    per_item = [[(0, b - a)] for a, b in itertools.pairwise(cu)] if spans is None else spans
    segments = [[list(range(a + s, a + e)) for s, e in item] for a, item in zip(cu[:-1], per_item, strict=True)]
    droppable = vk.TokenLayout.packed(spans, cu) if layout else spans
    offsets = None if layout else torch.tensor(cu, dtype=torch.int32) if tensor else cu
    real = [range(a, b) for a, b in itertools.pairwise(cu)]
    return Batch(name, len(cu) - 1, cu[-1], droppable, real, segments, offsets)


def _packed_mask(name: str, cu: list[int]) -> Batch:
    mask = torch.rand(cu[-1], generator=seeded(name)) < 0.5
    real = [range(a, b) for a, b in itertools.pairwise(cu)]
    segments = [[[j for j in r if mask[j]]] for r in real]
    return Batch(name, len(cu) - 1, cu[-1], mask, real, segments, cu)


BATCHES = [
    _padded("whole-B2-N63", 63, [[(0, 63)]] * 2),
    _padded("whole-B1-N1", 1, [[(0, 1)]]),
    _padded("span-B2-N70", 70, [[(5, 68)]] * 2, (5, 68)),
    _padded("span-to-the-ends-B2-N33", 33, [[(0, 33)]] * 2, (0, 33)),
    _padded("span-empty-B2-N9", 9, [[(4, 4)]] * 2, (4, 4)),
    _padded("one-span-each-B3-N40", 40, [[(1, 30)], [(0, 40)], [(39, 40)]], [(1, 30), (0, 40), (39, 40)]),
    _padded(
        "spans-B4-N50", 50, [[(2, 10), (10, 20), (35, 50)], [], [(0, 50)], [(7, 7), (9, 12)]],
        [[(2, 10), (10, 20), (35, 50)], [], (0, 50), [(7, 7), (9, 12)]],
    ),
    _padded("text-only-B2-N7", 7, [[], []], [[], None]),
    _padded("right-padding-B3-N30", 30, [[(2, 20)], [], [(3, 5), (6, 12)]], lengths=[25, 30, 12]),
    _padded("left-padding-B3-N30", 30, [[(7, 20)], [(18, 25), (25, 30)], []], lengths=[25, 12, 0], padding_side="left"),
    _masked("mask-B3-N45", 45, 3),
    _masked("mask-counted-B3-N45", 45, 3, layout=True),
    _masked("mask-left-padding-B3-N45", 45, 3, layout=True, lengths=[45, 30, 7], side="left"),
    _packed("packed-T90", [0, 20, 21, 90]),
    _packed("packed-tensor-T90", [0, 20, 21, 90], tensor=True),
    _packed("packed-empty-items-T40", [0, 0, 17, 17, 40, 40], tensor=True),
    _packed("packed-spans-T80", [0, 30, 35, 80], [[(2, 9), (9, 30)], [], [(0, 44)]]),
    _packed("packed-layout-T80", [0, 30, 35, 80], [[(2, 9), (9, 30)], [], [(0, 44)]], layout=True),
    _packed_mask("packed-mask-T60", [0, 25, 25, 60]),
    _padded("no-items-N12", 12, []),
    _padded("no-rows-B2", 0, [[(0, 0)]] * 2),
    _packed("packed-no-rows", [0]),
    _packed("packed-no-tokens", [0, 0, 0]),
]  # fmt: skip
# One batch of each way to say which tokens compete: enough in the interpreter for kernels that other tests run on all batches.
KINDS = [b for b in BATCHES if b.name in (
    "span-B2-N70", "spans-B4-N50", "right-padding-B3-N30", "left-padding-B3-N30", "mask-left-padding-B3-N45", "packed-tensor-T90",
    "packed-spans-T80", "packed-mask-T60", "no-rows-B2",
)]  # fmt: skip
# Beyond 2048 competing rows the GPU selects in a kernel of its own, beyond 8192 it no longer keeps the keys in
# registers.
LARGE = [
    _padded("span-B2-N2077", 2077, [[(20, 2070)]] * 2, (20, 2070)),
    _padded("spans-B2-N8500", 8500, [[(3, 8400)], [(0, 100), (105, 8500)]], [[(3, 8400)], [(0, 100), (105, 8500)]]),
    _packed("packed-T9001", [0, 300, 301, 9001]),
    _masked("mask-B2-N2500", 2500, 2, layout=True),
]


def companions(b: Batch, key: str = "", device: str = "cpu", strides: str = "contiguous") -> dict[str, Any]:
    """Everything that may travel with a batch: ids, KV of odd widths, masks, rope tables, labels."""
    lead, plural = b.lead, (3, *b.lead)
    heads = (lambda h, d: (h, *lead[-1:], d)) if b.packed else (lambda h, d: (b.batch, h, b.rows, d))
    found = {
        "position_ids": integers(plural if key == "mrope" else lead, torch.int64, "ids", high=9999),
        "kv": (
            [random_bytes(heads(2, 8), torch.bfloat16, "k"), random_bytes(heads(2, 6), torch.bfloat16, "v")],
            (random_bytes(heads(1, 3), torch.int8, "k2"), random_bytes(heads(1, 4), torch.float8_e4m3fn, "v2")),
        ),
        "rope": tuple(random_bytes((*(plural if key == "mrope" else lead), 4), torch.float32, c) for c in "cs"),
        "labels": integers(lead, torch.int64, "labels", high=500),
    }
    if not b.packed:
        found["attention_mask"] = torch.tensor([[j in r for j in range(b.rows)] for r in b.real]).view(lead)
    return {name: to(_strided_all(x, strides), device) for name, x in found.items()}


def _strided_all(x: Any, kind: str) -> Any:
    return type(x)(_strided_all(y, kind) for y in x) if isinstance(x, list | tuple) else strided(x, kind)


def some_rows(batch: int, rows: int, width: int) -> torch.Tensor:
    """``[batch, width]`` rows in any order, each at most once, with -1 between them."""
    gen = seeded("rows", batch, rows, width)
    picks = [torch.randperm(rows, generator=gen)[:width] for _ in range(batch)]
    keep = (
        torch.stack([torch.nn.functional.pad(p, (0, width - len(p)), value=-1) for p in picks]) if batch else torch.empty(0, width)
    )
    holes = torch.rand(batch, width, generator=gen) < 0.2
    return torch.where(holes, -1, keep.to(torch.int64))


FAR = 2**31 + 2**13  # elements; one more than an int32 offset reaches


def far_apart(x: torch.Tensor, on, dim: int = 0) -> torch.Tensor:
    """x with the given dimension's rows 2^31 elements apart; its values in a tensor of that many addresses."""
    strides = list(x.contiguous().stride())
    strides[dim] = FAR
    out = vast(FAR * (x.shape[dim] - 1) + x[0].numel() * x.shape[0], x.dtype, on.device).as_strided(x.shape, strides)
    return out.copy_(x.to(on.device))


def every_op(on, prev, cur, metric, k=300):
    """One call of every op, as a flat list; real values, so that another order of summation would show."""
    a, b = prev.detach().clone().requires_grad_(), cur.detach().clone().requires_grad_()
    scores = vk.variation_score(a, b, metric=metric, backend=on.backend)
    grads = torch.autograd.grad(scores.square().sum(), (a, b))
    top = vk.variation_topk(prev, cur, k, metric=metric, order="score", backend=on.backend)
    kv = cur.unflatten(-1, (2, -1)).transpose(1, 2)
    leaf = cur.detach().clone().requires_grad_()
    got = vk.drop_tokens(prev, leaf, k, droppable=(3, cur.shape[1] - 2), metric=metric, kv=(kv,), backend=on.backend)
    (grad,) = torch.autograd.grad(got.hidden.square().sum(), leaf)
    cache = kv.contiguous()
    vk.compact_(got.keep, cache, backend=on.backend)
    return [scores.detach(), *grads, *top, got.keep, got.hidden.detach(), got.kv[0], grad, cache]
