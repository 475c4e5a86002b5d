"""The wheel that `make wheel` built, as a user installs it: in an environment without a compiler and without this checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
TOOLS = ["cc", "gcc", "clang", "c++", "g++", "clang++", "nvcc", "cmake", "ninja", "make", "ld"]
if "V2DROP_WHEELS" not in os.environ:
    pytest.skip("V2DROP_WHEELS names no folder of wheels: `make wheel` builds and tests them", allow_module_level=True)
DIST = Path(os.environ["V2DROP_WHEELS"]).resolve()

DROP = """
import shutil, sys
import torch
import v2drop_kernels as vk

assert vk.__file__.startswith(sys.prefix), vk.__file__
assert not [tool for tool in sys.argv[1:] if shutil.which(tool)]
hidden = torch.arange(36.0).view(1, 9, 4)
dropped = vk.drop_tokens(torch.zeros_like(hidden), hidden, 2, droppable=(1, 7), backend="cpu")
assert torch.equal(dropped.hidden, hidden[:, [0, 5, 6, 7, 8]]), dropped
print(vk.explain(hidden))
"""


@pytest.fixture(scope="module")
def wheel() -> Path:
    (found,) = DIST.glob(f"v2drop_kernels-*-{TAG}-{TAG}-*.whl")
    return found


def sdist_names() -> set[str]:
    (sdist,) = DIST.glob("v2drop_kernels-*.tar.gz")
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def required(name: str, seen: set[str]) -> None:
    """The installed distributions that `name` needs, without its extras."""
    for requirement in metadata.requires(name) or []:
        needed = re.match(r"[\w.-]+", requirement)[0]
        if "extra ==" in requirement or needed in seen:
            continue
        try:
            metadata.distribution(needed)
        except metadata.PackageNotFoundError:  # for another platform or Python
            continue
        seen.add(needed)
        required(needed, seen)


def test_platform_tag(wheel):
    """auditwheel derives the tag from the symbols that the libraries import."""
    shown = subprocess.run([sys.executable, "-m", "auditwheel", "show", wheel], capture_output=True, text=True, check=True).stdout
    (tag,) = re.findall(r'platform tag:\s+"(manylinux_\w+_x86_64)"', shown)
    assert tag in wheel.name
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if ".libs/" in name], "a library of the system was copied"


def test_contents_of_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {name for name in names if re.fullmatch(rf"v2drop_kernels/_(C|xla)\.cpython-{TAG[2:]}-\S+\.so", name)}
    assert len(modules) == 2
    for name in ("include/v2drop/v2drop.h", "lib/libv2drop.so", "lib/cmake/V2Drop/V2DropConfig.cmake", "lib/pkgconfig/v2drop.pc"):
        assert f"v2drop_kernels/{name}" in names
    sources = {name for name in sdist_names() if name.startswith("v2drop_kernels/") and name.endswith((".py", ".json", "py.typed"))}
    assert "v2drop_kernels/py.typed" in sources
    assert sources == {name for name in names if name.endswith((".py", ".json", "py.typed"))}
    assert {name.split("/")[0] for name in names} == {"v2drop_kernels", wheel.name.split(f"-{TAG}")[0] + ".dist-info"}


def test_contents_of_the_sdist():
    """The wheel was built from it, so that it holds what the build needs; here also the tests, and nothing that was built."""
    names = sdist_names()
    assert {"tests/tools/test_wheel.py", "tools/setup.sh", "requirements/constraints.txt", "Makefile", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o")) or name.startswith(("build", "v2drop_kernels/lib"))]


def test_one_drop_without_a_compiler(wheel, tmp_path):
    """A new environment with torch, Triton and NumPy (linked, not downloaded again) and the wheel; PATH has no command at all."""
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    needed: set[str] = {"torch", "numpy", "triton"} & {d.metadata["Name"] for d in metadata.distributions()}
    for name in list(needed):
        required(name, needed)
    for name in needed:
        for file in metadata.files(name):
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not top.endswith(".pth") and not (site / top).exists():
                (site / top).symlink_to(metadata.distribution(name).locate_file(top))
    install = ["pip", "install", "--no-index", "--no-deps", "--no-input", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", *install, "--target", site, wheel], check=True, capture_output=True)

    (tmp_path / "empty").mkdir()
    env = {"PATH": str(tmp_path / "empty"), "HOME": str(tmp_path)}
    python = tmp_path / "env" / "bin" / "python"
    done = subprocess.run([python, "-I", "-c", DROP, *TOOLS], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cpu" in done.stdout
    assert shutil.which("gcc", path=env["PATH"]) is None
