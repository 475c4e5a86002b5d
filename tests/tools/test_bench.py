"""The benchmarks in a dry run: checks pass, files are written, a wrong result leaves no number. No timing is asserted."""

from __future__ import annotations

import csv
import functools
import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench import BENCH, run_script

CONDITIONS = {"run", "date", "commit", "isa", "machine", "versions"}
RESULTS = {"op", "B", "N", "D", "dtype", "k", "threads", "mode", "provider", "check", "min_us", "median_us", "p20_us", "p80_us",
           "rounds", "bytes", "gb_s", "copy_share", "quiet"} | CONDITIONS  # fmt: skip
TARGETS = {"target", "asserted", "op", "case", "threads", "a", "a_min_us", "b", "b_min_us", "value", "limit", "status"} | CONDITIONS


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    done = run_script(BENCH / "run.py", "--quick", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``providers``, ``targets`` and ``harness`` as bench/run.py imports them, and gone afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = (
        "harness", "registry", "verify", "providers", "targets", "suite", "schema", "tables", "readme_table", "gpu_floors",
        "gpu_report", "gpu_measure",
    )  # fmt: skip
    before = torch.get_num_threads()
    yield type("Modules", (), {name: importlib.import_module(name) for name in names})
    torch.set_num_threads(before)
    for name in names:
        sys.modules.pop(name, None)


def test_dry_run_writes_every_file_with_its_columns(dry: Path):
    assert {f.name for f in dry.iterdir()} == {"targets.csv", "results.csv", "report.md", "roofline.png"}
    results, targets = rows(dry / "results.csv"), rows(dry / "targets.csv")
    assert results[0].keys() >= RESULTS
    assert targets[0].keys() >= TARGETS
    assert {row["run"] for row in [*results, *targets]} == {"dry"}
    assert (dry / "roofline.png").stat().st_size < 200_000
    assert "dry run" in (dry / "report.md").read_text().splitlines()[0]


def test_dry_run_checked_and_timed_every_provider(dry: Path):
    results = rows(dry / "results.csv")
    assert {row["check"] for row in results} == {"equal", "none"}
    assert {row["provider"] for row in results if row["check"] == "none"} == {"copy"}
    assert all(float(row["median_us"]) > 0 and row["copy_share"] for row in results)
    for op in ("score", "select", "compact", "drop"):
        found = {row["provider"] for row in results if row["op"] == op}
        assert found >= {"native", "eager", "eager-out", "compile-out", "copy"}
    targets = rows(dry / "targets.csv")
    assert sum(row["asserted"] == "yes" for row in targets) == 6
    assert all(row["status"] == "dry run" and float(row["value"]) > 0 for row in targets)


def test_a_dry_run_never_reaches_the_committed_results_or_the_readme(dry: Path):
    refused = run_script(BENCH / "run.py", "--quick")
    assert refused.returncode == 2
    assert "--out" in refused.stderr
    table = run_script(BENCH / "readme_table.py", "--results", dry)
    assert table.returncode != 0
    assert "not hold a full, gated measurement" in table.stderr


@pytest.mark.parametrize("op", ["score", "select", "compact", "drop"])
def test_the_compiled_provider_is_one_graph(modules: Any, op: str, monkeypatch: pytest.MonkeyPatch):
    """The dry run calls it without compiling it. Here it is traced; inductor is tested in tests/ops/test_library.py."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    modules.verify.verified(op, modules.providers.providers(op)["compile-out"], modules.registry.DRY_CASES[1])


@pytest.mark.parametrize("fault", ["score", "kept", "row", "raises"])
def test_a_wrong_provider_gets_no_number(modules: Any, fault: str):
    providers, targets, harness = modules.providers, modules.targets, modules.harness
    registry, verify = modules.registry, modules.verify
    op = "score" if fault == "score" else "drop"
    right = providers.providers(op)["eager"]

    def build(case: Any) -> Any:
        call = right.build(case)

        def wrong(x: Any) -> Any:
            if fault == "raises":
                raise RuntimeError("no result at all")
            if fault == "score":
                return call(x) * 1.001
            keep, hidden = call(x)
            if fault == "row":
                hidden[0, 1, 2] += 1
                return keep, hidden
            keep = keep.clone()  # another, worse token in place of the best one, and its very row
            dropped = [i for i in range(case.n) if i not in keep[0].tolist()]
            keep[0, x.scores[0, keep[0]].argmax()] = min(dropped, key=lambda i: x.scores[0, i])
            keep = keep.sort().values
            return keep, torch.stack([h[rows] for h, rows in zip(x.h_cur, keep, strict=True)])

        return wrong

    case = registry.DRY_CASES[0]
    bad = right._replace(name="bad", build=build)
    verify.verified(op, right, case)
    with pytest.raises(verify.WrongResult, match="bad"):
        verify.verified(op, bad, case)

    providers.providers(op)["bad"] = bad
    target = targets.Target("over a wrong one", op, case, 1.0, "at least", targets._other("bad"))
    row = targets.measure(target, harness.NoiseGate(copied=1 << 12), dry=True)
    assert row["status"].startswith("wrong")
    assert row["value"] == row["a_min_us"] == row["b_min_us"] == ""


def test_a_wrong_provider_fails_the_suite_and_its_row_is_empty(modules: Any, tmp_path: Path):
    suite, found = modules.suite, modules.providers.providers("score")
    bad = found["eager"]._replace(name="bad", build=lambda case: lambda x: found["eager"].build(case)(x) + 1)
    case = modules.registry.DRY_CASES[0]
    chosen = [suite.Setting("score", provider, case, 1, "cold") for provider in (bad, found["copy"])]
    assert suite.measure(tmp_path / "rows.csv", "dry", chosen) == 1
    wrong, copy = rows(tmp_path / "rows.csv")
    assert wrong["check"].startswith("wrong")
    assert wrong["min_us"] == wrong["median_us"] == wrong["gb_s"] == wrong["copy_share"] == ""
    assert float(copy["copy_share"]) == 1.0


def test_a_set_that_rounding_allows_is_legal_and_no_other(modules: Any):
    scores = torch.tensor([[4.0, 3.0, 3.0000001, 1.0]])
    expected = modules.registry.Expected(scores, scores[:, [0, 2]], torch.tensor([[0, 2]]), torch.empty(1, 2, 1))
    legal = modules.verify.legal_set
    assert legal(torch.tensor([[0, 1]]), expected, 1e-5) is None
    assert "ascend" in legal(torch.tensor([[1, 0]]), expected, 1e-5)
    assert "ascend" in legal(torch.tensor([[0, 4]]), expected, 1e-5)
    assert "kept tokens differ" in legal(torch.tensor([[1, 2]]), expected, 1e-5)
    assert "kept tokens differ" in legal(torch.tensor([[0, 3]]), expected, 1e-5)


def test_moved_bytes_are_the_documented_formulas(modules: Any):
    case = modules.registry.Case(2, 6, 8)
    moved = {op: modules.registry.moved_bytes(op, case) for op in modules.registry.OPS}
    # B=2, N=6, D=8, E=2, k=2: 2BNDE = 384, 4BN = 48, BkDE = 64, 12Bk = 48, 8Bk = 32
    assert moved == {"score": 384 + 48, "select": 48 + 48, "compact": 128 + 32, "drop": 384 + 128 + 32}


def test_a_noisy_attempt_is_discarded(modules: Any):
    targets, gate = modules.targets, modules.harness.NoiseGate(copied=1 << 12)
    gate.best = (0.0, 0.0)  # nothing is as fast as that
    gate.settle = lambda seconds: gate.sample()
    targets.REPETITIONS, targets.SECONDS = 1, 0.0
    target = targets.Target("any", "drop", modules.registry.DRY_CASES[0], 0.0, "at least", targets._other("eager-out"))
    row = targets.measure(target, gate)
    assert row["status"].startswith("noisy")
    assert row["attempts"] == targets.ATTEMPTS
    assert row["value"] == ""


def test_steady_work_of_other_processes_is_not_quiet(modules: Any):
    gate = modules.harness.NoiseGate(tolerance=0.10)
    gate.best = (1.0, 1.0)
    start = modules.harness.Sample(cache=1.05, dram=1.05, at=0.0, machine=100.0, process=10.0)
    assert gate.quiet(start, start._replace(at=2.0, machine=102.1, process=12.0))
    assert not gate.quiet(start, start._replace(at=2.0, machine=103.0, process=12.0))
    assert not gate.quiet(start, start._replace(at=2.0, machine=102.0, process=12.0, dram=1.2))


def test_readme_table_replaces_what_is_between_the_markers(modules: Any):
    updated = modules.readme_table.updated
    begin, end = "<!-- bench:begin -->", "<!-- bench:end -->"
    assert updated(f"a\n{begin}\nold\n{end}\nb", "new") == f"a\n{begin}\nnew\n{end}\nb"
    with pytest.raises(SystemExit, match=r"docs/results/cpu\.md needs one"):
        updated("no markers", "new")


def gpu_results(folder: Path, run: str = "full") -> None:
    """What a check on a GPU would leave of one shape and two targets."""
    folder.mkdir()
    (folder / "env.json").write_text("{}")
    facts = {
        "gpu": "Some GPU",
        "run": run,
        "date": "2026-01-02",
        "commit": "abc",
        "isa": "avx2",
        "machine": "M",
        "versions": "torch 2",
    }
    shape = {"op": "drop", "B": 1, "N": 576, "D": 4096, "dtype": "bfloat16", "k": 144, "mode": "cold", "check": "equal", "bytes": 9}
    times = [("drop", "triton", 10, 900), ("drop", "cuda", 8, 1100), ("drop", "copy", 4, 2000), ("drop", "eager", 40, 200),
             ("compile", "triton", 20, 400), ("compile", "compile", 60, 150)]  # fmt: skip
    results = [
        {"group": f"{kind} B1-N576", "provider": name, "median_us": us, "p20_us": us, "p80_us": us, "gb_s": speed} | shape | facts
        for kind, name, us, speed in times
    ]
    target = {"group": "drop", "mode": "cold", "unit": "ratio"} | facts
    targets = [
        {"target": "4", "what": "image", "backend": "cuda", "value": 1.5, "limit": "<= 1.9", "status": "pass"} | target,
        {"target": "5", "what": "over eager", "backend": "triton", "value": 3.9, "limit": ">= 4", "status": "fail"} | target,
        {"target": "13", "what": "attention", "backend": "", "value": "", "limit": "<= 1.25", "status": "not there yet: no op"}
        | target,
    ]
    for name, lines in (("results.csv", results), ("targets.csv", targets)):
        with (folder / name).open("w", newline="") as file:
            out = csv.DictWriter(file, lines[0])
            out.writeheader()
            out.writerows(lines)


def test_the_gpu_part_of_the_docs_comes_from_its_csv_files(modules: Any, tmp_path: Path, capsys: Any):
    main, (begin, end) = modules.readme_table.main, ("<!-- gpu:begin -->", "<!-- gpu:end -->")
    results, page = tmp_path / "results", tmp_path / "docs" / "results" / "gpu.md"
    shutil.copytree(BENCH / "results", results)
    shutil.copytree(BENCH.parent / "docs" / "results", page.parent)
    shutil.copy(BENCH.parent / "README.md", tmp_path / "README.md")
    given = ["--results", str(results / "cpu"), "--root", str(tmp_path)]
    part = lambda: page.read_text().split(begin)[1].split(end)[0]
    assert main([*given, "--write"]) == 0
    assert "There are no GPU results yet" in part()
    gpu_results(results / "some-gpu")
    assert main([*given, "--check"]) == 1
    assert "readme_table.py --write" in capsys.readouterr().err
    assert main([*given, "--write"]) == main([*given, "--check"]) == 0
    # The fastest of ours beside the others of its group; torch.compile beside ours of its own.
    assert "| [1, 576, 4096] bfloat16, k = 144 | cold | cuda | 8.00 us | 1100 | 0.50x | 5.00x | 3.00x | - | - | - |" in part()
    assert "Of 3 targets 1 pass, 1 fail: 5 triton: over eager 3.9 (asked >= 4), 1 are without a verdict." in part()
    assert "Measured on Some GPU (M; instruction set avx2; torch 2; 2026-01-02, commit abc)" in part()
    gpu_results(results / "dry", run="dry")
    with pytest.raises(SystemExit, match="dry does not hold a full measurement"):
        main([*given, "--check"])


def test_the_committed_pages_hold_the_committed_results():
    checked = run_script(BENCH / "readme_table.py", "--check")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(("us", "words"), [("9.456", "9.46 us"), ("123.4", "123 us"), ("4567", "4.57 ms"), ("45670", "45.7 ms")])
def test_durations_have_three_digits(modules: Any, us: str, words: str):
    assert modules.tables.duration(us) == words


@pytest.mark.parametrize("suite", ["attention", "merge", "soft_topk", "threads"])
def test_the_targets_of_other_ops_run_dry(suite: str, tmp_path: Path):
    done = run_script(BENCH / "run.py", "--quick", "--suite", suite, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found, committed = rows(tmp_path / f"{suite}.csv"), rows(BENCH / "results" / "cpu" / f"{suite}.csv")
    assert [file.name for file in tmp_path.iterdir()] == [f"{suite}.csv"]
    assert found[0].keys() == committed[0].keys() == rows(BENCH / "results" / "cpu" / "targets.csv")[0].keys()
    assert {row["status"] for row in found} == {"dry run"}
    assert {row["target"] for row in committed} <= {row["target"] for row in found}


def test_every_op_beside_plain_torch_runs_dry(tmp_path: Path):
    """The results of both sides are equal in the smallest row of every op."""
    done = run_script(BENCH / "run.py", "--quick", "--suite", "never_slower", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found, committed = rows(tmp_path / "never_slower.csv"), rows(BENCH / "results" / "cpu" / "never_slower.csv")
    assert found[0].keys() == committed[0].keys() == rows(BENCH / "results" / "cpu" / "targets.csv")[0].keys()
    assert {row["status"] for row in found} == {"dry run"}
    assert {row["op"] for row in committed} == {row["op"] for row in found}
    assert {row["status"] for row in committed} <= {"pass", "fail"}


def test_results_of_a_cpu_and_of_a_gpu_have_the_columns_of_one_schema(modules: Any):
    folder = BENCH / "results" / "cpu"
    assert list(rows(folder / "results.csv")[0]) == list(modules.schema.RESULTS)
    assert list(rows(folder / "targets.csv")[0]) == list(modules.schema.TARGETS)
    assert modules.gpu_measure.FILES == {"results.csv": modules.schema.RESULTS, "targets.csv": modules.schema.TARGETS}
