"""The CUDA C++ kernels, compiled by nvcc without a GPU: real architectures and PTX, no spills, and the accesses asked for.

A source is compiled once, by one command for all that the tests of this session read: the object for the host, a cubin for every
architecture, and PTX. The flags are those of CMakeLists.txt. What the kernels compute is tested on the CPU by the emulated tests.
"""

from __future__ import annotations

import collections
import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from support.sass import accesses_before_wait

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/core").glob("*.cu"))
NVCC = shutil.which("nvcc")
OLDEST = 80

pytestmark = [
    pytest.mark.compile_only,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: no CUDA C++ kernel is compiled for a GPU here"),
]


class Kernel(NamedTuple):
    """One instance of a kernel template, as the assembler left it."""

    registers: int
    stack: int
    sass: str

    def accesses(self, kind: str) -> list[str]:
        """Widths of the loads or stores, e.g. ``accesses("LDG")`` -> ``["128", "32"]``."""
        found = re.findall(rf"\b{kind}\.(\S+)", self.sass)
        return [(re.findall(r"\b(?:U8|S8|U16|S16|64|128)\b", x) or ["32"])[-1].lstrip("US") for x in found]


class Built(NamedTuple):
    """What one call of nvcc made of a source."""

    host: Path  # the object file, with all that follows inside
    cubins: dict[int, Path]  # by architecture
    ptx: Path  # for the oldest architecture


def kernels_of(cubin: Path) -> dict[str, Kernel]:
    """The kernels, by mangled name."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage", cubin))
    bodies = re.split(r"\bFunction : (\S+)", cuobjdump("-sass", cubin))
    sass = dict(zip(bodies[1::2], bodies[2::2], strict=True))
    assert sass.keys() == {function for function, _, _ in usage} != set()
    return {function: Kernel(int(registers), int(stack), sass[function]) for function, registers, stack in usage}


def nvcc(source: Path, folder: Path, archs: set[int]) -> Built:
    options = ["-std=c++17", "-O3", "--fmad=false", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra"]
    options += ['-DV2DROP_CUDA_ARCHS_STRING="test"', f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/core'}"]
    options += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in sorted(archs)]
    host = folder / f"{source.stem}.o"
    command = [NVCC, *options, f"-gencode=arch=compute_{OLDEST},code=compute_{OLDEST}", "-c", source, "-o", host]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for option in ("-xelf", "-xptx"):
        cuobjdump(option, "all", host.name, cwd=folder)
    (ptx,) = folder.glob("*.ptx")
    return Built(host, {arch: next(folder.glob(f"*.sm_{arch}.cubin")) for arch in archs}, ptx)


def cuobjdump(*arguments: str | Path, cwd: Path | None = None) -> str:
    tool = shutil.which("cuobjdump")
    if tool is None:  # Triton brings one
        tool = pytest.importorskip("triton").knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def built(request, tmp_path_factory):
    """A function from the name of a source to what was made of it: for sm_90 and the architectures that tests have as parameter."""
    archs = collections.defaultdict(lambda: {90})
    for item in request.session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if "arch" in params:
            archs[params["name"]].add(params["arch"])
    archs["select_segments_cuda.cu"].add(OLDEST)  # of test_clusters_are_compiled_for_those_that_have_them

    @functools.cache
    def of(name: str) -> Built:
        return nvcc(ROOT / "csrc/core" / name, tmp_path_factory.mktemp("cubin"), archs[name])

    return of


@pytest.fixture(scope="module")
def kernels(built):
    """A function from the name of a source and an architecture to its kernels, by mangled name."""
    return functools.cache(lambda name, arch=90: kernels_of(built(name).cubins[arch]))


def named(kernels: dict[str, Kernel], name: str) -> dict[str, Kernel]:
    """The instances of one kernel: its name stands in the mangled one after its length."""
    found = {function: kernel for function, kernel in kernels.items() if f"{len(name)}{name}" in function}
    assert found, f"no kernel {name} among {', '.join(kernels)}"
    return found


every_source = pytest.mark.parametrize("name", [x.name for x in SOURCES])


def test_sources_are_those_of_the_build():
    listed = re.search(r"set\(cuda_sources (.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.DOTALL).group(1).split()
    assert sorted(listed) == [str(x.relative_to(ROOT)) for x in SOURCES] != []


@pytest.mark.parametrize("arch", [OLDEST, 90, 100, 120])
@every_source
def test_no_spills(name, arch, kernels):
    for function, kernel in kernels(name, arch).items():
        local = len(re.findall(r"\b(?:LDL|STL)\b", kernel.sass))
        assert (kernel.stack, local) == (0, 0), f"{function}: {kernel.registers} registers, {kernel.stack} bytes of stack"


# The first kernel of a call never waits, and what these read was written before the call, or by a kernel that has ended.
NEVER_WAIT = {
    "score_cuda.cu": ("score_kernel", "cosine_score", "score_backward_kernel"),
    "compact_cuda.cu": ("invert_kernel", "move_to_front_kernel"),
    "drop_cuda.cu": ("drop_kernel", "cosine_drop"),
    "similarity_cuda.cu": ("key_norm_kernel", "cosine_kernel"),
    "merge_cuda.cu": ("merge_kernel", "shares_kernel", "back_kernel"),
    "random_cuda.cu": ("random_kernel",),
    "upload_cuda.cu": ("upload_kernel",),
}


@every_source
def test_nothing_is_accessed_before_the_wait(name, kernels):
    """A kernel that may start before its predecessor has ended waits for it before it touches global memory."""
    for function, kernel in kernels(name).items():
        early = accesses_before_wait(kernel.sass)
        if early is None:
            assert any(f"{len(x)}{x}" in function for x in NEVER_WAIT.get(name, ())), f"{function} does not wait"
        else:
            assert early == [], function


def test_the_check_of_the_wait_finds_an_early_load():
    assert accesses_before_wait("LDC R1, c[0x0]; LDG.E R2, [R4]; ACQBULK; LDG.E R3, [R4]") == ["LDG.E"]
    assert accesses_before_wait("LDC R1; S2R R0; ACQBULK; LDG.E R3, [R4]") == []
    assert accesses_before_wait("LDG.E R3, [R4]; EXIT") is None


@every_source
def test_the_library_neither_copies_nor_synchronises(name, built):
    """The host's side of a source calls nothing of the CUDA runtime that waits, copies, or takes and gives memory back."""
    symbols = subprocess.run(["nm", "-u", built(name).host], capture_output=True, text=True, check=True).stdout
    called = set(re.findall(r"\b(cuda\w+)", symbols))
    assert called  # of the launches
    assert not {x for x in called if re.search("Memcpy|Memset$|Synchronize|Malloc|Free|Query", x)}  # cudaMemsetAsync is a launch


@every_source
def test_ptx(name, built):
    """The oldest architecture: nothing in the sources needs a newer one where it is not requested."""
    ptx = built(name).ptx.read_text()
    assert f".target sm_{OLDEST}" in ptx
    assert "griddepcontrol" not in ptx


@pytest.mark.parametrize(
    ("source", "name"),
    [("score_cuda.cu", "score_kernel"), ("compact_cuda.cu", "gather_kernel"), ("similarity_cuda.cu", "key_norm_kernel")],
)
def test_registers(source, name, kernels):
    """64 registers let four blocks of 256 threads live on an SM."""
    for function, kernel in named(kernels(source), name).items():
        assert kernel.registers <= 64, f"{function} has {kernel.registers}"


def test_score_loads_16_bytes(kernels):
    """Of both tensors, several at once; one instance per dtype for rows that are aligned."""
    wide = [kernel for kernel in named(kernels("score_cuda.cu"), "score_kernel").values() if "128" in kernel.accesses("LDG")]
    assert len(wide) == 3
    for kernel in wide:
        before_use = re.split(r"\b(?:FADD|FFMA|FMUL|HADD2\.F32)\b", kernel.sass[kernel.sass.index("LDG.E.128") :])[0]
        assert kernel.accesses("LDG").count("128") % 2 == 0
        assert len(re.findall(r"LDG\S*\.128", before_use)) >= 2


@pytest.mark.parametrize(("name", "loads"), [("weigh_kernel", 5), ("key_norm_kernel", 4), ("cosine_kernel", 3)])
def test_keys_are_loaded_by_16_bytes(name, loads, kernels):
    """Several rows of keys at once (and queries, or pivots), in the instances for aligned rows: every second one."""
    source = "attention_cuda.cu" if name == "weigh_kernel" else "similarity_cuda.cu"
    found = named(kernels(source), name).values()
    wide = [kernel for kernel in found if kernel.accesses("LDG").count("128") >= loads]
    assert len(wide) == len(found) // 2


@pytest.mark.parametrize(
    ("source", "name"),
    [("compact_cuda.cu", "gather_kernel"), ("drop_cuda.cu", "select_and_gather_kernel"), ("drop_cuda.cu", "drop_kernel")],
)
def test_gather_moves_16_bytes(source, name, kernels):
    for kernel in named(kernels(source), name).values():
        assert kernel.accesses("STG").count("128") >= 2  # several in flight
        assert kernel.accesses("LDG").count("128") >= kernel.accesses("STG").count("128")


TEAMS = ("OneBlock", "ClusterOfBlocks", "GridOfBlocks")


@pytest.mark.parametrize("team", TEAMS)
def test_long_selections_keep_loads_in_flight(team, kernels):
    """A block loads 16 ordinals a thread before it uses the first, when it reads them for the first time and again.

    Equal bins of neighbouring lanes do not make an atomic fail and repeat: the counters are incremented by POPC.INC.
    """
    (kernel,) = (k for f, k in named(kernels("select_segments_cuda.cu"), "select_team_kernel").items() if team in f)
    loads = [m.start() for m in re.finditer(r"LDG\.E\.STRONG\.GPU|BAR\.SYNC|VIMNMX|ATOMS|UCGABAR", kernel.sass)]
    runs, run = [], 0
    for at in loads:
        run = run + 1 if kernel.sass.startswith("LDG", at) else 0
        runs.append(run)
    assert max(runs) >= 16
    assert len(re.findall(r"ATOMS\.POPC\.INC\.32", kernel.sass)) == 16
    assert ("UCGABAR_WAIT" in kernel.sass) == (team == "ClusterOfBlocks")


def test_counts_of_the_selections(built):
    """Instructions a key and pass, and the times that follow on an H200, also where scores need a fourth pass.

    The bounds are the counts of nvcc 13.0, rounded up. The committed counts, for the performance model, are those of the sources.
    """
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        counter = importlib.import_module("sass_count")
    finally:
        sys.path.remove(str(ROOT / "tools"))
    made = counter.of_cubins(*(built(name).cubins[90] for name in counter.COUNTED))
    most = {"range": 7, "bins": 10.5, "count": 8.5, "place": 40}
    for found in made["counts"].values():
        assert {name for name, bound in most.items() if name in found and found[name]["instructions_per_key"] > bound} == set()
        assert found["range"]["loads_in_flight"] >= 16
    assert min(made["predicted_us_four_passes"][team]["6272"] for team in ("OneBlock", "ClusterOfBlocks")) <= 6
    assert made["predicted_us_four_passes"]["ClusterOfBlocks"]["65536"] <= 12
    item = made["gather_item"]
    assert item["loads_in_flight"] == 4
    assert item["issue_cycles"] < 0.8 * item["memory_cycles"]  # a gather is bound by memory
    committed = json.loads(counter.OUT.read_text())
    if committed["nvcc"] == made["nvcc"]:
        assert committed == made, "run tools/sass_count.py"


def test_clusters_are_compiled_for_those_that_have_them(kernels):
    """For sm_80 the kernel is empty, and is never launched there."""
    (kernel,) = (
        k for f, k in named(kernels("select_segments_cuda.cu", OLDEST), "select_team_kernel").items() if "ClusterOfBlocks" in f
    )
    assert kernel.registers < 16


def test_dependent_launch(kernels):
    """On sm_90 the second kernel of a call waits for the one before it by programmatic dependent launch."""
    for source, name in (("drop_cuda.cu", "select_and_gather_kernel"), ("attention_cuda.cu", "reduce_kernel")):
        for kernel in named(kernels(source), name).values():
            assert "ACQBULK" in kernel.sass
