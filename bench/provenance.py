"""The commit that a figure was measured on, also where the tree was copied without ``.git``.

In order: the environment variable ``V2DROP_COMMIT``, git where the tree is a checkout, and ``COMMIT.json`` at the root of the tree.
``make commit-file`` (``python bench/provenance.py``) writes that file; run it before the tree is copied. The file is neither
committed nor ignored, so a tool that copies tracked and untracked files takes it along. It also holds a digest of the sources:
where they were changed after the file was written, the commit reads ``<hash>+changes``, as in a checkout with uncommitted changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = "COMMIT.json"
SOURCES = ("v2drop_kernels", "csrc", "bench", "cmake", "CMakeLists.txt")
SUFFIXES = {".py", ".cpp", ".h", ".c", ".cu", ".cuh", ".inc", ".cmake", ".txt", ".sh", ".json"}


def digest(root: Path = ROOT) -> str:
    """A hash of the sources that a figure depends on."""
    found = hashlib.sha256()
    for name in SOURCES:
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            inside = path.relative_to(root)
            built = inside.parts[:2] in (("v2drop_kernels", "lib"), ("v2drop_kernels", "include"), ("bench", "results"))
            if path.is_file() and path.suffix in SUFFIXES and not built and "__pycache__" not in inside.parts:
                found.update(inside.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def from_git(root: Path = ROOT) -> str | None:
    """The short hash, with ``+changes`` when tracked files outside the results differ from it; None where there is no checkout."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    if not (root / ".git").exists():  # git would look for a checkout further up
        return None
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!README.md", ":!docs")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def from_file(root: Path = ROOT) -> str | None:
    """The hash that :func:`write` left in the tree; None where there is no such file."""
    try:
        left = json.loads((root / FILE).read_text())
        name = str(left["commit"])
    except (OSError, ValueError, KeyError):
        return None
    unchanged = name.endswith("+changes") or left.get("digest") == digest(root)
    return name if unchanged else f"{name}+changes"


def commit(root: Path = ROOT) -> str:
    """The commit of the tree, or ``unknown``."""
    return os.environ.get("V2DROP_COMMIT") or from_git(root) or from_file(root) or "unknown"


def write(root: Path = ROOT) -> str:
    """Write the file; returns the commit that it names."""
    name = os.environ.get("V2DROP_COMMIT") or from_git(root)
    if name is None:
        raise SystemExit(f"{root} is no git checkout, so there is no commit to write down; set V2DROP_COMMIT")
    (root / FILE).write_text(json.dumps({"commit": name, "digest": digest(root)}) + "\n")
    return name


if __name__ == "__main__":
    print(f"{FILE}: commit {write()}")
    sys.exit(0)
