"""The GPU check in a dry run: every line but those of CudaMeter runs, nothing is reported where something is red, a cut run leaves
what it has. No timing is asserted."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
MODULES = (
    "harness",
    "providers",
    "readme_table",
    "gpu_meter",
    "gpu_groups",
    "gpu_outcomes",
    "gpu_constants",
    "gpu_report",
    "gpu_check",
)


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("V2DROP_BACKEND", "PYTEST_ADDOPTS")}
    command = ["bash", str(BENCH / "gpu_check.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=kept | {"PYTHON": sys.executable}, check=False)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dry")
    done = run("--dry", 30, out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def check(modules: Any, tmp_path: Path) -> Any:
    """A dry check into a folder, with the outcomes of tests that the test writes."""

    def make(*lines: dict[str, Any], deadline: float = float("inf")) -> Any:
        (tmp_path / "tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        outcomes = modules.gpu_outcomes.Outcomes(tmp_path / "tests.jsonl", "")
        return modules.gpu_check.Check(tmp_path, modules.gpu_meter.HostMeter(), outcomes, deadline, "dry")

    return make


def test_a_dry_run_leaves_every_file_and_breaks_nothing(dry: Path):
    assert {f.name for f in dry.iterdir()} == {
        "env.json", "tests.jsonl", "tests.log", "results.csv", "bars.csv", "report.md", "gpu_roofline.png", "gpu_bars.png",
    }  # fmt: skip
    results, bars = rows(dry / "results.csv"), rows(dry / "bars.csv")
    assert {row["run"] for row in [*results, *bars]} == {"dry"}
    for row in results:
        assert row["check"] in ("equal", "none") or row["check"].startswith("missing: "), row
        assert (float(row["us"]) > 0) if row["check"] in ("equal", "none") else row["us"] == ""
    assert "dry run" in (dry / "report.md").read_text().splitlines()[0]
    env = json.loads((dry / "env.json").read_text())
    assert all(found["value"] == found["value"] for found in env["constants"].values()), env["constants"]
    assert [json.loads(line)["outcome"] for line in (dry / "tests.jsonl").read_text().splitlines()].count("passed") > 5


def test_a_dry_run_judges_every_bar_of_the_list_on_the_reference_and_the_interpreter(dry: Path):
    bars = rows(dry / "bars.csv")
    judged = {
        backend: {row["bar"] for row in bars if row["backend"] == backend and row["value"]} for backend in ("reference", "triton")
    }
    # 13 is an op that the package does not have, 16 the CPU's.
    assert judged["reference"] == {"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "14", "15"}
    assert judged["triton"] >= judged["reference"] - {"3", "6", "7"}
    exact = [row for row in bars if row["value"] and row["bar"] == "14"]
    assert {float(row["value"]) for row in exact} == {0.0}
    assert {row["status"] for row in bars if row["value"]} == {"dry"}
    # The limits are those of the list, whatever the wording.
    asked = {
        "1": ["<= 1.06", "<= 1.05"],
        "2": ["<= 1.1", "<= 1.15"],
        "3": ["<= 1.3", "<= 1.2", "<= 1.15", "<= 1.08"],
        "4": ["<= 4", "<= 1.9"],
        "5": [">= 4", ">= 3", ">= 2"],
        "6": [">= 5", ">= 2.5"],
        "7": [">= 3", ">= 2.2", ">= 1.8", ">= 1.2", ">= 1.6", ">= 1"],
        "8": [">= 4", ">= 3"],
        "9": ["<= 1.5"],
        "10": ["<= 1.15", "<= 1.05"],
        "11": ["<= 1.02", "<= 1.1", "<= 0"],
        "12": ["<= 1.1", ">= 1.3"],
        "14": ["<= 0", "<= 16"],
        "15": ["<= 12", "<= 2", "<= 3"],
    }
    for bar, limits in asked.items():
        assert {row["limit"] for row in bars if row["bar"] == bar} == set(limits), bar


def test_a_dry_run_never_reaches_the_committed_results(tmp_path: Path):
    for arguments in (["--dry", "1"], ["--dry", "1", BENCH / "results" / "dry"]):
        refused = run(*arguments)
        assert refused.returncode == 2
        assert "outside bench/results" in refused.stderr
    assert not (BENCH / "results" / "dry").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which this would measure")
@pytest.mark.parametrize("archs", ["", "90"])
def test_without_a_gpu_or_a_build_only_a_dry_run_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archs: str):
    """With an architecture that was named it builds; what fails there is told, and no reason to stop."""
    (tmp_path / "cmake").write_text("#!/bin/sh\necho 'CMake Error: no compiler'\nexit 1\n")
    (tmp_path / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("V2DROP_CUDA_ARCHS", archs)
    refused = run(1, tmp_path / "out")
    assert refused.returncode == 2
    assert "--dry" in refused.stderr
    assert ("build: failed: CMake Error: no compiler" if archs else "build: not built") in refused.stdout


def test_a_cut_run_names_what_it_did_not_reach(modules: Any, check: Any, tmp_path: Path):
    late = check(deadline=0.0)
    for step in (*modules.gpu_groups.urgent(), *modules.gpu_groups.others()):
        late.do(step)
    bars = rows(tmp_path / "bars.csv")
    assert {row["status"] for row in bars} == {"not reached in the time given"}
    assert {row["bar"] for row in bars} >= {"1", "2", "3", "4", "5", "14", "15"}
    assert rows(tmp_path / "results.csv") == []


def of(modules: Any, op: str) -> Any:
    groups = [s for s in modules.gpu_groups.others() if isinstance(s, modules.gpu_groups.Group)]
    return next(group for group in groups if group.op == op)


@pytest.mark.parametrize(
    ("test", "op", "red"),
    [
        ("tests/test_variation_score.py::test_values[l2-reference]", "score", True),
        ("tests/test_variation_score.py::test_values[reference-l2]", "drop", True),
        ("tests/test_variation_score.py::test_values[triton-l2]", "score", False),
        ("tests/test_compact.py::test_rows[reference]", "score", False),
        ("tests/test_determinism.py::test_bits[reference-l2]", "score", True),
        ("tests/test_device_lengths.py::test_replays", "score", True),
    ],
)
def test_no_figure_where_a_test_is_red(modules: Any, check: Any, tmp_path: Path, test: str, op: str, red: bool):
    group = of(modules, op)
    check({"test": test, "outcome": "failed", "seconds": 1.0, "why": "1 != 2"}).do(group)
    found = [row for row in rows(tmp_path / "results.csv") if row["provider"] == "reference"]
    bars = [row for row in rows(tmp_path / "bars.csv") if row["backend"] == "reference"]
    assert found
    assert bars
    for row in found:
        assert row["check"] == (f"red: {test}" if red else "equal")
        assert (row["us"] == "") == red
    for row in bars:
        assert (row["value"] == "") == red
        assert (test in row["status"]) == red


@pytest.mark.parametrize("fault", ["score", "raises"])
def test_a_wrong_result_gets_no_figure(modules: Any, check: Any, tmp_path: Path, fault: str):
    group = of(modules, "score")

    def build(case: Any, meter: Any) -> list[Any]:
        made = modules.gpu_groups.score(case, meter)

        def spoilt(call: Any) -> Any:
            if fault == "raises":
                raise RuntimeError("no result at all")
            return call() * 1.001

        wrong = [lambda call=call: spoilt(call) for call in made[0].calls]
        return [made[0]._replace(calls=wrong), *made[1:]]

    done = check()
    done.do(group._replace(build=build))
    mine = next(row for row in rows(tmp_path / "results.csv") if row["provider"] == "reference")
    assert mine["check"].startswith("wrong: scores are off" if fault == "score" else "broken: RuntimeError: no result")
    assert mine["us"] == mine["gb_s"] == ""
    bars = [row for row in rows(tmp_path / "bars.csv") if row["backend"] == "reference"]
    assert {row["value"] for row in bars} == {""}
    assert all(mine["check"] in row["status"] for row in bars)
    assert done.broken == (fault == "raises")


def test_a_broken_problem_does_not_take_the_next_with_it(modules: Any, check: Any, tmp_path: Path):
    def build(case: Any, meter: Any) -> list[Any]:
        raise RuntimeError("out of memory")

    group, done = of(modules, "score"), check()
    done.do(group._replace(build=build))
    done.do(group)
    status = [row["status"] for row in rows(tmp_path / "bars.csv") if row["backend"] == "reference"]
    assert status[: len(group.bars)] == ["broken: RuntimeError: out of memory"] * len(group.bars)
    assert status[len(group.bars) :] == ["dry"] * len(group.bars)


def test_packed_segments_are_checked_one_by_one(modules: Any):
    groups, meter = modules.gpu_groups, modules.gpu_meter.HostMeter()
    case = groups.Case(1, 30, 16, groups.QUARTER)
    x = groups.scored(case, *groups.scaled(case, meter))
    run = groups.vk.drop_tokens(x.h_prev[0], x.h_cur[0], [3, 2], cu_seqlens=[0, 12, 30], backend="reference")
    check = groups.segments_kept(x, [0, 12, 30], [3, 2])
    assert check((run.keep, run.hidden)) is None
    assert "rows in place of 5" in check((torch.cat([run.keep, run.keep[-1:]]), torch.cat([run.hidden, run.hidden[-1:]])))
    worst = x.scores[0, 12:].argmin() + 12
    other = run.keep.clone()
    other[3:] = torch.stack([worst, run.keep[4]]).sort().values
    assert "segment at row 12" in check((other, x.h_cur[0, other]))


def test_cuda_meter_runs_through_with_a_gpu_that_does_nothing(modules: Any):
    """No GPU here: every name that it takes from torch.cuda must at least exist, and be called in order."""
    order: list[str] = []

    class Graph:
        def replay(self) -> None:
            order.append("replay")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def elapsed_time(self, stop: Any) -> float:
            return 3.0

    facts = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=60 << 20, total_memory=1 << 37
    )
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stubs = {
        "set_device": lambda device: None, "get_device_properties": lambda device: facts,
        "synchronize": lambda: order.append("sync"),
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: contextlib.nullcontext(),
        "CUDAGraph": Graph, "graph": lambda g: contextlib.nullcontext(), "Event": Event, "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 164, "reset_peak_memory_stats": lambda: None,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        meter = modules.gpu_meter.CudaMeter()
        assert meter.name == "nvidia-h200"
        assert meter.facts["capability"] == "9.0"
        calls = [lambda: order.append("a"), lambda: order.append("b")]
        replay = meter.graph(calls, 3)
        assert [x for x in order if x in "ab"] == ["a", "b", "a", "a", "b", "a"]  # before the capture, then captured
        order.clear()
        assert meter.device_seconds(replay) == 3e-3
        assert order == ["sync", "record", "replay", "record", "sync"]
        assert meter.extra_bytes(lambda: torch.ones(3)) == 64
        assert meter.wall_seconds(lambda: None) >= 0
        assert meter.launches(lambda: torch.ones(3).add(1)) == []  # nothing ran on a GPU


def test_steps_name_only_candidates_that_exist(modules: Any):
    """A bar whose name is misspelt would find no time on the GPU, and nobody would know why."""
    groups, meter = modules.gpu_groups, modules.gpu_meter.HostMeter()
    seen = set()
    for step in (*groups.urgent(), *groups.others()):
        if isinstance(step, groups.Trial) or (key := (step.build, step.bars)) in seen:
            continue
        seen.add(key)
        if step.op == "drop" and "compile" in step.name:
            continue  # traced in the dry run; building it here again would only cost time
        times = {c.name: 1.0 for c in step.build(groups.tiny(step.case), meter)}
        for bar in step.bars:
            assert bar.value(times, "reference") in (0.0, 1.0)


def test_the_kernels_behind_the_constants_compile_for_a_gpu(modules: Any):
    """The interpreter leaves out what only a GPU has: dependent launches, and programs that wait for each other."""
    triton = importlib.import_module("triton")
    source = importlib.import_module("triton.compiler").ASTSource
    kernels = importlib.import_module("gpu_kernels")
    sys.modules.pop("gpu_kernels")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)

    def ptx(kernel: Any, types: dict[str, str], constant: Any, **options: Any) -> str:
        return triton.compile(source(kernel, types, {(2,): constant}), target=target, options=options).asm["ptx"]

    floats = {"y": "*fp32", "x": "*fp32", "EDGE": "constexpr"}
    assert "griddepcontrol.wait" in ptx(kernels.small, floats, True, num_warps=4, launch_pdl=True)
    assert "griddepcontrol" not in ptx(kernels.small, floats, False, num_warps=4)
    counter = {"counter": "*i32", "programs": "i32", "ROUNDS": "constexpr"}
    barriers = ptx(kernels.barriers, counter, 3, num_warps=8, launch_cooperative_grid=True)
    assert barriers.count("atom.global.gpu.acq_rel.add") == barriers.count("ld.global.gpu.acquire") == 3
