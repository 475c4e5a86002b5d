"""One measurement: candidates are checked against the reference, timed in turns, written down, and judged by their targets.

A candidate is timed only after its result equalled the reference's, and only while no test of its backend and op fails. Rows are
appended to results.csv and targets.csv, so a later call goes on in the same files; the last row of a key is the valid one.
"""

from __future__ import annotations

import csv
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy
import torch
from gpu_candidates import Candidate, own_backends
from gpu_inputs import tiny
from gpu_outcomes import Outcomes
from gpu_registry import Group
from gpu_targets import MODEL_LEVEL, Target, Times
from gpu_timer import HostTimer
from gpu_trials import Trial
from schema import RESULTS, TARGETS

HERE = Path(__file__).resolve().parent
FILES = {"results.csv": RESULTS, "targets.csv": TARGETS}
GROUP_SECONDS = 1.5  # of runs, for one mode of a group at most
LEAST_SECONDS = 8.0  # no group is begun with less than this: it would have to be compiled, checked and timed
SHORT_CALL = 20e-6  # seconds; a graph of calls below this holds `many` of them, so that its start is spread over more calls
MANY_BYTES = 1 << 32  # beyond which a graph holds 3 calls instead of 20
MODEL = HERE / "model" / "decoders.py"  # prints a JSON list of flat objects, one for a row of the report
POLICIES = HERE / "model" / "policies.py"  # writes policies.csv and policies.md into the folder that it is given
REFUSED = "context.launch_mode: "  # what the library says where a launch mode does not apply


class TooLarge(Exception):
    """The device has too little memory left for a problem."""


class Check:
    """What is measured, which figures failing tests forbid, and where the rows go."""

    def __init__(
        self, out: Path, timer: HostTimer, outcomes: Outcomes, deadline: float, run: str,
        files: Mapping[str, Sequence[str]] = FILES,
    ) -> None:  # fmt: skip
        self.out, self.timer, self.outcomes, self.deadline = out, timer, outcomes, deadline
        self.dry = run == "dry"
        self.conditions = {"gpu": timer.facts["name"], **harness.conditions(run, native=not own_backends.pending)}
        self.broken = 0  # exceptions that nothing expects
        self._seen: set[Any] = set()
        for name, columns in files.items():
            if not (out / name).exists():
                with (out / name).open("w", newline="") as file:
                    csv.DictWriter(file, columns, lineterminator="\n").writeheader()

    def left(self) -> float:
        """Seconds until the end of the time that was given."""
        return self.deadline - time.monotonic()

    def late(self, least: float = LEAST_SECONDS) -> bool:
        """Whether there is too little time to begin anything."""
        return self.left() < (0.0 if self.dry else least)

    def do(self, step: Group | Trial) -> dict[str, Times]:
        """Measure a group or a trial, whatever becomes of it; the times by mode."""
        why, found = None, {}
        try:
            if isinstance(step, Group):
                found = self._group(step)
            else:
                self._trial(step)
        except TooLarge as error:
            why = str(error)
        except Exception as error:  # one broken problem must not take the others with it
            why = self._broke(error)
        self._tidy()
        if why:
            print(f"{step.name if isinstance(step, Group) else step.text}: {why}", flush=True)
            for target in step.targets if isinstance(step, Group) else [step]:
                for backend in self._judged():
                    self._target(target, backend, step, None, why)
            if isinstance(step, Group):
                self._write("results.csv", RESULTS, [self._columns(step, step.case, step.modes[0]) | {"check": why}])
        return found

    def model(self, arguments: Sequence[str], name: str, seconds: float) -> str | None:
        """Part of the model level, by a program of its own, into ``name``; why there is nothing, None when there is."""

        def write(printed: str) -> None:
            rows = json.loads(printed)
            if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
                raise RuntimeError(f"{MODEL.name} printed no list of rows")
            (self.out / name).write_text(json.dumps(rows, indent=1) + "\n")

        end = min(seconds, self.left())
        why = self.program(MODEL, ["--json", "--seconds", f"{0.6 * end:.0f}", *arguments], write, end)
        print(f"model level: {why or 'measured'}", flush=True)
        for target in MODEL_LEVEL:
            self._target(target, "", target, None, why or "see the model level of the report")
        return why

    def policies(self, seconds: float) -> str | None:
        """Every policy on one model, by a program of its own, into policies.csv and policies.md; None when that worked."""
        why = self.program(POLICIES, ["--out", str(self.out)], lambda printed: None, min(seconds, self.left()))
        print(f"policies: {why or 'measured'}", flush=True)
        return why

    def program(self, program: Path, arguments: Sequence[str], use: Callable[[str], None], seconds: float) -> str | None:
        """Run a program for so long at most and ``use`` what it prints; why nothing came of it, or None."""
        command = [sys.executable, str(program), *arguments, *(["--dry"] if self.dry else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 0.0), check=False)
            last = (done.stderr.strip().splitlines() or ["-"])[-1]
            if done.returncode and last.startswith("ModuleNotFoundError: "):
                raise ModuleNotFoundError(last.removeprefix("ModuleNotFoundError: "))
            if done.returncode:
                raise RuntimeError(f"{program.name} ended with code {done.returncode}: {last}")
            use(done.stdout)
        except subprocess.TimeoutExpired:
            return f"cut after {seconds:.0f} s"
        except ModuleNotFoundError as error:  # transformers is an extra
            return f"not there: {error}"
        except Exception as error:
            return self._broke(error)
        return None

    def _judged(self) -> Sequence[str]:
        return own_backends(self.timer)

    def _tidy(self) -> None:
        if self.timer.device.type == "cuda":  # tiny tensors need no walk over all objects
            gc.collect()
            torch.cuda.empty_cache()

    def _group(self, group: Group) -> dict[str, Times]:
        start = time.monotonic()
        case = tiny(group.case) if self.dry else group.case
        free = self.timer.free_bytes()
        if not self.dry and group.needs > free:
            raise TooLarge(f"missing: needs about {group.needs / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free")
        candidates = group.build(case, self.timer)
        # Dry: each kind of problem once per backend through the interpreter and the emulator is enough.
        kind, again, targets = getattr(group.build, "func", group.build), set[str](), group.targets
        if self.dry:
            again = {b for b in ("triton", "cuda") if (kind, b) in self._seen}
            candidates = [c for c in candidates if c.backend not in again]
            if again and any("compile" in c.name for c in candidates):  # it takes seconds to trace
                candidates, targets = [c for c in candidates if "compile" not in c.name], ()
            self._seen |= {(kind, c.backend) for c in candidates if not c.missing}
        live, faults = [], {}
        for candidate in candidates:
            why = self._fault(candidate, group.op)
            if why:
                faults[candidate.name] = why
            else:
                live.append(candidate)
        found = {}
        for mode in group.modes:
            times = found[mode] = self._times(group, case, mode, live, faults)
            for target in targets:
                if target.mode == mode:
                    for backend in [b for b in self._judged() if b not in again]:
                        self._judge(target, backend, group, times, faults)
        print(f"{group.name}: {len(live)} of {len(candidates)} candidates in {time.monotonic() - start:.1f} s", flush=True)
        for name, why in faults.items():
            if not why.startswith("missing"):
                print(f"    {name}: {why}", flush=True)
        return found

    def _fault(self, candidate: Candidate, op: str) -> str | None:
        """Why a candidate gets no figure."""
        if candidate.missing:
            return f"missing: {candidate.missing}"
        failing = candidate.backend and self.outcomes.failing(candidate.backend, op)
        if failing:
            return f"failing: {failing}"
        try:
            for _ in range(1 if self.dry else 2):  # the second call finds buffers that have been used
                found = candidate.calls[0]()
                wrong = candidate.check and candidate.check(found)
                if wrong:
                    return f"wrong: {wrong}"
        except Exception as error:
            if REFUSED in str(error):
                return f"missing: {error}"
            return self._broke(error)
        return None

    def _columns(self, group: Group, case: Any, mode: str) -> dict[str, Any]:
        return {
            "group": group.name, "op": group.op, "B": case.batch, "N": case.n, "D": case.d, "k": case.k, "mode": mode,
            "dtype": str(case.dtype).removeprefix("torch."), "bytes": group.moved or "",
        }  # fmt: skip

    def _times(self, group: Group, case: Any, mode: str, live: Sequence[Candidate], faults: dict[str, str]) -> Times:
        """Median seconds of a call, candidates taken in turns; a row for each, and for those that have none."""
        runs: dict[str, tuple[Callable[[], Any], int]] = {}
        for c in live:
            calls = c.calls[:1] if mode == "warm" else c.calls
            least = self.timer.calls if group.moved < MANY_BYTES else 3  # no launch gap shows in calls of milliseconds
            count = max(least, len(calls) if mode == "cold" else 0)
            make = self.timer.graph if mode in ("cold", "warm") and c.captured else self.timer.eager
            if mode in ("eager", "host") and "-" in c.name and c.backend:  # a forced launch mode: a context manager in every call
                continue
            try:
                run = make(calls, count)
                run()
                # The start of a graph costs as much as a fifth of a short call, so more of them share it.
                if least == self.timer.calls and count < self.timer.many and mode in ("cold", "warm"):
                    run()
                    if self.timer.device_seconds(run) / count < SHORT_CALL:
                        count = -(-self.timer.many // len(calls)) * len(calls) if mode == "cold" else self.timer.many
                        run = make(calls, count)
                        run()
            except Exception as error:
                self.timer.synchronize()
                faults[c.name] = self._broke(error)
                continue
            runs[c.name] = (run, count)
        clock = {"eager": self.timer.wall_seconds, "host": self.timer.host_seconds}.get(mode, self.timer.device_seconds)
        taken: dict[str, list[float]] = {name: [] for name in runs}
        end = time.monotonic() + (0.0 if self.dry else GROUP_SECONDS)
        turns = list(runs)
        while runs and (len(taken[turns[0]]) < self.timer.rounds or time.monotonic() < end) and len(taken[turns[0]]) < 200:
            for name in turns:
                run, count = runs[name]
                taken[name].append(clock(run) / count)
            turns.reverse()
        base = self._columns(group, case, mode)
        rows: list[dict[str, Any]] = []
        for name, seconds in taken.items():
            p20, us, p80 = (harness.quantile(seconds, q) * 1e6 for q in (0.2, 0.5, 0.8))
            checked = next(c for c in live if c.name == name).check is not None
            speed = {"gb_s": round(group.moved / us / 1e3, 1)} if group.moved and not self.dry else {}
            rows.append(base | speed | {
                "provider": name, "check": "equal" if checked else "none", "min_us": round(min(seconds) * 1e6, 3),
                "median_us": round(us, 3), "p20_us": round(p20, 3), "p80_us": round(p80, 3), "rounds": len(seconds),
                "calls": runs[name][1],
            })  # fmt: skip
        rows += [base | {"provider": name, "check": why} for name, why in faults.items()]
        self._write("results.csv", RESULTS, rows)
        return {name: float(numpy.median(seconds)) for name, seconds in taken.items()}

    def _judge(self, target: Target, backend: str, group: Group, times: Times, faults: dict[str, str]) -> None:
        try:
            self._target(target, backend, group, target.value(times, backend), "")
        except (KeyError, ValueError):  # one of the sides has no time
            whys = [f"{name}: {fault}" for name, fault in faults.items() if name.split("@")[0] == backend]
            whys += [f"{name}: {fault}" for name, fault in faults.items() if not fault.startswith("missing")]
            self._target(target, backend, group, None, (whys or ["no time of one side"])[0])

    def _trial(self, trial: Trial) -> None:
        for backend in self._judged():
            kind = (getattr(trial.run, "func", trial.run), backend)
            if self.dry and backend != "reference" and kind in self._seen:
                continue
            candidate = Candidate(backend, missing=self._unable(backend))
            if not candidate.missing:
                self._seen.add(kind)
            why = self._fault(candidate._replace(calls=[lambda: None]), trial.op)
            value = None
            if not why:
                try:
                    value = trial.run(backend, self.timer, tiny if self.dry else lambda case: case)
                except Exception as error:
                    why = self._broke(error)
            self._target(trial, backend, trial, value, why or "")
            self._tidy()

    def _unable(self, backend: str) -> str | None:
        from v2drop_kernels.backends import choice

        return choice.why_not(backend, self.timer.device.type, torch.bfloat16)

    def _target(self, target: Target | Trial, backend: str, step: Group | Trial, value: float | None, why: str) -> None:
        status = why
        if value is not None:
            passed = value >= target.limit if target.sense == "at least" else value <= target.limit
            status = "dry" if self.dry else "pass" if passed else "fail"
        row = {
            "target": target.number, "what": target.text, "asserted": "yes", "backend": backend, "group": getattr(step, "name", ""),
            "mode": getattr(target, "mode", ""), "value": "" if value is None else f"{value:.4g}",
            "unit": getattr(target, "unit", "ratio"), "limit": f"{'>=' if target.sense == 'at least' else '<='} {target.limit:g}",
            "status": status,
        }  # fmt: skip
        self._write("targets.csv", TARGETS, [row])
        if value is not None:
            print(
                f"    {status:>5}  target {target.number}, {backend}: {row['value']} (asked {row['limit']}) {target.text}",
                flush=True,
            )

    def _broke(self, error: Exception) -> str:
        self.broken += 1
        return f"broken: {type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _write(self, name: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
        with (self.out / name).open("a", newline="") as file:
            out = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            out.writerows({**row, **self.conditions} for row in rows)
