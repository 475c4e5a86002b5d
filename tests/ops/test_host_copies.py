"""No op copies from host memory to a GPU, forward or backward, and none reads a GPU back: checked with tensors of the meta device
in place of a GPU's, for which Triton's launches are recorded and not made.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from support.streams import HostCopy, NoHostCopies, take_for_eager

import v2drop_kernels as vk
from v2drop_kernels import positions
from v2drop_kernels.backends import choice, implementations
from v2drop_kernels.core import overwrite
from v2drop_kernels.ops import host_ints as host_ints_module
from v2drop_kernels.ops.host_ints import host_ints

launch = pytest.importorskip("v2drop_kernels.backends.launch", reason="needs triton")

B, N, D = 3, 40, 16
SPANS = vk.TokenLayout.padded([(1, 9), [(0, 4), (6, 20)], []], N, lengths=[30, 40, 12])
LEFT = vk.TokenLayout.padded([(20, 29), [(3, 4), (6, 20)], []], N, lengths=[30, 40, 12], padding_side="left")
PACKED = vk.TokenLayout.packed([(1, 9), (0, 4), ()], [0, 30, 60, N * B])


@pytest.fixture
def launches(monkeypatch):
    """Triton serves meta tensors; the names of the kernels that it would start."""
    started = []
    caches = (choice.why_not, choice.choose_name, choice._chosen_runner, host_ints_module._upload_for)
    for cache in caches:
        cache.cache_clear()
    take_for_eager(monkeypatch)
    monkeypatch.setattr(implementations.Triton, "supports", lambda self, request: None)
    monkeypatch.setattr(overwrite, "conflict", lambda *tensors: False)  # all meta tensors are at address 0
    monkeypatch.setattr(launch, "start", lambda kernel, *args, **meta: started.append(kernel.fn.__name__))
    yield started
    for cache in caches:
        cache.cache_clear()


def meta(*shape, dtype=torch.float32, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def mask_layout(**options):
    return vk.TokenLayout.from_mask(meta(B, N, dtype=torch.bool), [4, 5, 6], **options)


def everything():
    """What belongs to a padded batch, beside the hidden states."""
    return {
        "position_ids": rows_of(3, B, N), "kv": [(meta(B, 2, N, 8, grad=True), meta(B, 2, N, 8))], "attention_mask": rows_of(B, N),
        "rope": (meta(N, 4), meta(1, N, 4)), "labels": rows_of(B, N),
    }  # fmt: skip


def drop(k=(3, 2, 5), rows=(B, N), **options):
    return vk.drop_tokens(meta(*rows, D, grad=True), meta(*rows, D, grad=True), list(k) if isinstance(k, tuple) else k,
                          backend="triton", **options)  # fmt: skip


def topk(layout=SPANS, k=(3, 2, 5), **options):
    rows = (N * B,) if layout is not None and layout.is_packed else (B, N)
    scores = vk.segmented_topk(meta(*rows, grad=True), list(k), droppable=layout, backend="triton", **options)
    both = vk.variation_topk(meta(*rows, D, grad=True), meta(*rows, D), list(k), droppable=layout, backend="triton", **options)
    return *scores, *both


def compact(keep, hidden, **options):
    return vk.compact(keep, hidden, backend="triton", **options)


def rows_of(*shape):
    return meta(*shape, dtype=torch.int64)


CALLS = {
    "drop uniform": lambda: drop(7),
    "drop one span": lambda: drop(7, droppable=(3, 30), positions="compacted", position_ids=rows_of(B, N)),
    "drop ragged": lambda: drop(droppable=SPANS, **everything()),
    "drop left": lambda: drop(droppable=LEFT, positions="group", position_ids=rows_of(B, N)),
    "drop mask": lambda: drop(droppable=mask_layout(lengths=[30, 40, 12]), **everything()),
    "drop packed": lambda: drop((3, 2), (N * B,), droppable=PACKED, positions="compacted", position_ids=rows_of(N * B)),
    "drop packed, group": lambda: drop((3, 2), (N * B,), droppable=PACKED, positions="group", position_ids=rows_of(N * B)),
    "drop packed, offsets of the host": lambda: drop((3, 2, 1), (N * B,), cu_seqlens=[0, 30, 60, N * B]),
    "drop packed, offsets of the device": lambda: drop((3, 2, 1), (N * B,), cu_seqlens=meta(4, dtype=torch.int32)),
    "drop by scores": lambda: vk.drop_tokens(None, meta(B, N, D), [3, 2, 5], scores=meta(B, N), droppable=SPANS, backend="triton"),
    "top-k by position": topk,
    "top-k by score": lambda: topk(order="score"),
    "top-k of a mask": lambda: topk(mask_layout()),
    "top-k packed": lambda: topk(PACKED, (3, 2)),
    "compact": lambda: compact(rows_of(B, 7), meta(B, N, D, grad=True), **everything()),
    "compact a top-k": lambda: compact(rows_of(3, 5), meta(B, N, D, grad=True), droppable=SPANS, k=[3, 2, 5]),
    "compact a top-k of a mask": lambda: compact(rows_of(3, 6), meta(B, N, D), droppable=mask_layout(), k=[3, 2, 5]),
    "compact packed": lambda: compact(rows_of(9), meta(N * B, D, grad=True), cu_seqlens=[0, 30, 60, N * B], positions="compacted"),
    "compact packed, top-k": lambda: compact(rows_of(2, 5), meta(N * B, D), droppable=PACKED, k=[3, 2]),
    "compact in place": lambda: vk.compact_(rows_of(B, 7), [meta(B, 2, N, 8)], backend="triton"),
    "variation": lambda: vk.variation_score(meta(B, N, D, grad=True), meta(B, N, D, grad=True), metric="cosine", backend="triton"),
    "attention": lambda: vk.attention_score(
        meta(B, 4, 3, 8, grad=True), meta(B, 2, N, 8, grad=True), droppable=meta(B, N, dtype=torch.bool), backend="triton"
    ),
    "cls attention": lambda: vk.cls_attention_score(meta(B, 4, 1, 8), meta(B, 4, N, 8), backend="triton"),
    "raters": lambda: vk.text_raters(rows_of(B, 5), rows_of(B, 6), meta(B, N, D)),
    "cross-modal": lambda: vk.cross_modal_score(meta(B, N), meta(B, N), 0.5, scale=2.0),
    "key norms": lambda: vk.key_norm_score(meta(B, 2, N, 8), backend="triton"),
    "pivots": lambda: vk.cosine_to_pivots(meta(B, N, D, grad=True), rows_of(B, 4), backend="triton"),
    "frames": lambda: vk.frame_similarity(meta(B, 4, N, D), backend="triton"),
    "random": lambda: vk.random_score(meta(B, N), 7),
    "random, seeds of the host": lambda: vk.random_score(meta(B, N), 7, item_seeds=[-(2**63), 5, 2**63 - 1]),
    "soft top-k": lambda: vk.soft_topk(meta(B, N, grad=True), 0.3),
    "soft top-k, ratio on the host": lambda: vk.soft_topk(meta(B, N), torch.tensor(0.3)),
    "weighted merge": lambda: vk.weighted_merge(
        meta(B, N, D, grad=True), rows_of(B, 6), rows_of(B, N), meta(B, N), backend="triton"
    ),
    "bipartite merge": lambda: vk.bipartite_merge(meta(B, N, D), meta(B, N, 8), 9),
    "merge, VisionZip": lambda: vk.merge_dropped(
        meta(B, N, D), rows_of(B, 9), "visionzip", metric=meta(B, N, 8), targets=meta(B, N, dtype=torch.bool)
    ),
    "contextual targets": lambda: visionzip().contextual_targets(meta(B, N, dtype=torch.bool), 3),
    "group ids": lambda: positions.group_position_ids(LEFT, "meta"),
}


def visionzip():
    from v2drop_kernels.ops.merge_dropped import visionzip

    return visionzip


def backward(results):
    """The backward pass of everything that has a gradient."""
    leaves = torch.utils._pytree.tree_leaves(results)
    outs = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    if outs:
        torch.autograd.backward(outs, [torch.empty_like(x) for x in outs])


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_copied_from_the_host(launches, name):
    with NoHostCopies():
        backward(CALLS[name]())
    if name.startswith(("drop", "top-k", "compact", "variation", "attention")):
        assert launches  # by Triton, not by an op that knows shapes only


def test_a_new_plan_is_uploaded_once_for_each_stream(launches, monkeypatch):
    """One upload of one table, whichever kernels of the call read it; then none on that stream, and one on another."""
    layout = vk.TokenLayout.padded([(1, 9), (2, 11)], N, batch=2)
    call = lambda: vk.drop_tokens(meta(2, N, D), meta(2, N, D), 5, droppable=layout, backend="triton")
    uploads = lambda: launches.count("_upload_fwd_kernel")
    call(), call()
    assert uploads() == 1
    monkeypatch.setattr(launch.tables, "stream_of", lambda device: 7)
    call(), call()
    assert uploads() == 2
    monkeypatch.setattr(launch.tables, "is_capturing", lambda device: True)
    call(), call()
    assert uploads() == 4


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: torch.tensor([1, 2]).to("meta"),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x.copy_(torch.zeros(4, 4)),
        lambda x: x[torch.tensor([1, 2])],
        lambda x: x[[1, 2]],
        lambda x: x.__setitem__((rows_of(2),), 1.0),
        lambda x: x.__setitem__((0, 0), 1.0),
        lambda x: x.index_put_((rows_of(2),), torch.tensor(1.0)),
    ],
)
def test_the_check_finds_copies(copy):
    with pytest.raises(HostCopy), NoHostCopies():
        copy(meta(4, 4))


@pytest.mark.parametrize("read", [lambda x: x.tolist(), lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x.cpu()])
def test_reading_a_meta_tensor_raises(read):
    with pytest.raises((RuntimeError, NotImplementedError)), NoHostCopies():
        read(meta(4, 4))


def test_host_ints_of_any_length(launches):
    with NoHostCopies():
        found = host_ints(range(1000), torch.device("meta"), torch.int32)
    assert (found.shape, found.dtype, launches) == ((1000,), torch.int32, ["_upload_fwd_kernel"] * 4)


MAKERS = ("torch.tensor", "torch.as_tensor", "torch.asarray")
# Made once, when a model is set up or read from disk, and not in a forward.
ONCE = {"models/soft.py"}


def made_on_the_host(source: str):
    """Lines where torch.tensor and the like are given a device: such a tensor is made on the host and copied."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in MAKERS and any(x.arg == "device" for x in node.keywords):
            yield node.lineno


def test_no_tensor_of_a_forward_is_made_on_the_host():
    """The model engine runs on real models only, whose forwards read the prompt; so its source is checked instead."""
    package = Path(vk.__file__).parent
    # The reference is the specification, and says what it does rather than how fast.
    files = [p for folder in ("core", "backends", "ops", "models") for p in (package / folder).rglob("*.py")]
    found = {
        f"{name}:{line}"
        for path in files
        if (name := path.relative_to(package).as_posix()) not in ONCE
        for line in made_on_the_host(path.read_text())
    }
    assert found == {x for x in found if x.startswith("backends/tables.py")}  # on_host, whose device is the CPU
    assert list(made_on_the_host("x = torch.tensor([1])\ny = torch.as_tensor(x, device=d)")) == [2]
