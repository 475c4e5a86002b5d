"""The Triton kernels, compiled for real targets without a GPU, exactly as their launchers would (see support/compiled.py)."""

from __future__ import annotations

import re

import pytest
import torch
from support.cases import cross
from support.compiled import SM90, SM100, SM120, Compiled, compile_for, every_target, hidden, recorded, specialize

from v2drop_kernels.backends import configs, launch
from v2drop_kernels.backends.requests import (
    AttentionRequest,
    CompactBackwardRequest,
    CompactRequest,
    CosineRequest,
    DropRequest,
    KeyNormRequest,
    ScoreBackwardRequest,
    Source,
    TopKRequest,
)
from v2drop_kernels.core.plan import CuPlan, Plan
from v2drop_kernels.core.types import GatherSpec
from v2drop_kernels.ops.attention_score.triton import attention_score
from v2drop_kernels.ops.compact.triton import compact_, compact_backward, gather
from v2drop_kernels.ops.drop_tokens.triton import drop_tokens
from v2drop_kernels.ops.similarity.triton import cosine_to_pivots, key_norm
from v2drop_kernels.ops.topk.triton import launch_select, topk
from v2drop_kernels.ops.variation_score.triton import variation_score, variation_score_backward

pytestmark = pytest.mark.compile_only


def everything(n: int, layers: int = 32) -> list[GatherSpec]:
    """Hidden states, K and V of ``layers`` layers, M-RoPE ids and a mask."""
    kv = [GatherSpec(torch.empty(1, 4, n, 128, dtype=torch.bfloat16), 0, 2) for _ in range(2 * layers)]
    ids, mask = torch.empty(3, 1, n, dtype=torch.int64), torch.empty(1, n, dtype=torch.bool)
    return [GatherSpec(hidden(n), 0, 1), *kv, GatherSpec(ids, 1, 2), GatherSpec(mask, 0, 1)]


def uniform(n: int) -> Plan:
    return Plan(1, n, n // 4, 1, (0, n, 0, n // 4), None)


def table(n: int) -> Plan:
    return Plan(1, n, n // 4, 2, None, (0, 0, n // 2, 0, n // 8, 0, 0, 0, n // 2, 0, n // 2, 0, n // 8, n // 8, 0, 0))


def drop(n: int, parts: list[GatherSpec], plan: Plan | None = None, mask: torch.Tensor | None = None) -> None:
    drop_tokens(DropRequest(Source(None, hidden(n), hidden(n), mask), plan or uniform(n), None, parts))


def has_pdl(compiled: Compiled) -> bool:
    return "griddepcontrol" in compiled.asm.get("ptx", "")


WIDE = ["select_count_fwd", "select_split_fwd", "select_place_fwd"]  # the select by many programs per segment

SCORES = [
    ("l2", 4096, torch.bfloat16, None),
    ("l2", 4096, torch.float32, None),
    ("l2", 4096, torch.bfloat16, torch.bfloat16),
    ("l1", 4096, torch.float16, None),
    ("cosine", 4096, torch.bfloat16, None),
    ("l2", 3584, torch.bfloat16, None),
    ("cosine", 576, torch.float16, None),
]


@every_target
@pytest.mark.parametrize(("metric", "d", "dtype", "score_dtype"), SCORES, ids=lambda x: str(x).removeprefix("torch."))
def test_variation_score(target, metric, d, dtype, score_dtype):
    with recorded(target) as launches:
        variation_score(Source(None, hidden(576, d, dtype), hidden(576, d, dtype), None, metric, score_dtype))
    (score,) = launches
    compiled = compile_for(target, score)
    assert not has_pdl(compiled)
    if target.backend != "cuda":
        return
    # Rows come in 16-byte loads only, of both tensors; the one narrow access is the store of the scores.
    loads = 2 * -(-d // score.meta["BLOCK_D"])
    assert compiled.accesses("LDG") == ["128"] * loads
    assert compiled.accesses("STG") == ["32"]
    # All are issued before the first is used; ptxas lets only half of them be in flight in the small float32 body.
    before_use = re.split(r"\b(?:FADD|FFMA|HADD2\.F32)\b", compiled.sass)[0]
    assert before_use.count("LDG.") >= (loads if dtype != torch.float32 else loads // 2)
    if d == 4096:
        assert compiled.registers <= 64


@every_target
@pytest.mark.parametrize("n", [576, 2048, 4096, 6272, 65536])
def test_topk(target, n):
    with recorded(target) as launches:
        topk(TopKRequest(Source(torch.empty(1, n), None, None), uniform(n), None, "position"))
    assert [x.name for x in launches] == (["select_fwd"] if n <= 4096 else WIDE)
    for item in launches:
        compile_for(target, item)


@every_target
@cross(kind=["uniform", "table", "cu"], chunk=[0, 512], n=[576, 4500, 20000], masked=[False, True], values=[False, True])
def test_select(target, kind, chunk, n, masked, values, monkeypatch):
    """Every form of the select: nothing spills, and a select that follows the score kernel reads nothing before its wait."""
    monkeypatch.setattr(configs, "wide_chunk", lambda n, groups, longest: chunk)
    scores, mask, cu, new_cu = torch.empty(1, 2 * n), None, None, None
    plan = {"uniform": Plan(1, 2 * n, n // 4, 1, (3, n, 5, n // 4)), "table": table(2 * n)}.get(kind)
    if plan is None:
        plan, cu = CuPlan(n, (5,) * 32, 160, not values), torch.empty(33, dtype=torch.int32)
        new_cu = None if values else torch.empty(33, dtype=torch.int32)
    if masked:
        mask = torch.empty(1, 2 * n, dtype=torch.bool)
    keep, chosen = torch.empty(1, plan.out_rows, dtype=torch.int64), torch.empty(1, plan.out_rows) if values else None
    waits = target in (SM90, SM100, SM120)
    with recorded(target) as launches:
        tables = launch.tables_of(plan, scores.device)
        launch_select(keep, chosen, new_cu, scores, mask, plan, cu, tables, force=not values, waits=waits, triggers=waits)
    assert [x.name for x in launches] == (WIDE if chunk else ["select_fwd"])
    for item in launches:
        ptx = compile_for(target, item).asm.get("ptx", "")
        if waits:
            assert ptx.index("griddepcontrol.wait") < ptx.index("ld.global")


def test_many_programs_select_where_that_is_faster():
    """By the model in configs.py: long segments of few items; a batch that fills the SMs has one program per segment."""
    for n, batch, many in (
        (2048, 1, False),
        (2049, 1, False),
        (6272, 1, True),
        (6272, 8, True),
        (65536, 1, True),
        (6272, 512, False),
    ):
        assert bool(configs.wide_chunk(n, batch, n)) == many, (n, batch)
    for n in (6272, 65536, 1 << 20):
        chunk = configs.wide_chunk(n, 1, n)
        assert chunk <= configs.WIDE_CHUNK_MAX < 1 << 15  # counts of 16 bits, in the sign's half too
        assert n / chunk <= max(configs.WIDE_CHUNKS, n / configs.WIDE_CHUNK_MAX)


@every_target
def test_topk_by_score_of_device_lengths(target):
    plan = CuPlan(9000, (5,) * 32, 5, False)
    with recorded(target) as launches:
        topk(TopKRequest(Source(torch.empty(9000), None, None), plan, torch.empty(33, dtype=torch.int32), "score"))
    assert [x.name for x in launches] == ["select_fwd", "rank_fwd"]
    for item in launches:
        assert has_pdl(compile_for(target, item)) == (target in (SM90, SM100, SM120))


@every_target
@pytest.mark.parametrize("n", [512, 1024, 2048, 6272])
@pytest.mark.parametrize("kv", [False, True], ids=["hidden", "kv"])
def test_drop(target, n, kv):
    with recorded(target) as launches:
        drop(n, everything(n) if kv else [GatherSpec(hidden(n), 0, 1)])
    names = ["variation_score_fwd", *([] if n <= 2048 else WIDE), "gather_fwd"]
    assert [x.name for x in launches] == names
    compiled = [compile_for(target, x) for x in launches]
    assert {has_pdl(x) for x in compiled} == {target in (SM90, SM100, SM120)}
    if target.backend != "cuda":
        return
    loads, stores = compiled[-1].accesses("LDG"), compiled[-1].accesses("STG")
    # Hidden states and K/V move by 16 bytes. Narrower are, where the select is fused, the scores (32) and keep (64), and
    # the small arrays: ids (64) and mask (8).
    narrow = {"64"} | ({"8"} if kv else set())
    assert set(stores) - narrow <= {"128"}
    assert set(loads) - narrow - ({"32"} if n <= 2048 else set()) <= {"128"}
    assert loads.count("128") == stores.count("128") > 0
    if not kv and n > 2048:
        assert set(stores) == {"128"}


@every_target
@pytest.mark.parametrize("n", [2048, 8192, 9000, 20000])
def test_drop_table_and_mask(target, n):
    with recorded(target) as launches:
        drop(n, [GatherSpec(hidden(n), 0, 1)], table(n), torch.empty(1, n, dtype=torch.bool))
    assert len(launches) == {2048: 2, 8192: 3, 9000: 3, 20000: 5}[n]  # segments of half as many rows
    for item in launches:
        compile_for(target, item)


@every_target
def test_drop_device_lengths(target):
    h, plan = hidden(9000)[0], CuPlan(9000, (5,) * 32, 160, True)
    with recorded(target) as launches:
        drop_tokens(DropRequest(Source(None, h, h), plan, torch.empty(33, dtype=torch.int32), [GatherSpec(h, -1, 0)]))
    assert [x.name for x in launches] == ["variation_score_fwd", "select_fwd", "gather_fwd"]
    for item in launches[:2]:
        compile_for(target, item)


@every_target
def test_backward(target):
    n = 2048
    keep = torch.empty(1, n // 4, dtype=torch.int64)
    with recorded(target) as launches:
        variation_score_backward(
            ScoreBackwardRequest(torch.empty(1, n), Source(None, hidden(n), hidden(n), None, "cosine"), True, True)
        )
        compact_backward(CompactBackwardRequest(keep, [GatherSpec(hidden(n // 4), 0, 1)], n))
    assert [x.name for x in launches] == ["variation_score_bwd", "invert_fwd", "gather_fwd"]
    score, _, gathered = (compile_for(target, x) for x in launches)
    if target.backend == "cuda":
        assert set(score.accesses("STG")) == set(gathered.accesses("STG")) == {"128"}


def innermost_loop(compiled: Compiled, holds: str) -> list[str]:
    """The shortest loop of the SASS that holds an instruction, by its backward branch."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", compiled.sass, re.MULTILINE)
    at = {int(address, 16): i for i, (address, _) in enumerate(found)}
    loops = []
    for i, (address, text) in enumerate(found):
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < int(address, 16):
            loops.append([text for _, text in found[at[int(branch[1], 16)] : i + 1]])
    return min((loop for loop in loops if any(holds in text for text in loop)), key=len)


@pytest.mark.parametrize("tensors", [1, 64, 128])
def test_a_gather_picks_a_tensor_once(tensors):
    """The loop over pieces of 8 KB has as few instructions for many tensors as for one, and reads no addresses."""
    kv = [GatherSpec(torch.empty(1, 4, 6272, 128, dtype=torch.bfloat16), 0, 2)] * tensors
    with recorded(SM90) as launches:
        gather(torch.empty(1, 1568, dtype=torch.int64), kv, 6272)
    (item,) = launches
    loop = innermost_loop(compile_for(SM90, item), "STG.E.128")
    assert sum("LDG.E.128" in text for text in loop) == sum("STG.E.128" in text for text in loop) == 4  # 8 KB by 128 threads
    assert len(loop) <= 120, len(loop)


@pytest.mark.parametrize(("n", "batch", "kv"), [
    (576, 1, False), (576, 8, False), (576, 32, False), (576, 96, False), (2048, 1, False), (2048, 8, False), (576, 1, True),
    (576, 8, True), (2048, 8, True),
])  # fmt: skip
def test_a_gather_that_selects_is_one_wave(n, batch, kv):
    """Every program repeats the select, so none should start when another has ended.

    Batches of more than 105 such items have more tiles of 32 rows than fit; narrower pieces would cost more than a second select.
    """
    h = torch.empty(1, n, 4096, dtype=torch.bfloat16).expand(batch, -1, -1)
    parts = [GatherSpec(h, 0, 1)]
    if kv:
        parts += [GatherSpec(torch.empty(1, 4, n, 128, dtype=torch.bfloat16).expand(batch, -1, -1, -1), 0, 2)] * 64
    with recorded(SM90) as launches:
        drop_tokens(DropRequest(Source(None, h, h), Plan(batch, n, n // 4, batch, (0, n, 0, n // 4)), None, parts))
    item = launches[-1]
    threads = 32 * item.meta["num_warps"]
    resident = 65536 // (-(-compile_for(SM90, item).registers // 8) * 8 * threads)  # an SM hands out registers by 8 per thread
    assert 1 <= item.programs / 132 <= resident


@every_target
def test_compact_in_place(target):
    with recorded(target) as launches:
        compact_(CompactRequest(torch.empty(1, 512, dtype=torch.int64), everything(2048)))
    assert [x.name for x in launches] == ["compact_inplace"]
    compiled = compile_for(target, launches[0])
    if target.backend == "cuda":
        assert {"64", "8"} <= set(compiled.accesses("STG")) <= {"128", "64", "8"}


def test_launches_of_many_tensors():
    """Up to 128 tensors share a launch and its 4 KB of parameters; 400 take three more."""
    for tensors, launches_wanted in ((128, 2), (129, 3), (400, 5)):
        with recorded(SM90) as launches:
            drop(64, [GatherSpec(torch.empty(1, 64, 128), 0, 1)] * tensors)
        assert len(launches) == launches_wanted
    with recorded(SM90) as launches:
        drop(64, [GatherSpec(torch.empty(1, 64, 128), 0, 1)] * 128)
    header = compile_for(SM90, launches[1]).asm["ptx"].split("{", 1)[0]
    assert 8 * header.count(".param") <= 4096


@pytest.mark.parametrize("plan", [uniform, table])
def test_new_lengths_do_not_recompile(plan):
    """Lengths that share a configuration compile to the same kernels, whatever divides them."""
    sources = []
    for n in (576, 640, 1000):
        with recorded(SM90) as launches:
            drop(n, everything(n, layers=2), plan(n))
        sources.append([specialize(SM90, x)[0].hash() for x in launches])
    assert sources[0] == sources[1] == sources[2]


@every_target
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_upload(target, dtype):
    """Integers travel as arguments: 256 a launch at the most, the rest in a smaller one; other integers are the same kernel."""
    sources = []
    for first in (0, 1 << 40):
        with recorded(target) as launches:
            launch.upload(range(first, first + 300), torch.device("cpu"), dtype)
        assert [x.name for x in launches] == ["upload_fwd"] * 2
        sources.append([specialize(target, x)[0].hash() for x in launches])
    assert sources[0] == sources[1]
    for item in launches:
        compile_for(target, item)


ATTENTIONS = [  # B, H, Hkv, Q, S, Dh
    (1, 32, 32, 1, 576, 128),
    (1, 28, 4, 1, 65536, 128),
    (2, 32, 8, 1, 6272, 64),
    (1, 28, 4, 24, 6272, 128),
    (1, 8, 2, 1, 900, 80),
    (1, 1, 1, 1, 577, 1024),
]


def attend(b, h, h_kv, n, s, d, dtype=torch.bfloat16, mode="softmax", heads="mean", queries="mean", masks=True):
    flags = torch.empty(b, s, dtype=torch.bool) if masks else None
    q, k = torch.empty(b, h, n, d, dtype=dtype), torch.empty(b, h_kv, s, d, dtype=dtype)
    attention_score(AttentionRequest(q, k, torch.empty(b, n, dtype=torch.int64), flags, flags, True, 0.1, mode, heads, queries))


@every_target
@pytest.mark.parametrize("shape", ATTENTIONS, ids=lambda x: "-".join(map(str, x)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_attention_score(target, shape, dtype):
    """One launch reads the keys, by 16 bytes; one reduces."""
    with recorded(target) as launches:
        attend(*shape, dtype=dtype)
    assert [x.name for x in launches] == ["attention_logits_fwd", "attention_score_fwd"]
    logits, score = (compile_for(target, x) for x in launches)
    assert {has_pdl(logits), has_pdl(score)} == {target in (SM90, SM100, SM120)}
    if target.backend != "cuda":
        return
    # Keys and queries go to shared memory by 16 bytes, past the registers; loads to these are masks (8) and row numbers (64).
    assert set(logits.accesses("LDGSTS.E")) == {"128"}
    assert set(logits.accesses("LDG")) <= {"8", "64"}
    assert set(logits.accesses("STG")) == set(score.accesses("STG")) == {"32"}


@every_target
@pytest.mark.parametrize("mode", ["softmax", "dot"])
def test_attention_score_of_the_best_heads(target, mode):
    with recorded(target) as launches:
        attend(1, 32, 8, 4, 6272, 128, mode=mode, heads=14, queries="l2", masks=False)
    assert [x.name for x in launches] == ["attention_logits_fwd", "attention_shares_fwd", "attention_score_fwd"]
    for item in launches:
        assert has_pdl(compile_for(target, item)) == (target in (SM90, SM100, SM120))


@every_target
@pytest.mark.parametrize("mode", ["softmax", "dot"])
def test_attention_score_of_the_largest_head(target, mode):
    with recorded(target) as launches:
        attend(1, 32, 8, 1, 576, 128, mode=mode, heads="max")
    for item in launches:
        compile_for(target, item)


def test_attention_score_works_off_many_queries_in_chunks():
    """256 queries of 32 heads would leave 2 GB of logits of 65536 keys; at most 64 MB, or one query's, are there at a time."""
    with recorded(SM90) as launches:
        attend(1, 32, 8, 256, 65536, 128)
    assert len(launches) == 2 * 32
    assert max(x.args[0].numel() for x in launches[::2]) <= 1 << 24


@every_target
@pytest.mark.parametrize(("dtype", "norm"), [(torch.bfloat16, "l1"), (torch.float32, "l2")], ids=str)
@pytest.mark.parametrize("d", [64, 128, 80])
def test_key_norm(target, dtype, norm, d):
    with recorded(target) as launches:
        key_norm(KeyNormRequest(torch.empty(1, 8, 6272, d, dtype=dtype), norm))
    assert [x.name for x in launches] == ["key_norm_fwd"]
    compiled = compile_for(target, launches[0])
    if target.backend == "cuda":
        assert set(compiled.accesses("LDG")) == {"128"}


@every_target
@pytest.mark.parametrize(
    ("dtype", "p", "d"), [(torch.bfloat16, 8, 4096), (torch.float32, 8, 3584), (torch.float16, 40, 1152)], ids=str
)
def test_cosine_to_pivots(target, dtype, p, d):
    with recorded(target) as launches:
        cosine_to_pivots(CosineRequest(hidden(6272, d, dtype), torch.empty(1, p, dtype=torch.int64)))
    assert [x.name for x in launches] == ["cosine_to_pivots_fwd"]
    compiled = compile_for(target, launches[0])
    if target.backend == "cuda":
        assert set(compiled.accesses("LDG", "LDGSTS.E")) <= {"128", "64"}  # the rows; the pivots' numbers


def test_new_attention_lengths_do_not_recompile():
    sources = []
    for n, s in ((1, 576), (1, 601), (1, 640)):
        with recorded(SM90) as launches:
            attend(1, 28, 4, n, s, 128)
            cosine_to_pivots(CosineRequest(hidden(s), torch.empty(1, 8, dtype=torch.int64)))
            key_norm(KeyNormRequest(torch.empty(1, 8, s, 128), "l1"))
        sources.append([specialize(SM90, x)[0].hash() for x in launches])
    assert sources[0] == sources[1] == sources[2]
