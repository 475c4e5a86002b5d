"""The launch sizes that the tuning tries: their keys in the table, candidates around the rule, and what is launched with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from gpu_candidates import Candidate, eager_gather, run_drop
from gpu_checks import EXACT, kept, same
from gpu_inputs import bind, rotations, scaled
from gpu_timer import Call, HostTimer
from registry import Case
from verify import same_scores

import v2drop_kernels as vk

WARPS = (1, 2, 4, 8, 16, 32)
ONE_PROGRAM = 1 << 13  # a chunk that the select by many programs refuses
Values = dict[str, int]
Entries = dict[str, list[dict[str, Any]]]


def power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def key_of(kind: str, case: Case) -> Values:
    """The key of an entry that a case is launched with."""
    n, itemsize = power(case.n), case.dtype.itemsize
    return {
        "score": {"itemsize": itemsize, "d": case.d}, "select": {"n": n}, "fused": {"n": n},
        "gather": {"kept": power(case.batch * case.k)}, "launches": {"n": n, "batch": case.batch},
        "wide": {"n": n, "batch": case.batch},
    }[kind]  # fmt: skip


def candidates_of(kind: str, case: Case) -> list[Values]:
    """What to try: sizes around the rule's, whose keys per thread (4 to 32) stay within reason."""
    threads = lambda keys: [w for w in WARPS if 4 <= keys // (32 * w) <= 32] or [1]
    if kind == "score":
        warp = 32 * 16 // case.dtype.itemsize
        made = []
        for shared, warps in ((1, 4), (2, 4), (4, 4), (2, 8), (4, 8), (8, 8), (16, 16)):
            block = min(warp * shared, power(case.d))
            made.append({"rows": min(warps * warp // block, 256), "block_d": block, "num_warps": warps})
    elif kind == "select":
        held = {power(case.n)} if case.n <= 16384 else {4096, 8192, 16384}
        made = [{"keys": k, "block": min(k, b), "num_warps": w} for k in held for w in threads(k) for b in (2048, 4096)]
    elif kind == "fused":
        made = [{"num_warps": w} for w in threads(power(case.n))]
    elif kind == "gather":
        made = [{"rows": r, "programs": p, "items": i} for r in (8, 16, 32) for p, i in ((1024, 8), (2048, 4), (512, 16))]
    elif kind == "wide":
        made = [{"chunk": x} for x in (max(power(case.n) // share, 32) for share in (32, 64, 128, 256))] + [{"chunk": ONE_PROGRAM}]
    else:
        made = [{"launches": 2}, {"launches": 3}]
    rule = rule_of(kind, case)  # tried anyway; a second time it could win by noise
    return [dict(found) for found in dict.fromkeys(tuple(m.items()) for m in made) if dict(found) != rule]


def rule_of(kind: str, case: Case) -> Values:
    """What holds without a table."""
    from v2drop_kernels.backends import configs

    with configs.override_configs({}):
        found = {
            "score": configs.score_config(case.d, case.dtype.itemsize),
            "select": configs.select_blocks(case.n, False),
            "fused": configs.fused_select_block(case.n)[1:],
            "gather": (configs.gather_rows(case.batch, case.k), 1024, 8),
            "launches": (2 if configs.fuses_select(case.n, case.batch) else 3,),
            "wide": (configs.wide_chunk(case.n, case.batch, case.n) or ONE_PROGRAM,),
        }[kind]
    return dict(zip(configs.KINDS[kind][1], found, strict=True))


def named(values: Values) -> str:
    return "triton@" + ",".join(f"{name}={value}" for name, value in values.items())


def values_of(name: str) -> Values:
    return {key: int(value) for key, value in (part.split("=") for part in name.removeprefix("triton@").split(","))}


def under(entries: Entries, run: Callable[[], Any]) -> Any:
    """A call with these entries and no others."""
    from v2drop_kernels.backends import configs

    with configs.override_configs(entries):
        return run()


# --- what is launched, per kind


def score(case: Case, timer: HostTimer) -> tuple[list[Call], Any]:
    xs = rotations(case, timer)
    run = lambda x: vk.variation_score(x.h_prev, x.h_cur, backend="triton")
    return bind(run, xs), lambda found: same_scores(found, xs[0].scores.cpu(), EXACT)


def select(case: Case, timer: HostTimer) -> tuple[list[Call], Any]:
    g = torch.Generator(timer.device).manual_seed(0)
    scores = torch.randn(case.batch, case.n, generator=g, device=timer.device)
    run = lambda: vk.segmented_topk(scores, case.k, backend="triton").indices
    return [run], same(vk.segmented_topk(scores, case.k, backend="reference").indices, "indices")


def gather(case: Case, timer: HostTimer) -> tuple[list[Call], Any]:
    g = torch.Generator(timer.device).manual_seed(0)
    keep = torch.rand(case.batch, case.n, generator=g, device=timer.device).topk(case.k).indices.sort().values
    rows = [scaled(case, timer)[1]]
    while len(rows) * case.batch * case.k * case.row_bytes < timer.cold_bytes and len(rows) < 64:
        rows.append(rows[0].clone())
    run = lambda h: vk.compact(keep, h, backend="triton").hidden
    return [functools.partial(run, h) for h in rows], same(eager_gather(rows[0], keep), "copied rows")


def drop(case: Case, timer: HostTimer) -> tuple[list[Call], Any]:
    xs = rotations(case, timer)
    return bind(functools.partial(run_drop, case.k, "triton"), xs), kept(xs[0], EXACT)


LAUNCHED = {"score": score, "select": select, "fused": drop, "gather": gather, "launches": drop, "wide": select}
OPS = {"score": "score", "select": "select", "fused": "drop", "gather": "compact", "launches": "drop", "wide": "select"}


def tried(kind: str, chosen: Entries, case: Case, timer: HostTimer) -> list[Candidate]:
    """The rule and its rivals on one case; entries that were chosen before hold for all of them."""
    from v2drop_kernels.backends import choice

    missing = choice.why_not("triton", timer.device.type, case.dtype)
    if missing:
        return [Candidate("triton", missing=missing)]
    calls, check = LAUNCHED[kind](case, timer)
    key = key_of(kind, case)
    fixed = {name: entries for name, entries in chosen.items() if name != kind}
    if kind == "select":  # its sizes matter where one program selects
        fixed["wide"] = [{"n": power(case.n), "batch": case.batch, "chunk": ONE_PROGRAM}]
    if kind == "fused":  # its sizes matter where two launches are made
        fixed["launches"] = [{"n": power(case.n), "batch": case.batch, "launches": 2}]
    made = [Candidate("triton", [functools.partial(under, fixed, call) for call in calls], check)]
    for values in candidates_of(kind, case):
        entries = {**fixed, kind: [{**key, **values}]}
        made.append(Candidate(named(values), [functools.partial(under, entries, call) for call in calls], check))
    return made


def builder(kind: str, chosen: Entries) -> Callable[[Case, HostTimer], list[Candidate]]:
    # A function of its own for every kind: a dry run tries each kind once.
    return KINDS[kind](chosen)


def _of(kind: str) -> Callable[[Entries], Callable[[Case, HostTimer], list[Candidate]]]:
    def build(chosen: Entries, case: Case, timer: HostTimer) -> list[Candidate]:
        return tried(kind, chosen, case, timer)

    return lambda chosen: functools.partial(build, chosen)


KINDS = {kind: _of(kind) for kind in LAUNCHED}
