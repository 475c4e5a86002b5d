"""The GPU check in a dry run: every line but those of CudaTimer runs, nothing is reported where something is red, a cut run leaves
what it has. No timing is asserted."""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import v2drop_kernels as vk

BENCH = Path(__file__).resolve().parents[2] / "bench"
MODULES = (
    "provenance",
    "harness",
    "registry",
    "verify",
    "providers",
    "tables",
    "readme_table",
    "gpu_timer",
    "gpu_targets",
    "gpu_inputs",
    "gpu_checks",
    "gpu_candidates",
    "gpu_problems",
    "gpu_trials",
    "gpu_registry",
    "gpu_outcomes",
    "gpu_constants",
    "gpu_floors",
    "gpu_report",
    "gpu_ncu",
    "gpu_sanitizer",
    "gpu_state",
    "gpu_build",
    "gpu_tests",
    "gpu_precompile",
    "gpu_measure",
    "schema",
    "gpu_options",
    "gpu_launch_sizes",
    "gpu_check",
    "gpu_verify",
    "gpu_tune",
)


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("V2DROP_BACKEND", "PYTEST_ADDOPTS")}
    command = ["bash", str(BENCH / "gpu_check.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=kept | {"PYTHON": sys.executable}, check=False)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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
        return modules.gpu_measure.Check(tmp_path, modules.gpu_timer.HostTimer(), outcomes, deadline, "dry")

    return make


def listed(modules: Any) -> list[Any]:
    """Every group and trial, in order."""
    return [one for found in modules.gpu_registry.steps().values() for one in found]


def test_the_limits_are_those_of_the_list(modules: Any):
    """A run of all of it is `make gpu-check-dry`; here only what it would be judged by."""
    found: dict[str, set[str]] = {}
    for one in (*listed(modules), *modules.gpu_targets.MODEL_LEVEL):
        for target in getattr(one, "targets", [one]):
            found.setdefault(target.number, set()).add(f"{'>=' if target.sense == 'at least' else '<='} {target.limit:g}")
    assert found == {
        "1": {"<= 1.06", "<= 1.05"},
        "2": {"<= 1.1", "<= 1.15"},
        "3": {"<= 1.3", "<= 1.2", "<= 1.15", "<= 1.08"},
        "4": {"<= 4", "<= 1.9"},
        "5": {">= 4", ">= 3", ">= 2"},
        "6": {">= 5", ">= 2.5"},
        "7": {">= 3", ">= 2.2", ">= 1.8", ">= 1.2", ">= 1.6", ">= 1"},
        "8": {">= 4", ">= 3"},
        "9": {"<= 1.5"},
        "10": {"<= 1.15", "<= 1.05"},
        "11": {"<= 1.02", "<= 1.1", "<= 0"},
        "12": {"<= 1.1", ">= 1.3"},
        "13": {"<= 1.25", ">= 3"},
        "14": {"<= 0", "<= 16"},
        "15": {"<= 12", "<= 2", "<= 3"},
        "model": {">= 1.22", ">= 1.38"},
    }


def test_a_dry_run_never_reaches_the_committed_results(tmp_path: Path):
    for arguments in (["--dry"], ["--dry", "--results", BENCH / "results" / "dry"]):
        refused = run(*arguments)
        assert refused.returncode == 2
        assert "outside bench/results" in refused.stderr
    assert not (BENCH / "results" / "dry").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which this would measure")
def test_without_a_gpu_only_a_dry_run_is_offered(tmp_path: Path):
    refused = run("--minutes", 1, "--results", tmp_path / "out")
    assert refused.returncode == 2
    assert "--dry" in refused.stderr


def of(modules: Any, op: str) -> Any:
    groups = [s for s in listed(modules) if isinstance(s, modules.gpu_registry.Group)]
    return next(group for group in groups if group.op == op)


@pytest.mark.parametrize(
    ("test", "op", "forbids"),
    [
        ("tests/test_variation_score.py::test_values[l2-reference]", "score", True),
        ("tests/test_variation_score.py::test_values[reference-l2]", "drop", True),
        ("tests/test_variation_score.py::test_values[triton-l2]", "score", False),
        ("tests/test_compact.py::test_rows[reference]", "score", False),
        ("tests/test_attention_score.py::test_values[reference]", "attention", True),
        ("tests/test_attention_score.py::test_values[reference]", "drop", False),
        ("tests/test_variation_score.py::test_values[reference]", "attention", False),
        ("tests/test_merge.py::test_values[reference]", "drop", False),
        ("tests/ops/test_determinism.py::test_bits[reference-l2]", "score", True),
        ("tests/ops/test_device_lengths.py::test_replays", "score", True),
        ("tests/interop/test_array.py::test_cupy", "score", False),
        ("tests/interop/test_jax.py::test_values", "score", False),
        ("tests/models/test_models.py::test_values[reference]", "score", False),
    ],
)
def test_no_figure_where_a_test_fails(modules: Any, check: Any, tmp_path: Path, test: str, op: str, forbids: bool):
    group = of(modules, op)
    check({"test": test, "outcome": "failed", "seconds": 1.0, "why": "1 != 2"}).do(group)
    found = [row for row in rows(tmp_path / "results.csv") if row["provider"] == "reference"]
    targets = [row for row in rows(tmp_path / "targets.csv") if row["backend"] == "reference"]
    assert found
    assert targets
    for row in found:
        assert row["check"] == (f"failing: {test}" if forbids else "equal")
        assert (row["median_us"] == "") == forbids
    for row in targets:
        assert (row["value"] == "") == forbids
        assert (test in row["status"]) == forbids


def test_only_tests_that_exist_speak_for_an_op(modules: Any):
    """A file that was renamed would speak for everything, or for nothing."""
    for name in modules.gpu_outcomes.SPEAKS_FOR:
        assert list((BENCH.parent / "tests").glob(f"*/{name}.py")), name
    for name in modules.gpu_tests.SMOKE:
        assert len(modules.gpu_tests.find(name)) == 1, name


def test_a_file_that_could_not_be_collected_forbids_nothing(modules: Any, tmp_path: Path):
    path = tmp_path / "tests.jsonl"
    for file in ("tests/interop/test_jax.py", "tests/ops/test_device_lengths.py", "tests/ops/test_compact.py"):
        path.write_text(json.dumps({"test": file, "outcome": "not collected", "seconds": 0, "why": "ImportError"}) + "\n{half")
        outcomes = modules.gpu_outcomes.Outcomes(path)
        assert outcomes.failing("triton", "compact") is None
        assert outcomes.words() == "Tests: 1 not collected."


@pytest.mark.parametrize(("op", "fault"), [("score", "score"), ("score", "raises"), ("attention", "score")])
def test_a_wrong_result_gets_no_figure(modules: Any, check: Any, tmp_path: Path, op: str, fault: str):
    group = of(modules, op)

    def build(case: Any, timer: Any) -> list[Any]:
        made = group.build(case, timer)

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
    assert mine["median_us"] == mine["gb_s"] == ""
    targets = [row for row in rows(tmp_path / "targets.csv") if row["backend"] == "reference"]
    assert {row["value"] for row in targets} == {""}
    assert all(mine["check"] in row["status"] for row in targets)
    assert done.broken == (fault == "raises")


def test_a_broken_problem_does_not_take_the_next_with_it(modules: Any, check: Any, tmp_path: Path):
    def build(case: Any, timer: Any) -> list[Any]:
        raise RuntimeError("out of memory")

    group, done = of(modules, "score"), check()
    done.do(group._replace(build=build))
    done.do(group)
    status = [row["status"] for row in rows(tmp_path / "targets.csv") if row["backend"] == "reference"]
    assert status[: len(group.targets)] == ["broken: RuntimeError: out of memory"] * len(group.targets)
    assert status[len(group.targets) :] == ["dry"] * len(group.targets)


def test_packed_segments_are_checked_one_by_one(modules: Any):
    inputs, timer = modules.gpu_inputs, modules.gpu_timer.HostTimer()
    case = modules.registry.Case(1, 30, 16, inputs.QUARTER)
    x = inputs.scored(case, *inputs.scaled(case, timer))
    run = vk.drop_tokens(x.h_prev[0], x.h_cur[0], [3, 2], cu_seqlens=[0, 12, 30], backend="reference")
    check = modules.gpu_checks.segments_kept(x, [0, 12, 30], [3, 2])
    assert check((run.keep, run.hidden)) is None
    assert "rows in place of 5" in check((torch.cat([run.keep, run.keep[-1:]]), torch.cat([run.hidden, run.hidden[-1:]])))
    worst = x.scores[0, 12:].argmin() + 12
    other = run.keep.clone()
    other[3:] = torch.stack([worst, run.keep[4]]).sort().values
    assert "segment at row 12" in check((other, x.h_cur[0, other]))


def test_cuda_timer_runs_through_with_a_gpu_that_does_nothing(modules: Any):
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
        timer = modules.gpu_timer.CudaTimer()
        assert timer.name == "nvidia-h200"
        assert timer.facts["capability"] == "9.0"
        calls = [lambda: order.append("a"), lambda: order.append("b")]
        replay = timer.graph(calls, 3)
        assert [x for x in order if x in "ab"] == ["a", "b", "a", "a", "b", "a"]  # before the capture, then captured
        order.clear()
        assert timer.device_seconds(replay) == 3e-3
        assert order == ["sync", "record", "replay", "record", "sync"]
        assert timer.extra_bytes(lambda: torch.ones(3)) == 64
        assert timer.wall_seconds(lambda: None) >= 0
        assert timer.launches(lambda: torch.ones(3).add(1)) == []  # nothing ran on a GPU


def test_steps_name_only_candidates_that_exist(modules: Any):
    """A target whose name is misspelt would find no time on the GPU, without an explanation."""
    timer, seen = modules.gpu_timer.HostTimer(), set()
    for step in listed(modules):
        if isinstance(step, modules.gpu_trials.Trial) or (key := (step.build, step.targets)) in seen:
            continue
        seen.add(key)
        if step.op == "drop" and "compile" in step.name:
            continue  # traced in the dry run; building it here again would only cost time
        times = {c.name: 1.0 for c in step.build(modules.gpu_inputs.tiny(step.case), timer)}
        for target in step.targets:
            assert target.value(times, "reference") in (0.0, 1.0)


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


def test_every_shape_that_was_asked_for_has_a_group(modules: Any):
    inputs, case_of = modules.gpu_inputs, modules.registry.Case
    steps = [s for s in listed(modules) if isinstance(s, modules.gpu_registry.Group)]
    drops = {s.case for s in steps if s.name.startswith("drop ")}
    asked = {case_of(b, n, d, inputs.QUARTER) for n, d in ((576, 4096), (6272, 3584), (65536, 4096)) for b in (1, 8, 32)}
    asked |= {case_of(64, 576, 4096, inputs.QUARTER)}
    asked |= {case_of(1, 6272, d, inputs.QUARTER) for d in (2560, 3584, 4096, 5120, 8192)}
    shares = [Fraction(1, 20), inputs.QUARTER, Fraction(1, 2)]
    asked |= {case._replace(ratio=ratio) for case in (inputs.IMAGE, inputs.VIDEO, inputs.LONG) for ratio in shares}
    assert asked <= drops
    assert {s.case.dtype for s in steps if s.op == "score"} == {torch.bfloat16, torch.float16, torch.float32}
    assert {s.build.keywords["layers"] for s in steps if s.name.startswith("extras")} == {1, 4, 32}
    attention = {(*s.case[:2], s.build.keywords["heads"], s.build.keywords["kv_heads"]) for s in steps if s.op == "attention"}
    shapes = [(1, 576), (1, 6272), (8, 6272), (1, 65536)]
    assert attention == {(*shape, *heads) for shape in shapes for heads in ((28, 4), (32, 32))}
    assert {s.op for s in steps} == {"score", "select", "compact", "drop", "backward", "attention"}
    assert any(s.name == "ragged" for s in steps)
    assert max(s.needs for s in steps) > 100e9  # what an 80 GB device must refuse


def test_a_problem_that_does_not_fit_is_named_and_nothing_is_run(modules: Any, check: Any, tmp_path: Path, monkeypatch: Any):
    group = of(modules, "score")._replace(needs=2 * 10**9, build=lambda case, timer: pytest.fail("was built"))
    done = check()
    done.dry = False
    monkeypatch.setattr(done.timer, "free_bytes", lambda: 1e9)
    assert done.do(group) == {}
    why = "missing: needs about 2 GB of memory, 1 GB are free"
    assert [row["check"] for row in rows(tmp_path / "results.csv")] == [why]
    assert {row["status"] for row in rows(tmp_path / "targets.csv")} == {why}
    assert done.broken == 0


def test_a_launch_mode_that_does_not_apply_is_missing_and_not_broken(modules: Any, check: Any):
    def refuse() -> None:
        raise RuntimeError("context.launch_mode: a cooperative drop takes at most 2048 competing rows a segment")

    done = check()
    assert done._fault(modules.gpu_candidates.Candidate("cuda-cooperative", [refuse]), "drop").startswith(
        "missing: context.launch_mode: a coop"
    )
    assert done.broken == 0


# --- the model level


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("import json, sys; print(json.dumps([{'model': 'a', 'args': sys.argv[1:]}]))", "see the model level of the report"),
        ("import sys; sys.exit('no weights')", "broken: RuntimeError: decoders.py ended with code 1: no weights"),
        ("import a_package_that_is_not_here", "not there: No module named 'a_package_that_is_not_here'"),
        ("print('[]')", "broken: RuntimeError: decoders.py printed no list of rows"),
    ],
)
def test_the_model_level_runs_where_it_exists(modules: Any, check: Any, tmp_path: Path, monkeypatch: Any, script: str, why: str):
    monkeypatch.setattr(modules.gpu_measure, "MODEL", tmp_path / "decoders.py")
    (tmp_path / "decoders.py").write_text(script)
    check().model(["--batch", "1"], "model-1.json", 60)
    found = [row["status"] for row in rows(tmp_path / "targets.csv") if row["target"] == "model"]
    assert len(found) == 2
    assert all(status.startswith(why) for status in found), found
    if why.startswith("see"):
        written = json.loads((tmp_path / "model-1.json").read_text())
        assert written == [{"model": "a", "args": ["--json", "--seconds", "36", "--batch", "1", "--dry"]}]
        assert "| model | args |" in modules.gpu_report.model_table(written)
    else:
        assert not (tmp_path / "model-1.json").exists()


# --- the policies


@pytest.mark.parametrize(
    ("script", "seconds", "why"),
    [
        ("import pathlib, sys; pathlib.Path(sys.argv[2], 'policies.md').write_text(f'# Title\\n\\n{sys.argv}\\n')", 60, "measured"),
        ("import sys; sys.exit('no memory')", 60, "broken: RuntimeError: policies.py ended with code 1: no memory"),
        ("import a_package_that_is_not_here", 60, "not there: No module named 'a_package_that_is_not_here'"),
        ("import time; time.sleep(60)", 1, "cut after 1 s"),
    ],
)
def test_the_policies_are_measured_in_the_time_that_is_left(
    modules: Any, check: Any, tmp_path: Path, monkeypatch: Any, script: str, seconds: float, why: str
):
    program = tmp_path / "policies.py"
    program.write_text(script)
    monkeypatch.setattr(modules.gpu_measure, "POLICIES", program)
    done = check()
    assert (done.policies(seconds) or "measured") == why
    assert done.broken == why.startswith("broken")
    told = modules.gpu_report.policies(tmp_path, {"policies": why})
    given = [str(program), "--out", str(tmp_path), "--dry"]
    assert told == (f"In this run: {why}." + (f"\n\n{given}" if why == "measured" else ""))
    # What an earlier run left in the folder stays, below what became of this one.
    (tmp_path / "policies.md").write_text("# Title\n\nearlier\n")
    assert modules.gpu_report.policies(tmp_path, {}) == "In this run: not run yet.\n\nearlier"


# --- Nsight Compute

HEADER = (
    '"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum.per_second",'
    '"dram__throughput.avg.pct_of_peak_sustained_elapsed","lts__t_sector_hit_rate.pct","launch__registers_per_thread"\n'
    '"","","","ns","byte/s","%","%","register/thread"\n'
)
RAW = (
    "==PROF== Connected to process 7\n"
    + HEADER
    + '"0","7","_variation_score_fwd_kernel","25,000","4,100,000,000,000","85.5","12.25","48"\n'
    + '"1","7","void at::native::vectorized_gather_kernel<16, long>(char *)","1","1","1","1","1"\n'
    + '"2","7","void v2drop::<unnamed>::select_kernel<v2drop::Row, (bool)1>(v2drop::Table)","5,000","n/a","1","99","64"\n'
)


def stub(folder: Path, script: str, name: str = "ncu") -> None:
    (folder / name).write_text(f"#!{sys.executable}\nimport subprocess, sys\n{script}")
    (folder / name).chmod(0o755)


def test_ncu_figures_reach_the_csv_and_the_report(modules: Any, tmp_path: Path, monkeypatch: Any):
    stub(
        tmp_path,
        "at = sys.argv.index(sys.executable)\n"
        "if 'triton' in sys.argv and subprocess.run(sys.argv[at:]).returncode:\n    sys.exit('what it profiles failed')\n"
        "assert sys.argv[1:3] == ['--clock-control', 'none']\n"
        f"open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write({RAW!r})\n",
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for backend in ("triton", "cuda", "triton"):  # measured again, a backend's rows are replaced
        assert modules.gpu_ncu.profile(tmp_path, "image", backend, 100, True) is None
    found = rows(tmp_path / "ncu.csv")
    assert [row["backend"] for row in found] == ["cuda", "cuda", "triton", "triton"]
    found = found[2:]
    assert [(row["backend"], row["kernel"], row["name"]) for row in found] == [
        ("triton", "score", "_variation_score_fwd_kernel"), ("triton", "select", "select_kernel"),
    ]  # fmt: skip
    assert [found[0][c] for c in ("us", "dram_gb_s", "l2_hit_percent", "registers")] == ["25", "4100", "12.25", "48"]
    assert found[1]["dram_gb_s"] == ""
    assert "| triton | [1, 40, 32] | select_kernel | 5 | - | 1 | 99 | 64 |" in modules.gpu_report.ncu_table(found)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            "print('==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'); sys.exit(1)",
            "no permission to read the GPU's c",
        ),
        ("print('==ERROR== an error occurred'); sys.exit(1)", "ncu gave no figures: ==ERROR== an error occurred"),
        ("pass", "ncu gave no figures: it printed no kernel"),
        (None, "ncu is not installed"),
    ],
)
def test_what_keeps_ncu_from_its_counters_is_told_and_no_failure(
    modules: Any, tmp_path: Path, monkeypatch: Any, script: str | None, why: str
):
    if script:
        stub(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path) if script is None else f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert modules.gpu_ncu.profile(tmp_path, "image", "triton", 100, True).startswith(why)
    assert [row["status"].startswith(why) for row in rows(tmp_path / "ncu.csv")] == [True]


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("print('========= ERROR SUMMARY: 0 errors')", "clean"),
        ("print('========= Invalid __global__ read\\n========= ERROR SUMMARY: 2 errors'); sys.exit(9)", "errors found"),
        ("print('device not supported'); sys.exit(1)", "ended with code 1"),
        (None, "compute-sanitizer is not installed"),
    ],
)
def test_the_verdict_of_compute_sanitizer_reaches_the_csv(
    modules: Any, tmp_path: Path, monkeypatch: Any, script: str | None, status: str
):
    if script:
        stub(tmp_path, "assert sys.argv[1:3] == ['--tool', 'racecheck'] and '--drive' in sys.argv\n" + script, "compute-sanitizer")
    monkeypatch.setenv("PATH", str(tmp_path) if script is None else f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert modules.gpu_sanitizer.check(tmp_path, "racecheck", "cuda", 60, True) == (None if status == "clean" else status)
    (row,) = rows(tmp_path / "sanitizer.csv")
    assert (row["tool"], row["backend"], row["status"]) == ("racecheck", "cuda", status)
    if script and "SUMMARY" in script:
        assert row["summary"].startswith("ERROR SUMMARY")


# --- state, archive, provenance, build


def test_an_archive_holds_the_folder_and_a_new_folder_goes_on_from_it(modules: Any, tmp_path: Path):
    state = modules.gpu_state
    (tmp_path / "a").mkdir()
    first = state.State(tmp_path / "a", "abc")
    first.finish("image/one", ["triton"])
    (tmp_path / "a" / "results.csv").write_text("x\n")
    (tmp_path / "a" / "long.log").write_bytes(b"0" * (state.LOG_BYTES + 7))
    archive = state.pack(tmp_path / "a", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu-check.tar.gz"]
    state.unpack(archive, tmp_path / "b")
    assert (tmp_path / "b" / "results.csv").read_text() == "x\n"
    assert (tmp_path / "b" / "long.log").stat().st_size == state.LOG_BYTES
    again = state.State(tmp_path / "b", "abc")
    assert not again.due("image/one", ["triton"])
    assert again.due("image/one", ["triton", "cuda"])  # measured again once CUDA C++ is built
    assert again.due("image/two", [])
    assert state.State(tmp_path / "b", "def").due("image/one", ["triton"])  # another commit begins anew


def test_an_archive_stays_within_its_limit(modules: Any, tmp_path: Path, monkeypatch: Any):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tests.jsonl").write_bytes(os.urandom(1 << 20))
    monkeypatch.setattr(modules.gpu_state, "ARCHIVE_BYTES", 300 << 10)
    assert modules.gpu_state.pack(tmp_path / "a", tmp_path / "out").stat().st_size <= 300 << 10


def test_a_tree_without_git_knows_its_commit(modules: Any, tmp_path: Path, monkeypatch: Any):
    provenance = modules.provenance
    monkeypatch.delenv("V2DROP_COMMIT", raising=False)
    for name in provenance.SOURCES[:-1]:
        (tmp_path / name).mkdir()
    (tmp_path / "CMakeLists.txt").write_text("")
    (tmp_path / "bench" / "a.py").write_text("1")
    assert provenance.commit(tmp_path) == "unknown"
    with pytest.raises(SystemExit, match="no git checkout"):
        provenance.write(tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *arguments], check=True)
    name = provenance.write(tmp_path)
    assert name == provenance.from_git(tmp_path)
    assert len(name) == 12
    (tmp_path / ".git").rename(tmp_path / "elsewhere")
    assert provenance.commit(tmp_path) == name
    (tmp_path / "bench" / "a.py").write_text("2")
    assert provenance.commit(tmp_path) == f"{name}+changes"
    monkeypatch.setenv("V2DROP_COMMIT", "feed")
    assert provenance.commit(tmp_path) == "feed"


@pytest.mark.parametrize(
    ("script", "note"),
    [
        ("[ $1 = -S ] || touch $2/_C.so", "for architecture 90 in"),
        ("echo 'CMake Error: no compiler'; exit 1", "failed: CMake Error: no compiler"),
        (None, "not built: CMake was not found"),
    ],
)
def test_a_build_in_the_background_is_taken_into_use_or_told(
    modules: Any, tmp_path: Path, monkeypatch: Any, script: str | None, note: str
):
    monkeypatch.delenv("V2DROP_NATIVE_MODULE", raising=False)
    if script:
        (tmp_path / "cmake").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if script is None else f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "build"
    build = modules.gpu_build.Build("90", folder=folder)
    try:
        assert build.wait(60)
        assert build.note.startswith(note)
        assert (os.environ.get("V2DROP_NATIVE_MODULE") == str(folder / "_C.so")) == note.startswith("for")
    finally:
        os.environ.pop("V2DROP_NATIVE_MODULE", None)
        modules.gpu_build.forget()


# --- the model of bytes and latencies


def test_floors_are_bytes_over_what_was_measured(modules: Any):
    floors = modules.gpu_floors
    measured = {
        "copy bandwidth": 4000, "read bandwidth": 4500, "kernel, plain edge": 1.5, "kernel, PDL edge": 0.5, "grid barrier": 1.25,
        "ramp": 1.0, "L2 reuse at 16 MB": 2.0, "L2 reuse at 30 MB": 1.5,
    }  # fmt: skip
    constants = {name: {"value": value, "unit": "", "how": ""} for name, value in measured.items()}
    c = floors.Constants.of(constants)
    assert c.again(10e6) == 9000
    assert c.again(20e6) == 6750
    assert c.again(100e6) == 4500
    base = {"B": "1", "D": "4096", "dtype": "bfloat16", "k": "144", "gb_s": ""}
    row = {
        **base,
        "group": "drop one",
        "op": "drop",
        "N": "576",
        "mode": "cold",
        "bytes": "11796480",
        "median_us": "12.5",
        "provider": "triton",
    }
    # (2 * 576 + 144) rows of 8192 bytes: 10.6 MB at 4000 GB/s
    assert floors.floor_us(row, c) == pytest.approx(10616832 / 4000e3)
    # 9437184 bytes read at 4500, 1179648 read again at 9000 and written at 4000, a select of 3.5 us of which 1.5 is its launch
    move = 9437184 / 4500e3 + 1179648 / 9000e3 + 1179648 / 4000e3
    assert floors.models(row, c, 3.5) == {
        "one launch": pytest.approx(1.5 + 1.0 + 1.25 + 2.0 + move),
        "two launches": pytest.approx(1.5 + 1.0 + 0.5 + 2.0 + 1.0 + move),
        "three launches": pytest.approx(1.5 + 1.0 + 1.0 + 2.0 + 1.0 + move),
    }
    select = {
        **base,
        "group": "select one",
        "op": "select",
        "N": "576",
        "mode": "warm",
        "bytes": "5",
        "median_us": "3.5",
        "provider": "cuda",
    }
    copy = {**row, "provider": "copy", "median_us": "4.5"}
    text = floors.floors_table([row, select, copy], constants)
    line = "| drop one | 2.65 us | 8.27 us | 8.52 us | 9.02 us | 4.50 us | triton | 12.5 us | 21 % |"
    assert line in text
    # Keys are read, not copied.
    assert floors.floor_us({**row, "op": "attention", "bytes": "9000000"}, c) == pytest.approx(2.0)
    # What was not measured is a dash, and never a guess.
    assert "| drop one | - | - | - | - | 4.50 us | triton | 12.5 us | - |" in floors.floors_table([row, select, copy], {})


# --- launch sizes


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned")
    done = run("--tune", "--dry", "--minutes", 30, "--results", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out / "tune"


def test_a_dry_tuning_tries_and_checks_candidates_of_every_kind(modules: Any, tuned: Path):
    assert {f.name for f in tuned.iterdir()} == {"results.csv", "tuned.json", "tune.md"}
    results = rows(tuned / "results.csv")
    tried = {row["group"].split()[1] for row in results if row["provider"].startswith("triton@") and row["check"] == "equal"}
    assert tried == {"score", "select", "wide", "fused", "gather", "launches"}
    assert {row["check"] for row in results if not row["check"].startswith("missing")} == {"equal"}
    assert {row["mode"] for row in results if row["group"].startswith("versus")} == {"cold", "eager"}
    assert not any(row["mode"] == "eager" and row["provider"] == "triton-tuned" and row["median_us"] for row in results)
    table = json.loads((tuned / "tuned.json").read_text())["devices"]
    assert table["none: a dry run on the CPU"]["measured"].keys() >= {"run", "date", "commit", "command", "versions"}
    text = (tuned / "tune.md").read_text()
    for kind in ("| score | itemsize 2, d 32 | 4 |", "| launches | n 64, batch 1 | 2 |", "Suggested rule of dispatch, not applied"):
        assert kind in text
    with pytest.raises(SystemExit, match="holds no measurement of a GPU"):
        modules.gpu_tune.ship(tuned, tuned / "table.json")


def fake(times: Any, dry: bool = False) -> Any:
    return SimpleNamespace(
        late=lambda: False, do=lambda group: {"cold": times(group)} if times(group) else {}, dry=dry, conditions={"gpu": "Some GPU"}
    )


def test_an_entry_is_what_gained_on_all_cases_of_its_key(modules: Any, tmp_path: Path):
    tune, case = modules.gpu_tune, modules.registry.Case
    cases = [case(b, 576, 4096, modules.gpu_inputs.QUARTER) for b in (1, 8)]
    a, b = "triton@keys=1024,block=1024,num_warps=8", "triton@keys=1024,block=1024,num_warps=2"
    first = {cases[0]: {"triton": 4.0, a: 2.0, b: 1.0}, cases[1]: {"triton": 4.0, a: 2.0}}  # b was wrong on the second case
    tuning = tune.Tuning(fake(lambda group: first[group.case]), {"run": "full", "date": "2026-01-02"})
    tuning.check.out = tmp_path
    tuning.sweep("select", cases)
    assert tuning.entries == {"select": [{"n": 1024, "keys": 1024, "block": 1024, "num_warps": 8, "gain": 2.0}]}
    tuning.check = fake(lambda group: {"triton": 1.0, "triton@num_warps=8": 0.99})  # noise
    tuning.check.out = tmp_path
    tuning.sweep("fused", cases)
    tuning.check.do = lambda group: {}  # too large, or no time left
    tuning.sweep("launches", cases[:1])
    tuning.check.do = lambda group: {"cold": {"copy": 1.0}}  # red: none of ours was timed
    tuning.sweep("gather", cases[:1])
    assert list(tuning.entries) == ["select"]
    assert tuning.late == [f"launches {cases[0]}"]
    tuning.check.do = lambda group: {
        "cold": {
            "triton": 9e-6,
            "triton-tuned": 8e-6,
            "cuda": 6e-6,
            "cuda-cooperative": 5e-6,
            "cuda-fused": 6e-6,
            "cuda-separate": 7e-6,
        },
        "eager": {"triton": 30e-6, "cuda": 10e-6},
    }
    tuning.compare(cases[0])
    tuning.write()
    text = (tmp_path / "tune.md").read_text()
    assert "| 8.00 us | 6.00 us | 1.33 | 30.0 us | 10.0 us | 3.00 |" in text
    assert f"cuda was faster in GPU time at {cases[0]}; triton was faster in GPU time at no shape" in text
    assert "one or two launches won up to 4.5 MiB of one hidden state, and three from no size tried on" in text
    assert "the rule has no time" in text

    # Shipped, it is what the package reads, beside what stood there of other devices.
    to = tmp_path / "table.json"
    to.write_text('{"devices": {"Other GPU": {"measured": {"run": "full"}, "fused": [{"n": 1024, "num_warps": 8}]}}}')
    tune.ship(tmp_path, to)
    configs = importlib.import_module("v2drop_kernels.backends.configs")
    assert configs.read(to, "Some GPU") == {("select", 1024): (1024, 1024, 8)}
    assert configs.read(to, "Other GPU") == {("fused", 1024): (8,)}
    assert json.loads(to.read_text())["devices"]["Some GPU"]["measured"]["date"] == "2026-01-02"


TABLE = {
    "score": [{"itemsize": 4, "d": 48, "rows": 4, "block_d": 16, "num_warps": 8}],
    "select": [{"n": 64, "keys": 128, "block": 32, "num_warps": 4}],
    "fused": [{"n": 64, "num_warps": 2}],
    "gather": [{"kept": 64, "rows": 16, "programs": 4, "items": 2}],
    "launches": [{"n": 64, "batch": 3, "launches": 3}],
    "wide": [{"n": 64, "batch": 3, "chunk": 32}],
}


def test_a_table_is_read_for_its_device_and_by_exact_key(tmp_path: Path, monkeypatch: Any):
    configs = importlib.import_module("v2drop_kernels.backends.configs")
    functions = {
        "score": lambda: configs.score_config(48, 4), "select": lambda: configs.select_blocks(50, False),
        "fused": lambda: configs.fused_select_block(50), "rows": lambda: configs.gather_rows(3, 17),
        "items": lambda: configs.gather_items(4, 3, 51), "launches": lambda: configs.fuses_select(50, 3),
        "wide": lambda: configs.wide_chunk(50, 3, 50),
    }  # fmt: skip
    others = [
        lambda: configs.score_config(48, 2), lambda: configs.score_config(50, 4), lambda: configs.select_blocks(65, False),
        lambda: configs.fused_select_block(65), lambda: configs.gather_rows(5, 13), lambda: configs.fuses_select(50, 2),
    ]  # fmt: skip
    rule, elsewhere = {name: f() for name, f in functions.items()}, [f() for f in others]
    (tmp_path / "tuned.json").write_text(json.dumps({"devices": {"Some GPU": {"measured": {"date": "2026-01-02"}, **TABLE}}}))
    monkeypatch.setattr(configs, "TABLE", tmp_path / "tuned.json")
    monkeypatch.setattr(configs, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("Some GPU", "Other GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: device)
        configs._shipped.cache_clear()
        found = {name: f() for name, f in functions.items()}
        assert [f() for f in others] == elsewhere
        if device == "Other GPU":
            assert found == rule
        else:
            want = {
                "score": (4, 16, 8),
                "select": (128, 32, 4),
                "fused": (512, 2),
                "rows": 16,
                "items": 2,
                "launches": False,
                "wide": 32,
            }
            assert found == want
            assert not set(found.items()) & set(rule.items())  # or this would prove nothing
    configs._shipped.cache_clear()


def test_the_shipped_table_is_in_order():
    """Absent, or without a device, the rules hold: so it is until a GPU has been measured."""
    configs = importlib.import_module("v2drop_kernels.backends.configs")
    for device, entries in json.loads(configs.TABLE.read_text())["devices"].items():
        configs.parse(entries, device)
        assert entries["measured"]["run"] == "full"
    assert configs.read(configs.TABLE.with_name("absent.json"), "Some GPU") == {}


@pytest.mark.parametrize(
    ("kind", "change", "why"),
    [
        ("score", {"rows": 3}, "score with itemsize 4, d 48: rows must be a power of two from 1 to 256, got 3"),
        ("score", {"block_d": 16384}, "block_d must be a power of two from 1 to 8192, got 16384"),
        ("score", {"d": 0}, "d must be an integer from 1 to 2147483648, got 0"),
        ("select", {"num_warps": 8}, "select with n 64: keys must be at least one per thread of 8 warps, got 128"),
        ("select", {"block": "32"}, "block must be a power of two from 1 to 8192, got '32'"),
        ("fused", {"num_warps": 64}, "num_warps must be a power of two from 1 to 32, got 64"),
        ("fused", {"n": 16384}, "a select inside the gather holds at most 8192 keys"),
        ("launches", {"launches": 2, "n": 16384}, "a select inside the gather holds at most 8192 keys"),
        ("launches", {"launches": 1}, "launches must be 2 or 3, got 1"),
        ("wide", {"chunk": 16}, "chunk must be at least 32, got 16"),
        ("gather", {"items": True}, "items must be an integer from 1 to 2147483648, got True"),
        ("gather", {"columns": 5}, "an entry of gather has kept, rows, programs, items, got kept, rows, programs, items, columns"),
        ("sort", {}, "there is no kernel 'sort', only score, select, fused, gather, launches"),
    ],
)
def test_a_wrong_entry_is_refused_with_one_sentence(tmp_path: Path, kind: str, change: dict[str, Any], why: str):
    configs = importlib.import_module("v2drop_kernels.backends.configs")
    (tmp_path / "tuned.json").write_text(json.dumps({"devices": {"Some GPU": {kind: [{**TABLE.get(kind, [{}])[0], **change}]}}}))
    with pytest.raises(ValueError, match=r"^tuned\.json: Some GPU: ") as error:
        configs.read(tmp_path / "tuned.json", "Some GPU")
    assert why in str(error.value)
    assert "\n" not in str(error.value)
    assert configs.read(tmp_path / "tuned.json", "Other GPU") == {}


HONOURED = """
import json, sys, torch
import v2drop_kernels as vk
from v2drop_kernels.backends import configs, launch

g = torch.Generator().manual_seed(0)
h_prev, h_cur = torch.randint(-4, 5, (2, 3, 50, 48), generator=g).float()  # exact in any order of summation; many scores tie
started, start = [], launch.start

def record(kernel, programs, *args, **meta):
    started.append((kernel.__name__, programs, meta))
    start(kernel, programs, *args, **meta)

launch.start = record

def results():
    started.clear()
    score = vk.variation_score(h_prev, h_cur, backend="triton")
    chosen = vk.segmented_topk(score, 17, backend="triton").indices
    step = vk.drop_tokens(h_prev, h_cur, 17, backend="triton")
    rows = vk.compact(chosen, h_cur, backend="triton").hidden
    names = ("ROWS", "BLOCK_D", "KEYS", "BLOCK", "num_warps")
    sizes = [[name, programs, {n: meta[n] for n in names if n in meta}] for name, programs, meta in started]
    return [score, chosen, step.keep, step.hidden, rows], sizes

rule, sizes = results()
with configs.override_configs(json.loads(sys.argv[1])):
    tuned, other = results()
assert all(map(torch.equal, rule, tuned)), "results differ"
assert results()[1] == sizes, "the rule came back"
print(json.dumps([sizes, other]))
"""


def test_a_table_changes_what_is_launched_and_no_result():
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCH.parent)}

    def launched(table: dict[str, Any]) -> Any:
        command = [sys.executable, "-c", HONOURED, json.dumps(table)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    _, many = launched(TABLE)
    assert many[1][0] == "_select_count_fwd_kernel"  # the select by many programs per segment
    rule, tuned = launched({kind: entries for kind, entries in TABLE.items() if kind != "wide"})
    assert tuned != rule
    assert tuned[0] == ["_variation_score_fwd_kernel", 38, {"ROWS": 4, "BLOCK_D": 16, "num_warps": 8}]  # 150 rows
    assert tuned[1] == ["_select_fwd_kernel", 3, {"KEYS": 128, "BLOCK": 32, "num_warps": 4}]
    names = ["_variation_score_fwd_kernel", "_select_fwd_kernel", "_gather_fwd_kernel"]
    assert [name for name, _, _ in rule[2:]] == [names[0], names[2], names[2]]
    assert [name for name, _, _ in tuned[2:]] == [*names, names[2]]
    assert {size["ROWS"] for _, _, size in tuned[4:]} == {16}
