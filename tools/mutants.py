"""Mutation check: break one line of a copy of the project at a time; tests must notice.

``make mutants`` runs all of them with the cases that ``make test`` uses, and fails where a mutant survives that ``SURVIVORS``
does not explain. ``python tools/mutants.py --both`` also runs the mutants of Python code with every combination of parameters
(``V2DROP_TEST_FULL=1``) and prints both results side by side: the fewer cases must find what all of them find.

The copy lies in ``build/mutants``; it is kept, so that the native library is rebuilt incrementally. A mutant replaces one piece of
text that must occur exactly once in its file: where it does not, the list is out of date, and nothing runs until it is corrected.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "mutants"
SECONDS = 1200  # for one run of tests: a mutant may loop for ever


class Mutant(NamedTuple):
    """One replacement, and the tests that should notice it."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # files, or tests in them (file::test), by spaces
    process: str = "main"  # "main", "interpreter" (Triton), "native" (C++, rebuilt) or "emulated" (CUDA C++, rebuilt)


ERRORS, TOPK, SCORE = "tests/ops/test_errors.py", "tests/ops/test_segmented_topk.py", "tests/ops/test_variation_score.py"
VARIATION, COMPACT, DROP = "tests/ops/test_variation_topk.py", "tests/ops/test_compact.py", "tests/ops/test_drop_tokens.py"
INPLACE, ATTENTION = "tests/ops/test_compact_inplace.py", "tests/ops/test_attention_score.py"
MODELS = "tests/models/test_models.py"
ARGUMENTS, PLAN, POSITIONS = "v2drop_kernels/core/arguments.py", "v2drop_kernels/core/plan.py", "v2drop_kernels/core/positions.py"
OPS, ENGINE = "v2drop_kernels/ops", "v2drop_kernels/models"
POLICIES, HIDIVDROP = "tests/models/test_policies.py", "tests/models/test_hidivdrop.py"

MUTANTS = [
    # Argument checks.
    Mutant("spans may overlap by one", ARGUMENTS, "        if start < at:", "        if start < at - 1:", ERRORS),
    Mutant("a span may end one row late", ARGUMENTS, "start < lo or stop > hi:", "start < lo or stop > hi + 1:", ERRORS),
    Mutant("hidden states may have more dimensions", ARGUMENTS, "elif h.ndim != (2 if", "elif h.ndim < (2 if", ERRORS),
    Mutant("k may be a bool tensor", ARGUMENTS, "k.is_complex() or k.dtype == torch.bool or", "k.is_complex() or", ERRORS),
    Mutant("cu_seqlens may end early", ARGUMENTS, "and cu[-1] != total", "and cu[-1] > total", ERRORS),
    Mutant("k may be a bool", ARGUMENTS, "if isinstance(x, bool) or not is_int(x)", "if not is_int(x)", ERRORS),
    Mutant(
        "zero heads", f"{OPS}/attention_score/checks.py",
        "not 1 <= heads <= h", "not 0 <= heads <= h", f"{ATTENTION}::test_attention_of_bad_input",
    ),
    # Plans.
    Mutant(
        "left padding before the last segment", PLAN,
        "own[0] = own[0]._replace(pad_before=pad)", "own[-1] = own[-1]._replace(pad_before=pad)", f"{DROP} {COMPACT}",
    ),
    Mutant("rows of a mask that do not compete are not kept", PLAN, "forced = s.n - s.available", "forced = 0", DROP),
    Mutant(
        "a plan is taken for uniform where only k differs", PLAN,
        "n_prefix, n, n_suffix, k, g * plan", "n_prefix, n, n_suffix, s.k, g * plan", f"{DROP} {COMPACT}",
    ),
    Mutant(
        "rows behind the last segment are lost", PLAN,
        "n_suffix=end - row)", "n_suffix=end - row if len(own) == 1 else 0)", DROP,
    ),
    Mutant("a selection is as wide as k", PLAN, "ks = tuple(min(x, s.available) for", "ks = tuple(min(x, s.n) for", TOPK),
    Mutant(
        "a dropped item begins at its padding", "v2drop_kernels/core/layout.py",
        "tuple((out_rows - n, out_rows) if left else (0, n)", "tuple((0, n) if left else (0, n)", DROP,
    ),
    # New positions.
    Mutant("packed ids run on into the next item", POSITIONS, "rows, right=True)", "rows, right=False)", f"{COMPACT} {DROP}"),
    Mutant("compacted ids begin at one", POSITIONS, "real.cumsum(-1) - 1, 0)", "real.cumsum(-1), 0)", f"{COMPACT} {DROP}"),
    Mutant(
        "text ids of a group begin one late", POSITIONS,
        "cumsum(0) - 1 + vision.sum()", "cumsum(0) + vision.sum()", f"{COMPACT} {DROP}",
    ),
    # The specification in PyTorch.
    Mutant(
        "L1 ignores score_dtype in the difference", f"{OPS}/variation_score/reference.py",
        "if score_dtype is not None:\n            d", 'if score_dtype is not None and metric != "l1":\n            d', SCORE,
    ),
    Mutant(
        "the last rounding is missing", f"{OPS}/variation_score/reference.py",
        "else score.to(score_dtype).to(wide)", "else score", SCORE,
    ),
    Mutant(
        "packed selections come by score", f"{OPS}/topk/reference.py",
        'if order == "position":', 'if order == "position" and not packed:', TOPK,
    ),
    Mutant(
        "a mask of a segment is ignored", f"{OPS}/topk/reference.py",
        "if layout.mask is not None:", "if layout.mask is None and layout.mask:", TOPK,
    ),
    Mutant(
        "left padding lies right", f"{OPS}/compact/reference.py",
        'if side == "left" else 0', 'if side == "lef" else 0', COMPACT,
    ),
    Mutant(
        "padding holds zero, not the fill", f"{OPS}/compact/reference.py",
        "masked_fill(empty, spec.fill)", "masked_fill(empty, 0)", COMPACT,
    ),
    # Triton kernels.
    Mutant(
        "one tie too few", f"{OPS}/topk/triton_keys.py",
        "(is_equal & (e <= quota))", "(is_equal & (e < quota))", TOPK, "interpreter",
    ),
    Mutant(
        "-0.0 is below 0.0", f"{OPS}/topk/triton_keys.py",
        "bits = tl.where(score == 0, 0.0, score).to", "bits = score.to", TOPK, "interpreter",
    ),
    Mutant(
        "NaN is the smallest", f"{OPS}/topk/triton_keys.py",
        "tl.constexpr(0x7FFFFFFE)", "tl.constexpr(-0x7FFFFFFF)", TOPK, "interpreter",
    ),
    Mutant(
        "rows outside the mask are dropped", f"{OPS}/topk/triton_keys.py",
        "FORCED if FORCE else EXCLUDED)", "EXCLUDED if FORCE else EXCLUDED)", DROP, "interpreter",
    ),
    Mutant(
        "one zero vector is no direction, two are", f"{OPS}/variation_score/triton.py",
        "zero = (norm_a == 0) | (norm_b == 0)", "zero = (norm_a == 0) & (norm_b == 0)", SCORE, "interpreter",
    ),
    # C++ kernels.
    Mutant(
        "ties crowd out larger scores", "csrc/core/select_cpu.cpp",
        "above += ordinals[i] > cut", "above += ordinals[i] >= cut", TOPK, "native",
    ),
    Mutant("equal scores in descending rows", "csrc/core/select_cpu.cpp", "x > y : a < b;", "x > y : a > b;", TOPK, "native"),
    Mutant(
        "rows in place are taken for contiguous", "csrc/core/compact_cpu.cpp",
        "= bytes == copy.inner && copy.src_row == copy.inner;", "= bytes == copy.inner;", INPLACE, "native",
    ),
    Mutant(
        "gathered rows are taken for contiguous", "csrc/core/compact_cpu.cpp",
        "if (copy.src_row == copy.inner && copy.dst_row == copy.inner)", "if (copy.dst_row == copy.inner)", COMPACT, "native",
    ),
    Mutant(
        "a batch dimension behind the rows is ignored", "csrc/core/request.cpp",
        "d > row_dim && d != batch_dim; --d", "d > row_dim; --d", COMPACT, "native",
    ),
    # CUDA kernels, emulated.
    Mutant(
        "ties are counted anew in every block of ordinals", "csrc/core/select_cuda.cuh",
        "placed.equal += all >> 16;", "placed.equal = all >> 16;", f"{TOPK} {VARIATION}", "emulated",
    ),
    Mutant(
        "a block of a team counts its own survivors as earlier ones", "csrc/core/select_bins_cuda.cuh",
        "lane_id() < team.rank() ? above : 0", "lane_id() <= team.rank() ? above : 0", "tests/native/test_launches.py", "emulated",
    ),
    # The model engine and its policies.
    Mutant(
        "logits of left-padded items come from wrong rows", f"{ENGINE}/rows.py",
        "slot = (count - 1).clamp(min=0) + pad", "slot = (count - 1).clamp(min=0)", MODELS,
    ),
    Mutant(
        "a second stage numbers rows of the first stage's result", f"{ENGINE}/stage.py",
        "torch.where(keep >= 0, prefill.current.keep.gather(1, keep.clamp(min=0)), keep)", "keep", MODELS,
    ),
    Mutant(
        "late injection puts padding into the first row", f"{ENGINE}/rows.py",
        "source.scatter_(1, torch.where(keep >= 0, keep, n),", "source.scatter_(1, keep.clamp(min=0),", HIDIVDROP,
    ),
    Mutant(
        "fastv reads the block behind the drop", f"{ENGINE}/policies/fastv.py",
        "attention(context.layer - 1, context.prev", "attention(context.layer, context.prev", MODELS,
    ),
    Mutant(
        "random draws start at the second token", f"{ENGINE}/policies/random.py",
        "cumsum(1).sub(1).clamp(min=0)", "cumsum(1).clamp(min=0)", f"{MODELS} {POLICIES}",
    ),
]  # fmt: skip

# Mutants that no test finds, and why that is right.
SURVIVORS: dict[str, str] = {}


def check(mutants: list[Mutant]) -> None:
    """Raise unless every mutant says something of the code as it is."""
    for m in mutants:
        path = ROOT / m.file
        found = path.read_text().count(m.old) if path.exists() else 0
        if found != 1:
            raise SystemExit(f"mutants: {m.name!r}: the text to replace occurs {found} times in {m.file}, it must occur once")
        if missing := [test for test in m.tests.split() if not (ROOT / test.partition("::")[0]).exists()]:
            raise SystemExit(f"mutants: {m.name!r}: there is no {missing[0]}")
    names = {m.name for m in MUTANTS}
    if len(names) < len(MUTANTS) or set(SURVIVORS) - names:
        raise SystemExit("mutants: names must differ, and survivors must be mutants")


def copy_tree(copy: Path) -> None:
    """The files of the checkout and its native library; files that did not change keep their times, for the incremental build."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    wanted = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    package = ROOT / "v2drop_kernels"
    built = [*package.glob("*.so"), *package.glob("lib/**/*"), *package.glob("include/**/*")]
    wanted |= {str(path.relative_to(ROOT)) for path in built if path.is_file()}
    for name in wanted:
        source, target = ROOT / name, copy / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    for path in [p for p in copy.rglob("*") if p.is_file() and p.relative_to(copy).parts[0] != "build"]:
        if str(path.relative_to(copy)) not in wanted:
            path.unlink()


def build(copy: Path, process: str) -> Path:
    """Build the native library of the copy, for the CPU alone or with the emulated CUDA kernels; the module's path."""
    folder = copy / "build" / process
    tools = str(Path(sys.executable).parent)
    environ = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    run = lambda *command: subprocess.run(command, cwd=copy, env=environ, check=True, capture_output=True, text=True).stdout
    if not (folder / "build.ninja").exists():
        pybind11 = run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
        cuda = "EMULATE" if process == "emulated" else "OFF"
        run("cmake", "-S", ".", "-B", str(folder), "-G", "Ninja", f"-DV2DROP_CUDA={cuda}", "-DV2DROP_BUILD_PYTHON=ON",
            "-DV2DROP_JAX=OFF", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}")  # fmt: skip
    run("cmake", "--build", str(folder), "--", "--quiet")
    (module,) = folder.glob("_C*.so")
    return module


def killed(copy: Path, process: str, tests: list[str], *, full: bool = False) -> bool:
    """Whether a test fails."""
    environ = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "V2DROP_NATIVE_MODULE", "V2DROP_TEST_FULL")}
    environ["PYTHONPATH"] = str(copy)
    if full:
        environ["V2DROP_TEST_FULL"] = "1"
    if process == "interpreter":
        environ["TRITON_INTERPRET"] = "1"
    if process in ("native", "emulated"):
        environ["V2DROP_NATIVE_MODULE"] = str(build(copy, process))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return True
    if done.returncode not in (0, 1) and done.returncode >= 0:  # a signal is a crash, which is noticed
        raise SystemExit(f"mutants: pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return done.returncode != 0


def try_mutant(copy: Path, m: Mutant, *, full: bool = False) -> bool:
    """Whether the tests notice the mutant; the copy is as before afterwards."""
    path = copy / m.file
    before = path.read_text()
    path.write_text(before.replace(m.old, m.new))
    try:
        return killed(copy, m.process, m.tests.split(), full=full)
    finally:
        path.write_text(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose name, file or process contains one of these")
    parser.add_argument("--list", action="store_true", help="check the list against the code and print it; run nothing")
    parser.add_argument("--both", action="store_true", help="mutants of Python code with all combinations of parameters as well")
    parser.add_argument("--folder", type=Path, default=COPY, help="where the copy of the project goes")
    parser.add_argument("--no-baseline", action="store_true", help="do not check first that the tests pass without a mutant")
    args = parser.parse_args()
    copy = args.folder.resolve()
    check(MUTANTS)
    chosen = [
        m for m in MUTANTS if not args.words or any(word in text for word in args.words for text in (m.name, m.file, m.process))
    ]
    if args.list:
        print("\n".join(f"{m.process:12} {m.file:45} {m.name}" for m in chosen))
        return 0
    copy_tree(copy)
    if not args.no_baseline:
        for process in dict.fromkeys(m.process for m in chosen):
            if killed(copy, process, list(dict.fromkeys(test for m in chosen if m.process == process for test in m.tests.split()))):
                raise SystemExit(f"mutants: without a mutant, the tests of the process {process!r} do not pass")
    head = ["mutant", "file", "process", "pairs", *(["all"] if args.both else []), "seconds"]
    print(f"| {' | '.join(head)} |\n{'| --- ' * (len(head) - 1)}| ---: |")
    unexplained, lost = [], []
    for m in chosen:
        began = time.monotonic()
        found = try_mutant(copy, m)
        both = args.both and m.process == "main"
        found_by_all = try_mutant(copy, m, full=True) if both and not found else found  # what pairs find, their superset finds
        word = lambda x, m=m: "killed" if x else "survived, explained" if m.name in SURVIVORS else "**survived**"
        columns = [m.name, m.file, m.process, word(found), *([word(found_by_all) if both else ""] if args.both else [])]
        print(f"| {' | '.join(columns)} | {time.monotonic() - began:.0f} |", flush=True)
        unexplained += [m.name] if not found and m.name not in SURVIVORS else []
        lost += [m.name] if found_by_all and not found else []
    explained = sum(m.name in SURVIVORS for m in chosen)
    print(f"\n{len(chosen)} mutants: {len(unexplained)} survived without an explanation, {explained} are listed as survivors.")
    for name in lost:
        print(f"only all combinations find: {name}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
