"""Recorded launches: with the arguments that the whole way would give, and only where nothing has changed.

There is no GPU here: Triton's ``JITFunction.run`` is replaced by one that notes the launch and returns a kernel that notes its own.
"""

from __future__ import annotations

import array
import gc
import weakref

import pytest
import torch

import v2drop_kernels as vk
from v2drop_kernels.backends import choice, implementations, repeated

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles no kernels")


class Compiled:
    """Stands for a compiled kernel."""

    packed_metadata, function = (4, 1, 0), 7

    def __init__(self, kernel, log):
        self.kernel, self.log = kernel, log

    def run(self, gridX, gridY, gridZ, stream, function, *arguments):
        metadata, launch_metadata, enter, leave, *arguments = arguments
        assert (gridY, gridZ, stream, function, metadata) == (1, 1, 11, self.function, self.packed_metadata)
        assert launch_metadata is enter is leave is None
        assert len(arguments) == len(self.kernel.arg_names)
        self.log.append(("again", self.kernel, gridX, tuple(arguments)))


class Driver:
    """Stands for the driver of Triton: one device, stream 11."""

    @staticmethod
    def get_current_device():
        return 0

    @staticmethod
    def get_current_stream(device):
        return 11


@pytest.fixture
def log(monkeypatch):
    """The launches, which do nothing: ("first" or "again", kernel, programs, arguments)."""
    from v2drop_kernels.backends import relaunch

    launches = []

    def run(kernel, *arguments, grid, warmup, **constants):
        launches.append(("first", kernel, grid[0], arguments))
        return Compiled(kernel, launches)

    monkeypatch.setattr(triton.JITFunction, "run", run)
    monkeypatch.setattr(implementations.Triton, "supports", lambda self, request: None)
    monkeypatch.setattr(relaunch, "driver", type("Active", (), {"active": Driver}))
    choice.why_not.cache_clear()
    choice.choose_name.cache_clear()
    choice._chosen_runner.cache_clear()
    repeated.clear()
    yield launches
    repeated.clear()
    choice.why_not.cache_clear()
    choice.choose_name.cache_clear()
    choice._chosen_runner.cache_clear()


def hidden(rows=40, d=32, batch=2, offset=0):
    """Hidden states that begin ``offset`` elements behind an aligned address."""
    return tuple(torch.randn(batch * rows * d + 16)[offset : offset + batch * rows * d].view(batch, rows, d) for _ in range(2))


def cache(layers, rows=40):
    return [(torch.randn(2, 2, rows, 8), torch.randn(2, 2, rows, 8)) for _ in range(layers)]


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for item in value for x in leaves(item)] if isinstance(value, list | tuple) else []


class Labels:
    """Addresses as places in tensors of the call, or in scratch memory, which is numbered as it appears."""

    def __init__(self, *tensors):
        self.tensors, self.scratch = leaves(tensors), []

    def __call__(self, address):
        for i, x in enumerate(self.tensors):
            if x.numel() and x.data_ptr() <= address < x.data_ptr() + x.nbytes:
                return i, address - x.data_ptr()
        if address not in self.scratch:
            self.scratch.append(address)
        return "scratch", self.scratch.index(address)


def assert_alike(whole, again, of_whole, of_again):
    """Whether two logs have the same kernels, programs, constants, and addresses of the same places."""
    assert [(kernel, programs) for _, kernel, programs, _ in whole] == [(kernel, programs) for _, kernel, programs, _ in again]
    for (_, kernel, _, arguments), (_, _, _, repeated_ones) in zip(whole, again, strict=True):
        for i, (x, y) in enumerate(zip(arguments, repeated_ones[: len(arguments)], strict=True)):
            if isinstance(x, torch.Tensor):
                assert of_whole(x.data_ptr()) == of_again(y), kernel.arg_names[i]
            elif kernel.arg_names[i] == "addresses":
                decode = lambda pairs, of: [[of((a & ((1 << 62) - 1)) >> 1) for a in pair] for pair in pairs]
                assert decode(x, of_whole) == decode(y, of_again)
            else:
                assert x == y, kernel.arg_names[i]


CALLS = {
    "drop": lambda h, **more: vk.drop_tokens(*h, 9, droppable=(3, 30), backend="triton", **more),
    "drop by scores": lambda h, **more: vk.drop_tokens(None, h[1], 9, scores=h[0][..., 0].contiguous(), backend="triton", **more),
    "layout": lambda h, **more: vk.drop_tokens(
        *h, 5, droppable=vk.TokenLayout.padded([[(0, 10), (12, 30)], [(2, 12), (20, 38)]], 40), backend="triton", **more
    ),
    "topk": lambda h: vk.variation_topk(*h, 9, backend="triton"),
    "topk by score": lambda h: vk.variation_topk(*h, 9, order="score", backend="triton"),
    "select": lambda h: vk.segmented_topk(h[0][..., 0].contiguous(), 9, backend="triton"),
    "compact": lambda h, **more: vk.compact(torch.arange(0, 40, 2).repeat(2, 1), h[1], backend="triton", **more),
}


WITH_CACHES = [(name, layers) for name in CALLS for layers in (0, 3) if not layers or name in ("drop", "layout", "compact")]


@pytest.mark.parametrize(("name", "layers"), WITH_CACHES)
def test_the_same_launches_with_other_addresses(name, layers, log, monkeypatch):
    call = CALLS[name]
    given = [(hidden(), {"kv": cache(layers)} if layers else {}) for _ in range(4)]
    alive = [call(h, **more) for h, more in given[:2]]  # the whole way, then recorded
    assert {how for how, *_ in log} == {"first"}
    for h, more in given[2:]:
        del log[:]
        found = call(h, **more)
        again = log[:]
        assert again
        assert {how for how, *_ in again} == {"again"}
        with monkeypatch.context() as patch:
            patch.setattr(relaunch(), "repeated", lambda memo, device, given, held, run, places=None: run())
            del log[:]
            whole = call(h, **more)
        assert {how for how, *_ in log} == {"first"}
        assert_alike(log, again, Labels(h, *more.values(), whole), Labels(h, *more.values(), found))
        alive += [found, whole]


def relaunch():
    from v2drop_kernels.backends import relaunch as module

    return module


def again(log, call):
    """Whether the launches of a call were those of an earlier one."""
    del log[:]
    call()
    (how,) = {how for how, *_ in log}
    return how == "again"


def drop(h, **more):
    return vk.drop_tokens(*h, 9, backend="triton", **more)


def settle(call):
    for _ in range(2):
        call()


def test_other_alignments_strides_shapes_and_dtypes_are_other_launches(log):
    settle(lambda: drop(hidden()))
    assert again(log, lambda: drop(hidden()))
    for offset in (1, 2):
        assert not again(log, lambda offset=offset: drop(hidden(offset=offset)))
    assert not again(log, lambda: drop(hidden(rows=41)))
    assert not again(log, lambda: drop([x.bfloat16() for x in hidden()]))
    assert not again(log, lambda: drop([x.transpose(0, 1).contiguous().transpose(0, 1) for x in hidden()]))
    assert not again(log, lambda: drop([x.transpose(1, 2).contiguous().transpose(1, 2) for x in hidden()]))
    assert again(log, lambda: drop(hidden()))


def test_forced_sizes_hooks_and_another_source_go_the_whole_way(log, monkeypatch):
    from v2drop_kernels.backends import configs

    settle(lambda: drop(hidden()))
    with configs.override_configs({}):
        assert not again(log, lambda: drop(hidden()))
    assert again(log, lambda: drop(hidden()))
    runtime = triton.knobs.runtime
    hook = lambda metadata: None
    runtime.launch_enter_hook.add(hook)
    try:
        assert not again(log, lambda: drop(hidden()))
    finally:
        runtime.launch_enter_hook.remove(hook)
    assert again(log, lambda: drop(hidden()))
    kernel = log[0][1]
    kernel.pre_run_hooks.append(hook)
    try:
        assert not again(log, lambda: drop(hidden()))
    finally:
        kernel.pre_run_hooks.remove(hook)
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "_src", kernel.src + "# changed")
        assert not again(log, lambda: drop(hidden()))


def test_settings_of_triton_that_changed_go_the_whole_way(log, monkeypatch):
    settle(lambda: drop(hidden()))
    for knobs, name, value in ((triton.knobs.runtime, "debug", True), (triton.knobs.compilation, "instrumentation_mode", "consan")):
        with monkeypatch.context() as patch:
            patch.setattr(knobs, name, value)
            assert not again(log, lambda: drop(hidden()))
        assert again(log, lambda: drop(hidden()))


@pytest.mark.parametrize("missing", ["packed_metadata", "function", "arguments", "driver"])
def test_a_triton_that_launches_in_another_way_is_never_repeated(missing, log, monkeypatch):
    if missing == "arguments":
        monkeypatch.setattr(Compiled, "run", lambda self, grid, stream, arguments: None)
    elif missing == "driver":
        monkeypatch.setattr(relaunch(), "driver", object())
    else:
        monkeypatch.delattr(Compiled, missing)
    for _ in range(3):
        drop(hidden())
    assert {how for how, *_ in log} == {"first"}


def test_tables_of_a_plan_are_read_on_their_stream_and_never_in_a_graph(log, monkeypatch):
    from v2drop_kernels.backends import tables

    call = lambda: CALLS["layout"](hidden())
    settle(call)
    assert again(log, call)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "stream_of", lambda device: 5)
        assert not again(log, call)
    with tables.made_anew():  # as in a stream capture
        assert not again(log, call)
    assert again(log, call)


def test_tensors_that_share_memory_are_not_recorded(log):
    h = hidden()
    for _ in range(3):
        drop((h[0], h[0]))
    assert {how for how, *_ in log} == {"first"}
    shared = torch.randn(2, 2, 2, 40, 8)
    for _ in range(3):
        drop(hidden(), kv=(shared[:, 0], shared[:, 1]))
    assert {how for how, *_ in log} == {"first"}


def test_nothing_of_the_caller_is_held(log):
    h, kv = hidden(), cache(2)
    for _ in range(3):
        found = drop(h, kv=kv)
    held = [weakref.ref(x) for x in leaves([h, kv, found])]
    del h, kv, found, log[:]
    gc.collect()
    assert not any(x() is not None for x in held)


def test_addresses_are_encoded_alike_with_and_without_the_library():
    from v2drop_kernels import native

    module = relaunch()
    starts, pairs = [0x7F0000000010, 0x1000], ((0, 0, 1, 64), (1, 8, 0, 1 << 33))
    want = tuple((module._encode(starts[a] + x), module._encode(starts[b] + y)) for a, x, b, y in pairs)
    places = array.array("Q", starts).tobytes()
    assert module._encoded(places, pairs) == want
    if native.reads(torch.Tensor):
        assert native.lib().encoded_addresses(places, pairs) == want
