"""A program that was built against the header of version 0.1.0 keeps working: nothing that it declares or links has gone.

``ctest`` compiles such a program and runs it with the library of today (``csrc/tests/abi``).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from v2drop_kernels import native
from v2drop_kernels.core.arguments import METRICS
from v2drop_kernels.core.plan import Segment

ROOT = Path(__file__).resolve().parents[2]
THEN = ROOT / "csrc/tests/abi/v2drop_0_1_0.h"
NOW = ROOT / "csrc/include/v2drop/v2drop.h"
SYMBOLS = ROOT / "csrc/tests/abi/symbols_0_1_0.txt"


def text_of(header: Path) -> str:
    return " ".join(re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL).split())


def declarations(header: Path) -> set[str]:
    return set(re.findall(r"V2DROP_API ([\w* ]+ v2drop_\w+\([^;]*\));", text_of(header)))


def enumerators(header: Path) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"\b(V2DROP_\w+) = (-?\d+)", text_of(header))}


def fields(header: Path) -> dict[str, list[str]]:
    return {name: body.split(";") for body, name in re.findall(r"typedef struct \w+ \{([^}]*)\} (\w+);", text_of(header))}


def test_declarations_are_still_there():
    assert len(declarations(THEN)) == len(SYMBOLS.read_text().split())
    assert declarations(THEN) <= declarations(NOW)


def test_enumerators_keep_their_values():
    assert len(enumerators(THEN)) > 30
    assert enumerators(THEN).items() <= enumerators(NOW).items()


def test_structs_only_grow_at_their_end():
    now = fields(NOW)
    for name, then in fields(THEN).items():
        then, today = ([x.strip() for x in listed if x.strip()] for listed in (then, now[name]))
        assert today[: len(then)] == then, name
        if name not in ("v2drop_source", "v2drop_context"):
            assert today == then, name


def test_the_layout_test_lists_every_field_and_enumerator():
    listed = (ROOT / "csrc/tests/abi/layout.h").read_text()
    for name in enumerators(THEN):
        assert f"X({name})" in listed
    for struct, members in fields(THEN).items():
        for member in filter(None, (x.strip() for x in members)):
            for field in re.findall(r"(\w+)(?:\[\w+\])?(?:,|$)", member):
                assert f"X({struct}, {field})" in listed


@pytest.mark.skipif(not native.available()[0], reason="the native library is not built")
def test_symbols_are_still_exported():
    library = Path(native.lib().__file__).parent / "lib/libv2drop.so"
    done = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    assert set(SYMBOLS.read_text().split()) <= {line.split()[-1] for line in done.stdout.splitlines()}


@pytest.mark.skipif(not native.available()[0], reason="the native library is not built")
def test_the_package_uses_the_names_of_the_library():
    """The plan and the argument checks work without the library, so they name columns and metrics themselves."""
    assert Segment._fields == native.SEGMENT_FIELDS
    assert set(native.METRICS) == set(METRICS)
    assert list(native.METRICS.values()) == list(range(len(METRICS)))
