"""What only an emulated GPU can show: how many kernels a call starts, and that no result depends on the order of its threads."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from support.cases import BATCHES, LARGE, METRICS, companions, every_op, hidden_pair, integers, normal, random_bytes, same, scores
from support.streams import Pool, take_for_eager

import v2drop_kernels as vk
from v2drop_kernels import native as library
from v2drop_kernels.backends import native
from v2drop_kernels.ops.attention_score import native as attention_native

pytestmark = pytest.mark.emulated  # also where the file is named, as the GPU check names it


@pytest.fixture(scope="module")
def started():
    """The kernels started so far in this process."""
    count = ctypes.CDLL(str(Path(library.lib().__file__).parent / "libv2drop.so")).v2drop_emulate_launches
    count.restype = ctypes.c_int64
    return count


@pytest.fixture(scope="module")
def of_kind():
    """The cluster launches and the cooperative launches so far in this process."""
    emulator = ctypes.CDLL(str(Path(library.lib().__file__).parent / "libv2drop.so"))
    counts = [emulator.v2drop_emulate_cluster_launches, emulator.v2drop_emulate_cooperative_launches]
    for count in counts:
        count.restype = ctypes.c_int64
    return lambda: tuple(count() for count in counts)


def launches(started, call):
    before = started()
    call()
    return started() - before


@pytest.mark.parametrize(("mode", "want"), [("cooperative", 1), ("fused", 2), ("separate", 3)])
def test_launches_of_a_drop(on, started, mode, want):
    """Scores, selection, hidden states, ids, keys and values of 8 layers."""
    prev, cur = hidden_pair((2, 70, 16), torch.bfloat16)
    kv = [random_bytes((2, 2, 70, 8), torch.bfloat16, i) for i in range(16)]
    ids = integers((2, 70), torch.int64, "ids")
    with native.launch_mode(mode):
        drop = lambda: vk.drop_tokens(prev, cur, 9, droppable=(5, 68), kv=kv, position_ids=ids, backend=on.backend)
        assert launches(started, drop) == want


def test_launches_of_the_automatic_mode(on, started):
    """One where the hidden states are small; three where more rows compete than the blocks of a gather select by themselves."""
    small, large = hidden_pair((1, 64, 8), torch.bfloat16), hidden_pair((1, 2100, 8), torch.bfloat16)
    assert launches(started, lambda: vk.drop_tokens(*small, 9, backend=on.backend)) == 1
    assert launches(started, lambda: vk.drop_tokens(*large, 9, backend=on.backend)) == 3


def test_a_captured_drop_is_two_launches(on, started, monkeypatch):
    """By the model a dependent launch takes a GPU less than a grid barrier; an eager drop, where the host counts, is one launch."""
    emulator = ctypes.CDLL(str(Path(library.lib().__file__).parent / "libv2drop.so"))
    small = hidden_pair((1, 64, 8), torch.bfloat16)
    want = vk.drop_tokens(*small, 9, backend=on.backend)
    pool = Pool()  # a graph keeps the memory that was allocated during its capture
    with monkeypatch.context() as patch, pool:
        take_for_eager(patch)
        emulator.v2drop_emulate_begin_capture()
        found = vk.drop_tokens(*small, 9, backend=on.backend)
        emulator.v2drop_emulate_end_capture()
    assert launches(started, emulator.v2drop_emulate_replay) == 2
    assert torch.equal(found.keep, want.keep)
    assert torch.equal(found.hidden, want.hidden)
    emulator.v2drop_emulate_drop_capture()
    assert pool.tensors


@pytest.mark.parametrize(("rows", "want"), [(7, 1), (9, 3)])
def test_large_drops_select_in_a_launch_of_their_own(on, started, rows, want):
    """From 16 MiB of hidden states on, by the model: the blocks of a gather that share an SM would select one after the other."""
    given = torch.zeros(2, 1, rows, 1 << 20, dtype=torch.bfloat16)
    assert launches(started, lambda: vk.drop_tokens(*given, 2, backend=on.backend)) == want


@pytest.mark.parametrize("tensors", [1, 128, 129, 400])
def test_launches_of_many_tensors(on, started, tensors):
    """Up to 128 tensors share a launch and its parameters."""
    kv = [random_bytes((1, 1, 9, 2), torch.bfloat16, i) for i in range(tensors)]
    hidden = torch.zeros(1, 9, 0)
    keep = torch.tensor([[1, 4, 8]])
    assert launches(started, lambda: vk.compact(keep, hidden, kv=kv, backend=on.backend)) == -(-tensors // 128)
    got = vk.compact(keep, hidden, kv=kv, backend=on.backend).kv
    same(got, [x[:, :, [1, 4, 8]] for x in kv])


def test_launches_of_the_other_ops(on, started):
    prev, cur = hidden_pair((2, 40, 8), torch.float32)
    scores = cur[..., 0].contiguous()
    counts = {
        "variation_score": lambda: vk.variation_score(prev, cur, backend=on.backend),
        "segmented_topk": lambda: vk.segmented_topk(scores, 5, backend=on.backend),
        "compact": lambda: vk.compact(torch.tensor([[1], [2]]), cur, backend=on.backend),
        "compact_": lambda: vk.compact_(torch.tensor([[1], [2]]), cur.clone().unsqueeze(1), backend=on.backend),
    }
    assert {name: launches(started, call) for name, call in counts.items()} == dict.fromkeys(counts, 1)
    assert launches(started, lambda: vk.variation_topk(prev, cur, 5, backend=on.backend)) == 2


def attention(on, heads="mean", queries=3, rows=300):
    q, k = normal((2, 6, queries, 24), torch.bfloat16, "q"), normal((2, 2, rows, 24), torch.bfloat16, "k")
    droppable = torch.arange(rows).expand(2, -1) % 3 > 0
    return vk.attention_score(q, k, droppable=droppable, heads=heads, queries="l2", backend=on.backend)


@pytest.mark.parametrize(("queries", "want"), [(1, 2), (170, 2), (171, 4)])
def test_launches_of_attention(on, started, queries, want):
    """The logits, then their reduction; 1024 pairs of a query and one of six heads fit one step."""
    assert launches(started, lambda: attention(on, queries=queries, rows=180)) == want


def test_launches_of_the_other_scores(on, started):
    k, x = normal((2, 2, 40, 24), torch.float16, "k"), normal((2, 40, 24), torch.float16, "x")
    assert launches(started, lambda: vk.key_norm_score(k, backend=on.backend)) == 1
    assert launches(started, lambda: vk.cosine_to_pivots(x, torch.tensor([[3, -1], [0, 5]]), backend=on.backend)) == 1


@pytest.mark.parametrize("heads", ["mean", "max", 2])
def test_little_scratch_memory_changes_no_bit_of_attention(on, heads, monkeypatch, started):
    """One query in a step in place of all of them."""
    want = attention(on, heads)
    one = attention_native.workspace_bytes(2, 6, 1, 300)
    monkeypatch.setattr(attention_native, "workspace_bytes", lambda *shape: one)
    assert launches(started, lambda: same(attention(on, heads), want)) == 6


@pytest.fixture(scope="module")
def last_blocks():
    """The blocks of the last kernel that was launched."""
    count = ctypes.CDLL(str(Path(library.lib().__file__).parent / "libv2drop.so")).v2drop_emulate_last_blocks
    count.restype = ctypes.c_int64
    return count


@pytest.mark.parametrize(("b", "n", "d", "k"), [(1, 576, 256, 500), (2, 300, 512, 144), (3, 200, 64, 200), (8, 144, 128, 100)])
def test_blocks_that_select_run_at_once(on, last_blocks, b, n, d, k):
    """The emulated GPU holds 8 blocks: a second wave of a fused gather would select once more."""
    prev, cur = hidden_pair((b, n, d), torch.bfloat16)
    want = vk.reference.drop_tokens(prev, cur, k)
    blocks = {}
    for mode in ("fused", "separate"):
        with native.launch_mode(mode):
            got = vk.drop_tokens(prev, cur, k, backend=on.backend)
        same([got.keep, got.hidden], [want.keep, want.hidden])
        blocks[mode] = last_blocks()
    assert blocks["fused"] <= 8
    assert blocks["separate"] >= blocks["fused"]


@pytest.mark.parametrize(("tensors", "heads", "dim"), [(64, 2, 128), (64, 1, 64), (2, 8, 128), (1, 1, 4)])
@pytest.mark.parametrize("wide", [0, 4096])
def test_rows_of_all_widths_share_a_launch(on, last_blocks, tensors, heads, dim, wide):
    """Many narrow tensors beside a wide one: items of about 16 KB, so at least 4 KB and at most 128 KB for a block on average."""
    rows, k = 150, 97
    kv = [random_bytes((1, heads, rows, dim), torch.bfloat16, i) for i in range(tensors)]
    hidden = random_bytes((1, rows, wide), torch.bfloat16, "hidden")
    keep = torch.arange(rows)[torch.arange(rows) % 3 > 0][None, :k]
    got = vk.compact(keep, hidden, kv=kv, backend=on.backend)
    same([got.hidden, *got.kv], [hidden[:, keep[0]], *(x[:, :, keep[0]] for x in kv)])
    moved = 2 * k * (tensors * heads * dim + wide)
    assert moved / (128 << 10) <= last_blocks() <= max(2, moved / (4 << 10))


MODES = pytest.mark.parametrize("mode", ["cooperative", "fused", "separate"])
IN_EVERY_ORDER = pytest.mark.parametrize("order", ["forward", "reverse", "7"])


@pytest.mark.parametrize("metric", METRICS)
def test_the_order_of_threads_changes_no_bit(on, metric, monkeypatch):
    """Blocks and threads run forwards, backwards and shuffled: a missing barrier, or a block that counts on another, shows."""
    prev, cur = normal((2, 90, 64), torch.bfloat16, "a"), normal((2, 90, 64), torch.bfloat16, "b")
    found = []
    for order in ("forward", "reverse", "7"):
        monkeypatch.setenv("V2DROP_EMULATE_ORDER", order)
        found.append(every_op(on, prev, cur, metric, k=30))
    same(found[1:], found[:1] * 2)


@pytest.mark.parametrize("heads", ["mean", "max", 2])
def test_the_order_of_threads_changes_no_score(on, heads, monkeypatch):
    k, x = normal((2, 2, 70, 24), torch.float16, "k"), normal((2, 70, 200), torch.float16, "x")
    found = []
    for order in ("forward", "reverse", "7"):
        monkeypatch.setenv("V2DROP_EMULATE_ORDER", order)
        pivots = torch.tensor([[3, -1, 69], [0, 5, 5]])
        found.append(
            [attention(on, heads), vk.key_norm_score(k, backend=on.backend), vk.cosine_to_pivots(x, pivots, backend=on.backend)]
        )
    same(found[1:], found[:1] * 2)


@IN_EVERY_ORDER
@MODES
@pytest.mark.parametrize("b", [BATCHES[2], BATCHES[6], BATCHES[9], BATCHES[12], BATCHES[16]], ids=str)
def test_the_order_of_threads_changes_no_drop(on, b, mode, order, monkeypatch):
    monkeypatch.setenv("V2DROP_EMULATE_ORDER", order)
    prev, cur = hidden_pair((*b.lead, 24), torch.bfloat16)
    want = vk.reference.drop_tokens(prev, cur, b.k("n/3"), **b.arguments(), **companions(b))
    with native.launch_mode(mode):
        got = vk.drop_tokens(prev, cur, b.k("n/3"), backend=on.backend, **b.arguments(), **companions(b))
    same([got.keep, got.hidden, got.kv, got.labels], [want.keep, want.hidden, want.kv, want.labels])


@IN_EVERY_ORDER
@MODES
def test_the_order_of_threads_changes_no_tile(on, mode, order, monkeypatch):
    """200 KB of results: many tiles, and fewer, larger ones where the blocks of one launch must all be on the device at once."""
    monkeypatch.setenv("V2DROP_EMULATE_ORDER", order)
    prev, cur = hidden_pair((2, 300, 256), torch.bfloat16)
    want = vk.reference.drop_tokens(prev, cur, 190, droppable=(3, 290))
    with native.launch_mode(mode):
        got = vk.drop_tokens(prev, cur, 190, droppable=(3, 290), backend=on.backend)
    same([got.keep, got.hidden], [want.keep, want.hidden])


# Who selects from a long segment, and how many launches in clusters and cooperative launches that is.
TEAMS = pytest.mark.parametrize(("team", "kinds"), [("one_block", (0, 0)), ("cluster", (1, 0)), ("grid", (0, 1))])


@IN_EVERY_ORDER
@TEAMS
@pytest.mark.parametrize("kind", ["random", "three", "special"])
def test_the_order_of_threads_changes_no_large_selection(on, of_kind, kind, team, kinds, order, monkeypatch):
    """More keys than the registers of a block hold, of two segments or three."""
    monkeypatch.setenv("V2DROP_EMULATE_ORDER", order)
    b = LARGE[1]
    x = scores(kind, b.lead, torch.float32)
    hidden = torch.arange(float(b.rows)).expand(b.lead)[..., None]
    want = vk.reference.drop_tokens(None, hidden, 3000, scores=x, **b.arguments())
    before = of_kind()
    with native.launch_mode(team):
        got = vk.drop_tokens(None, hidden, 3000, scores=x, backend=on.backend, **b.arguments())
    assert tuple(b - a for a, b in zip(before, of_kind(), strict=True)) == kinds
    same([got.keep, got.hidden], [want.keep, want.hidden])


@TEAMS
@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)])
def test_teams_select_exactly(on, team, kinds, dtype, masked):
    """k from nothing to everything, a length that no team divides, scores with a stride, both orders."""
    n = 9173
    x = scores("special" if masked else "random", (2, n, 2), dtype)[..., 0]
    mask = torch.arange(2 * n).view(2, n) % 7 > 1 if masked else None
    with native.launch_mode(team):
        for k, order in [(0, "position"), (1, "score"), (4096, "position"), (n - 1, "position"), (n, "score"), (n, "position")]:
            want = vk.reference.segmented_topk(x, k, order=order, droppable=mask)
            got = vk.segmented_topk(x, k, order=order, droppable=mask, backend=on.backend)
            same([got.indices, got.values], [want.indices, want.values])


@TEAMS
@pytest.mark.parametrize("value", [0.0, -1.5, float("nan"), float("-inf")])
def test_teams_keep_the_first_of_equal_scores(on, team, kinds, value):
    x = torch.full((1, 8200), value)
    with native.launch_mode(team):
        got = vk.segmented_topk(x, 5000, backend=on.backend)
    same(got.indices, torch.arange(5000)[None])


@TEAMS
def test_teams_read_long_stretches_again(on, team, kinds):
    """More keys than the registers of a cluster hold: computed ordinals are read again, those of given scores are stored first."""
    n, k = 70_001, 30_001
    x = scores("random", (1, n), torch.float16)
    hidden = x[..., None].contiguous()
    with native.launch_mode(team):
        same(vk.segmented_topk(x, k, backend=on.backend).indices, vk.reference.segmented_topk(x, k).indices)
        got = vk.variation_topk(torch.zeros_like(hidden), hidden, k, metric="l1", backend=on.backend)
    same(got.indices, vk.reference.variation_topk(torch.zeros_like(hidden), hidden, k, metric="l1").indices)


def test_a_device_without_clusters_selects_by_a_grid(on, of_kind, monkeypatch):
    """Where one segment is long, and by one block where there are many."""
    found, x = [], scores("random", (1, 60_000), torch.float32)
    want = vk.reference.segmented_topk(x, 7000).indices
    for clusters in "1", "0":
        monkeypatch.setenv("V2DROP_EMULATE_CLUSTERS", clusters)
        before = of_kind()
        same(vk.segmented_topk(x, 7000, backend=on.backend).indices, want)
        found.append(tuple(b - a for a, b in zip(before, of_kind(), strict=True)))
    assert found == [(1, 0), (0, 1)]
    with native.launch_mode("cluster"), pytest.raises(RuntimeError, match="launch_mode"):
        vk.segmented_topk(x, 7000, backend=on.backend)
    many = scores("random", (12, 2500), torch.float32)
    before = of_kind()
    same(vk.segmented_topk(many, 700, backend=on.backend).indices, vk.reference.segmented_topk(many, 700).indices)
    assert of_kind() == before
