"""Which backend runs, and the reasons of those that do not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import v2drop_kernels as vk
from v2drop_kernels import native as library
from v2drop_kernels.backends import choice, native
from v2drop_kernels.backends.protocol import Op

H = torch.zeros(1, 3, 4)
CALLS = {
    "variation_score": lambda **kw: vk.variation_score(H, H, **kw),
    "segmented_topk": lambda **kw: vk.segmented_topk(H[..., 0], 2, **kw),
    "variation_topk": lambda **kw: vk.variation_topk(H, H, 2, **kw),
    "compact": lambda **kw: vk.compact(torch.tensor([[1]]), H, **kw),
    "compact_": lambda **kw: vk.compact_(torch.tensor([[1]]), torch.zeros(1, 1, 3, 2), **kw),
    "drop_tokens": lambda **kw: vk.drop_tokens(H, H, 2, **kw),
}
EVERY = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture
def calls(monkeypatch):
    """The functions of the compiled library that the calls of a test reach."""
    found, call = [], native.call
    monkeypatch.setattr(native, "call", lambda name, *args, **kw: (found.append(name), call(name, *args, **kw))[1])
    return found


def test_explain_of_cpu_tensors():
    found = vk.explain(torch.zeros(1, 3, 4))
    assert found.chosen == "cpu"
    assert set(found.rejected) == {"triton", "cuda", "reference"}
    assert found.rejected["cuda"] == "serves CUDA tensors, not cpu"
    assert "TRITON_INTERPRET" in found.rejected["triton"] or "not installed" in found.rejected["triton"]
    assert "'cpu' comes first" in found.rejected["reference"]
    assert str(found).splitlines()[0] == "cpu: runs"
    assert len(str(found).splitlines()) == 4


def test_explain_falls_through_to_the_reference():
    found = vk.explain(torch.zeros(1, 3, 4, dtype=torch.float64))
    assert found.chosen == "reference"
    assert "float64" in found.rejected["cpu"]
    assert "float64" in found.rejected["triton"]
    assert "float64" in found.rejected["cuda"]
    assert vk.explain(dtype=torch.float64) == found
    other = vk.explain(device="meta")
    assert other.chosen == "reference"
    assert "meta" in other.rejected["cpu"]
    assert "meta" in other.rejected["cuda"]


def test_explain_of_gpu_tensors():
    found = vk.explain(device="cuda", dtype=torch.bfloat16)
    assert "serves cpu tensors, not cuda" in found.rejected["cpu"]
    assert found.chosen == "triton" or any(
        why in found.rejected["triton"] for why in ("'cuda' comes first", "not installed", "sees no GPU")
    )
    assert found.chosen == "cuda" or any(
        why in found.rejected["cuda"] for why in ("'triton' comes first", "sees no GPU", "without CUDA", "no kernel")
    )


class Library:
    """Stands for the native module of a build."""

    def __init__(self, archs, reason=""):
        self.cuda_archs = lambda: archs
        self.cuda_available = lambda: reason


NONE_FOR_IT = "no kernel for this GPU (sm_75; built for 80 90)"
WHY_NOT_CUDA = [
    ("cuda", Library("80 90"), True, None, None),
    ("cuda", None, True, None, "not built: of a test"),
    ("cuda", Library("", "built without CUDA"), True, None, "built without CUDA"),
    ("cuda", Library("", "built without CUDA"), False, None, "built without CUDA"),
    ("cuda", Library("80 90"), False, None, "torch sees no GPU"),
    ("cuda", Library("80 90"), True, "6.4", "serves NVIDIA GPUs, and this torch is built for ROCm"),
    ("cuda", Library("80 90", NONE_FOR_IT), True, None, NONE_FOR_IT),
    ("cpu", Library("80 90"), True, None, "serves CUDA tensors, not cpu"),
    ("xpu", Library("80 90"), True, None, "serves CUDA tensors, not xpu"),
    ("cpu", Library("emulated"), False, None, None),
    ("cuda", Library("emulated"), True, None, "emulated in this build of the library, which serves cpu tensors, not cuda"),
]


@pytest.mark.parametrize(("kind", "build", "gpu", "rocm", "want"), WHY_NOT_CUDA, ids=range(len(WHY_NOT_CUDA)))
def test_cuda_tells_its_reasons_apart(kind, build, gpu, rocm, want, monkeypatch):
    monkeypatch.setattr(library, "load_library", lambda: (build, "not built: of a test"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.version, "hip", rocm)
    assert choice.why_not.__wrapped__("cuda", kind, torch.bfloat16) == want


@pytest.mark.parametrize(
    ("refused", "want"),
    [((), "triton"), (("triton",), "cuda"), (("triton", "cuda"), "reference")],
    ids=["all", "no-triton", "none"],
)
def test_cuda_is_the_fallback_of_triton(refused, want, monkeypatch):
    monkeypatch.setattr(choice, "why_not", lambda name, kind, dtype: "refused" if name in refused else None)
    assert choice.choose_name.__wrapped__("cuda", torch.bfloat16, None) == want
    assert choice.choose_name.__wrapped__("cpu", torch.bfloat16, None) == "cpu", "also where the emulated library would serve"


class Hidden:
    """Stands for a tensor on a GPU."""

    def __init__(self, nbytes):
        self.nbytes, self.device, self.dtype = nbytes, torch.device("cuda", 0), torch.bfloat16


@pytest.mark.parametrize(
    ("refused", "small", "large"),
    [
        ((), "cuda", "triton"),
        (("triton",), "cuda", "cuda"),
        (("cuda",), "triton", "triton"),
        (("triton", "cuda"), "reference", "reference"),
    ],
    ids=["all", "no-triton", "no-cuda", "none"],
)
def test_small_calls_on_a_gpu_go_to_cuda_first(refused, small, large, monkeypatch):
    monkeypatch.setattr(choice, "why_not", lambda name, kind, dtype: "refused" if name in refused else None)
    monkeypatch.setattr(choice, "_chosen_runner", choice._chosen_runner.__wrapped__)
    monkeypatch.setattr(choice, "choose_name", choice.choose_name.__wrapped__)
    monkeypatch.setattr(choice, "runner_of", lambda op, name: name if name in op.kernels else "reference")

    monkeypatch.setattr(choice, "is_traced", lambda x: False)
    op, merge = Op("package", "name"), Op("package", "name", kernels=("triton",))
    edge = 125_000_000  # of two tensors of hidden states
    assert choice.resolve_backend(op, Hidden(edge - 1), None) == small
    assert choice.resolve_backend(op, Hidden(edge), None) == large
    with choice.cuda_below(0):
        assert choice.resolve_backend(op, Hidden(2), None) == large
    with choice.cuda_below(1 << 40):
        assert choice.resolve_backend(op, Hidden(edge), None) == small
    if "triton" not in refused:
        assert choice.resolve_backend(op, Hidden(2), "triton") == "triton", "forced"
        assert choice.resolve_backend(merge, Hidden(2), None) == "triton", "an op without CUDA C++"


def test_explain_tells_the_size(monkeypatch):
    monkeypatch.setattr(choice, "why_not", lambda name, kind, dtype: "not here" if name == "cpu" else None)
    monkeypatch.setattr(choice, "choose_name", choice.choose_name.__wrapped__)
    found = vk.explain(device="cuda", dtype=torch.bfloat16)
    assert (found.chosen, found.rejected["triton"]) == ("cuda", "'cuda' comes first for cuda tensors below 250000000 bytes")
    with choice.cuda_below(0):
        found = vk.explain(Hidden(1 << 30))
    assert (found.chosen, found.rejected["cuda"]) == ("triton", "'triton' comes first for cuda tensors of 0 bytes and more")


@pytest.mark.parametrize("nbytes", [-1, 1.5, True, "1"])
def test_cuda_below_refuses_what_is_no_size(nbytes):
    with pytest.raises(ValueError, match="nbytes must be an int >= 0"), choice.cuda_below(nbytes):
        pass


def test_the_size_can_be_set_by_environment(monkeypatch):
    script = "from v2drop_kernels.backends import choice; print(choice.small_limit())"
    environment = {**os.environ, "V2DROP_CUDA_BELOW": "1000"}
    assert subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True).stdout == "1000\n"
    for given, want in [("0", 0), ("", 250_000_000)]:  # what the module reads when it is imported
        monkeypatch.setenv("V2DROP_CUDA_BELOW", given)
        assert choice._bytes_from_environment() == want
    monkeypatch.setenv("V2DROP_CUDA_BELOW", "1 GB")
    with pytest.raises(ValueError, match="V2DROP_CUDA_BELOW must be a number of bytes, got '1 GB'"):
        choice._bytes_from_environment()


@EVERY
def test_the_automatic_choice_on_cpu_tensors_is_the_library(call, calls):
    call()
    assert calls


@EVERY
def test_backend_forces_by_argument_and_by_block(call, calls):
    call(backend="reference")
    with vk.backend("reference"):
        call()
    assert not calls
    with vk.backend("reference"):
        call(backend="cpu")
    assert calls, "the argument is nearer than the block"


@EVERY
def test_backend_forces_by_environment(call, calls, monkeypatch):
    monkeypatch.setenv("V2DROP_BACKEND", "reference")
    call()
    assert not calls
    assert vk.explain().chosen == "reference"
    with vk.backend("cpu"):
        call()
    assert calls, "the block is nearer than the environment"


@EVERY
def test_backend_that_cannot_serve_raises_with_its_reason(call):
    with pytest.raises(RuntimeError, match=r"'triton' cannot serve cpu.*(TRITON_INTERPRET|not installed)"):
        call(backend="triton")
    with vk.backend("triton"), pytest.raises(RuntimeError, match="triton"):
        call()


@pytest.mark.parametrize("call", [c for n, c in CALLS.items() if n not in ("compact", "compact_", "segmented_topk")])
def test_backend_cpu_refuses_float64(call, monkeypatch):
    monkeypatch.setitem(globals(), "H", H.double())
    call()
    with pytest.raises(RuntimeError, match=r"'cpu' cannot serve.*float64"):
        call(backend="cpu")


def test_backend_moves_bytes_of_any_dtype():
    """compact reads no numbers, so the library also serves float64, complex and integers."""
    for dtype in (torch.float64, torch.complex64, torch.int64, torch.float8_e4m3fn):
        x = torch.zeros(1, 3, 2, dtype=torch.uint8).repeat(1, 1, dtype.itemsize).view(dtype)
        assert vk.compact(torch.tensor([[1]]), x, backend="cpu").hidden.dtype == dtype


def test_backend_restores_what_was_forced():
    with vk.backend("reference"):
        with vk.backend("cpu"):
            assert vk.explain().chosen == "cpu"
        assert vk.explain().chosen == "reference"
        assert vk.explain().rejected["cpu"] == "'reference' is forced"
    with pytest.raises(KeyError), vk.backend("reference"):
        raise KeyError
    assert vk.explain().chosen == "cpu"


def test_backend_is_local_to_a_thread():
    """A context variable: forcing a backend here changes nothing for a server's other threads."""
    seen = []
    with vk.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(vk.explain().chosen))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "native"])
def test_backend_of_unknown_names(name, monkeypatch):
    with pytest.raises(ValueError, match="name must be one of"), vk.backend(name):
        pass
    with pytest.raises(ValueError, match="backend must be one of"):
        vk.variation_score(H, H, backend=name)
    if name:
        monkeypatch.setenv("V2DROP_BACKEND", name)
        with pytest.raises(ValueError, match="V2DROP_BACKEND must be one of"):
            vk.variation_score(H, H)


@EVERY
def test_backend_cuda_refuses_cpu_tensors(call):
    with pytest.raises(RuntimeError, match=r"'cuda' cannot serve cpu.*serves CUDA tensors, not cpu"):
        call(backend="cuda")


def test_another_build_of_the_module_is_loaded_from_its_path(tmp_path):
    """V2DROP_NATIVE_MODULE: what it names is loaded, or nothing is; never the installed module in its place."""
    script = "from v2drop_kernels import native; print(native.available()[1] or native.lib().__file__)"
    for path, want in ((library.lib().__file__, library.lib().__file__), (str(tmp_path / "_C.so"), "it cannot be loaded")):
        environment = {**os.environ, "V2DROP_NATIVE_MODULE": path}
        out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
        assert want in out


def test_backend_environment_holds_for_a_process():
    script = "import torch, v2drop_kernels as vk; print(vk.explain(torch.zeros(1, 2, 3)))"
    out = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "V2DROP_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.startswith("reference: runs\n")
    assert "cpu: 'reference' is forced" in out


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_native_isa_is_capped_by_environment(isa):
    """Every instruction set that this machine has gives the same bits; V2DROP_ISA caps the choice."""
    script = """
import torch, v2drop_kernels as vk
from v2drop_kernels import native
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for D in (1, 7, 33, 200):
        a = torch.randint(-8, 9, (2, 70, D), generator=g).to(dtype)
        b = torch.randint(-8, 9, (2, 70, D), generator=g).to(dtype)
        for metric in ("l2", "l1"):
            got = vk.drop_tokens(a, b, 20, droppable=(3, 66), metric=metric, backend="cpu")
            want = vk.drop_tokens(a, b, 20, droppable=(3, 66), metric=metric, backend="reference")
            assert torch.equal(got.keep, want.keep) and torch.equal(got.hidden, want.hidden)
            scores = vk.variation_score(a, b, metric=metric, backend="cpu")
            assert torch.equal(scores, vk.variation_score(a, b, metric=metric, backend="reference"))
print(native.isa())
"""
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "V2DROP_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    order = ["baseline", "avx2", "avx512", "avx512bf16"]
    assert found.stdout.strip() in order[: order.index(isa) + 1]
