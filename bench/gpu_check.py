"""Test and measure on the GPU that is here, most important first, and go on where the last call stopped.

``bench/gpu_check.sh`` (``make gpu-check ARGS=...``) calls this. The steps, in order: smoke tests, the drop of an image with every
launch mode, host time, constants of the latency model, video, long prompts, selects, K/V of many layers, backward, ragged batches,
model level, the remaining ops and sizes, Nsight Compute, compute-sanitizer, and all tests last. Each step has units; a unit that is
done is written to state.json and not repeated, except with ``--only``. After every unit the results folder is on disk, and in one
archive with ``--out``.

The native library is built in the background while Triton is tested and measured; what was measured without it is measured again,
side by side, once it is there. Triton's kernels of later steps are compiled by a second process. A run that is cut by its time ends
with exit code 0 and a note on what is left; the code is 1 where a test failed or something raised unexpectedly.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_constants
import gpu_fit
import gpu_ncu
import gpu_report
import gpu_sanitizer
import gpu_state
import gpu_tests
import harness
import provenance
import torch
from gpu_build import Build
from gpu_candidates import own_backends
from gpu_machine import constants, machine_of, machines
from gpu_measure import LEAST_SECONDS, Check
from gpu_options import ORDER, begin, environment
from gpu_outcomes import Outcomes
from gpu_precompile import Precompiler
from gpu_registry import Group, steps
from gpu_timer import HostTimer
from gpu_trials import Trial

SMOKE_SECONDS = {"triton": 40.0, "cuda": 20.0, "reference": 60.0}  # 60 s at most in all; CUDA C++ compiles nothing in its tests
MODEL_SECONDS, POLICY_SECONDS = 150.0, 150.0


class Cut(Exception):
    """The time was over before a unit was done; the next call begins it anew."""


class Unit(NamedTuple):
    """Part of a step. ``run`` returns why something is missing although the unit is done, or None."""

    step: str
    text: str
    run: Callable[[], str | None]
    backends: tuple[str, ...] | None = ()  # what it must have been run with; None: all own backends that there are
    least: float = LEAST_SECONDS  # seconds without which it is not begun
    quiet: bool = False  # it times the host, so nothing else may run beside it

    @property
    def name(self) -> str:
        return f"{self.step}/{self.text}"


class Session:
    """One call: the files, the clock, and what runs in the background."""

    def __init__(self, options: argparse.Namespace, timer: HostTimer, folder: Path, deadline: float) -> None:
        self.options, self.timer, self.folder = options, timer, folder
        self.dry = options.dry
        self.build = self._build()
        if self.build:
            own_backends.pending.add("cuda")
        self.state = gpu_state.State(folder, provenance.commit())
        self.check = Check(folder, timer, Outcomes(folder / "tests.jsonl"), deadline, "dry" if self.dry else "full")
        self.precompiler = Precompiler(folder)
        self.env = self._environment()
        self.save()

    def units(self) -> list[Unit]:
        """All units in order."""
        own = ("reference",) if self.dry else ("triton", "cuda")
        kernels = ("triton", "cuda")
        groups = steps()
        made: dict[str, list[Unit]] = {name: [self._measured(name, one) for one in found] for name, found in groups.items()}
        made["smoke"] = [Unit("smoke", b, lambda b=b: self._smoke(b), (b,)) for b in own]
        made["constants"] = [Unit("constants", "all", self._constants)]
        made["model"] = [
            Unit("model", f"B={b}", lambda b=b: self._model(b), least=30.0) for b in ((1,) if self.dry else (1, 8, 32))
        ]
        made["ncu"] = [
            Unit("ncu", f"{size} {b}", lambda s=size, b=b: gpu_ncu.profile(self.folder, s, b, self._left(), self.dry), (b,), 20.0)
            for size in gpu_ncu.SIZES for b in kernels
        ]  # fmt: skip
        sanitize = gpu_sanitizer.check
        made["sanitizer"] = [
            Unit("sanitizer", f"{t} {b}", lambda t=t, b=b: sanitize(self.folder, t, b, self._left(), self.dry), (b,), 30.0)
            for t in gpu_sanitizer.TOOLS for b in kernels
        ]  # fmt: skip
        made["policies"] = [Unit("policies", "all", self._policies, least=30.0)]
        made["tests"] = [Unit("tests", "all", self._tests)]
        return [unit for name in ORDER for unit in made[name]]

    def go(self) -> list[Unit]:
        """Do what is due, in order, as long as there is time; returns what is left."""
        units = [unit for unit in self.units() if self._chosen(unit.step)]
        if self.options.only:
            self.state.forget([u.name for u in units] + [n for n in self.state.done if n.partition("/")[0] in self.options.only])
        skipped: set[str] = set()
        while True:
            self._poll()
            due = [unit for unit in units if unit.name not in skipped and self._due(unit)]
            ready = [unit for unit in due if not self._waits(unit)]
            if (
                not ready and due and self.build and self.build.wait(self._left())
            ):  # nothing else to do than to wait for the library
                continue
            if not ready:
                return [unit for unit in units if self._due(unit)]
            unit = ready[0]
            if self.check.late(unit.least):
                skipped.add(unit.name)
                continue
            self._run(unit, skipped)

    def save(self) -> None:
        """Everything that is known, on disk and in the archive."""
        self.env["tests"] = self.check.outcomes.words()
        gpu_state.replace(self.folder / "env.json", (json.dumps(self.env, indent=1) + "\n").encode())
        gpu_report.write(self.folder, self.env, self.check.outcomes)
        if self.options.out:
            gpu_state.pack(self.folder, self.options.out)

    def predict(self) -> None:
        """Measured times beside their predictions, and the constants of the model fitted to them: predictions.csv, fitted.json."""
        machine = machine_of(self.timer.facts["name"]) or machines()["H200"]
        try:
            gpu_fit.write(self.folder, gpu_report.results_of(self.folder), self.env.get("constants", {}), machine, constants())
        except Exception as error:  # what was measured is on disk, and can be compared later
            self.check.broken += 1
            print(f"predictions: broken: {type(error).__name__}: {error}", flush=True)

    def close(self) -> None:
        """End what runs in the background."""
        self.precompiler.stop()
        if self.build:
            self.build.stop()

    # --- units

    def _run(self, unit: Unit, skipped: set[str]) -> None:
        own = own_backends(self.timer) if unit.backends is None else unit.backends
        if unit.quiet:
            self.precompiler.pause()
        try:
            why = unit.run()
        except Cut as error:
            skipped.add(unit.name)
            print(f"{unit.name}: {error}", flush=True)
        else:
            self.state.finish(unit.name, own, why)
        finally:
            self.precompiler.resume()
        self.save()

    def _measured(self, step: str, one: Group | Trial) -> Unit:
        name = one.name if isinstance(one, Group) else one.text
        timed_on_the_host = step == "host" or (isinstance(one, Group) and {"eager", "host"} & set(one.modes))

        def run() -> None:
            self.check.do(one)

        return Unit(step, name, run, None, quiet=bool(timed_on_the_host))

    def _smoke(self, backend: str) -> str | None:
        files = [path for name in gpu_tests.SMOKE for path in gpu_tests.find(name)]
        chosen = ["-k", backend, "--sample", str(6 if self.dry else gpu_tests.SMOKE_SAMPLE), *([] if self.dry else ["-m", "gpu"])]
        ended = gpu_tests.run(self.folder, files, chosen, min(SMOKE_SECONDS[backend], self._left()))
        self._outcomes()
        if backend == "triton" and not self.dry:
            self.precompiler.start(self.folder)
        return ended or None

    def _constants(self) -> None:
        self.env["constants"] = gpu_constants.measure(self.timer)

    def _model(self, batch: int) -> str | None:
        new = ["--new", "1", *([] if self.dry else ["128"])]
        arguments = [] if self.dry else ["--batch", str(batch), *new]
        return self._uncut(self.check.model(arguments, f"model-{batch}.json", MODEL_SECONDS), MODEL_SECONDS)

    def _policies(self) -> str | None:
        why = self._uncut(self.check.policies(POLICY_SECONDS), POLICY_SECONDS)
        self.env["policies"] = why or "measured"
        return why

    def _uncut(self, why: str | None, seconds: float) -> str | None:
        """A program that was given less than its time is run again by the next call."""
        if why and why.startswith("cut") and self.check.late(1.0):
            raise Cut(why)
        return why

    def _tests(self) -> str | None:
        files = gpu_tests.find("test_out") if self.dry else gpu_tests.test_files()
        chosen = ["-k", "reference"] if self.dry else ["-m", "gpu"]

        def ended(path: Path, code: int) -> None:
            self.state.finish(f"tests/{path.name}", (), None if code in (0, 5) else f"pytest ended with code {code}")
            self._outcomes()
            self.save()

        left = [path for path in files if self.state.due(f"tests/{path.name}", ())]
        cut = gpu_tests.run(self.folder, left, chosen, self._left(), ended)
        self._outcomes()
        if cut:
            raise Cut(cut)
        return None

    # --- the order

    def _left(self) -> float:
        return max(self.check.left(), 1.0)

    def _chosen(self, step: str) -> bool:
        if self.options.only:
            return step in self.options.only
        return ORDER.index(step) >= ORDER.index(self.options.begin)

    def _due(self, unit: Unit) -> bool:
        wanted = own_backends(self.timer) if unit.backends is None else unit.backends
        if "cuda" in wanted and "cuda" in own_backends.pending and not self.build:
            return False  # it could not be built; build.note says why
        return self.state.due(unit.name, wanted)

    def _waits(self, unit: Unit) -> bool:
        return bool(set(unit.backends or ()) & own_backends.pending)

    def _poll(self) -> None:
        """Take the native library into use as soon as it is there."""
        if self.build is None or self.build.running():
            return
        print(f"build: {self.build.note}", flush=True)
        if os.environ.get("V2DROP_NATIVE_MODULE"):
            own_backends.pending.discard("cuda")
            self.check.conditions |= harness.conditions("dry" if self.dry else "full")
        self.env["build"] = self.build.note
        self.build = None
        self.env["backends"] = self._backends()
        self.save()

    def _outcomes(self) -> None:
        self.check.outcomes = Outcomes(self.folder / "tests.jsonl")

    def _build(self) -> Build | None:
        how = self.options.build or ("none" if self.dry else "gpu")
        if how == "none" or os.environ.get("V2DROP_NATIVE_MODULE"):
            return None
        if how == "emulate":  # the CUDA C++ kernels on the CPU, for a dry run
            return Build("90", ["-DV2DROP_CUDA=EMULATE"])
        major, minor = torch.cuda.get_device_capability(0)
        return Build(os.environ.get("V2DROP_CUDA_ARCHS") or f"{major}{minor}", ["-DV2DROP_CUDA=ON"])

    def _backends(self) -> str:
        from v2drop_kernels import explain

        if self.build:
            return "The native library is still being built."
        return str(explain(device=self.timer.device, dtype=torch.bfloat16))

    def _environment(self) -> dict[str, Any]:
        try:
            before = json.loads((self.folder / "env.json").read_text())
        except (OSError, ValueError):
            before = {}
        kept = {name: before[name] for name in ("constants", "policies") if name in before}
        return environment(self.timer, "bench/gpu_check.sh") | kept | {
            "build": self.build.note if self.build else os.environ.get("V2DROP_NATIVE_MODULE", "the library that is installed"),
            "backends": self._backends(),
        }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; 1 where a test failed or something raised unexpectedly."""
    options, timer, folder, deadline = begin(__doc__, arguments)
    session = Session(options, timer, folder, deadline)
    try:
        left = session.go()
    finally:
        session.close()
    gpu_report.plot(folder)
    session.predict()
    session.save()
    outcomes = session.check.outcomes
    print(outcomes.words(), flush=True)
    if left:
        named = list(dict.fromkeys(unit.step for unit in left))
        print(f"The time is over. Left for the next call: {len(left)} units of {', '.join(named)}.", flush=True)
    print(f"{folder}: report.md; {session.check.broken} broken", flush=True)
    return 1 if outcomes.count("failed") or session.check.broken else 0


if __name__ == "__main__":
    sys.exit(main())
