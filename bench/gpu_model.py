"""Predicted GPU times of every path of this package, and of every target of the GPU check: ``python bench/gpu_model.py``.

Nothing here is measured. The published figures of each GPU and the constants that no data sheet gives stand in gpu_machines.json,
each with its source; what the kernels consist of stands in gpu_counts.json, counted in their machine code. Every target is judged
by the function that judges its measurement, on predicted times. ``--machine H200`` (or all); ``--results DIR`` prints what a GPU
check measured beside the prediction and fits the constants to it; ``--docs`` writes the page of predictions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import gpu_fit  # noqa: E402
from gpu_clocks import clocks, of_one  # noqa: E402
from gpu_inputs import IMAGE, IMAGES, LONG, VIDEO, VIDEOS  # noqa: E402
from gpu_machine import Constants, constants, machine_of, machines  # noqa: E402
from gpu_predict import Predictor, drop_launches  # noqa: E402
from gpu_registry import Group, steps  # noqa: E402
from gpu_targets import Target  # noqa: E402
from gpu_trials import Trial  # noqa: E402
from tables import table  # noqa: E402

BACKENDS = ("triton", "cuda")


class Bar(NamedTuple):
    """A target with its prediction for one backend; None where the model has nothing to say."""

    number: str
    text: str
    backend: str
    value: float | None
    limit: str
    status: str
    parts: str = ""  # what its time is made of


def bars(p: Predictor) -> list[Bar]:
    """Every target of the GPU check on one machine."""
    found = []
    for step in steps().values():
        for one in step:
            if isinstance(one, Group):
                found += _of_group(p, one)
            else:
                found += [_bar(one, backend, _of_trial(p, one, backend)) for backend in BACKENDS]
    return found


def _of_group(p: Predictor, group: Group) -> list[Bar]:
    found = []
    for mode in group.modes:
        times = {name: p.seconds(time) for name, time in p.times(group, mode).items()}
        for target in group.targets:
            if target.mode == mode:
                made = (_bar(target, backend, target.value(times, backend)) for backend in BACKENDS)
                found += [bar._replace(parts=_parts(p, group, bar.backend)) for bar in made]
    return found


def _bar(target: Target | Trial, backend: str, value: float | None) -> Bar:
    least = target.sense == "at least"
    status = "not predicted"
    if value is not None:
        status = "held" if (value >= target.limit if least else value <= target.limit) else "missed"
    return Bar(target.number, target.text, backend, value, f"{'>=' if least else '<='} {target.limit:g}", status)


def _of_trial(p: Predictor, trial: Trial, backend: str) -> float | None:
    """Host time, launches and memory; what must hold bit by bit is tested, not predicted."""
    values: dict[str, Callable[[], float]] = {
        "host": lambda: p.c.values[f"host_{backend}"],
        "launches": lambda: len(drop_launches(trial.run.args[0], p.machine)[backend]),  # type: ignore[attr-defined]
    }
    name = getattr(getattr(trial.run, "func", trial.run), "__name__", "")
    return values[name]() if name in values else None


SHAPES = (IMAGE, IMAGES, IMAGE._replace(batch=32), VIDEO, VIDEOS, VIDEO._replace(batch=32), LONG, LONG._replace(batch=8),
          LONG._replace(batch=32))  # fmt: skip
# Why targets are missed, by their number, what their text begins with, and the backend.
REASONS = (
    (
        "12", "backward over zeros and index_copy_", "",
        "by bytes alone: zeros and index_copy_ move (N + 2k)DE bytes against (N + k)DE, 1.2 times as many at k = N/4, so that 1.3 "
        "takes an index_copy_ that falls short of the bandwidth of a copy",
    ),
    (
        "13", "attention of one query", "",
        "by bytes alone: the float32 logits of 28 heads, written and then read again, add a fifth to the bytes of the keys",
    ),
    (
        "15", "host time", "triton",
        "it is asked of the backend that small calls go to, the CUDA library; Triton's launches may take 20 us",
    ),
    (
        "11", "drop with M-RoPE", "cuda",
        "instructions: blocks of the gather that take ids or the mask set up as long as those that take hidden states",
    ),
    (
        "12", "backward over a copy", "cuda",
        "instructions: to find and move an item of 16 KB takes 650 a warp, and three rows of four are zeros, which are not read",
    ),
    (
        "4", "image: drop", "",
        "reading the hidden states, and then a select that waits for its barriers, take longer than what a target of so few bytes "
        "leaves for them",
    ),
    (
        "3", "drop over a copy of 2NDE + 2kDE bytes, B=1 N=6272", "triton",
        "three dependent launches select, each with its edge; the select of the CUDA library is one launch",
    ),
    (
        "3", "drop over a copy", "",
        "a select and the start of another kernel follow the scores, where no bytes move, and the copy is too short to make up for "
        "them",
    ),
    (
        "8", "select over torch.topk", "triton",
        "the first of three launches compares every key with 128 samples, which keeps all multiprocessors busy with instructions; "
        "the CUDA library counts bins instead",
    ),
    (
        "8", "select over torch.topk", "cuda",
        "instructions: where a block selects from many keys, it reads them again for every pass; this is at the edge",
    ),
    (
        "2", "gather of given rows", "cuda",
        "instructions: to find and move an item takes longer than its bytes at this bandwidth",
    ),
    ("5", "image: drop over", "", "by bytes: at this bandwidth the launches that are saved are a small part of either side"),
    ("7", "drop over", "", "by bytes: at this bandwidth the launches that are saved are a small part of either side"),
    ("15", "launches of drop_tokens", "triton", "many programs select a long segment in three launches, sooner than one"),
    ("6", "image, wall time", "cuda", "host time of both sides is assumed, and this is at the edge"),
    ("6", "image, wall time", "triton", "host time; small eager calls go to the CUDA library unless Triton is asked for"),
    (
        "1", "score over", "cuda",
        "instructions: where a row is no multiple of 8 KB, the warps that share it have fewer loads than are unrolled",
    ),
)  # fmt: skip


def reason(bar: Bar) -> str:
    """Why a target is missed: as stated above, and what its time is made of."""
    stated = (why for number, start, backend, why in REASONS
              if bar.number == number and bar.text.startswith(start) and backend in ("", bar.backend))  # fmt: skip
    return "; ".join(filter(None, (next(stated, ""), bar.parts)))


def _parts(p: Predictor, group: Group, backend: str) -> str:
    """The time of a drop or a select, launch by launch."""
    if group.op not in ("drop", "select") or group.name.startswith(("extras", "ragged", "eager")):
        return ""
    select = group.op == "select"
    launches = p.select_launches(group.case)[backend] if select else drop_launches(group.case, p.machine)[backend]
    named = []
    for launch in launches:
        us = p.c.us(of_one(launch, p.machine, p.c, select))
        alone = clocks(launch, p.c)
        once = launch.work.alone_us or p.machine.clock_us(alone.select + alone.wait)
        chosen = f", of it {once:.1f} to select once" if launch.work.n else ""
        named.append(f"{launch.kernel.name.strip('_').partition('<')[0]} {us:.1f}{chosen}")
    return f"us: {', '.join(named)}; {len(launches)} launches"


def bars_table(found: Sequence[Bar]) -> str:
    """Both backends of a target in one line."""
    lines: dict[tuple[str, str], dict[str, Bar]] = {}
    for bar in found:
        lines.setdefault((bar.number, bar.text), {})[bar.backend] = bar
    cell = lambda bar: "-" if bar.value is None else f"{bar.value:.3g}{' **missed**' if bar.status == 'missed' else ''}"
    made = [[f"{number}: {text}", *(cell(by[b]) for b in BACKENDS), by["cuda"].limit] for (number, text), by in lines.items()]
    return table(["target", *BACKENDS, "asked"], made)


def drops_table(p: Predictor) -> str:
    """A drop at the shapes of the GPU check: floor, copy, and every launch mode."""
    names = ("triton", "cuda", "cuda-cooperative", "cuda-fused", "cuda-separate")
    lines = []
    for case in SHAPES:
        full, kept = case.input_bytes / 2, case.batch * case.k * case.row_bytes
        floor = p.machine.dram_us(2 * full + kept) * p.c.theta()["copy"]
        copy = p.c.us(p.copies(2 * full + 2 * kept)["copy"])
        times = p.own_drop(case)
        best = min(p.c.us(time) for time in times.values())
        ours = [f"{p.c.us(times[name]):.1f}" if name in times else "-" for name in names]
        lines.append([f"[{case.batch}, {case.n}, {case.d}]", f"{floor:.1f}", f"{copy:.1f}", *ours, f"{best / copy:.2f}"])
    return table(["hidden", "floor", "copy", *names, "best over copy"], lines)


def launches_table(p: Predictor) -> str:
    """The launches of a drop: blocks, registers, blocks that a multiprocessor holds, waves, clocks and microseconds of each."""
    lines = []
    for case in (IMAGE, IMAGES, VIDEO, LONG):
        for backend, launches in drop_launches(case, p.machine).items():
            if "-" in backend:
                continue
            for launch in launches:
                kernel, alone = launch.kernel, clocks(launch, p.c)
                resident = p.machine.resident(kernel.registers, kernel.shared, launch.threads)
                waves = launch.blocks / (resident * p.machine.sms)
                us = p.c.us(of_one(launch, p.machine, p.c))
                select = launch.work.alone_us * 1e3 * p.machine.clock_ghz or alone.select + alone.wait
                lines.append([
                    f"[{case.batch}, {case.n}, {case.d}]", backend, kernel.name.removeprefix("_"), str(launch.blocks),
                    str(kernel.registers), str(resident), f"{waves:.2f}", f"{select:.0f}", f"{alone.move:.0f}", f"{us:.1f}",
                ])  # fmt: skip
    head = ["hidden", "backend", "kernel", "blocks", "registers", "blocks per SM", "waves", "clocks to select", "to move", "us"]
    return table(head, lines)


def host_table(p: Predictor) -> str:
    """Launches, host time and eager wall time of a drop: the longer of the host's and the GPU's."""
    lines = []
    for case in (IMAGE, VIDEO, LONG):
        for backend, launches in drop_launches(case, p.machine).items():
            if backend in BACKENDS:
                host, gpu = p.c.values[f"host_{backend}"], p.c.us(p.own_drop(case)[backend])
                lines.append([
                    f"[{case.batch}, {case.n}, {case.d}]", backend, str(len(launches)), f"{host:.1f}", f"{gpu:.1f}",
                    f"{max(host, gpu):.1f}",
                ])  # fmt: skip
    return table(["hidden", "backend", "launches", "host", "GPU", "eager wall"], lines)


def constants_table(c: Constants) -> str:
    """Every constant with its source."""
    return table(["constant", "value", "unit", "source"],
                 [[name, f"{value:.4g}", c.units[name], c.sources[name]] for name, value in c.values.items()])  # fmt: skip


def verdict(name: str, found: Sequence[Bar]) -> str:
    """One sentence: how many targets hold, and which do not."""
    missed = [bar for bar in found if bar.status == "missed"]
    counted = [sum(bar.status == status for bar in found) for status in ("held", "missed", "not predicted")]
    text = f"{name}: of {len(found)} targets (two backends each) {counted[0]} are predicted to hold, {counted[1]} to be missed; "
    text += f"{counted[2]} are no matter of time (equal bits, launches that are added) and are tested instead."
    why = []
    for bar in missed:
        because = f" ({reason(bar)})" if reason(bar) else ""
        why.append(f"- {bar.number}, {bar.backend}: {bar.text}: {bar.value:.3g}, asked {bar.limit}{because}")
    return "\n".join([text, *([""] if why else []), *why])


DOCS = HERE.parent / "docs" / "gpu-predictions.md"


def docs(c: Constants) -> str:
    """The page of predictions."""
    h200 = Predictor(machines()["H200"], c)
    parts = [
        "# GPU predictions",
        "Written by `python bench/gpu_model.py --docs`. **Nothing on this page was measured.** The times are predictions of a "
        "model: bytes over bandwidth, launches, waves, and instructions counted in the machine code of the kernels, compiled for "
        "sm_90 (`python bench/gpu_counts.py`). `make gpu-check` prints what it measures beside these predictions and fits the "
        "constants anew; measured times stand on the page of [GPU results](results/gpu.md).",
        "## drop_tokens on an H200",
        "Microseconds of GPU time inside a graph, cold inputs, bfloat16, a quarter of the tokens kept. The floor is the bytes that "
        "must move, at the bandwidth of a copy; the copy moves 2NDE + 2kDE bytes.",
        drops_table(h200),
        "## Other GPUs",
        *(f"**{name}**\n\n{drops_table(Predictor(machine, c))}" for name, machine in machines().items() if name != "H200"),
        "## Targets on an H200",
        verdict("H200", bars(h200)),
        bars_table(bars(h200)),
        "## Launches on an H200",
        launches_table(h200),
        "## Eager calls on an H200",
        "Microseconds of a call: launches, what the host takes, what the GPU takes, and the longer of the two.",
        host_table(h200),
        "## Targets on other GPUs",
        *(verdict(name, bars(Predictor(machine, c))) for name, machine in machines().items() if name != "H200"),
        "## Constants",
        "What no data sheet gives. An assumed value is no measurement; the fit replaces it.",
        constants_table(c),
        "## Published figures",
        table(["GPU", "SMs", "GHz", "GB/s", "L2 MB"],
              [[m.name, str(m.sms), f"{m.clock_ghz:g}", f"{m.dram_gb_s:g}", f"{m.l2_mb:g}"] for m in machines().values()]),
        "The source of each figure stands beside it in `bench/gpu_machines.json`.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def compare(folder: Path, name: str | None, c: Constants) -> None:
    """What a GPU check measured, beside its prediction; the constants are fitted and written beside the results."""
    import gpu_report

    env = json.loads((folder / "env.json").read_text())
    machine = machines()[name] if name else machine_of(env["gpu"]["name"]) or machines()["H200"]
    rows = gpu_report.results_of(folder)
    after = gpu_fit.write(folder, rows, env.get("constants", {}), machine, c)
    found = gpu_fit.measured(rows, env.get("constants", {}), machine)
    print(f"# {env['gpu']['name']}, predicted as {machine.name}\n")
    print(gpu_fit.page(gpu_fit.comparison(found, machine, c, after), c, after))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print predictions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", choices=(*machines(), "all"), default="H200", help="the GPU (default: H200)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="a results folder of bench/gpu_check.py to compare with")
    parser.add_argument("--constants", type=Path, metavar="FILE", help="fitted.json of an earlier comparison")
    parser.add_argument("--docs", action="store_true", help=f"write {DOCS.relative_to(HERE.parent)}")
    options = parser.parse_args(arguments)
    c = constants()
    if options.constants:
        fitted = json.loads(options.constants.read_text())["constants"]
        c = c._replace(values={**c.values, **fitted}, sources={**c.sources, **dict.fromkeys(fitted, str(options.constants))})
    if options.docs:
        DOCS.write_text(docs(c))
        return 0
    if options.results:
        compare(options.results, None if options.machine == "H200" else options.machine, c)
        return 0
    for name in machines() if options.machine == "all" else [options.machine]:
        p = Predictor(machines()[name], c)
        found = bars(p)
        tables = (drops_table(p), launches_table(p), host_table(p), bars_table(found), verdict(name, found))
        print("\n\n".join([f"# {name}: predictions, no measurements", *tables]), end="\n\n")
    print(constants_table(c))
    return 0


if __name__ == "__main__":
    sys.exit(main())
