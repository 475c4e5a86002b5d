"""The table of methods is made from the code; what it claims about memory is so."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from support.bench import BENCH, run_script

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
def test_deviations_stand_in_one_place(name):
    """The docstring of the policy, the table and docs/methods.md repeat ``Method.deviations``; module docstrings hold none."""
    policy = policies.find(name)
    stated = policy.method.deviations
    assert policy.__doc__.count("Not as in the published code") == bool(stated)
    assert stated in policy.__doc__
    lines = (ROOT / "docs" / "methods.md").read_text().splitlines()
    assert [line for line in lines if line.startswith(f"- `{name}`:")] == ([f"- `{name}`: {stated}."] if stated else [])
    assert "deviation" not in sys.modules[policy.__module__].__doc__.lower()


@pytest.mark.parametrize("name", ["fastv", "hidivdrop", "sparsevlm", "pdrop", "variation"])
def test_rounding_to_the_dtype_of_the_model_is_a_stated_deviation(name):
    assert "float32, where the code rounds" in policies.find(name).method.deviations


def test_the_cross_modal_share_of_flops_says_what_it_counts():
    """The paper's table 3 counts the text: with 96 text tokens its percentages are met to 0.6 points."""
    llava = (576, 32, 4096, 11008)
    stated = policies.find("cross_modal_flash").method.deviations
    for tokens, paper in ((192, 42.9), (128, 33.7), (64, 23.2)):
        preset = policies.preset(f"cross-modal-flash-{tokens}")
        with_text = 100 * preset.flops_share(*llava, text=96)
        assert abs(with_text - paper) < 1
        assert f"{with_text:.1f}" in stated
        assert f"{paper}" in stated
        assert 100 * preset.flops_share(*llava) < with_text - 9


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
    done = run_script(BENCH / "model" / "policies.py", "--dry", "--out", folder)
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
