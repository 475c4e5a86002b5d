"""How many files a call passes through, and how often the signature of a call is written out."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

import v2drop_kernels as vk

PACKAGE = Path(vk.__file__).parent

# The op, the rules of arguments, what they become (plan and gathers), the choice of backend, the op's call of the library, and the
# helpers of such calls.
MOST_FILES = 6
MOST_SIGNATURES = 8
SPELT_OUT = 5  # parameters; a function that takes a request does not write the call out again


def files_of(call):
    """The files of the package whose functions run in one warm call: its second call prepares what those after it use."""
    call()
    call()
    found = set()

    def profile(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            found.add(path.relative_to(PACKAGE).as_posix())

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("companions", [False, True], ids=["hidden", "kv-ids-mask"])
def test_drop_tokens_on_the_cpu_passes_through_few_files(companions):
    h_prev, h_cur = torch.zeros(1, 64, 16), torch.randn(1, 64, 16)
    given = {}
    if companions:
        given = {
            "kv": [(torch.zeros(1, 2, 64, 8), torch.zeros(1, 2, 64, 8))],
            "position_ids": torch.arange(64)[None],
            "attention_mask": torch.ones(1, 64, dtype=torch.bool),
        }
    found = files_of(lambda: vk.drop_tokens(h_prev, h_cur, 16, droppable=(8, 56), backend="cpu", **given))
    assert {"ops/drop_tokens/__init__.py", "ops/drop_tokens/native.py"} <= found
    assert len(found) <= MOST_FILES, sorted(found)


def test_the_signature_of_drop_tokens_is_written_out_rarely():
    """Functions of a drop that spell out its arguments, the request's fields, and the torch op's schema."""
    found = []
    for path in sorted(set(PACKAGE.rglob("*.py")) - set((PACKAGE / "models").rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.strip("_").split("_")[0] == "drop":
                arguments = [*node.args.args, *node.args.kwonlyargs]
                if len(arguments) >= SPELT_OUT:
                    found.append(f"{path.relative_to(PACKAGE)}: {node.name}")
            elif isinstance(node, ast.ClassDef) and node.name == "DropRequest":
                found.append(f"{path.relative_to(PACKAGE)}: {node.name}")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("drop("):
                found.append(f"{path.relative_to(PACKAGE)}: schema")
    assert 5 <= len(found) <= MOST_SIGNATURES, found
