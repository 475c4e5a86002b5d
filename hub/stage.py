"""Stage the Triton part of the package as a project for Hugging Face's kernel-builder: ``python hub/stage.py OUT``.

The Hub loads several builds of a kernel into one process, each under a name of its own. So nothing staged may import
``v2drop_kernels`` by name, and the torch ops must live in the namespace of the ``_ops`` module that kernel-builder generates for
every build. The package is written that way; this script copies it, leaves out what the Hub has no use for, and checks both.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HUB = Path(__file__).resolve().parent
PACKAGE = HUB.parent / "v2drop_kernels"
# What needs transformers or only draws, the command line, what needs the compiled library but no torch; the builder writes _ops.py.
LEFT_OUT = {"__main__.py", "_ops.py", "array.py", "cli", "interop", "jax.py", "models", "plot.py"}
GENERATED = "_ops"
COMPILED = "_C"  # never there: native.py finds that it is not built, and its backends say so
FOREIGN = sys.stdlib_module_names | {"torch", "triton"}  # all that a kernel on the Hub may import


def stage(out: Path, package: Path = PACKAGE) -> list[Path]:
    """Write the project to ``out`` and return the Python files. An earlier stage there is replaced; all else stays."""
    target = out / "torch-ext" / PACKAGE.name
    shutil.rmtree(target, ignore_errors=True)
    sources = [path for path in sorted(package.rglob("*.py")) if path.relative_to(package).parts[0] not in LEFT_OUT]
    for source in sources:
        staged = target / source.relative_to(package)
        staged.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, staged)
    for extra in (HUB / "build.toml", HUB / "flake.nix", HUB / "CARD.md", HUB.parent / "LICENSE"):
        shutil.copyfile(extra, out / extra.name)
    faults = [fault for path in sorted(target.rglob("*.py")) for fault in check(path, target)]
    if faults:
        raise SystemExit("\n".join(faults))
    return sorted(target.rglob("*.py"))


def check(path: Path, root: Path) -> Iterator[str]:
    """What in a staged file would not work on the Hub."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        where = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}:"
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
            yield from (f"{where} imports {name}, which a kernel may not" for name in names if name not in FOREIGN)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{where} {fault}" for fault in _import_faults(node, path, root))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith("v2drop::"):
                yield f"{where} names the op {node.value!r} without add_op_namespace_prefix"
            if re.fullmatch(r"v2drop_kernels(\.\w+)+", node.value):
                yield f"{where} names the module {node.value!r}, whose name on the Hub is another"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.v2drop":
            yield f"{where} uses torch.ops.v2drop in place of ops from ._ops"


def _import_faults(node: ast.ImportFrom, path: Path, root: Path) -> Iterator[str]:
    if not node.level:
        name = str(node.module).split(".")[0]
        if name not in FOREIGN:
            yield f"imports {name}, which a kernel may not"
        return
    base = path.parents[node.level - 1]
    if not base.is_relative_to(root):
        yield "imports from outside the package"
        return
    if node.module:
        base /= node.module.replace(".", "/")
    if base != root / GENERATED and not base.with_suffix(".py").exists() and not (base / "__init__.py").exists():
        yield f"imports {base.relative_to(root)}, which is not staged"
    if not node.module:  # from . import names: modules, except where the package itself has them
        own = (base / "__init__.py").read_text()
        for name in (alias.name for alias in node.names):
            staged = (base / f"{name}.py").exists() or (base / name / "__init__.py").exists()
            if not staged and name != COMPILED and name not in own:
                yield f"imports {name}, which is not staged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the kernel project, best a git repository of its own")
    out = parser.parse_args().out
    print(f"{out}: {len(stage(out))} Python files in torch-ext/{PACKAGE.name}; build it with kernel-builder build-and-copy")


if __name__ == "__main__":
    main()
