"""The performance model: occupancy and machine code as published, every target predicted, constants that times give back."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("gpu_clocks", "gpu_fit", "gpu_machine", "gpu_model", "gpu_paths", "gpu_predict", "gpu_registry", "gpu_sass", "gpu_inputs")


@pytest.fixture(scope="module")
def bench():
    sys.path[:0] = [str(ROOT / "bench")]
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(ROOT / "bench"))


@pytest.fixture(scope="module")
def h200(bench):
    return bench.gpu_predict.Predictor(bench.gpu_machine.machines()["H200"], bench.gpu_machine.constants())


def test_every_figure_has_its_source():
    found = json.loads((ROOT / "bench" / "gpu_machines.json").read_text())
    assert set(found["machines"]) == {"H200", "H100", "A100", "B200", "RTX 4090"}
    for facts in found["machines"].values():
        sourced = {name for names in facts["sources"] for name in names.split(", ")}
        assert sourced >= {"sms", "clock_ghz", "dram_gb_s", "l2_mb", "registers", "shared_kb", "threads", "blocks"}
    assert all(entry["source"] and entry["unit"] and entry["value"] >= 0 for entry in found["constants"].values())


@pytest.mark.parametrize(
    ("machine", "registers", "shared", "threads", "want"),
    [
        ("H200", 32, 0, 128, 16),  # 16 blocks of 2048 threads
        ("H200", 64, 0, 256, 4),
        ("H200", 94, 0, 128, 5),  # 96 registers of a warp's 32 threads: 21 warps, of which blocks of four
        ("H200", 255, 0, 256, 1),
        ("H200", 16, 0, 32, 32),  # no more than 32 blocks
        ("H200", 32, 100 << 10, 128, 2),
        ("RTX 4090", 32, 0, 128, 12),  # 1536 threads
        ("RTX 4090", 32, 60 << 10, 128, 1),
    ],
)
def test_blocks_that_a_multiprocessor_holds(bench, machine, registers, shared, threads, want):
    assert bench.gpu_machine.machines()[machine].resident(registers, shared, threads) == want


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MOV R2, RZ ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   ISETP.GE.AND P1, PT, R4, R5, PT ;
        /*0040*/               @P1 BRA 0x80 ;
        /*0050*/                   FADD R6, R6, R4 ;
        /*0060*/                   FADD R7, R7, R5 ;
        /*0070*/                   BRA 0x90 ;
        /*0080*/                   FMUL R6, R6, R4 ;
        /*0090*/                   ISETP.NE.AND P0, PT, R2, R3, PT ;
        /*00a0*/               @P0 BRA 0x20 ;
        /*00b0*/              @!P2 BRA 0xe0 ;
        /*00c0*/                   SHFL.BFLY PT, R8, R6, 0x10, 0x1f ;
        /*00d0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00e0*/                   STG.E desc[UR4][R2.64], R6 ;
        /*00f0*/                   EXIT ;
        /*0100*/                   BRA 0x100;
"""


def test_loops_of_machine_code(bench):
    """A loop with an alternative, of which the shorter counts; what can be left out is counted; the last line is not reached."""
    once, loops, depths = bench.gpu_sass.analysed(SASS)
    assert depths == (0,)
    assert loops[0].pipes == {"issue": 6, "lsu": 1, "alu": 2, "fma": 1}
    assert (loops[0].global_loads, loops[0].widest, loops[0].barriers) == (1, 16, 0)
    assert once.pipes == {"issue": 7, "constant": 1, "alu": 1, "shfl": 1, "lsu": 1}
    assert (once.barriers, once.global_stores, once.shuffles) == (1, 1, 1)
    assert bench.gpu_clocks.role(loops[0]) == "read"
    # 8 warps issue 6 instructions at 4 a clock, 2 of them through 64 lanes: 12 clocks, and 8 of the ALU.
    assert loops[0].clocks(8) == 12
    assert bench.gpu_sass.clocks({"issue": 2, "alu": 2}, 8) == 8


def test_nested_loops(bench):
    inner = SASS.replace("/*00f0*/                   EXIT", "/*00f0*/               @P3 BRA 0x10").replace("BRA 0x100;", "EXIT ;")
    _, loops, depths = bench.gpu_sass.analysed(inner)
    assert depths == (0, 1)
    assert [bench.gpu_clocks.role(code) for code in loops] == ["place", "read"]


def test_counts_name_every_group_of_the_check(bench, h200):
    """A group that is added needs ``python bench/gpu_counts.py``; without its launches there is no prediction."""
    for name, group in bench.gpu_fit.groups().items():
        for mode in group.modes:
            times = h200.times(group, mode)
            assert {"triton", "cuda"} <= {provider.split("@")[0] for provider in times}, name
            assert all(h200.c.us(time) > 0 for time in times.values()), name


def test_the_counts_are_those_of_the_kernels(bench):
    """Two kernels compiled here; ``python bench/gpu_counts.py --check`` does the same for all."""
    program = (
        "import sys; sys.path[:0] = ['bench']; import gpu_counts, gpu_inputs, json;"
        "wanted = {f'drop {gpu_inputs.IMAGE}', f'drop {gpu_inputs.VIDEO}'};"
        "all_of_them = gpu_counts.problems; gpu_counts.problems = lambda: (p for p in all_of_them() if p[0] in wanted);"
        "json.dump(gpu_counts.triton_counts(), sys.stdout)"
    )
    pytest.importorskip("triton")
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    found, counted = json.loads(done.stdout), bench.gpu_paths.counts()["triton"]
    for key, launches in found["launches"].items():
        for mine, theirs in zip(launches, counted["launches"][key], strict=True):
            assert {**mine, "kernel": ""} == {**theirs, "kernel": ""}, f"{key}: run python bench/gpu_counts.py"
            a, b = found["kernels"][mine["kernel"]], counted["kernels"][theirs["kernel"]]
            assert a == b, f"{mine['name']} has changed: run python bench/gpu_counts.py"


def test_every_target_has_a_line_and_a_verdict(bench, h200):
    found = bench.gpu_model.bars(h200)
    numbers = {bar.number for bar in found}
    assert numbers == {str(n) for n in range(1, 16)}
    assert all(bar.status == "not predicted" or math.isfinite(bar.value) for bar in found)
    unpredicted = {bar.text.split(",")[0] for bar in found if bar.status == "not predicted"}
    assert all(any(word in text for word in ("replays", "launches that", "memory")) for text in unpredicted), unpredicted


@pytest.mark.parametrize("name", ["H200", "H100", "A100", "B200", "RTX 4090"])
def test_no_prediction_is_below_its_floor(bench, name):
    """Cold inputs: no launch mode beats the bytes at the bandwidth of a copy, nor the edge before its first kernel."""
    p = bench.gpu_predict.Predictor(bench.gpu_machine.machines()[name], bench.gpu_machine.constants())
    for case in bench.gpu_model.SHAPES:
        floor = p.machine.dram_us(case.input_bytes + case.batch * case.k * case.row_bytes)
        for mode, time in p.own_drop(case).items():
            assert p.c.us(time) > floor, (case, mode)


def synthetic(bench, truth):
    """Times of every group as a machine with these constants would measure them."""
    p = bench.gpu_predict.Predictor(bench.gpu_machine.machines()["H200"], truth)
    return [
        {"group": name, "mode": mode, "provider": provider, "median_us": str(truth.us(time))}
        for name, group in bench.gpu_fit.groups().items()
        for mode in group.modes
        for provider, time in p.times(group, mode).items()
    ]


def test_a_fit_recovers_the_constants(bench, h200, tmp_path):
    """Times made with other constants, all of them far from those assumed, give these constants back."""
    changed = {
        "copy_share": 0.83, "kernel_share": 0.91, "read_share": 0.88, "l2_share": 1.6, "plain_edge": 1.9, "pdl_edge": 1.1,
        "ramp": 1.4, "select": 1.35, "torch_topk": 31.0, "torch_sort": 17.0, "host_cuda": 15.0, "host_torch_op": 7.0,
    }  # fmt: skip
    truth = h200.c._replace(values={**h200.c.values, **changed})
    rows = synthetic(bench, truth)
    after = bench.gpu_fit.write(tmp_path, rows, {}, h200.machine, h200.c)
    for name, value in changed.items():
        assert after.values[name] == pytest.approx(value, rel=0.03), name
    fitted = json.loads((tmp_path / "fitted.json").read_text())
    assert fitted["times"] == len(rows)
    compared = (tmp_path / "predictions.csv").read_text().splitlines()
    assert len(compared) == len(rows) + 1
    over = [float(line.rsplit(",", 1)[1]) for line in compared[1:]]
    assert max(abs(x - 1) for x in over) < 0.02


def test_measured_constants_enter_the_fit(bench, h200, tmp_path):
    """gpu_constants measures some of them directly; a bandwidth counts as its share of the published one."""
    found = {"kernel, plain edge": {"value": 2.0}, "copy bandwidth": {"value": 3840.0}, "grid barrier": {"value": math.nan}}
    after = bench.gpu_fit.write(tmp_path, [], found, h200.machine, h200.c)
    assert after.values["plain_edge"] == pytest.approx(2.0, rel=1e-3)
    assert after.values["copy_share"] == pytest.approx(3840 / 4800, rel=1e-3)
    assert after.values["grid_barrier"] == h200.c.values["grid_barrier"]
    assert after.sources["plain_edge"] == "fitted to measured times"


def test_the_command(bench, tmp_path):
    run = lambda *given: subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_model.py"), *given], capture_output=True, text=True, cwd=ROOT, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    printed = run("--machine", "all")
    assert printed.stderr == ""
    for name in bench.gpu_machine.machines():
        assert f"# {name}: predictions, no measurements" in printed.stdout
    for name in bench.gpu_machine.constants().values:
        assert f"| {name} |" in printed.stdout
    other = tmp_path / "fitted.json"
    other.write_text(json.dumps({"constants": {"plain_edge": 99.0}}))
    assert "| plain_edge | 99 |" in run("--constants", str(other)).stdout


def test_the_page_of_predictions_is_up_to_date(bench):
    page = (ROOT / "docs" / "gpu-predictions.md").read_text()
    assert page == bench.gpu_model.docs(bench.gpu_machine.constants()), "run python bench/gpu_model.py --docs"
    assert "Nothing on this page was measured" in page
