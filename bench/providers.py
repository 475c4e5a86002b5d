"""Who computes what: cases, inputs, the providers of every op, and the check that comes before any clock.

A provider is built once per case, so that buffers and compilation are not timed, and is then called with the inputs. No
provider is timed before ``verified`` has compared its result with ``v2drop_kernels.reference``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from harness import ALL_CORES, LLC, touch

import v2drop_kernels as vk
from v2drop_kernels import reference
from v2drop_kernels.backends import choice

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


class WrongResult(Exception):
    """A provider does not compute what the reference computes: it gets no number."""


class Provider(NamedTuple):
    """``build(case)`` gives the callable that is timed; ``missing(case)`` why it cannot serve, or None.

    ``rounding`` is the relative rounding of its scores against the float32 reference. Kept sets may differ only there. None:
    it computes nothing, so there is nothing to compare.
    """

    name: str
    about: str
    build: Callable[[Case], Callable[[Inputs], Any]]
    rounding: float | None = 1e-5  # another order of summation of a few thousand float32 terms
    missing: Callable[[Case], str | None] = lambda case: None


def verified(op: str, provider: Provider, case: Case) -> Callable[[Inputs], Any]:
    """The provider's callable, after its result on the case was compared with the reference.

    Raises
    ------
    WrongResult
        With what differs.
    """
    inputs, expected = inputs_of(case)
    try:
        call = provider.build(case)
        if provider.rounding is None:
            return call
        results = [call(inputs), call(inputs)]  # the second call finds buffers that have been used
        found = (_difference(op, result, inputs, expected, provider.rounding) for result in results)
        why = next(filter(None, found), None)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    if why:
        raise WrongResult(f"{provider.name} {op} {case}: {' '.join(why.split())[:300]}")
    return call


def _difference(op: str, found: Any, inputs: Inputs, expected: Expected, rounding: float) -> str | None:
    if op == "score":
        return _same_scores(found, expected.scores, rounding)
    if op == "select":
        values, indices = (x.cpu() for x in found)
        if not torch.equal(indices, expected.keep):
            return f"{int((indices != expected.keep).sum())} indices differ"
        return None if torch.equal(values, expected.values) else "values differ"
    if op == "compact":
        return _same_bytes(found.cpu(), expected.hidden)
    keep, hidden = (x.cpu() for x in found)
    if keep.shape != expected.keep.shape:
        return f"keep has shape {list(keep.shape)} in place of {list(expected.keep.shape)}"
    if torch.equal(keep, expected.keep):
        return _same_bytes(hidden, expected.hidden)
    return _legal_set(keep, expected, rounding) or _same_bytes(hidden, _rows(inputs.h_cur, keep))


def _same_scores(found: torch.Tensor, expected: torch.Tensor, rounding: float) -> str | None:
    if found.shape != expected.shape:
        return f"scores have shape {list(found.shape)} in place of {list(expected.shape)}"
    off = ((found.cpu().float() - expected).abs() / expected.abs().clamp(min=1e-30)).max().item()
    return None if off <= rounding else f"scores are off by {off:.1e}, more than {rounding:.1e}"


def _same_bytes(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"rows are {found.dtype} {list(found.shape)} in place of {expected.dtype} {list(expected.shape)}"
    return None if torch.equal(found, expected) else "copied rows differ"


def _legal_set(keep: torch.Tensor, expected: Expected, rounding: float) -> str | None:
    """Another kept set is legal where it ascends and only tokens whose scores round into the cut changed sides."""
    n = expected.scores.shape[1]
    if not bool(((keep >= 0) & (keep < n)).all()) or not bool((keep.diff(dim=1) > 0).all()):
        return "kept rows do not ascend inside the item"
    chosen = torch.zeros(expected.scores.shape, dtype=torch.bool).scatter_(1, keep, True)
    wanted = torch.zeros_like(chosen).scatter_(1, expected.keep, True)
    cut = expected.scores.gather(1, expected.keep).amin(dim=1, keepdim=True)
    clear = (expected.scores - cut).abs() > 2 * rounding * cut
    wrong = int(((chosen != wanted) & clear).sum())
    return f"{wrong} kept tokens differ by more than rounding" if wrong else None


def _rows(h: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.index_select(0, rows) for x, rows in zip(h, keep, strict=True)])


# --- this package


def _public(op: str, backend: str, case: Case, x: Inputs) -> Any:
    if op == "score":
        return vk.variation_score(x.h_prev, x.h_cur, backend=backend)
    if op == "select":
        return vk.segmented_topk(x.scores, case.k, backend=backend)
    if op == "compact":
        return vk.compact(x.keep, x.h_cur, backend=backend).hidden
    out = vk.drop_tokens(x.h_prev, x.h_cur, case.k, backend=backend)
    return out.keep, out.hidden


def _native(op: str) -> Provider:
    def build(case: Case) -> Callable[[Inputs], Any]:
        return functools.partial(_public, op, "cpu", case)

    return Provider(
        "native", "this package, C++ CPU backend; results freshly allocated by each call", build,
        missing=lambda case: choice.why_not("cpu", "cpu", case.dtype),
    )  # fmt: skip


def _triton(op: str) -> Provider:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def build(case: Case) -> Callable[[Inputs], Any]:
        moved: dict[int, Inputs] = {}

        def call(x: Inputs) -> Any:
            if id(x) not in moved:
                moved[id(x)] = Inputs(*(t.to(device) for t in x))
            out = _public(op, "triton", case, moved[id(x)])
            if device == "cuda":
                torch.cuda.synchronize()
            return out

        return call

    return Provider(
        "triton", "this package, Triton backend; wall time with a synchronisation", build,
        missing=lambda case: choice.why_not("triton", device, case.dtype),
    )  # fmt: skip


# --- PyTorch. Hidden states are views throughout: no provider but "v2drop" copies them before it subtracts.


def _eager(op: str) -> Provider:
    def score(x: Inputs) -> torch.Tensor:
        return torch.linalg.vector_norm(x.h_cur.float() - x.h_prev.float(), dim=-1)

    def select(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        keep = scores.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
        return scores.gather(-1, keep), keep

    def compact(h: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        b, n, d = h.shape
        rows = keep if b == 1 else keep + torch.arange(0, b * n, n)[:, None]
        return h.reshape(b * n, d).index_select(0, rows.flatten()).view(b, -1, d)

    def build(case: Case) -> Callable[[Inputs], Any]:
        def drop(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
            keep = select(score(x), case.k)[1]
            return keep, compact(x.h_cur, keep)

        return {
            "score": score,
            "select": lambda x: select(x.scores, case.k),
            "compact": lambda x: compact(x.h_cur, x.keep),
            "drop": drop,
        }[op]

    return Provider("eager", "plain eager PyTorch: float32 difference and norm, topk, sort, index_select", build)


class _Buffers:
    """Everything that a step writes, allocated and touched once."""

    def __init__(self, case: Case, wide: torch.dtype) -> None:
        b, n, k, d = case.batch, case.n, case.k, case.d
        self.prev, self.cur = (torch.empty(b, n, d, dtype=wide) for _ in range(2)) if wide != case.dtype else (None, None)
        self.diff = torch.empty(b, n, d, dtype=wide)
        self.scores = torch.empty(b, n)
        self.values, self.chosen = torch.empty(b, k), torch.empty(b, k, dtype=torch.int64)
        self.keep, self.order = torch.empty(b, k, dtype=torch.int64), torch.empty(b, k, dtype=torch.int64)
        self.kept = torch.empty(b, k)
        self.rows, self.first = torch.empty(b, k, dtype=torch.int64), torch.arange(0, b * n, n)[:, None]
        self.hidden = torch.empty(b * k, d, dtype=case.dtype)
        touch(*(t for t in vars(self).values() if isinstance(t, torch.Tensor) and t is not self.first))


def _eager_out(op: str, name: str, about: str, wide: torch.dtype | None, rounding: float) -> Provider:
    """``wide``: the type in which to subtract; None for the type of the hidden states."""

    def build(case: Case) -> Callable[[Inputs], Any]:
        m = _Buffers(case, wide or case.dtype)
        flat = (case.batch * case.n, case.d)

        def score(x: Inputs) -> torch.Tensor:
            prev, cur = x.h_prev, x.h_cur
            if m.prev is not None:
                prev, cur = m.prev.copy_(prev), m.cur.copy_(cur)
            torch.sub(cur, prev, out=m.diff)
            return torch.linalg.vector_norm(m.diff, dim=-1, dtype=torch.float32, out=m.scores)

        def select(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            torch.topk(scores, case.k, dim=-1, sorted=False, out=(m.values, m.chosen))
            torch.sort(m.chosen, dim=-1, out=(m.keep, m.order))
            return torch.gather(scores, -1, m.keep, out=m.kept), m.keep

        def compact(h: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            rows = keep if case.batch == 1 else torch.add(keep, m.first, out=m.rows)
            torch.index_select(h.view(flat), 0, rows.view(-1), out=m.hidden)
            return m.hidden.view(case.batch, case.k, case.d)

        def drop(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
            keep = select(score(x))[1]
            return keep, compact(x.h_cur, keep)

        return {
            "score": score,
            "select": lambda x: select(x.scores),
            "compact": lambda x: compact(x.h_cur, x.keep),
            "drop": drop,
        }[op]

    return Provider(name, about, build, rounding)


def _compiled(op: str) -> Provider:
    def build(case: Case) -> Callable[[Inputs], Any]:
        b, n, k, d = case.batch, case.n, case.k, case.d
        first = torch.arange(0, b * n, n)[:, None]
        scores_out, values_out = torch.empty(b, n), torch.empty(b, k)
        keep_out, hidden_out = torch.empty(b, k, dtype=torch.int64), torch.empty(b, k, d, dtype=case.dtype)
        touch(scores_out, values_out, keep_out, hidden_out)

        def score(x: Inputs) -> torch.Tensor:
            return torch.linalg.vector_norm(x.h_cur.float() - x.h_prev.float(), dim=-1)

        def select(scores: torch.Tensor) -> torch.Tensor:
            return scores.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values

        def compact(h: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            rows = keep if b == 1 else keep + first
            return h.view(-1, d).index_select(0, rows.view(-1)).view(b, k, d)

        def run_score(x: Inputs) -> torch.Tensor:
            return scores_out.copy_(score(x))

        def run_select(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
            keep = select(x.scores)
            return values_out.copy_(x.scores.gather(-1, keep)), keep_out.copy_(keep)

        def run_compact(x: Inputs) -> torch.Tensor:
            return hidden_out.copy_(compact(x.h_cur, x.keep))

        def run_drop(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
            keep = select(score(x))
            return keep_out.copy_(keep), hidden_out.copy_(compact(x.h_cur, keep))

        torch._dynamo.reset()  # a graph per case and number of threads, without the limit on recompilations
        fn = {"score": run_score, "select": run_select, "compact": run_compact, "drop": run_drop}[op]
        return torch.compile(fn, fullgraph=True, dynamic=False)

    return Provider("compile-out", "torch.compile of the plain reference, results written to preallocated tensors", build)


def _v2drop(op: str) -> Provider:
    def score(x: Inputs, tokens: torch.Tensor) -> torch.Tensor:
        return torch.norm(x.h_cur[:, tokens] - x.h_prev[:, tokens], p=2, dim=-1)

    def build(case: Case) -> Callable[[Inputs], Any]:
        tokens = torch.arange(case.n)

        def drop(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
            best = score(x, tokens)[0].topk(case.k).indices
            keep = torch.cat([tokens[:0], tokens[best], tokens[case.n :]]).sort().values
            return keep[None], x.h_cur[:, keep]

        return {"score": lambda x: score(x, tokens), "drop": drop}[op]

    return Provider(
        "v2drop", "as V2Drop publishes it: copies both hidden states, subtracts and takes the norm in their type", build,
        rounding=2.0**-7,  # the bfloat16 norm has eight bits
        missing=lambda case: None if case.batch == 1 else "serves a batch of one",
    )  # fmt: skip


def _copy(op: str) -> Provider:
    """A copy that reads and writes as many bytes as the op moves; its target is reused, as the results of the others are."""

    def build(case: Case) -> Callable[[Inputs], Any]:
        target = torch.ones(moved_bytes(op, case) // 8)
        sources: dict[int, torch.Tensor] = {}

        def call(x: Inputs) -> None:
            if id(x) not in sources:
                sources[id(x)] = torch.ones_like(target)
            target.copy_(sources[id(x)])

        return call

    return Provider("copy", "torch copy_ of half the op's bytes: reads and writes as much as the op moves", build, rounding=None)


@functools.cache
def providers(op: str) -> dict[str, Provider]:
    """The providers of an op, by name."""
    made = [_native(op), _triton(op), _eager(op)]
    made.append(
        _eager_out(op, "eager-out", "the plain reference with every result and temporary preallocated", torch.float32, 1e-5)
    )
    if op in ("score", "drop"):
        about = "as eager-out, but subtracts in the input type: fewer bytes, rounded differences"
        made.append(_eager_out(op, "eager-out-lean", about, None, 2.0**-7))
        made.append(_v2drop(op))
    made += [_compiled(op), _copy(op)]
    return {p.name: p for p in made}


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
