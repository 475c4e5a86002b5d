"""What the pages hold of the code: ``python docs/generate.py`` writes it, ``--check`` fails where a file differs.

The table of methods goes to docs/methods.md, a short one to README.md, and the diagrams of ``diagrams.py`` to docs/assets. Measured
figures come from ``bench/readme_table.py``. ``--models`` also judges the models of the installed transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

SHORT = ("method", "paper", "where", "score")
CONTROLS = ("given", "random")  # of any paper: README names them in its text


def methods() -> str:
    """The whole table, and what differs from the published code."""
    from v2drop_kernels.models import methods

    return methods.markdown()


def short_methods() -> str:
    """One line per published method."""
    from v2drop_kernels.models import methods

    columns = [methods.COLUMNS.index(name) for name in SHORT]
    rows = [[row[i] for i in columns] for row in methods.rows() if row[0] not in CONTROLS]
    return "\n".join(f"| {' | '.join(line)} |" for line in [SHORT, ["---"] * len(SHORT), *rows])


def between(text: str, name: str, inner: str, line: str = "\n") -> str:
    """``text`` with ``inner`` between the markers of this name, on lines of its own unless ``line`` is empty."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}{line}{inner}{line}{end}{rest.split(end)[1]}"


def model_table() -> str:
    """Which models of the installed transformers are served."""
    from v2drop_kernels.models import support

    return support.markdown()


def short_models(table: str) -> str:
    """The counts, and the types that are served, in one line."""
    head, rows = table.split("\n\n")
    cells = [row.strip("| ").split(" | ") for row in rows.splitlines()[2:]]
    return f"{head} Served: {', '.join(cell[0] for cell in cells if cell[1] == 'yes')}"


def files(root: Path = ROOT, *, models: bool = False) -> dict[Path, str]:
    """Every generated file with the text that it should hold; the tables of models, which take half a minute, with ``models``."""
    import diagrams

    tables: dict[str, Callable[[], str]] = {"docs/methods.md": methods, "README.md": short_methods}
    found = {root / name: between((root / name).read_text(), "methods", make()) for name, make in tables.items()}
    if models:
        table = model_table()
        found[root / "docs" / "models.md"] = between((root / "docs" / "models.md").read_text(), "models", table)
        found[root / "README.md"] = between(found[root / "README.md"], "models", short_models(table), line="")
    return found | {root / "docs" / "assets" / f"{name}.svg": svg for name, svg in diagrams.all_of_them().items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where a file differs, and write nothing")
    parser.add_argument("--models", action="store_true", help="also the tables of models, which take half a minute")
    given = parser.parse_args()
    check, made = given.check, files(models=given.models)
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is not up to date: run python docs/generate.py", file=sys.stderr)
        else:
            path.write_text(made[path])
            print(path.relative_to(ROOT))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
