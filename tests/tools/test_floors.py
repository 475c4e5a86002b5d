"""The floors of the house (DESIGN.md, section 1): imports go down only, and the package imports on a bare machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import v2drop_kernels

PACKAGE = Path(v2drop_kernels.__file__).resolve().parent
BENCH = Path(__file__).resolve().parents[2] / "bench"
# From the ground up; a module may import from its own floor and from those below. A name stands for all modules inside it.
FLOORS = [
    {"core", "positions", "schedule"},
    {"native", "_C", "_xla", "_ops", "interop", "array", "jax"},
    {"backends"},
    {"ops"},
    {"reference"},
    {"__init__"},
    {"distributed"},
    {"models", "plot"},
    {"cli", "__main__"},
    {"bench", "tests", "examples"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
OPTIONAL = ("triton", "jax", "cupy", "transformers", "flash_attn", "matplotlib", "PIL", "sklearn")
# What a module is made of, it imports at the top.
ALLOWED = {"triton": r"ops/\w+/triton\w*\.py|backends/(configs|launch|relaunch)\.py", "jax": r"interop/jax\.py"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def top(path: Path) -> str:
    """The name that has a floor: the file, or the folder, directly inside the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    """(imported module of this package, or foreign top-level name; whether it is imported when the module is) per
    import."""
    package = ("v2drop_kernels", *path.relative_to(PACKAGE).parent.parts)

    def visit(node, eager):
        for child in ast.iter_child_nodes(node):
            inner = eager and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield from resolved(tuple(alias.name.split(".")), [], inner)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                yield from resolved((*base, *(child.module or "").split(".")) if child.module else base, child.names, inner)
            yield from visit(child, inner)

    def resolved(parts, names, eager):
        if parts[0] != "v2drop_kernels":
            yield parts[0], True, eager
        elif len(parts) > 1:
            yield parts[1], False, eager
        else:
            for alias in names or [ast.alias("__init__")]:
                submodule = alias.name in FLOOR or (PACKAGE / alias.name).is_dir() or (PACKAGE / f"{alias.name}.py").exists()
                yield alias.name if submodule else "__init__", False, eager

    yield from visit(ast.parse(path.read_text()), True)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    assert top(path) in FLOOR, f"{top(path)} has no floor: give it one here and in CONTRIBUTING.md"
    for name, foreign, _ in imports(path):
        if not foreign:
            assert name in FLOOR, f"{name} has no floor"
            assert FLOOR[name] <= FLOOR[top(path)], f"{path.name} imports {name}, which stands on a higher floor"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optional_packages_are_imported_inside_functions(path):
    for name, foreign, eager in imports(path):
        if foreign and eager and name in OPTIONAL:
            where = path.relative_to(PACKAGE).as_posix()
            assert re.fullmatch(ALLOWED.get(name, ""), where), f"{where} imports {name} at the top"


def test_kernels_are_loaded_by_name_only():
    """No module imports ops/<op>/triton*.py or ops/<op>/native.py at its top, but the kernels that use each other."""
    kernels = {name for name in module_graph(PACKAGE, "v2drop_kernels") if re.fullmatch(r".*\.ops\.\w+\.(triton\w*|native)", name)}
    for name, needed in module_graph(PACKAGE, "v2drop_kernels", eager=True).items():
        if name not in kernels:
            assert not needed & kernels, f"{name} imports {sorted(needed & kernels)}"


def module_graph(folder, package="", eager=False):
    """Every module of a folder with the modules of it that it imports; ``eager``: only those that it imports at its top."""
    paths = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [*([package] if package else []), *path.relative_to(folder).with_suffix("").parts]
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    def named(node, importer, path):
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        own = importer.split(".") if path.name == "__init__.py" else importer.split(".")[:-1]
        base = ".".join([*own[: len(own) - node.level + 1 if node.level else 0], *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in paths else base for alias in node.names]

    def visit(node, importer, path):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if eager and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield from (name for name in named(child, importer, path) if name in paths and name != importer)
            yield from visit(child, importer, path)

    return {name: set(visit(ast.parse(path.read_text()), name, path)) for name, path in paths.items()}


def cycles(graph):
    """The sets of modules that import each other, directly or through others."""
    order, low, stack, found = {}, {}, [], []

    def connect(name):
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph[name]:
            if other not in order:
                connect(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in graph:
        if name not in order:
            connect(name)
    return found


@pytest.mark.parametrize(("folder", "package"), [(PACKAGE, "v2drop_kernels"), (BENCH, "")], ids=["package", "bench"])
def test_no_modules_import_each_other(folder, package):
    """Imports inside functions count as well: those hide a cycle, they do not remove it."""
    assert cycles(module_graph(folder, package)) == []


def test_the_cycle_test_sees_what_it_forbids(tmp_path):
    for name, text in {
        "__init__": "", "a": "from . import b", "b": "def f():\n    from .c import x", "c": "import p.a", "d": "from .a import y",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.py").write_text(text)
    assert cycles(module_graph(tmp_path, "p")) == [["p.a", "p.b", "p.c"]]
    assert cycles(module_graph(tmp_path, "p", eager=True)) == []


def test_the_floors_test_sees_what_it_forbids(tmp_path, monkeypatch):
    """A test of the test: upward imports of every spelling are found."""
    monkeypatch.setitem(globals(), "PACKAGE", PACKAGE)
    path = PACKAGE / "config.py"
    for line in (
        "from . import ops",
        "from .ops import x",
        "import v2drop_kernels.ops",
        "from v2drop_kernels import ops",
        "from v2drop_kernels.ops import x",
        "def f():\n    from . import ops",
    ):
        monkeypatch.setattr(Path, "read_text", lambda self, line=line: line)
        assert [name for name, *_ in imports(path)] == ["ops"], line
    monkeypatch.setattr(Path, "read_text", lambda self: "import v2drop_kernels\nimport triton")
    assert list(imports(path)) == [("__init__", False, True), ("triton", True, True)]


def run(script, **env):
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


BARE = """
import sys

# These are not installed: every finder answers that it knows no such module.
ABSENT = ("triton", "jax", "cupy", "transformers", "flash_attn", "matplotlib", "PIL", "sklearn", "v2drop_kernels._C")
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name in ABSENT or name.startswith(tuple(a + "." for a in ABSENT)):
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Without(f) for f in sys.meta_path]
import torch
import v2drop_kernels as vk
"""


def test_import_on_a_bare_machine():
    """No Triton, no compiled library, no GPU: the import succeeds and plain PyTorch serves."""
    out = run(
        BARE
        + """
assert not [m for m in sys.modules if m.startswith(ABSENT)]
found = vk.explain(torch.zeros(1, 3, 4))
assert found.chosen == "reference", found
assert "not built" in found.rejected["cpu"], found
assert "not built" in found.rejected["cuda"], found
assert "not installed" in found.rejected["triton"], found
h = torch.arange(12.0).view(1, 3, 4)
assert vk.drop_tokens(torch.zeros(1, 3, 4), h, 2).keep.tolist() == [[1, 2]]
for name in ("cpu", "cuda", "triton"):
    try:
        vk.variation_score(h, h, backend=name)
    except RuntimeError as error:
        print(error)
    else:
        raise SystemExit(f"{name} served")
"""
    )
    cpu, cuda, triton = out.splitlines()
    assert "'cpu' cannot serve" in cpu
    assert "not built" in cpu
    assert "'cuda' cannot serve" in cuda
    assert "not built" in cuda
    assert "not installed" in triton


def test_import_is_light():
    """What need not be there is not imported where it is, either; nor is a GPU touched, nor numpy through us."""
    run("""
        import sys
        import torch
        before = set(sys.modules)
        import v2drop_kernels
        new = {m.split(".")[0] for m in set(sys.modules) - before}
        assert not new & {"triton", "jax", "cupy", "transformers", "flash_attn", "matplotlib", "PIL", "sklearn"}, new
        assert not torch.cuda.is_initialized()
        assert "v2drop_kernels.ops.compact.triton" not in sys.modules
        assert "v2drop_kernels.ops.compact.native" not in sys.modules
        assert "v2drop_kernels.models" not in sys.modules
    """)
