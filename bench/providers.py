"""Who computes an op: this package, PyTorch in several ways, V2Drop's published code, and a copy of as many bytes.

A provider is built once per case, so that buffers and compilation are not timed, and is then called with the inputs. No
provider is timed before ``verify.verified`` has compared its result with ``v2drop_kernels.reference``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness import touch
from registry import Case, Inputs, moved_bytes

import v2drop_kernels as vk
from v2drop_kernels.backends import choice


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
