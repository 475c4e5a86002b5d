"""The compiled library under capture, in the emulator: its launches are recorded with their arguments and run again later, and
whatever would make the host wait is counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.cases import METRICS, every_op, hidden_pair, same
from support.ragged import CALLS, B, D, N, all_three, drop_padded, forget_plans, other_plans
from support.streams import Pool, take_for_eager

from v2drop_kernels import native as library
from v2drop_kernels.backends import native, tables
from v2drop_kernels.ops import host_ints

pytestmark = pytest.mark.emulated
OTHER_PLANS, REPLAYS = 10_000, 4
ON = SimpleNamespace(backend="cuda", device="cpu")


@pytest.fixture(scope="module")
def emulator():
    found = ctypes.CDLL(str(Path(library.lib().__file__).parent / "libv2drop.so"))
    found.v2drop_emulate_end_capture.restype = found.v2drop_emulate_synchronisations.restype = ctypes.c_int64
    found.v2drop_emulate_holds.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    yield found
    found.v2drop_emulate_drop_capture()


def captured(emulator, monkeypatch, pool, call):
    with monkeypatch.context() as patch, pool:
        take_for_eager(patch)
        patch.setattr(tables, "is_capturing", lambda device: True)
        emulator.v2drop_emulate_begin_capture()
        result = call()
        assert emulator.v2drop_emulate_end_capture() > 0
    return result


@pytest.fixture(autouse=True)
def uploads(monkeypatch):
    """CPU tensors get their integers as a GPU's would."""
    monkeypatch.setattr(host_ints, "_upload_for", lambda kind: native.upload)
    yield
    forget_plans()


@contextlib.contextmanager
def without_launches(monkeypatch):
    """Calls that run nothing: what they allocate, keep and give back is real."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "_function", lambda name: lambda *arguments: None)
        yield
    gc.collect()


def test_replays_between_ten_thousand_plans(emulator, monkeypatch):
    prev, cur = hidden_pair((B, N, D), torch.float32)
    kept, make = [], tables._plan_tables
    monkeypatch.setattr(tables, "_plan_tables", lambda *args: kept.append(make(*args)) or kept[-1])
    all_three(prev, cur, ON.backend)  # the plans of the graph are kept from eager calls before
    pool = Pool()
    got = captured(emulator, monkeypatch, pool, lambda: all_three(prev, cur, ON.backend))
    for table in kept:
        memory = table.segments.untyped_storage()
        assert not emulator.v2drop_emulate_holds(memory.data_ptr(), memory.nbytes())
    assert len(kept) == len(CALLS)
    kept.clear()
    monkeypatch.setattr(tables, "_plan_tables", make)
    for i in range(REPLAYS):
        with without_launches(monkeypatch):
            other_plans(i * OTHER_PLANS // REPLAYS, (i + 1) * OTHER_PLANS // REPLAYS, prev, cur, ON.backend)
        prev.copy_(prev.roll(1, dims=1)), cur.copy_(cur.roll(3, dims=2))
        for x in (*got, *(x for x in pool.tensors if x.dtype == torch.uint8)):  # results and scratch memory
            x.fill_(77)
        emulator.v2drop_emulate_replay()
        same(got, all_three(prev, cur, "reference"))


def test_a_kept_table_would_be_noticed(emulator, monkeypatch):
    """A test of the test: a graph that uses a table from before the capture holds its memory."""
    prev, cur = hidden_pair((B, N, D), torch.float32)
    kept, make = [], tables._plan_tables
    monkeypatch.setattr(tables, "_plan_tables", lambda *args: kept.append(make(*args)) or kept[-1])
    monkeypatch.setattr(tables, "may_keep", lambda device: True)
    drop_padded(-1, prev, cur, ON.backend)
    captured(emulator, monkeypatch, Pool(), lambda: drop_padded(-1, prev, cur, ON.backend))
    memory = kept[0].segments.untyped_storage()
    assert emulator.v2drop_emulate_holds(memory.data_ptr(), memory.nbytes())


@pytest.mark.parametrize("metric", METRICS)
def test_no_call_makes_the_host_wait(emulator, metric):
    prev, cur = hidden_pair((2, 40, 8), torch.float32)
    before = emulator.v2drop_emulate_synchronisations()
    every_op(ON, prev, cur, metric, 9)
    for call in CALLS:
        call(-2, *hidden_pair((B, N, D), torch.float32), ON.backend)
    assert emulator.v2drop_emulate_synchronisations() == before


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_uploads_of_any_length(emulator, count, dtype):
    """1024 integers a launch."""
    values = [(-1) ** i * i * 5 for i in range(count)]
    before = emulator.v2drop_emulate_launches()
    got = native.upload(values, torch.device("cpu"), dtype)
    assert emulator.v2drop_emulate_launches() - before == -(-count // 1024)
    assert torch.equal(got, torch.tensor(values, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_upload_on_the_cpu(dtype):
    out = torch.empty(3, dtype=dtype)
    library.lib().upload(native.view(torch.tensor([1, -2, 3])), native.view(out), library.cpu_context(1))
    assert out.tolist() == [1, -2, 3]


@pytest.mark.parametrize(
    ("values", "to", "message"),
    [
        (torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), "values: must have dtype int64"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3), "to: must be int64 or int32"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int32), "to: has 4 elements, not 3"),
        (torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int32), "to: has 1 dimensions and values has 2"),
        (torch.zeros(6, dtype=torch.int64)[::2], torch.zeros(3, dtype=torch.int32), "values: must be contiguous"),
    ],
)
def test_errors_of_an_upload(values, to, message):
    for context in (library.cpu_context(1), library.cuda_context(0)):
        with pytest.raises((ValueError, RuntimeError), match=message):
            library.lib().upload(native.view(values), native.view(to), context)
