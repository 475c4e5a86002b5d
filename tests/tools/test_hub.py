"""The Hub form: staged, built as kernel-builder builds it, loaded as the ``kernels`` library loads it, and run."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import v2drop_kernels as vk

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ("_v2drop_kernels_cpu_aaaaaaa", "_v2drop_kernels_cpu_bbbbbbb")  # the ids of two builds: name, backend, revision

# What a build has besides the staged files. kernel-builder derives the name from the backend of the installed torch.
OPS = """
import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name):
    return f"{id}::{{op_name}}"
"""

# The loader makes a module of the build's id from its __init__.py; nothing may come from an installed v2drop_kernels.
LOAD = """
import importlib.util, sys
from pathlib import Path
import torch

sys.modules["v2drop_kernels"] = None


def load(path):
    path = Path(path)
    spec = importlib.util.spec_from_file_location(path.name, path / "__init__.py")
    sys.modules[path.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builds = [load(path) for path in sys.argv[2:]]
h_prev, h_cur, kv = torch.load(sys.argv[1])
"""


@pytest.fixture(scope="module")
def stage() -> Any:
    sys.path.insert(0, str(ROOT / "hub"))
    try:
        yield importlib.import_module("stage")
    finally:
        sys.path.remove(str(ROOT / "hub"))
        sys.modules.pop("stage", None)


@pytest.fixture(scope="module")
def project(stage: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("project")
    stage.stage(out)
    return out


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    h_prev, h_cur = torch.randn(2, 2, 23, 32, generator=g)
    h_cur[:, 5:9] = h_prev[:, 5:9] + 1.0  # equal scores across the cut
    return h_prev, h_cur, torch.randn(2, 3, 23, 8, generator=g)


@pytest.fixture(scope="module")
def run(project: Path, inputs: tuple[torch.Tensor, ...], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("builds")
    torch.save(inputs, folder / "inputs.pt")
    for build in BUILDS:
        for source in (project / "torch-ext" / "v2drop_kernels").rglob("*.py"):
            built = folder / build / source.relative_to(project / "torch-ext" / "v2drop_kernels")
            built.parent.mkdir(parents=True, exist_ok=True)
            built.write_bytes(source.read_bytes())
        (folder / build / "_ops.py").write_text(OPS.format(id=build))

    def run(code: str, **environment: str) -> Any:
        (folder / "code.py").write_text(LOAD + textwrap.dedent(code) + "\ntorch.save(result, sys.argv[1] + '.out')\n")
        clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "V2DROP_BACKEND", "PYTHONPATH")}
        command = [sys.executable, folder / "code.py", folder / "inputs.pt", *(folder / build for build in BUILDS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean | environment, check=False)
        assert done.returncode == 0, done.stderr
        return torch.load(folder / "inputs.pt.out")

    return run


def wanted(inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    h_prev, h_cur, kv = inputs
    out = vk.drop_tokens(h_prev, h_cur, 7, droppable=(2, 20), kv=(kv, kv), backend="reference")
    return [out.keep, out.hidden, out.kv[0]]


DROP = """
result = []
for vk in builds:
    out = vk.drop_tokens(h_prev, h_cur, 7, droppable=(2, 20), kv=(kv, kv), backend={backend!r})
    result.append([out.keep, out.hidden, out.kv[0]])
"""


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_two_builds_in_one_process_equal_the_package(run: Any, inputs: tuple[torch.Tensor, ...], backend: str):
    environment = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
    for found in run(DROP.format(backend=backend), **environment):
        for a, b in zip(found, wanted(inputs), strict=True):
            assert torch.equal(a, b)


def test_a_compiled_call_uses_the_ops_of_its_own_build(run: Any, inputs: tuple[torch.Tensor, ...]):
    found = run(
        """
        result = []
        for vk in builds:
            targets = []
            def backend(graph, _):
                targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
                return graph.forward
            step = lambda a, b, c: vk.drop_tokens(a, b, 7, droppable=(2, 20), kv=(c, c), backend="triton")
            out = torch.compile(step, fullgraph=True, backend=backend)(h_prev, h_cur.requires_grad_(), kv)
            out.hidden.sum().backward()
            result.append(([out.keep, out.hidden.detach(), out.kv[0]], [t for t in targets if "drop" in t], h_cur.grad))
            h_cur.grad = None
        result.append([name for name in dir(torch.ops.v2drop) if not name.startswith("_") and name != "name"])
        """,
        TRITON_INTERPRET="1",
    )
    kept = torch.zeros_like(inputs[1]).scatter_(1, wanted(inputs)[0][..., None].expand(-1, -1, 32), 1.0)
    for (outs, targets, grad), build in zip(found[:-1], BUILDS, strict=True):
        assert targets == [f"{build}.drop.default"] or targets == [f"{build}.drop"]
        assert all(torch.equal(a, b) for a, b in zip(outs, wanted(inputs), strict=True))
        assert torch.equal(grad, kept)
    assert found[-1] == [], "ops were registered outside the namespace of the build"


def test_all_public_names_are_there_and_the_native_backends_say_why_not(run: Any):
    found = run(
        """
        result = []
        for vk in builds:
            why = vk.explain(h_cur)
            result.append(([name for name in vk.__all__ if not hasattr(vk, name)], why.chosen, why.rejected["cpu"]))
        """
    )
    for missing, chosen, reason in found:
        assert missing == []
        assert chosen == "reference"
        assert "not built" in reason


def test_build_toml_is_what_the_builder_reads(project: Path):
    # Edition 5: kernels-data/src/config/v5.rs of huggingface/kernels refuses any other key and wants these.
    build = tomllib.loads((project / "build.toml").read_text())
    general = build.pop("general")
    assert build == {"torch-noarch": {}}
    assert general.keys() == {"name", "version", "edition", "license", "backends"}
    assert general["edition"] == 5
    assert set(general["backends"]) <= {"cann", "cpu", "cuda", "metal", "neuron", "rocm", "tpu", "xpu"}
    assert (project / "torch-ext" / general["name"].replace("-", "_") / "__init__.py").exists()
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (general["name"], general["license"]) == (ours["name"], ours["license"])


def test_staging_again_replaces_the_package_and_nothing_else(stage: Any, tmp_path: Path):
    stage.stage(tmp_path)
    old, other = tmp_path / "torch-ext" / "v2drop_kernels" / "old.py", tmp_path / ".git"
    old.write_text("")
    other.write_text("kept")
    stage.stage(tmp_path)
    assert not old.exists()
    assert other.read_text() == "kept"


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import v2drop_kernels", "imports v2drop_kernels"),
        ("from v2drop_kernels.core.counts import n_keep", "imports v2drop_kernels"),
        ("import numpy as np", "imports numpy"),
        ("from .plot import keep_picture", "imports plot, which is not staged"),
        ("from . import demo", "imports demo, which is not staged"),
        ("from ..other import x", "outside the package"),
        ('torch.library.register_fake(f"v2drop::{name}")', "add_op_namespace_prefix"),
        ("torch.ops.v2drop.drop(x)", "ops from ._ops"),
        ('importlib.import_module("v2drop_kernels.ops")', "names the module"),
        ("from ._ops import ops\nfrom . import _C\nfrom .core.counts import n_keep\nimport torch, math", None),
    ],
)
def test_staging_refuses_what_would_not_work_on_the_hub(stage: Any, project: Path, code: str, fault: str | None):
    root = project / "torch-ext" / "v2drop_kernels"
    module = root / "bad.py"
    module.write_text(code)
    try:
        faults = list(stage.check(module, root))
    finally:
        module.unlink()
    assert len(faults) == (fault is not None)
    assert all(fault in found for found in faults)
