"""The table of methods is made from the code; what it claims about memory is so."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from v2drop_kernels.cli import main as cli
from v2drop_kernels.models import methods, policies

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_has_a_row_per_method(capsys):
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.strip().split("\n\n")[0].splitlines()
    assert len(lines) == 2 + len(policies.known()) + 1  # VoCo is a mask, and no policy
    assert {line.count("|") for line in lines} == {len(methods.COLUMNS) + 1}


def test_every_compared_method_is_there():
    named = " ".join(row[1] for row in methods.rows())
    for paper in (
        "V2Drop", "HiDivDrop", "cross-modal", "ToMe", "FastV", "SparseVLM", "PyramidDrop", "DART", "HiRED", "PruMerge", "DyCoke",
        "VisionZip", "FasterVLM", "VTW", "TopV", "TwigVLM", "VoCo-LLaMA",
    ):  # fmt: skip
        assert paper.lower() in named.lower(), paper


@pytest.mark.parametrize("name", sorted(policies.known()))
def test_presets_name_their_policy_and_source(name):
    for preset in policies.known()[name].method.presets:
        assert preset.name
        assert preset.source
        assert policies.preset(preset.name) == preset
        assert name in {stage.policy for stage in preset.stages}


def test_the_smallest_policy_is_short():
    """Comments, docstring and all."""
    lengths = {name: len((Path(policies.__file__).parent / f"{name}.py").read_text().splitlines()) for name in policies.known()}
    assert min(lengths.values()) < 40


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """A dry run of bench/model/policies.py."""
    folder = tmp_path_factory.mktemp("policies")
    command = [sys.executable, str(ROOT / "bench" / "model" / "policies.py"), "--dry", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (folder / "policies.csv").open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_the_bench_covers_the_methods(costs):
    covered = {row["policy"] for row in costs.values()}
    # These need a twig or a video; "given" ranks by the user's own scores.
    assert set(policies.known()) - covered == {"twigvlm", "dycoke", "given"}
    assert {row["run"] for row in costs.values()} == {"dry"}


def test_peak_memory_is_no_more_than_without_dropping(costs):
    """Bytes are counted, not sampled, so that this is exact."""
    full = float(costs["nothing dropped"]["peak_mb"])
    for name, row in costs.items():
        if row["reads_weights"] == "no":
            assert float(row["peak_mb"]) <= full, name
