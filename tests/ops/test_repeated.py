"""Calls like an earlier one: the same results without the checks, and never where the checks could find something else."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref

import pytest
import torch
from support.cases import fewer
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import v2drop_kernels as vk
from v2drop_kernels import native
from v2drop_kernels.backends import repeated

READERS = ["library", "python"] if native.available()[0] else ["python"]


@pytest.fixture(autouse=True, params=READERS)
def reader(request, monkeypatch):
    """Arguments are described by the library, and by Python where the library is not there."""
    repeated.clear()
    if request.param == "python":
        monkeypatch.setattr(repeated, "_functions", lambda: None)
    yield request.param
    repeated.clear()


@pytest.fixture
def backend(on):
    """The backend of a test, whose tensors are made on its device."""
    with torch.device(on.device):
        yield on.backend


def arguments(seed=0, rows=24, dtype=torch.float32, layers=3):
    torch.manual_seed(seed)
    h_prev, h_cur = (torch.randn(2, rows, 16).to(dtype) for _ in range(2))
    kv = [tuple(torch.randn(2, 2, rows, 8).to(dtype) for _ in range(2)) for _ in range(layers)]
    given = {
        "kv": kv,
        "position_ids": torch.arange(rows).expand(2, rows).contiguous() + seed,
        "attention_mask": torch.ones(2, rows, dtype=torch.bool),
        "labels": torch.randint(0, 9, (2, rows)),
    }
    return h_prev, h_cur, given


def leaves(result):
    found = []
    for value in result if isinstance(result, list | tuple) else [result]:
        found += leaves(value) if isinstance(value, list | tuple) else [value]
    return found


def alike(a, b):
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def remembered():
    return len(repeated._table)


@pytest.mark.parametrize("droppable", [None, (3, 20)], ids=["all", "span"])
def test_a_second_call_gives_what_a_first_one_gives(backend, droppable):
    for dtype, seed in zip([torch.float32, torch.bfloat16] * 3, range(fewer([6], [2])[0]), strict=False):
        h_prev, h_cur, given = arguments(seed, dtype=dtype)
        second = vk.drop_tokens(h_prev, h_cur, 5, droppable=droppable, backend=backend, **given)
        scores = vk.variation_score(h_prev, h_cur, backend=backend)
        topk = vk.variation_topk(h_prev, h_cur, 5, order="score", backend=backend)
        chosen = vk.segmented_topk(scores, 5, backend=backend)
        moved = vk.compact(chosen, h_cur, backend=backend, **given)
        repeated.clear()
        assert alike(second, vk.drop_tokens(h_prev, h_cur, 5, droppable=droppable, backend=backend, **given))
        assert alike(topk, vk.variation_topk(h_prev, h_cur, 5, order="score", backend=backend))
        assert alike(chosen, vk.segmented_topk(scores, 5, backend=backend))
        assert alike(moved, vk.compact(chosen, h_cur, backend=backend, **given))
        assert [type(x) for x in (second.kv, second.kv[0])] == [list, tuple]


def test_calls_are_remembered(backend):
    h_prev, h_cur, given = arguments()
    for _ in range(3):
        vk.drop_tokens(h_prev, h_cur, 5, backend=backend, **given)
    assert remembered() == (0 if backend == "reference" else 1)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"k": True}, TypeError),
        ({"k": 5.0}, TypeError),
        ({"k": -1}, ValueError),
        ({"droppable": (3.0, 20)}, (TypeError, ValueError)),
        ({"droppable": (3, 25)}, ValueError),
        ({"metric": "l3"}, ValueError),
        ({"metric": ["l2"]}, (TypeError, ValueError)),
        ({"kv_layout": "BSHD"}, ValueError),
        ({"positions": "anew"}, ValueError),
        ({"score_dtype": "float16"}, TypeError),
        ({"attention_mask": torch.ones(2, 23)}, ValueError),
        ({"labels": torch.ones(2, 24)}, TypeError),
        ({"h_prev": torch.zeros(2, 24, 15)}, ValueError),
        ({"h_prev": torch.zeros(2, 24, 16, dtype=torch.float16)}, TypeError),
        ({"kv": [(torch.zeros(2, 2, 24, 8), None)]}, TypeError),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_no_check_is_lost_after_a_call_that_passed_them(change, error):
    h_prev, h_cur, given = arguments()
    given |= {"h_prev": h_prev, "h_cur": h_cur, "k": 5, "droppable": (3, 20)}
    vk.drop_tokens(**given)
    vk.drop_tokens(**given)
    with pytest.raises(error):
        vk.drop_tokens(**given | change)


def test_other_strides_and_alignments_are_other_calls(backend):
    h_prev, h_cur, _ = arguments()
    memory = torch.zeros(h_cur.numel() * 2 + 64)
    for first, step in [(0, 1), (1, 1), (2, 1), (4, 1), (3, 2)]:
        moved = torch.as_strided(memory, h_cur.shape, tuple(step * s for s in h_cur.stride()), first).copy_(h_cur)
        for _ in range(2):
            found = vk.drop_tokens(h_prev, moved, 5, backend=backend)
            assert alike(found, vk.drop_tokens(h_prev, h_cur, 5, backend="reference"))


def test_a_gradient_is_recorded_after_calls_that_needed_none():
    h_prev, h_cur, _ = arguments()
    vk.drop_tokens(h_prev, h_cur, 5)
    vk.drop_tokens(h_prev, h_cur.requires_grad_(), 5).hidden.sum().backward()
    assert h_cur.grad.sum() == 2 * 5 * 16
    with torch.no_grad():
        assert not vk.drop_tokens(h_prev, h_cur, 5).hidden.requires_grad


def test_lazily_negated_values_are_read_as_their_values():
    h_prev, h_cur, _ = arguments()
    expected = vk.drop_tokens(h_prev, h_cur, 5)
    negated = torch._neg_view(-h_cur)
    for _ in range(2):
        assert alike(vk.drop_tokens(h_prev, negated, 5), expected)


def test_dual_numbers_and_subclasses_go_the_whole_way():
    class Mine(torch.Tensor):
        pass

    h_prev, h_cur, _ = arguments()
    vk.drop_tokens(h_prev, h_cur, 5)
    before = remembered()
    assert repeated.look_up(None, (h_prev,), (h_cur.as_subclass(Mine),), 5, None, None, True) == repeated.UNKNOWN
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(h_cur, torch.ones_like(h_cur))
        assert repeated.look_up(None, (h_prev,), (dual,), 5, None, None, True) == repeated.UNKNOWN
    assert remembered() == before


def test_a_forced_backend_is_part_of_a_call(monkeypatch):
    h_prev, h_cur, _ = arguments()
    expected = vk.variation_topk(h_prev, h_cur, 5)
    before = dict(repeated._table)
    repeated._table.update({key: known._replace(runner=None) for key, known in before.items()})  # calling these would fail
    with vk.backend("reference"):
        assert torch.equal(vk.variation_topk(h_prev, h_cur, 5).indices, expected.indices)
    monkeypatch.setenv("V2DROP_BACKEND", "reference")
    assert torch.equal(vk.variation_topk(h_prev, h_cur, 5).indices, expected.indices)


def test_no_tensor_is_held():
    h_prev, h_cur, given = arguments()
    for _ in range(2):
        result = vk.drop_tokens(h_prev, h_cur, 5, **given)
    held = [weakref.ref(x) for x in leaves([h_prev, h_cur, *given.values(), result]) if isinstance(x, torch.Tensor)]
    del h_prev, h_cur, given, result
    gc.collect()
    assert not any(x() is not None for x in held)


def test_a_cache_that_contains_itself_is_an_error():
    h_prev, h_cur, _ = arguments()
    kv = []
    kv.append(kv)
    for _ in range(2):
        with pytest.raises(RecursionError):
            vk.drop_tokens(h_prev, h_cur, 5, kv=kv)


def test_a_cache_that_shrinks_while_it_is_read():
    """Another thread may run while the flags of a tensor are read; here the tensor's own flag empties the list."""
    h_prev = torch.zeros(2, 24, 16)
    kv = [torch.zeros(2, 2, 24, 8) for _ in range(8)]

    class Emptied(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kv.clear()
            return function(*args, **(kwargs or {}))

    with Emptied():
        repeated.signature((h_prev, kv))


def test_every_dtype_is_another_call(reader):
    found = {}
    for dtype in sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str):
        try:
            described = repeated.signature((torch.empty(2, 3, dtype=dtype),))
        except (RuntimeError, TypeError):
            continue
        if described is not None:
            assert found.setdefault(described[0], dtype) is dtype
    assert {torch.float32, torch.int32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int8} <= set(found.values())


@pytest.mark.parametrize("form", ["inference", "inference mode", "deterministic", "resized", "parameter"])
def test_what_is_like_a_known_call_gives_what_a_first_one_gives(form):
    h_prev, h_cur, given = arguments()
    expected = vk.drop_tokens(h_prev, h_cur, 5, **given)
    vk.drop_tokens(h_prev, h_cur, 5, **given)
    with contextlib.ExitStack() as stack:
        if form == "inference mode":
            stack.enter_context(torch.inference_mode())
        elif form == "inference":
            with torch.inference_mode():
                h_cur = h_cur.clone()
        elif form == "deterministic":
            torch.use_deterministic_algorithms(True)
            stack.callback(torch.use_deterministic_algorithms, False)
        elif form == "resized":  # the same shape and strides in other memory
            h_cur = torch.empty(0).set_(h_cur.clone().untyped_storage(), 0, h_cur.shape, h_cur.stride())
        else:
            h_cur = torch.nn.Parameter(h_cur)
        found = vk.drop_tokens(h_prev, h_cur, 5, **given)
    assert torch.equal(found.keep, expected.keep)
    assert alike(found.kv, expected.kv)
    assert found.hidden.requires_grad == (form == "parameter")
    assert found.hidden.is_inference() == (form == "inference mode")


def test_memory_that_was_given_back_is_an_error():
    h_prev, h_cur, _ = arguments()
    for _ in range(2):
        vk.drop_tokens(h_prev, h_cur, 5)
    h_cur.untyped_storage().resize_(0)
    if vk.explain(h_cur).chosen != "reference":
        with pytest.raises(ValueError, match="cur"):
            vk.drop_tokens(h_prev, h_cur, 5)


def test_the_table_is_bounded(monkeypatch):
    monkeypatch.setattr(repeated, "ENTRIES", 3)
    h_prev, h_cur, _ = arguments()
    for k in range(10):
        vk.drop_tokens(h_prev, h_cur, k)
    assert remembered() <= 3


def test_results_that_share_memory_are_tensors_of_their_own():
    h_prev, h_cur, given = arguments(layers=8)
    with torch.no_grad():
        for _ in range(2):
            result = vk.drop_tokens(h_prev, h_cur, 4, **given)
    parts = [x for pair in result.kv for x in pair]
    if vk.explain(h_cur).chosen != "reference":
        assert len({x.untyped_storage().data_ptr() for x in parts}) == 1
    assert not any(x._is_view() for x in parts)
    assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in parts)
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in parts)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    versions = [x._version for x in parts]
    parts[0].zero_()
    assert [x._version for x in parts[1:]] == versions[1:]


def test_large_results_have_memory_of_their_own(monkeypatch):
    monkeypatch.setattr(repeated, "SHARED_BYTES", 1 << 10)
    h_prev, h_cur, given = arguments(layers=8)
    for _ in range(2):
        result = vk.drop_tokens(h_prev, h_cur, 4, **given)
    assert max(x.untyped_storage().nbytes() for pair in result.kv for x in pair) <= 1 << 10
