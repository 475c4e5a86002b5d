"""Other programs link libv2drop, installed alone or with the Python package, by the commands of docs/linking.md."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "linking.md"
PACKAGE = Path(importlib.util.find_spec("v2drop_kernels").origin).parent
# The commands of this environment first: its python has the package, its cmake was pinned.
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
C_OUTPUT = """\
row 0, position 100, hidden 0
row 2, position 102, hidden 11
row 4, position 104, hidden 11
row 6, position 106, hidden 14
row 7, position 107, hidden 7
"""
CPP_OUTPUT = """\
image 0 keeps rows 1 and 4: -1 and -4
image 1 keeps rows 0 and 5: -6 and -11
CUDA: """
OUTPUT = {"c": C_OUTPUT, "cpp": CPP_OUTPUT}
COMPILER = {"c": ["cc", "-std=c99"], "cpp": ["c++", "-std=c++17"]}
BARE = shutil.ignore_patterns("*.so", "lib", "include", "__pycache__")  # of the package: what is built
WARNINGS = ["-Wall", "-Wextra", "-pedantic", "-Werror"]


def run(*command, **env) -> str:
    done = subprocess.run([str(x) for x in command], env={**ENV, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def config(*options: str) -> str:
    return run(sys.executable, "-m", "v2drop_kernels", "config", *options).rstrip("\n")


def documented_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def documented(tmp_path_factory) -> tuple[Path, str]:
    """Every shell block of the page, in order, exactly as written, in a copy of the sources that hides nothing that is installed.

    The folder and the output. Not optimised, which saves most of the time and shows that no undefined symbol hides in a branch that
    an optimiser removes: the library for users is that of the package.
    """
    scratch = tmp_path_factory.mktemp("documented")
    for name in ("csrc", "cmake", "examples"):
        shutil.copytree(ROOT / name, scratch / name)
    shutil.copytree(ROOT / "v2drop_kernels", scratch / "v2drop_kernels", ignore=BARE)
    shutil.copy(ROOT / "CMakeLists.txt", scratch)
    blocks = documented_blocks("sh")
    assert len(blocks) >= 3
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(blocks)],
        cwd=scratch, env={**ENV, "CMAKE_BUILD_TYPE": "None", "CXXFLAGS": "-O0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return scratch, done.stdout


@pytest.fixture(scope="module")
def installed(documented) -> Path:
    """What ``cmake --install`` gives, without CUDA; moved afterwards, since the tree must not remember where it was made."""
    scratch, _ = documented
    return (scratch / "build/prefix").rename(scratch / "moved here")


@pytest.fixture(params=["installed", "package"])
def tree(request) -> Path:
    return request.getfixturevalue("installed") if request.param == "installed" else PACKAGE


def check_output(language: str, program: Path) -> None:
    out = run(program)
    assert out.startswith(OUTPUT[language]), out
    # Whatever is said about CUDA is one line: which architectures, or why not.
    rest = out.removeprefix(OUTPUT[language]).splitlines()
    assert [line != "" for line in rest] == [True] * (language == "cpp")


@pytest.mark.parametrize("language", ["c", "cpp"])
def test_cmake(language, tree, tmp_path):
    where = config("--cmakedir") if tree == PACKAGE else tree / "lib/cmake/V2Drop"
    run("cmake", "-S", ROOT / "examples" / language, "-B", tmp_path, f"-DV2Drop_DIR={where}")
    run("cmake", "--build", tmp_path)
    assert f"[{tree / 'lib'}]" in run("readelf", "-d", tmp_path / "drop")  # the run path: no other libv2drop is meant
    check_output(language, tmp_path / "drop")


@pytest.mark.parametrize("language", ["c", "cpp"])
def test_pkg_config(language, tree, tmp_path):
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    path = config("--pkgconfigdir") if tree == PACKAGE else str(tree / "lib/pkgconfig")
    flags = shlex.split(run("pkg-config", "--cflags", "--libs", "v2drop", PKG_CONFIG_PATH=path))
    assert f"-L{tree / 'lib'}" in [f"-L{Path(x[2:]).resolve()}" for x in flags if x.startswith("-L")]
    rpath = f"-Wl,-rpath,{tree / 'lib'}"
    run(*COMPILER[language], *WARNINGS, ROOT / f"examples/{language}/drop.{language}", *flags, rpath, "-o", tmp_path / "drop")
    check_output(language, tmp_path / "drop")


@pytest.mark.parametrize("language", ["c", "cpp"])
def test_plain_flags(language, tmp_path):
    flags = shlex.split(config("--cflags", "--libs"))
    run(*COMPILER[language], *WARNINGS, ROOT / f"examples/{language}/drop.{language}", *flags, "-o", tmp_path / "drop")
    check_output(language, tmp_path / "drop")


def test_the_c_tests_pass(tree, tmp_path):
    """On a build without CUDA, and on the one that users get, with CUDA kernels where nvcc was found: without a GPU their entry
    points refuse, and say why."""
    flags = shlex.split(config("--cflags", "--libs"))
    if tree != PACKAGE:
        flags = [flag.replace(str(PACKAGE), str(tree)) for flag in flags]
    run("cc", "-std=c99", *WARNINGS, ROOT / "csrc/tests/test_c_api.c", *flags, "-o", tmp_path / "test_c_api")
    assert run(tmp_path / "test_c_api").startswith("c api: ok")


def test_symbols_and_dependencies(tree):
    """Nothing but the documented names is exported, and the CUDA runtime, which is inside, needs no driver to load."""
    library = tree / "lib/libv2drop.so"
    header = (tree / "include/v2drop/v2drop.h").read_text()
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}
    assert exported == set(re.findall(r"^V2DROP_API .*?\b(v2drop_\w+)\(", header, re.MULTILINE))
    needed = re.findall(r"NEEDED\W+Shared library: \[(\S+?)\]", run("readelf", "-d", library))
    assert needed
    system = r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|librt|ld-linux\S*)\.so"
    assert not [name for name in needed if not re.match(system, name)]


def test_size_of_the_library():
    """At most 25 MB with all architectures; here with those of this build."""
    assert (PACKAGE / "lib/libv2drop.so").stat().st_size <= 25e6


def test_config():
    include, lib = PACKAGE / "include", PACKAGE / "lib"
    assert config("--includedir", "--libdir") == f"{include}\n{lib}"
    flags = shlex.join([f"-L{lib}", f"-Wl,-rpath,{lib}", "-lv2drop", f"-I{include}"])
    assert config("--libs", "--cmakedir", "--cflags") == f"{lib}/cmake/V2Drop\n{flags}"
    assert (include / "v2drop/v2drop.h").read_text() == (ROOT / "csrc/include/v2drop/v2drop.h").read_text()


def test_config_needs_no_torch():
    script = """
import sys

class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("torch", "numpy"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Without)
from v2drop_kernels.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    assert run(sys.executable, "-c", script, "config", "--libdir") == f"{PACKAGE}/lib\n"


def test_config_without_the_library(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "v2drop_kernels", ignore=BARE)
    command = [sys.executable, "-m", "v2drop_kernels", "config"]
    for options, expected in (["--cmakedir"], "has no C++ library"), ([], "give one of --cmakedir"):
        done = subprocess.run([*command, *options], cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("python -m v2drop_kernels config: error: ")
        assert expected in line


def test_documented_commands(documented):
    """Both examples, with the installed Python package and without Python."""
    _, out = documented
    assert out.count(C_OUTPUT) == out.count(CPP_OUTPUT) == 2


@pytest.mark.parametrize("framework", ["array", "jax"])
def test_documented_python(framework):
    (block,) = [x for x in documented_blocks("python") if re.search(rf"\bv2drop_kernels(\.| import ){framework}\b", x)]
    if framework == "jax" and importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed (extra 'jax')")
    run(sys.executable, "-c", block)
