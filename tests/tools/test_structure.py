"""Files and functions of the package stay short enough to be read in one go."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

import v2drop_kernels

PACKAGE = Path(v2drop_kernels.__file__).resolve().parent


class Limit(NamedTuple):
    files: str  # pattern below v2drop_kernels/
    file_lines: int | None
    function_lines: int | None  # without the docstring; decorators do not count
    reason: str


# The first pattern that matches a file holds.
LIMITS = (
    Limit("ops/*/triton*.py", None, None, "a kernel is one function: Triton inlines helpers, and splitting hides the data flow"),
    Limit("**/*.py", 350, 50, "a file has one subject, and a function one step"),
)


def limit_of(path: Path) -> Limit:
    relative = path.relative_to(PACKAGE)
    return next(limit for limit in LIMITS if limit.files == "**/*.py" or relative.match(limit.files))


def lengths(source: str):
    """(name, lines without the docstring) of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, lines


def too_long(path: Path) -> list[str]:
    limit, source = limit_of(path), path.read_text()
    found = []
    if limit.file_lines is not None and (lines := len(source.splitlines())) > limit.file_lines:
        found.append(f"{lines} lines, at most {limit.file_lines}")
    if limit.function_lines is not None:
        found += [f"{name}: {n} lines, at most {limit.function_lines}" for name, n in lengths(source) if n > limit.function_lines]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_lengths(path):
    assert not too_long(path), f"{path.relative_to(PACKAGE).as_posix()}: {'; '.join(too_long(path))}"


def test_what_is_counted(tmp_path, monkeypatch):
    """A test of the test: docstrings do not count, nested functions and methods do."""
    body = "\n".join(["        x = 1"] * 60)
    source = (
        f'class A:\n    def long(self):\n        """One\n        two."""\n{body}\n\ndef short():\n    """{"a" * 9}\n\n\n    """\n'
    )
    assert dict(lengths(source)) == {"long": 61, "short": 1}
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path = tmp_path / "a.py"
    path.write_text(source + "\n" * 300)
    assert too_long(path) == ["370 lines, at most 350", "long: 61 lines, at most 50"]
    kernel = tmp_path / "ops" / "compact" / "triton.py"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(source)
    assert too_long(kernel) == []
