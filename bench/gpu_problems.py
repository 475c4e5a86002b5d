"""A function for each kind of problem, which builds all its candidates on the device with a check of each result."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from gpu_candidates import (
    Candidate,
    copies,
    eager_drop,
    eager_gather,
    eager_select,
    flashinfer,
    one_block,
    ours,
    peers,
    published_drop,
    reads,
    run_drop,
)
from gpu_checks import EXACT, ROUNDED, kept, same, segments_kept
from gpu_inputs import FP32, bind, rotations, scaled, scored
from gpu_targets import COMPILED
from gpu_timer import HostTimer
from registry import Case, Inputs, moved_bytes
from verify import same_scores

import v2drop_kernels as vk
from v2drop_kernels import reference
from v2drop_kernels.backends.choice import runner_of
from v2drop_kernels.backends.requests import CompactBackwardRequest
from v2drop_kernels.core.types import GatherSpec
from v2drop_kernels.ops.compact.torch_op import BACKWARD as COMPACT_BACKWARD


def drop(case: Case, timer: HostTimer) -> list[Candidate]:
    """The whole step beside what it could be replaced by, but for torch.compile."""
    xs = rotations(case, timer)
    exact, rounded = kept(xs[0], EXACT), kept(xs[0], ROUNDED)

    def topk_gather(x: Inputs) -> Any:  # a lenient baseline: scores given, order as it comes
        chosen = x.scores.topk(case.k, dim=-1, sorted=False).indices
        return chosen, eager_gather(x.h_cur, chosen)

    def any_order(found: Any) -> str | None:
        keep, order = found[0].sort(dim=-1)
        return exact((keep, torch.take_along_dim(found[1], order[..., None], 1)))

    tokens = torch.arange(case.n, device=timer.device)
    return [
        *ours(case, timer, xs, functools.partial(run_drop, case.k), exact, launch_modes=True),
        one_block(timer),
        *copies(timer, moved_bytes("drop", case), len(xs)),
        Candidate("eager", bind(functools.partial(eager_drop, case.k), xs), rounded),
        Candidate("v2drop", bind(functools.partial(published_drop, case.k, tokens), xs), rounded),
        Candidate("topk+gather", bind(topk_gather, xs), any_order),
        *flashinfer(case, xs, any_order),
    ]


def compiled_drop(case: Case, timer: HostTimer, modes: Sequence[str] = COMPILED[:2]) -> list[Candidate]:
    """The whole step beside torch.compile of the plain reference; a dry run only traces it."""
    torch._dynamo.reset()
    xs, k = rotations(case, timer), case.k
    exact = kept(xs[0], EXACT)

    def step(h_prev: torch.Tensor, h_cur: torch.Tensor) -> Any:
        keep = eager_select(torch.linalg.vector_norm(h_cur.float() - h_prev.float(), dim=-1), k)
        return keep, eager_gather(h_cur, keep)

    made = ours(case, timer, xs, functools.partial(run_drop, k), exact)
    for name in modes:
        mode = name.removeprefix("compile").removeprefix("-")
        options: dict[str, Any] = {"mode": mode or "default"} if timer.device.type == "cuda" else {"backend": "eager"}
        run = torch.compile(step, fullgraph=True, dynamic=False, **options)
        # All modes but the default replay graphs of their own, whose results the next call overwrites.
        made.append(Candidate(name, [functools.partial(run, x.h_prev, x.h_cur) for x in xs], exact, captured=not mode))
    return made


def score(case: Case, timer: HostTimer) -> list[Candidate]:
    xs = rotations(case, timer)
    check = lambda found: same_scores(found, xs[0].scores.cpu(), EXACT)
    run = lambda backend, x: vk.variation_score(x.h_prev, x.h_cur, backend=backend)
    both = [(x.h_prev, x.h_cur) for x in xs]
    return [*ours(case, timer, xs, run, check), *reads(both), *copies(timer, moved_bytes("score", case), len(xs))]


def attention(case: Case, timer: HostTimer, heads: int, kv_heads: int) -> list[Candidate]:
    """What one query per head gives to all keys, mean over heads; its row is a table that the layers of a model share."""
    g = torch.Generator(timer.device).manual_seed(0)
    # Of -1, 0 and 1, every logit is exact in any order of summation, and in bfloat16 too until it is scaled; scaled, it stays below
    # 8 (12 standard deviations). So a weight's exponent is below 16 and rounded three times: 3 * 16 * 2**-24 of the weight, and of
    # their sum, are 6e-6 of EXACT. The rest is for sums in blocks, whence float64: PyTorch's own over 65536 keys is 8e-6 off.
    q, k = (
        torch.randint(-1, 2, (case.batch, h, n, case.d), generator=g, device=timer.device, dtype=torch.int8).to(case.dtype)
        for h, n in ((heads, 1), (kv_heads, case.n))
    )
    rows = torch.full((case.batch, 1), case.n - 1, device=timer.device)
    keys = [k, *(k.clone() for _ in range(-(-timer.cold_bytes // k.nbytes) - 1))]
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
        *ours(case, timer, keys, run, lambda found: same_scores(found, expected, EXACT)),
        *reads([[k] for k in keys]),
        Candidate("eager", bind(eager, keys), lambda found: same_scores(found, expected, 2.0**-4)),
    ]


def select(case: Case, timer: HostTimer) -> list[Candidate]:
    """Scores as a layer leaves them, in L2; and such that tie, or are NaN."""
    g = torch.Generator(timer.device).manual_seed(0)
    scores = torch.randn(case.batch, case.n, generator=g, device=timer.device)
    kinds = {
        "": scores,
        "@equal": torch.ones_like(scores),
        "@three": torch.randint(0, 3, scores.shape, generator=g, device=timer.device).float(),
        "@nan": torch.full_like(scores, torch.nan),
    }
    made = []
    for suffix, values in kinds.items():
        expected = reference.segmented_topk(values, case.k).indices
        run = lambda backend, x: vk.segmented_topk(x, case.k, backend=backend).indices
        made += ours(case, timer, [values], run, same(expected, "indices"), suffix)
    expected = reference.segmented_topk(scores, case.k).indices
    ascending = lambda found: same(expected, "indices")(found.sort(dim=-1).values)
    made.append(Candidate("topk+sort", [lambda: eager_select(scores, case.k)], same(expected, "indices")))
    made.append(Candidate("topk", [lambda: scores.topk(case.k, dim=-1, sorted=False).indices], ascending))
    return [*made, *peers(case, scores, ascending)]


def gather(case: Case, timer: HostTimer, heads: int = 0, layers: int = 4) -> list[Candidate]:
    """Given rows of the hidden states, random and in runs; with ``heads``, of K and V ``[B, H, N, 128]`` of some layers instead."""
    g = torch.Generator(timer.device).manual_seed(0)
    scores = torch.rand(case.batch, case.n, generator=g, device=timer.device)
    runs = torch.rand(case.batch, -(-case.n // 32), generator=g, device=timer.device).repeat_interleave(32, dim=1)
    keeps = {
        "@random": scores.topk(case.k).indices.sort().values,
        "@clustered": runs[:, : case.n].topk(case.k).indices.sort().values,
    }
    shape = (case.batch, heads, case.n, 128) if heads else (case.batch, case.n, case.d)
    made: list[Candidate] = []
    tensors = [torch.randn(shape, generator=g, device=timer.device).to(case.dtype) for _ in range(2 * layers if heads else 1)]
    nothing = torch.empty(case.batch, case.n, 1, dtype=case.dtype, device=timer.device)
    sets = [tensors]
    size = sum(t.nbytes for t in tensors)
    while len(sets) * size < timer.cold_bytes:
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

        made += ours(case, timer, sets, run, check, suffix)
        rows = lambda x, keep=keep, index=index: (
            [torch.take_along_dim(t, index, -2) for t in x] if heads else [eager_gather(x[0], keep)]
        )
        made.append(Candidate(f"eager{suffix}", [functools.partial(rows, x) for x in sets], check))
    return [*made, *copies(timer, 2 * sum(e.nbytes for e in expected), len(sets))]


def ragged_lengths(case: Case) -> list[int]:
    """From n / 98 to n, each as many times longer than the one before."""
    return [max(round(case.n / 98 * 98 ** (i / max(case.batch - 1, 1))), 2) for i in range(case.batch)]


def ragged(case: Case, timer: HostTimer) -> list[Candidate]:
    """A packed batch of lengths from n / 98 to n beside a dense one of as many tokens, and kept tokens in runs."""
    lengths = ragged_lengths(case)
    flat = case._replace(batch=1, n=sum(lengths))
    dense = case._replace(n=sum(lengths) // case.batch)
    offsets = [sum(lengths[:i]) for i in range(case.batch + 1)]
    ks = [vk.n_keep(n, case.ratio) for n in lengths]
    made: list[Candidate] = []
    for suffix, clustered in (("", False), ("-in-runs", True)):
        x = scored(flat, *scaled(flat, timer, clustered))

        def packed(backend: str, x: Inputs) -> Any:
            out = vk.drop_tokens(x.h_prev[0], x.h_cur[0], ks, cu_seqlens=offsets, backend=backend)
            return out.keep, out.hidden

        made += ours(case, timer, [x], packed, segments_kept(x, offsets, ks), f"@ragged{suffix}")
        y = scored(dense, *scaled(dense, timer, clustered))
        made += ours(dense, timer, [y], functools.partial(run_drop, dense.k), kept(y, EXACT), f"@dense{suffix}")
    return made


def extras(case: Case, timer: HostTimer, layers: int) -> list[Candidate]:
    """What comes along: M-RoPE ids and a mask; K and V of some layers, four heads of 128."""
    xs = rotations(case, timer)
    layers = layers if timer.device.type == "cuda" else 1
    b, n = case.batch, case.n
    ids = torch.arange(n, device=timer.device).expand(3, b, n).contiguous()
    mask = torch.ones(b, n, dtype=torch.bool, device=timer.device)
    kv = [torch.randn(b, 4, n, 128, device=timer.device).to(case.dtype) for _ in range(2 * layers)]

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
        *ours(case, timer, xs, run, check),
        *ours(case, timer, xs, functools.partial(run, position_ids=ids, attention_mask=mask), check, "@ids"),
        *ours(case, timer, xs, functools.partial(run, kv=kv), check, "@kv"),
        *copies(timer, 2 * layers * 2 * b * 4 * case.k * 128 * case.dtype.itemsize, 1, "copy-kv"),
    ]


def backward(case: Case, timer: HostTimer) -> list[Candidate]:
    g = torch.Generator(timer.device).manual_seed(0)
    keep = torch.rand(case.batch, case.n, generator=g, device=timer.device).topk(case.k).indices.sort().values
    grad = torch.randn(case.batch, case.k, case.d, generator=g, device=timer.device).to(case.dtype)
    rows = (keep + torch.arange(0, case.batch * case.n, case.n, device=timer.device)[:, None]).flatten()

    def scattered(_: Any) -> torch.Tensor:
        zeros = torch.zeros(case.batch * case.n, case.d, dtype=case.dtype, device=timer.device)
        return zeros.index_copy_(0, rows, grad.view(-1, case.d)).view(case.batch, case.n, case.d)

    def run(backend: str, grad: torch.Tensor) -> torch.Tensor:
        if backend == "reference":
            return scattered(grad)
        return runner_of(COMPACT_BACKWARD, backend).run(CompactBackwardRequest(keep, [GatherSpec(grad, 0, 1)], case.n))[0]

    check = same(scattered(grad), "gradients")
    moved = case.batch * (case.n + case.k) * case.row_bytes
    return [
        *ours(case, timer, [grad], run, check),
        Candidate("zeros+index_copy", [functools.partial(scattered, grad)], check),
        *copies(timer, moved, 1),
    ]
