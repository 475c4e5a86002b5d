"""What the GPU check measures: groups of candidates that run the same problem side by side, and the bars that judge them.

A group is built on the device: every candidate is a list of calls, one per rotated copy of the inputs, and a check of its result
against ``v2drop_kernels.reference``. A bar is a ratio of two medians of one group; ours is judged once per own backend.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from gpu_meter import Call, HostMeter
from providers import Case, Expected, Inputs, _legal_set, _rows, _same_scores, moved_bytes

import v2drop_kernels as vk
from v2drop_kernels import reference
from v2drop_kernels.backends import choice
from v2drop_kernels.backends.choice import runner_of
from v2drop_kernels.backends.native import launch_mode
from v2drop_kernels.backends.requests import CompactBackwardRequest
from v2drop_kernels.core.types import GatherSpec
from v2drop_kernels.ops.compact.torch_op import BACKWARD as COMPACT_BACKWARD

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUARTER = Fraction(1, 4)
IMAGE, IMAGES = Case(1, 576, 4096, QUARTER), Case(8, 576, 4096, QUARTER)
VIDEO, VIDEOS, LONG = Case(1, 6272, 3584, QUARTER), Case(8, 6272, 3584, QUARTER), Case(1, 65536, 4096, QUARTER)
ROUNDED = 2.0**-7  # what a bfloat16 difference or norm may be off
EXACT = 1e-5  # another order of summation of a few thousand float32 terms
DESIGNS = ("cooperative", "two", "three")
LAUNCH_MODES = {"two": "fused", "three": "separate"}
DESIGNED_ROWS = 2048  # kFusedSelect of csrc/core/tuning_cuda.h: beyond it there is one design
# Baselines are named by what they do; where a bar names several, the fastest one counts.
COPIES, READS = ("copy", "copy-kernel"), ("read-sum", "read-norm", "read-max")
COMPILED = ("compile", "compile-reduce-overhead", "compile-max-autotune")


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


Times = dict[str, float]  # candidate to median seconds, of one group in one mode


class Bar(NamedTuple):
    """A limit on a value that comes from the times of a group, for one own backend."""

    number: str
    text: str
    sense: str  # "at most" or "at least"
    limit: float
    value: Callable[[Times, str], float]
    mode: str = "cold"


class Group(NamedTuple):
    """Candidates on one problem. Modes: cold and warm are GPU time of a graph, eager is wall time, host is the host's share."""

    name: str
    op: str
    case: Case
    build: Callable[[Case, HostMeter], list[Candidate]]
    modes: tuple[str, ...] = ("cold",)
    bars: tuple[Bar, ...] = ()
    moved: int = 0
    needs: int = 0  # bytes of memory, where that may be too much


def faster(*names: str, own: str = "{}") -> Callable[[Times, str], float]:
    """How many times longer the fastest of ``names`` takes than ours."""
    return lambda t, o: min(t[n] for n in names if n in t) / t[own.format(o)]


def within(*names: str, own: str = "{}") -> Callable[[Times, str], float]:
    """How many times longer ours takes than the fastest of ``names``, which may themselves be ours."""
    return lambda t, o: t[own.format(o)] / min(t[n.format(o)] for n in names if n.format(o) in t)


# --- inputs


def scaled(case: Case, meter: HostMeter, clustered: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal hidden states and a change whose size varies from token to token; clustered: large in runs of 32 tokens."""
    g = torch.Generator(meter.device).manual_seed(0)
    shape = (case.batch, case.n, case.d)
    size = torch.exp(0.5 * torch.randn(case.batch, case.n, 1, generator=g, device=meter.device)) * 0.1
    if clustered:
        runs = torch.randn(case.batch, -(-case.n // 32), 1, generator=g, device=meter.device)
        size *= 1 + 20 * torch.sigmoid(40 * runs).repeat_interleave(32, dim=1)[:, : case.n]
    h_prev = torch.empty(shape, dtype=case.dtype, device=meter.device)
    h_cur = torch.empty_like(h_prev)
    for b in range(case.batch):  # one item at a time: the float32 copies of all would be large
        h_prev[b] = torch.randn(shape[1:], generator=g, device=meter.device)
        h_cur[b] = h_prev[b].float() + size[b] * torch.randn(shape[1:], generator=g, device=meter.device)
    return h_prev, h_cur


def scored(case: Case, h_prev: torch.Tensor, h_cur: torch.Tensor) -> Inputs:
    scores = torch.cat([reference.variation_score(a[None], b[None]) for a, b in zip(h_prev, h_cur, strict=True)])
    return Inputs(h_prev, h_cur, scores, reference.segmented_topk(scores, case.k).indices)


def rotated(x: Inputs, meter: HostMeter, size: int) -> list[Inputs]:
    """Copies of the inputs, so that one turn over all of them reads more than the caches hold."""
    copies = min(-(-meter.cold_bytes // max(size, 1)), 64)
    return [x, *(Inputs(*(t.clone() for t in x)) for _ in range(copies - 1))]


def bind(fn: Callable[..., Any], xs: Sequence[Any]) -> list[Call]:
    return [functools.partial(fn, x) for x in xs]


# --- checks against the reference


def same(expected: Any, what: str) -> Callable[[Any], str | None]:
    """Equal bytes."""

    def check(found: Any) -> str | None:
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return f"{what}: {found.dtype} {list(found.shape)} in place of {expected.dtype} {list(expected.shape)}"
        return None if torch.equal(found, expected) else f"{what} differ"

    return check


def kept(x: Inputs, rounding: float) -> Callable[[Any], str | None]:
    """The right tokens, but for those whose scores round into the cut, and the very rows of what was kept."""
    expected = Expected(x.scores.cpu(), x.scores.cpu(), x.keep.cpu(), x.scores.cpu())

    def check(found: Any) -> str | None:
        keep, hidden = found[0], found[1]
        if keep.shape != x.keep.shape:
            return f"keep has shape {list(keep.shape)} in place of {list(x.keep.shape)}"
        why = None if torch.equal(keep, x.keep) else _legal_set(keep.cpu(), expected, rounding)
        return why or same(_rows(x.h_cur, keep), "copied rows")(hidden)

    return check


# --- candidates


def own(case: Case, meter: HostMeter, designs: bool = False) -> Iterator[tuple[str, str, Callable[[], Any], str | None]]:
    """(name, backend, context of a call, why it is missing) of this package's own candidates."""
    for backend in own_backends(meter):
        why = choice.why_not(backend, meter.device.type, case.dtype)
        yield backend, backend, contextlib.nullcontext, why
        if designs and backend == "cuda" and case.n <= DESIGNED_ROWS:
            for design in DESIGNS:
                yield f"cuda-{design}", "cuda", functools.partial(launch_mode, LAUNCH_MODES.get(design, design)), why


class OwnBackends:
    """The backends of this package that are judged, without those in ``pending``, whose library is still being built."""

    def __init__(self) -> None:
        self.pending: set[str] = set()

    def __call__(self, meter: HostMeter) -> tuple[str, ...]:
        """Without a GPU the reference stands in for them, beside Triton's interpreter and an emulated library."""
        names = ("triton", "cuda") if meter.device.type == "cuda" else ("reference", "triton", "cuda")
        return tuple(name for name in names if name not in self.pending)


own_backends = OwnBackends()


def ours(
    case: Case, meter: HostMeter, xs: Sequence[Any], fn: Callable[[str, Any], Any], check: Callable[[Any], str | None],
    suffix: str = "", designs: bool = False,
) -> list[Candidate]:  # fmt: skip
    """This package's candidates for ``fn(backend, inputs)``."""

    def call(backend: str, context: Callable[[], Any], x: Any) -> Any:
        with context():
            return fn(backend, x)

    def plain(backend: str, x: Any) -> Any:  # eager times are the user's: without a context around the call
        return fn(backend, x)

    made = []
    for name, backend, context, why in own(case, meter, designs):
        run = functools.partial(plain, backend) if name == backend else functools.partial(call, backend, context)
        made.append(Candidate(name + suffix, bind(run, xs), check, missing=why))
    return made


def copies(meter: HostMeter, size: int, count: int, name: str = "copy") -> list[Candidate]:
    """Copies that read and write ``size`` bytes together, by the driver's copy and by an elementwise kernel."""
    words = max(size // 8, 1)
    sources = [torch.randint(-1000, 1000, (words,), dtype=torch.int32, device=meter.device) for _ in range(count)]
    target = torch.empty_like(sources[0])
    check = same(sources[0], "copied words")
    plain = [functools.partial(target.copy_, s) for s in sources]
    kernel = [functools.partial(torch.bitwise_or, s, 0, out=target) for s in sources]
    return [Candidate(name, plain, check), Candidate(f"{name}-kernel", kernel, check)]


def one_block(meter: HostMeter) -> Candidate:
    """A kernel of one thread block that copies 1 KB: what a launch costs in a graph."""
    source = torch.randn(256, device=meter.device)
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


def rotations(case: Case, meter: HostMeter) -> list[Inputs]:
    x = scored(case, *scaled(case, meter))
    return rotated(x, meter, case.input_bytes)


def run_drop(k: int, backend: str, x: Inputs, **given: Any) -> Any:
    out = vk.drop_tokens(x.h_prev, x.h_cur, k, backend=backend, **given)
    return out.keep, out.hidden, out.position_ids, out.kv


def drop(case: Case, meter: HostMeter) -> list[Candidate]:
    """The whole step beside what it could be replaced by, but for torch.compile."""
    xs = rotations(case, meter)
    exact, rounded = kept(xs[0], EXACT), kept(xs[0], ROUNDED)

    def topk_gather(x: Inputs) -> Any:  # a lenient baseline: scores given, order as it comes
        chosen = x.scores.topk(case.k, dim=-1, sorted=False).indices
        return chosen, eager_gather(x.h_cur, chosen)

    def any_order(found: Any) -> str | None:
        keep, order = found[0].sort(dim=-1)
        return exact((keep, torch.take_along_dim(found[1], order[..., None], 1)))

    tokens = torch.arange(case.n, device=meter.device)
    return [
        *ours(case, meter, xs, functools.partial(run_drop, case.k), exact, designs=True),
        one_block(meter),
        *copies(meter, moved_bytes("drop", case), len(xs)),
        Candidate("eager", bind(functools.partial(eager_drop, case.k), xs), rounded),
        Candidate("v2drop", bind(functools.partial(published_drop, case.k, tokens), xs), rounded),
        Candidate("topk+gather", bind(topk_gather, xs), any_order),
        *flashinfer(case, xs, any_order),
    ]


def compiled_drop(case: Case, meter: HostMeter, modes: Sequence[str] = COMPILED[:2]) -> list[Candidate]:
    """The whole step beside torch.compile of the plain reference; a dry run only traces it."""
    torch._dynamo.reset()
    xs, k = rotations(case, meter), case.k
    exact = kept(xs[0], EXACT)

    def step(h_prev: torch.Tensor, h_cur: torch.Tensor) -> Any:
        keep = eager_select(torch.linalg.vector_norm(h_cur.float() - h_prev.float(), dim=-1), k)
        return keep, eager_gather(h_cur, keep)

    made = ours(case, meter, xs, functools.partial(run_drop, k), exact)
    for name in modes:
        mode = name.removeprefix("compile").removeprefix("-")
        options: dict[str, Any] = {"mode": mode or "default"} if meter.device.type == "cuda" else {"backend": "eager"}
        run = torch.compile(step, fullgraph=True, dynamic=False, **options)
        # All modes but the default replay graphs of their own, whose results the next call overwrites.
        made.append(Candidate(name, [functools.partial(run, x.h_prev, x.h_cur) for x in xs], exact, captured=not mode))
    return made


def flashinfer(case: Case, xs: Sequence[Inputs], check: Any) -> list[Candidate]:
    if importlib.util.find_spec("flashinfer") is None:
        return [Candidate("flashinfer+gather", missing="flashinfer is not installed")]

    def run(x: Inputs) -> Any:
        import flashinfer

        chosen = flashinfer.top_k(x.scores, case.k)[1].long()
        return chosen, eager_gather(x.h_cur, chosen)

    return [Candidate("flashinfer+gather", bind(run, xs), check)]


def score(case: Case, meter: HostMeter) -> list[Candidate]:
    xs = rotations(case, meter)
    check = lambda found: _same_scores(found, xs[0].scores.cpu(), EXACT)
    run = lambda backend, x: vk.variation_score(x.h_prev, x.h_cur, backend=backend)
    both = [(x.h_prev, x.h_cur) for x in xs]
    return [*ours(case, meter, xs, run, check), *reads(both), *copies(meter, moved_bytes("score", case), len(xs))]


def attention(case: Case, meter: HostMeter, heads: int, kv_heads: int) -> list[Candidate]:
    """What one query per head gives to all keys, mean over heads; its row is a table that the layers of a model share."""
    g = torch.Generator(meter.device).manual_seed(0)
    # Of -1, 0 and 1, every logit is exact in any order of summation, and in bfloat16 too until it is scaled; scaled, it stays below
    # 8 (12 standard deviations). So a weight's exponent is below 16 and rounded three times: 3 * 16 * 2**-24 of the weight, and of
    # their sum, are 6e-6 of EXACT. The rest is for sums in blocks, whence float64: PyTorch's own over 65536 keys is 8e-6 off.
    q, k = (
        torch.randint(-1, 2, (case.batch, h, n, case.d), generator=g, device=meter.device, dtype=torch.int8).to(case.dtype)
        for h, n in ((heads, 1), (kv_heads, case.n))
    )
    rows = torch.full((case.batch, 1), case.n - 1, device=meter.device)
    keys = [k, *(k.clone() for _ in range(-(-meter.cold_bytes // k.nbytes) - 1))]
    expected = reference.attention_score(q.double(), k.double(), rows).float().cpu()

    def run(backend: str, k: torch.Tensor) -> torch.Tensor:
        return vk.attention_score(q, k, query_rows=rows, backend=backend)

    def eager(k: torch.Tensor) -> torch.Tensor:  # as transformers attends, with the logits of one query
        b, h, n, d = k.shape
        repeated = k[:, :, None].expand(b, h, heads // h, n, d).reshape(b, heads, n, d)
        weights = torch.matmul(q, repeated.transpose(2, 3)) * d**-0.5
        return weights.softmax(-1, dtype=FP32).mean(1)[:, 0]

    # Eager rounds scaled logits to bfloat16: 8 * 2**-8 of a weight, and of their sum.
    return [
        *ours(case, meter, keys, run, lambda found: _same_scores(found, expected, EXACT)),
        *reads([[k] for k in keys]),
        Candidate("eager", bind(eager, keys), lambda found: _same_scores(found, expected, 2.0**-4)),
    ]


def select(case: Case, meter: HostMeter) -> list[Candidate]:
    """Scores as a layer leaves them, in L2; and such that tie, or are NaN."""
    g = torch.Generator(meter.device).manual_seed(0)
    scores = torch.randn(case.batch, case.n, generator=g, device=meter.device)
    kinds = {
        "": scores,
        "@equal": torch.ones_like(scores),
        "@three": torch.randint(0, 3, scores.shape, generator=g, device=meter.device).float(),
        "@nan": torch.full_like(scores, torch.nan),
    }
    made = []
    for suffix, values in kinds.items():
        expected = reference.segmented_topk(values, case.k).indices
        run = lambda backend, x: vk.segmented_topk(x, case.k, backend=backend).indices
        made += ours(case, meter, [values], run, same(expected, "indices"), suffix)
    expected = reference.segmented_topk(scores, case.k).indices
    ascending = lambda found: same(expected, "indices")(found.sort(dim=-1).values)
    made.append(Candidate("topk+sort", [lambda: eager_select(scores, case.k)], same(expected, "indices")))
    made.append(Candidate("topk", [lambda: scores.topk(case.k, dim=-1, sorted=False).indices], ascending))
    return [*made, *peers(case, scores, ascending)]


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


def gather(case: Case, meter: HostMeter, heads: int = 0, layers: int = 4) -> list[Candidate]:
    """Given rows of the hidden states, random and in runs; with ``heads``, of K and V ``[B, H, N, 128]`` of some layers instead."""
    g = torch.Generator(meter.device).manual_seed(0)
    scores = torch.rand(case.batch, case.n, generator=g, device=meter.device)
    runs = torch.rand(case.batch, -(-case.n // 32), generator=g, device=meter.device).repeat_interleave(32, dim=1)
    keeps = {
        "@random": scores.topk(case.k).indices.sort().values,
        "@clustered": runs[:, : case.n].topk(case.k).indices.sort().values,
    }
    shape = (case.batch, heads, case.n, 128) if heads else (case.batch, case.n, case.d)
    made: list[Candidate] = []
    tensors = [torch.randn(shape, generator=g, device=meter.device).to(case.dtype) for _ in range(2 * layers if heads else 1)]
    nothing = torch.empty(case.batch, case.n, 1, dtype=case.dtype, device=meter.device)
    sets = [tensors]
    size = sum(t.nbytes for t in tensors)
    while len(sets) * size < meter.cold_bytes:
        sets.append([t.clone() for t in tensors])
    for suffix, keep in keeps.items():
        index = keep[:, None, :, None] if heads else keep[..., None]
        expected = [torch.take_along_dim(t, index, -2) for t in tensors]

        def check(found: Sequence[torch.Tensor], expected: Any = expected) -> str | None:
            return next(filter(None, (same(e, "copied rows")(f) for f, e in zip(found, expected, strict=True))), None)

        def run(backend: str, x: Any, keep: torch.Tensor = keep) -> Any:
            if heads:
                return vk.compact(keep, nothing, kv=x, backend=backend).kv
            return [vk.compact(keep, x[0], backend=backend).hidden]

        made += ours(case, meter, sets, run, check, suffix)
        rows = lambda x, keep=keep, index=index: (
            [torch.take_along_dim(t, index, -2) for t in x] if heads else [eager_gather(x[0], keep)]
        )
        made.append(Candidate(f"eager{suffix}", [functools.partial(rows, x) for x in sets], check))
    return [*made, *copies(meter, 2 * sum(e.nbytes for e in expected), len(sets))]


def ragged(case: Case, meter: HostMeter) -> list[Candidate]:
    """A packed batch of lengths from n / 98 to n beside a dense one of as many tokens, and kept tokens in runs."""
    lengths = [max(round(case.n / 98 * 98 ** (i / max(case.batch - 1, 1))), 2) for i in range(case.batch)]
    flat = case._replace(batch=1, n=sum(lengths))
    dense = case._replace(n=sum(lengths) // case.batch)
    offsets = [sum(lengths[:i]) for i in range(case.batch + 1)]
    ks = [vk.n_keep(n, case.ratio) for n in lengths]
    made: list[Candidate] = []
    for suffix, clustered in (("", False), ("-in-runs", True)):
        x = scored(flat, *scaled(flat, meter, clustered))

        def packed(backend: str, x: Inputs) -> Any:
            out = vk.drop_tokens(x.h_prev[0], x.h_cur[0], ks, cu_seqlens=offsets, backend=backend)
            return out.keep, out.hidden

        made += ours(case, meter, [x], packed, segments_kept(x, offsets, ks), f"@ragged{suffix}")
        y = scored(dense, *scaled(dense, meter, clustered))
        made += ours(dense, meter, [y], functools.partial(run_drop, dense.k), kept(y, EXACT), f"@dense{suffix}")
    return made


def segments_kept(x: Inputs, offsets: Sequence[int], ks: Sequence[int]) -> Callable[[Any], str | None]:
    """``kept`` for every segment of a packed batch."""
    checks = []
    for lo, hi, k in zip(offsets[:-1], offsets[1:], ks, strict=True):
        scores = x.scores[:, lo:hi]
        keep = reference.segmented_topk(scores, k).indices
        checks.append((lo, k, kept(Inputs(x.h_prev[:, lo:hi], x.h_cur[:, lo:hi], scores, keep), EXACT)))

    def check(found: Any) -> str | None:
        at = 0
        for lo, k, segment in checks:
            wrong = segment((found[0][None, at : at + k] - lo, found[1][None, at : at + k]))
            if wrong:
                return f"segment at row {lo}: {wrong}"
            at += k
        return None if at == len(found[0]) else f"{len(found[0])} rows in place of {at}"

    return check


def extras(case: Case, meter: HostMeter, layers: int) -> list[Candidate]:
    """What comes along: M-RoPE ids and a mask; K and V of some layers, four heads of 128."""
    xs = rotations(case, meter)
    layers = layers if meter.device.type == "cuda" else 1
    b, n = case.batch, case.n
    ids = torch.arange(n, device=meter.device).expand(3, b, n).contiguous()
    mask = torch.ones(b, n, dtype=torch.bool, device=meter.device)
    kv = [torch.randn(b, 4, n, 128, device=meter.device).to(case.dtype) for _ in range(2 * layers)]

    run = functools.partial(run_drop, case.k)

    def check(found: Any) -> str | None:
        index = found[0]
        wrong = kept(xs[0], EXACT)(found)
        if found[2] is not None:
            wrong = wrong or same(torch.take_along_dim(ids, index.expand(3, -1, -1), -1), "position ids")(found[2])
        for a, t in zip(found[3] or (), kv if found[3] else (), strict=True):
            wrong = wrong or same(torch.take_along_dim(t, index[:, None, :, None], -2), "kv rows")(a)
        return wrong

    return [
        *ours(case, meter, xs, run, check),
        *ours(case, meter, xs, functools.partial(run, position_ids=ids, attention_mask=mask), check, "@ids"),
        *ours(case, meter, xs, functools.partial(run, kv=kv), check, "@kv"),
        *copies(meter, 2 * layers * 2 * b * 4 * case.k * 128 * case.dtype.itemsize, 1, "copy-kv"),
    ]


def backward(case: Case, meter: HostMeter) -> list[Candidate]:
    g = torch.Generator(meter.device).manual_seed(0)
    keep = torch.rand(case.batch, case.n, generator=g, device=meter.device).topk(case.k).indices.sort().values
    grad = torch.randn(case.batch, case.k, case.d, generator=g, device=meter.device).to(case.dtype)
    rows = (keep + torch.arange(0, case.batch * case.n, case.n, device=meter.device)[:, None]).flatten()

    def scattered(_: Any) -> torch.Tensor:
        zeros = torch.zeros(case.batch * case.n, case.d, dtype=case.dtype, device=meter.device)
        return zeros.index_copy_(0, rows, grad.view(-1, case.d)).view(case.batch, case.n, case.d)

    def run(backend: str, grad: torch.Tensor) -> torch.Tensor:
        if backend == "reference":
            return scattered(grad)
        return runner_of(COMPACT_BACKWARD, backend).run(CompactBackwardRequest(keep, [GatherSpec(grad, 0, 1)], case.n))[0]

    check = same(scattered(grad), "gradients")
    moved = case.batch * (case.n + case.k) * case.row_bytes
    return [
        *ours(case, meter, [grad], run, check),
        Candidate("zeros+index_copy", [functools.partial(scattered, grad)], check),
        *copies(meter, moved, 1),
    ]


# --- what is no ratio of times


class Trial(NamedTuple):
    """A bar on one own backend by itself: ``run(backend, meter, tiny)`` gives its value."""

    number: str
    text: str
    op: str
    sense: str
    limit: float
    unit: str
    run: Callable[[str, HostMeter, Callable[[Case], Case]], float]


def _step(backend: str, case: Case, meter: HostMeter, **given: Any) -> Callable[[], Any]:
    h_prev, h_cur = scaled(case, meter)
    return functools.partial(vk.drop_tokens, h_prev, h_cur, case.k, backend=backend, **given)


def repeated(backend: str, meter: HostMeter, tiny: Callable[[Case], Case]) -> float:
    """Replays, of 100, whose results differ in a bit from the first."""
    case = tiny(Case(2, 1500, 1000, QUARTER))
    step, found = _step(backend, case, meter), []
    run = meter.graph([lambda: found.append(step())], 1)  # a capture's own results come last
    first, differing = None, 0
    for _ in range(5 * meter.calls):
        run()
        meter.synchronize()
        now = [found[-1].keep, found[-1].hidden]
        first = first or [t.clone() for t in now]
        differing += not all(torch.equal(a, b) for a, b in zip(now, first, strict=True))
    return differing


def relengthed(backend: str, meter: HostMeter, tiny: Callable[[Case], Case]) -> float:
    """Wrong results of one captured graph when the lengths change on the device."""
    case = tiny(Case(1, 900, 512, QUARTER))
    n = case.n
    # Small integers: every order of summation gives the same scores, many of which tie.
    h_prev, h_cur = torch.randint(-3, 4, (2, n, case.d), device=meter.device).to(case.dtype)
    ks = [max(n // 9, 1), 0, max(n // 7, 1)]
    offsets = torch.tensor([0, n // 3, n // 2, n], dtype=torch.int32, device=meter.device)
    found: list[Any] = []
    step = functools.partial(vk.drop_tokens, h_prev, h_cur, ks, cu_seqlens=offsets, backend=backend)
    run = meter.graph([lambda: found.append(step())], 1)
    wrong = 0
    for cu in ([0, n // 3, n // 2, n], [0, n // 2, n // 2, n], [0, 3, 4, n], [0, 0, 0, n]):
        offsets.copy_(torch.tensor(cu, dtype=torch.int32))
        run()
        meter.synchronize()
        want = vk.drop_tokens(h_prev, h_cur, ks, cu_seqlens=cu, backend="reference")
        used = len(want.keep)
        wrong += not (torch.equal(found[-1].keep[:used], want.keep) and torch.equal(found[-1].hidden[:used], want.hidden))
    return wrong


def memory(backend: str, meter: HostMeter, tiny: Callable[[Case], Case]) -> float:
    """Bytes per token at the peak, beyond the outputs."""
    case = tiny(LONG)
    return meter.extra_bytes(_step(backend, case, meter)) / (case.batch * case.n)


def host(backend: str, meter: HostMeter, tiny: Callable[[Case], Case]) -> float:
    """Microseconds that the host spends on one call: the median of batches of calls."""
    count = 10 * meter.calls
    run = meter.eager([_step(backend, tiny(Case(1, 64, 4096, QUARTER)), meter)], count)
    return statistics.median(meter.host_seconds(run) for _ in range(meter.rounds)) / count * 1e6


def launches(case: Case, backend: str, meter: HostMeter, tiny: Callable[[Case], Case]) -> float:
    return len(meter.launches(_step(backend, tiny(case), meter)))


def more_launches(backend: str, meter: HostMeter, tiny: Callable[[Case], Case]) -> float:
    """Launches that K and V of eight layers add."""
    case = tiny(IMAGE)
    kv = [torch.randn(case.batch, 4, case.n, 128, device=meter.device).to(BF16) for _ in range(16)]
    return len(meter.launches(_step(backend, case, meter, kv=kv))) - len(meter.launches(_step(backend, case, meter)))


# --- the list


def at_least(number: str, text: str, limit: float, value: Any, mode: str = "cold") -> Bar:
    return Bar(number, text, "at least", limit, value, mode)


def at_most(number: str, text: str, limit: float, value: Any, mode: str = "cold") -> Bar:
    return Bar(number, text, "at most", limit, value, mode)


def _drop_group(case: Case, *bars: Bar) -> Group:
    modes = ("cold", "warm") if case in (IMAGE, VIDEO) else ("cold",)
    moved, kept_bytes = moved_bytes("drop", case), case.batch * case.k * case.row_bytes
    # Inputs and what eager makes of them, both sides of the copy, and a result for each of six graphs.
    needs = 2 * case.input_bytes + moved + 6 * kept_bytes
    return Group(f"drop {case}", "drop", case, drop, modes, bars, moved, needs)


def _compile_group(case: Case, *bars: Bar) -> Group:
    modes = ("cold", *sorted({bar.mode for bar in bars} - {"cold"}))
    return Group(f"compile {case}", "drop", case, compiled_drop, modes, bars, moved_bytes("drop", case))


def _copy_bar(limit: float, where: str) -> Bar:
    return at_most("3", f"drop over a copy of 2NDE + 2kDE bytes, {where}", limit, within(*COPIES))


def _score_group(d: int, dtype: torch.dtype) -> Group:
    case = Case(1, -(-256_000_000 // (2 * d * dtype.itemsize)), d, QUARTER, dtype)
    name = str(dtype).removeprefix("torch.")
    return Group(
        f"score {case}", "score", case, score, ("cold",),
        (
            at_most("1", f"score over a read of the same bytes, D={d} {name}", 1.06, within(*READS)),
            at_most("1", f"score over a copy of the same bytes, D={d} {name}", 1.05, within(*COPIES)),
        ),
        moved_bytes("score", case),
    )  # fmt: skip


def _attention_group(batch: int, n: int, heads: int, kv_heads: int, *bars: Bar) -> Group:
    case = Case(batch, n, 128, Fraction(1))
    modes = ("cold", "warm") if n < 8192 else ("cold",)
    build = functools.partial(attention, heads=heads, kv_heads=kv_heads)
    moved = batch * n * (kv_heads * case.row_bytes + 4)  # the keys in, float32 scores out
    return Group(f"attention {heads}/{kv_heads} {case}", "attention", case, build, modes, bars, moved)


def _gather_group(heads: int) -> Group:
    case, layers = (Case(1, 16384, 128, QUARTER), 4) if heads else (Case(1, 16384, 4096, QUARTER), 1)
    what, limit = (f"K and V of {layers} layers [1, {heads}, N, 128]", 1.15) if heads else ("gather of given rows", 1.10)
    bars = tuple(
        at_most("2", f"{what} over a copy of the same bytes, {kind}", limit, within(*COPIES, own=f"{{}}@{kind}"))
        for kind in ("random", "clustered")
    )
    width = 2 * layers * heads * 128 * 2 if heads else case.row_bytes
    return Group(f"{what} {case}", "compact", case, functools.partial(gather, heads=heads, layers=layers), ("cold",), bars,
                 2 * case.k * width)  # fmt: skip


def _select_group(batch: int, n: int) -> Group:
    case = Case(batch, n, 1, QUARTER)
    limit = 3.0 if n > 8192 else 4.0
    bars = (
        at_least("8", f"select over torch.topk and a sort of the indices, B={batch} N={n}", limit, faster("topk+sort"), "warm"),
        *(
            at_most("9", f"select of {what} over random scores, B={batch} N={n}", 1.5, within("{}", own=f"{{}}@{kind}"), "warm")
            for kind, what in (("equal", "equal scores"), ("three", "three values"), ("nan", "NaN"))
        ),
    )
    return Group(f"select {case}", "select", case, select, ("warm",), bars, moved_bytes("select", case))


def _extras_group(case: Case, layers: int) -> Group:
    added = lambda t, o: (t[f"{o}@kv"] - t[o]) / min(t[n] for n in ("copy-kv", "copy-kv-kernel"))
    bars = (
        at_most("11", f"drop with M-RoPE ids and a mask over without, {case}", 1.02, within("{}", own="{}@ids")),
        at_most("11", f"what K and V of {layers} layers add over a copy of their bytes, {case}", 1.10, added),
    )
    build = functools.partial(extras, layers=layers)
    return Group(f"extras {case} {layers} layers", "drop", case, build, ("cold",), bars, moved_bytes("drop", case))


def _eager_bar(limit: float, where: str) -> Bar:
    return at_least("7", f"drop over view-based eager, {where}", limit, faster("eager"))


def _compile_bar(limit: float, where: str) -> Bar:
    return at_least("7", f"drop over torch.compile, {where}", limit, faster(*COMPILED))


def steps() -> dict[str, list[Group | Trial]]:
    """What is measured, in the order in which it is: steps by name, and their groups and trials."""
    big = Case(32, 576, 4096, QUARTER)
    return {
        "image": [
            _drop_group(
                IMAGE,
                at_most("4", "image: drop over one kernel of one block", 4.0, within("one-block")),
                at_most("4", "image: drop over a copy of the same bytes", 1.9, within(*COPIES)),
                at_least("5", "image: drop over view-based eager", 4.0, faster("eager")),
                at_least("5", "image: drop over top-k of given scores + gather", 2.0, faster("topk+gather", "flashinfer+gather")),
            ),
            _drop_group(IMAGES, _copy_bar(1.20, "B=8 N=576")),
        ],
        "host": [
            Trial("15", "host time of drop_tokens, B=1 N=64", "drop", "at most", 12.0, "us", host),
            Trial("15", "launches of drop_tokens, N=576", "drop", "at most", 2, "", functools.partial(launches, IMAGE)),
            Trial("15", "launches of drop_tokens, N=6272", "drop", "at most", 3, "", functools.partial(launches, VIDEO)),
            Group(
                "eager drop", "drop", IMAGE, drop, ("eager", "host"),
                (at_least("6", "image, wall time: drop over view-based eager", 5.0, faster("eager"), "eager"),),
            ),
            Trial("14", "replays of 100 that differ in a bit", "drop", "at most", 0, "", repeated),
            Trial("14", "wrong replays after the lengths changed on the device", "drop", "at most", 0, "", relengthed),
            Trial("14", "extra memory per token at the peak, N=65536", "drop", "at most", 16, "bytes", memory),
        ],
        "constants": [],
        "video": [
            _drop_group(VIDEO, _copy_bar(1.30, "B=1 N=6272"), _eager_bar(3.0, "B=1 N=6272")),
            _drop_group(VIDEOS, _copy_bar(1.15, "B=8 N=6272"), _eager_bar(1.8, "B=8 N=6272")),
        ],
        "long": [
            _drop_group(LONG, _copy_bar(1.08, "B=1 N=65536"), _eager_bar(1.6, "B=1 N=65536")),
        ],
        "select": [_select_group(b, n) for n in (6272, 65536, 576) for b in (1, 8, 32)],
        "kv": [
            _extras_group(VIDEO, 4),
            _extras_group(VIDEO, 32),
            Trial("11", "launches that K and V of eight layers add", "drop", "at most", 0, "", more_launches),
            _gather_group(8),
            _gather_group(0),
            _extras_group(VIDEO, 1),
        ],
        "backward": [
            Group(
                f"backward {case}", "backward", case, backward, ("cold",),
                (
                    at_most("12", f"backward over a copy of (N + k)DE bytes, {where}", 1.10, within(*COPIES)),
                    at_least("12", f"backward over zeros and index_copy_, {where}", 1.3, faster("zeros+index_copy")),
                ),
                case.batch * (case.n + case.k) * case.row_bytes,
            )
            for case, where in ((Case(1, 16384, 4096, QUARTER), "N=16384"), (LONG, "N=65536"))
        ],
        "ragged": [
            Group(
                "ragged", "drop", Case(32, 6272, 3584, QUARTER), ragged, ("cold",),
                (
                    at_most("10", "packed batch of 32 lengths over a dense one", 1.15, within("{}@dense", own="{}@ragged")),
                    at_most("10", "kept tokens in runs over scattered ones", 1.05, within("{}@dense", own="{}@dense-in-runs")),
                ),
            ),
        ],
        "model": [],
        "score": [
            *(_score_group(d, BF16) for d in (4096, 2560, 3584, 5120, 8192)),
            *(_score_group(d, dtype) for dtype in (FP16, FP32) for d in (2560, 3584, 4096, 5120, 8192)),
        ],
        "attention": [
            _attention_group(
                1, 65536, 28, 4,
                at_most("13", "attention of one query, GQA 28/4, N=65536, over reading K once", 1.25, within(*READS)),
                at_least("13", "attention of one query, GQA 28/4, N=65536, over eager with repeated K", 3.0, faster("eager")),
            ),
            *(_attention_group(b, n, 28, 4) for b, n in ((1, 576), (1, 6272), (8, 6272))),
            *(_attention_group(b, n, 32, 32) for b, n in ((1, 576), (1, 6272), (8, 6272), (1, 65536))),
        ],
        "compile": [
            _compile_group(
                IMAGE,
                at_least("5", "image: drop over torch.compile", 3.0, faster(*COMPILED)),
                at_least("6", "image, wall time: drop over torch.compile", 2.5, faster("compile"), "eager"),
            ),
            _compile_group(VIDEO, _compile_bar(2.2, "B=1 N=6272")),
            _compile_group(LONG, _compile_bar(1.0, "B=1 N=65536")),
            _compile_group(VIDEOS, _compile_bar(1.2, "B=8 N=6272")),
            Group(f"max-autotune {IMAGE}", "drop", IMAGE, functools.partial(compiled_drop, modes=COMPILED[2:]), ("cold",), (),
                  moved_bytes("drop", IMAGE)),
        ],
        # Most of these have no target; other batches, keep ratios and widths were asked for.
        "sizes": [
            _drop_group(big, _copy_bar(1.15, "B=32 N=576")),
            _drop_group(Case(32, 6272, 3584, QUARTER)),
            *(_drop_group(case._replace(ratio=r)) for r in (Fraction(1, 20), Fraction(1, 2)) for case in (IMAGE, VIDEO, LONG)),
            _drop_group(Case(64, 576, 4096, QUARTER)),
            *(_drop_group(Case(1, 6272, d, QUARTER)) for d in (2560, 4096, 5120, 8192)),
            *(_drop_group(LONG._replace(batch=batch)) for batch in (8, 32)),
        ],
    }  # fmt: skip


# What the papers report, on other GPUs: V2Drop's Table 4 and its video table.
MODEL_LEVEL = (
    at_least("model", "LLaVA-1.5-7B with 128 of 576 tokens: throughput over no dropping", 1.22, None, mode=""),
    at_least("model", "LLaVA-OneVision-7B, video of 32 frames: throughput over no dropping", 1.38, None, mode=""),
)


def tiny(case: Case) -> Case:
    """The same problem in a size for which an interpreter takes a moment; larger stays larger."""
    return Case(min(case.batch, 2), 16 + 8 * round(math.log2(case.n)) // 3, 32 if case.d > 1 else 1, case.ratio, case.dtype)
