"""tools/fuzz: its properties hold on a few inputs, and every one of them fails where the op that it tests is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import v2drop_kernels as vk

ROOT = Path(__file__).resolve().parents[2]
FUZZ = ROOT / "tools" / "fuzz"
sys.path.append(str(FUZZ))


def program():
    import importlib.util

    found = importlib.util.spec_from_file_location("fuzz_main", FUZZ / "__main__.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_no_property_fails():
    command = [sys.executable, str(FUZZ), "--seconds", "0", "--examples", "4", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no failure" in done.stdout


def spoiled(result):
    """The first tensor of a result with its first element changed; a count plus one."""
    if isinstance(result, int):
        return result + 1
    if isinstance(result, tuple):
        return result._replace(**{result._fields[0]: spoiled(result[0])})
    changed = result.clone()
    if changed.numel():
        changed.view(-1)[0] = torch.where(changed.view(-1)[0] == 5, 7, 5).to(changed.dtype)
    return changed


@pytest.mark.parametrize(
    "name",
    [
        "variation_score", "segmented_topk", "variation_topk", "drop_tokens", "compact", "attention_score", "key_norm_score",
        "cosine_to_pivots", "frame_similarity", "soft_topk", "weighted_merge", "bipartite_merge", "merge_dropped", "random_score",
    ],
)  # fmt: skip
def test_a_wrong_result_is_found(name, monkeypatch):
    main, right = program(), getattr(vk, name)
    (check,) = main.properties([name])
    monkeypatch.setattr(vk, name, lambda *args, **options: spoiled(right(*args, **options)))
    assert main.attempt(check, "reference", seed=0, examples=60) is not None


def test_a_wrong_count_is_found(monkeypatch):
    main, right = program(), vk.n_keep
    (check,) = main.properties(["counts"])
    monkeypatch.setattr(vk, "n_keep", lambda *args: right(*args) + 1)
    assert main.attempt(check, "reference", seed=0, examples=60) is not None


def test_a_wrong_move_in_place_is_found(monkeypatch):
    main = program()
    (check,) = main.properties(["compact_inplace"])
    monkeypatch.setattr(vk, "compact_", lambda *args, **options: None)
    assert main.attempt(check, "reference", seed=0, examples=60) is not None


def test_a_lost_gradient_is_found(monkeypatch):
    main, right = program(), vk.drop_tokens
    (check,) = main.properties(["gradients"])
    monkeypatch.setattr(vk, "drop_tokens", lambda h, cur, *args, **options: right(h, cur * 1.5, *args, **options))
    assert main.attempt(check, "reference", seed=0, examples=60) is not None


def test_an_error_without_the_name_of_an_argument_is_found(monkeypatch):
    main = program()
    (check,) = main.properties(["one_wrong_argument"])
    import wrong

    def refuse(**options):
        raise ValueError("no")

    monkeypatch.setattr(wrong, "CALLS", ((refuse, {"x": 1}),))
    assert main.attempt(check, "reference", seed=0, examples=60) is not None


def test_unknown_properties_are_refused():
    with pytest.raises(SystemExit, match="--only must be among"):
        program().properties(["sorting"])
