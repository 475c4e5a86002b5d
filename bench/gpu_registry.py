"""The registry of the GPU check: which groups and trials there are, with their targets, in the order in which they run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from gpu_candidates import Candidate
from gpu_inputs import BF16, FP16, FP32, IMAGE, IMAGES, LONG, QUARTER, VIDEO, VIDEOS
from gpu_problems import attention, backward, compiled_drop, drop, extras, gather, ragged, score, select
from gpu_targets import COMPILED, COPIES, READS, Target, at_least, at_most, faster, within
from gpu_timer import HostTimer
from gpu_trials import Trial, host, launches, memory, more_launches, relengthed, repeated
from registry import Case, moved_bytes


class Group(NamedTuple):
    """Candidates on one problem. Modes: cold and warm are GPU time of a graph, eager is wall time, host is the host's share."""

    name: str
    op: str
    case: Case
    build: Callable[[Case, HostTimer], list[Candidate]]
    modes: tuple[str, ...] = ("cold",)
    targets: tuple[Target, ...] = ()
    moved: int = 0
    needs: int = 0  # bytes of memory, where that may be too much


def _drop_group(case: Case, *targets: Target) -> Group:
    modes = ("cold", "warm") if case in (IMAGE, VIDEO) else ("cold",)
    moved, kept_bytes = moved_bytes("drop", case), case.batch * case.k * case.row_bytes
    # Inputs and what eager makes of them, both sides of the copy, and a result for each of six graphs.
    needs = 2 * case.input_bytes + moved + 6 * kept_bytes
    return Group(f"drop {case}", "drop", case, drop, modes, targets, moved, needs)


def _compile_group(case: Case, *targets: Target) -> Group:
    modes = ("cold", *sorted({target.mode for target in targets} - {"cold"}))
    return Group(f"compile {case}", "drop", case, compiled_drop, modes, targets, moved_bytes("drop", case))


def _copy_target(limit: float, where: str) -> Target:
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


def _attention_group(batch: int, n: int, heads: int, kv_heads: int, *targets: Target) -> Group:
    case = Case(batch, n, 128, Fraction(1))
    modes = ("cold", "warm") if n < 8192 else ("cold",)
    build = functools.partial(attention, heads=heads, kv_heads=kv_heads)
    moved = batch * n * (kv_heads * case.row_bytes + 4)  # the keys in, float32 scores out
    return Group(f"attention {heads}/{kv_heads} {case}", "attention", case, build, modes, targets, moved)


def _gather_group(heads: int) -> Group:
    case, layers = (Case(1, 16384, 128, QUARTER), 4) if heads else (Case(1, 16384, 4096, QUARTER), 1)
    what, limit = (f"K and V of {layers} layers [1, {heads}, N, 128]", 1.15) if heads else ("gather of given rows", 1.10)
    targets = tuple(
        at_most("2", f"{what} over a copy of the same bytes, {kind}", limit, within(*COPIES, own=f"{{}}@{kind}"))
        for kind in ("random", "clustered")
    )
    width = 2 * layers * heads * 128 * 2 if heads else case.row_bytes
    return Group(f"{what} {case}", "compact", case, functools.partial(gather, heads=heads, layers=layers), ("cold",), targets,
                 2 * case.k * width)  # fmt: skip


def _select_group(batch: int, n: int) -> Group:
    case = Case(batch, n, 1, QUARTER)
    limit = 3.0 if n > 8192 else 4.0
    targets = (
        at_least("8", f"select over torch.topk and a sort of the indices, B={batch} N={n}", limit, faster("topk+sort"), "warm"),
        *(
            at_most("9", f"select of {what} over random scores, B={batch} N={n}", 1.5, within("{}", own=f"{{}}@{kind}"), "warm")
            for kind, what in (("equal", "equal scores"), ("three", "three values"), ("nan", "NaN"))
        ),
    )
    return Group(f"select {case}", "select", case, select, ("warm",), targets, moved_bytes("select", case))


def _extras_group(case: Case, layers: int) -> Group:
    added = lambda t, o: (t[f"{o}@kv"] - t[o]) / min(t[n] for n in ("copy-kv", "copy-kv-kernel"))
    targets = (
        at_most("11", f"drop with M-RoPE ids and a mask over without, {case}", 1.02, within("{}", own="{}@ids")),
        at_most("11", f"what K and V of {layers} layers add over a copy of their bytes, {case}", 1.10, added),
    )
    build = functools.partial(extras, layers=layers)
    return Group(f"extras {case} {layers} layers", "drop", case, build, ("cold",), targets, moved_bytes("drop", case))


def _eager_target(limit: float, where: str) -> Target:
    return at_least("7", f"drop over view-based eager, {where}", limit, faster("eager"))


def _compile_target(limit: float, where: str) -> Target:
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
            _drop_group(IMAGES, _copy_target(1.20, "B=8 N=576")),
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
            _drop_group(VIDEO, _copy_target(1.30, "B=1 N=6272"), _eager_target(3.0, "B=1 N=6272")),
            _drop_group(VIDEOS, _copy_target(1.15, "B=8 N=6272"), _eager_target(1.8, "B=8 N=6272")),
        ],
        "long": [
            _drop_group(LONG, _copy_target(1.08, "B=1 N=65536"), _eager_target(1.6, "B=1 N=65536")),
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
            _compile_group(VIDEO, _compile_target(2.2, "B=1 N=6272")),
            _compile_group(LONG, _compile_target(1.0, "B=1 N=65536")),
            _compile_group(VIDEOS, _compile_target(1.2, "B=8 N=6272")),
            Group(f"max-autotune {IMAGE}", "drop", IMAGE, functools.partial(compiled_drop, modes=COMPILED[2:]), ("cold",), (),
                  moved_bytes("drop", IMAGE)),
        ],
        # Most of these have no target; other batches, keep ratios and widths were asked for.
        "sizes": [
            _drop_group(big, _copy_target(1.15, "B=32 N=576")),
            _drop_group(Case(32, 6272, 3584, QUARTER)),
            *(_drop_group(case._replace(ratio=r)) for r in (Fraction(1, 20), Fraction(1, 2)) for case in (IMAGE, VIDEO, LONG)),
            _drop_group(Case(64, 576, 4096, QUARTER)),
            *(_drop_group(Case(1, 6272, d, QUARTER)) for d in (2560, 4096, 5120, 8192)),
            *(_drop_group(LONG._replace(batch=batch)) for batch in (8, 32)),
        ],
    }  # fmt: skip
