"""Test and measure on the GPU that is here, and write it down as it comes: called by gpu_check.sh, which built the library.

Of it come env.json, tests.jsonl, results.csv (every time), bars.csv (every bar), report.md and two plots; ncu.csv, model.json,
policies.csv and policies.md where there is time for them and they can be had. A figure is on disk as soon as it is known, most
important first; what the time given did not reach is named. A candidate is timed only after its result equalled the reference's,
and only while no test of its backend and op is red. ``--dry``: the same on the CPU with tiny shapes, by wall clock; its rows say
so, and it never writes to bench/results.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_constants
import gpu_ncu
import gpu_report
import harness
import numpy
import torch
from gpu_groups import MODEL_LEVEL, Bar, Candidate, Group, Times, Trial, not_there, others, own_backends, tiny, urgent
from gpu_meter import CudaMeter, HostMeter
from gpu_outcomes import Outcomes

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TIMES = (
    "group", "op", "B", "N", "D", "dtype", "k", "mode", "provider", "check", "us", "p20_us", "p80_us", "runs", "calls", "bytes",
    "gb_s", "gpu", *harness.CONDITIONS,
)  # fmt: skip
BARS = ("bar", "what", "backend", "group", "mode", "value", "unit", "limit", "status", "gpu", *harness.CONDITIONS)
FILES = {"results.csv": TIMES, "bars.csv": BARS}
TEST_SHARE = 0.45  # of the time, for the tests at most
GROUP_SECONDS = 1.5  # of runs, for one mode of a group at most
LEAST_SECONDS = 8.0  # no group is begun with less than this: it would have to be compiled, checked and timed
MANY_BYTES = 1 << 32  # beyond which a graph holds 3 calls instead of 20
MODEL = HERE / "bench_model.py"  # prints a JSON list of flat objects, one for a row of the report
POLICIES = HERE / "bench_policies.py"  # writes policies.csv and policies.md into the folder that it is given

REFUSED = "a cooperative drop takes at most"  # what the library says where that design does not apply


class TooLarge(Exception):
    """The device has too little memory left for a problem."""


class Check:
    """The run: what is measured, what is red, and where it is written."""

    def __init__(
        self, out: Path, meter: HostMeter, outcomes: Outcomes, deadline: float, run: str,
        files: Mapping[str, Sequence[str]] = FILES,
    ) -> None:  # fmt: skip
        self.out, self.meter, self.outcomes, self.deadline = out, meter, outcomes, deadline
        self.dry = run == "dry"
        self.conditions = {"gpu": meter.facts["name"], **harness.conditions(run)}
        self.broken = 0  # what raised, which is never meant to
        self._seen: set[Any] = set()
        for name, columns in files.items():
            with (out / name).open("w", newline="") as file:
                csv.DictWriter(file, columns, lineterminator="\n").writeheader()

    def late(self) -> bool:
        """Whether there is too little time to begin anything."""
        return time.monotonic() > self.deadline - (0.0 if self.dry else LEAST_SECONDS)

    def do(self, step: Group | Trial) -> dict[str, Times]:
        """Measure a group or a trial, whatever becomes of it; the times by mode, none where there is no time for it."""
        why, found = None, {}
        if self.late():
            why = "not reached in the time given"
        else:
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
            for bar in step.bars if isinstance(step, Group) else [step]:
                for backend in self._judged():
                    self._bar(bar, backend, step, None, why)
            if isinstance(step, Group):
                self._write("results.csv", TIMES, [self._columns(step, step.case, step.modes[0]) | {"check": why}])
        return found

    def expect(self) -> None:
        """A row for every bar that nothing here can judge yet, so that none is silently missing."""
        for bar, why in not_there(MODEL):
            self._bar(bar, "", bar, None, why)

    def model(self) -> None:
        """The model level, by a program of its own, into model.json; MODEL_LEVEL says in bars.csv what became of it."""
        if not MODEL.exists():
            return  # expect() said so

        def write(printed: str) -> None:
            rows = json.loads(printed)
            if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
                raise RuntimeError(f"{MODEL.name} printed no list of rows")
            (self.out / "model.json").write_text(json.dumps(rows, indent=1) + "\n")

        why = self._program(MODEL, ["--json"], write) or "see the model level of the report"
        print(f"model level: {why}", flush=True)
        for bar in MODEL_LEVEL:
            self._bar(bar, "", bar, None, why)

    def policies(self) -> str:
        """Every policy on one model, by a program of its own, into policies.csv and policies.md; what became of it, in words."""
        why = self._program(POLICIES, ["--out", str(self.out)], lambda printed: None) or "measured"
        print(f"policies: {why}", flush=True)
        return why

    def _program(self, program: Path, arguments: Sequence[str], use: Callable[[str], None]) -> str | None:
        """Run a program in the time that is left and ``use`` what it prints; why nothing came of it, or None."""
        command = [sys.executable, str(program), *arguments, *(["--dry"] if self.dry else [])]
        try:
            if self.late():
                raise TimeoutError
            seconds = self.deadline - time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
            last = (done.stderr.strip().splitlines() or ["-"])[-1]
            if done.returncode and last.startswith("ModuleNotFoundError: "):
                raise ModuleNotFoundError(last.removeprefix("ModuleNotFoundError: "))
            if done.returncode:
                raise RuntimeError(f"{program.name} ended with code {done.returncode}: {last}")
            use(done.stdout)
        except (TimeoutError, subprocess.TimeoutExpired):
            return "not reached in the time given"
        except ModuleNotFoundError as error:  # transformers is an extra
            return f"not there: {error}"
        except Exception as error:
            return self._broke(error)
        return None

    def _judged(self) -> Sequence[str]:
        return own_backends(self.meter)

    def _tidy(self) -> None:
        if self.meter.device.type == "cuda":  # tiny tensors need no walk over all objects
            gc.collect()
            torch.cuda.empty_cache()

    def _group(self, group: Group) -> dict[str, Times]:
        start = time.monotonic()
        case = tiny(group.case) if self.dry else group.case
        free = self.meter.free_bytes()
        if not self.dry and group.needs > free:
            raise TooLarge(f"missing: needs about {group.needs / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free")
        candidates = group.build(case, self.meter)
        # Dry: each kind of problem through the interpreter once is enough.
        kind = getattr(group.build, "func", group.build)
        if self.dry and kind in self._seen:
            candidates = [c for c in candidates if c.backend not in ("triton", "cuda") and "compile" not in c.name]
        self._seen.add(kind)
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
            for bar in group.bars:
                if bar.mode == mode:
                    for backend in self._judged():
                        self._judge(bar, backend, group, times, faults)
        print(f"{group.name}: {len(live)} of {len(candidates)} candidates in {time.monotonic() - start:.1f} s", flush=True)
        for name, why in faults.items():
            if not why.startswith("missing"):
                print(f"    {name}: {why}", flush=True)
        return found

    def _fault(self, candidate: Candidate, op: str) -> str | None:
        """Why a candidate gets no figure."""
        if candidate.missing:
            return f"missing: {candidate.missing}"
        red = candidate.backend and self.outcomes.red(candidate.backend, op)
        if red:
            return f"red: {red}"
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
            least = self.meter.calls if group.moved < MANY_BYTES else 3  # no launch gap shows in calls of milliseconds
            count = max(least, len(calls) if mode == "cold" else 0)
            make = self.meter.graph if mode in ("cold", "warm") and c.captured else self.meter.eager
            if mode in ("eager", "host") and "-" in c.name and c.backend:  # a forced design: a context manager in every call
                continue
            try:
                run = make(calls, count)
                run()
            except Exception as error:
                self.meter.synchronize()
                faults[c.name] = self._broke(error)
                continue
            runs[c.name] = (run, count)
        clock = {"eager": self.meter.wall_seconds, "host": self.meter.host_seconds}.get(mode, self.meter.device_seconds)
        taken: dict[str, list[float]] = {name: [] for name in runs}
        end = time.monotonic() + (0.0 if self.dry else GROUP_SECONDS)
        turns = list(runs)
        while runs and (len(taken[turns[0]]) < self.meter.rounds or time.monotonic() < end) and len(taken[turns[0]]) < 200:
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
                "provider": name, "check": "equal" if checked else "none", "us": round(us, 3), "p20_us": round(p20, 3),
                "p80_us": round(p80, 3), "runs": len(seconds), "calls": runs[name][1],
            })  # fmt: skip
        rows += [base | {"provider": name, "check": why} for name, why in faults.items()]
        self._write("results.csv", TIMES, rows)
        return {name: float(numpy.median(seconds)) for name, seconds in taken.items()}

    def _judge(self, bar: Bar, backend: str, group: Group, times: Times, faults: dict[str, str]) -> None:
        try:
            self._bar(bar, backend, group, bar.value(times, backend), "")
        except (KeyError, ValueError):  # one of the sides has no time
            whys = [f"{name}: {fault}" for name, fault in faults.items() if name.split("@")[0] == backend]
            whys += [f"{name}: {fault}" for name, fault in faults.items() if not fault.startswith("missing")]
            self._bar(bar, backend, group, None, (whys or ["no time of one side"])[0])

    def _trial(self, trial: Trial) -> None:
        for backend in self._judged():
            kind = (backend, getattr(trial.run, "func", trial.run))
            again = self.dry and backend != "reference" and kind in self._seen
            self._seen.add(kind)
            candidate = Candidate(backend, missing=self._unable(backend) or ("once is enough when dry" if again else None))
            why = self._fault(candidate._replace(calls=[lambda: None]), trial.op)
            value = None
            if not why:
                try:
                    value = trial.run(backend, self.meter, tiny if self.dry else lambda case: case)
                except Exception as error:
                    why = self._broke(error)
            self._bar(trial, backend, trial, value, why or "")
            self._tidy()

    def _unable(self, backend: str) -> str | None:
        from v2drop_kernels.backends import choice

        return choice.why_not(backend, self.meter.device.type, torch.bfloat16)

    def _bar(self, bar: Bar | Trial, backend: str, step: Group | Trial, value: float | None, why: str) -> None:
        status = why
        if value is not None:
            passed = value >= bar.limit if bar.sense == "at least" else value <= bar.limit
            status = "dry" if self.dry else "pass" if passed else "fail"
        row = {
            "bar": bar.number, "what": bar.text, "backend": backend, "group": getattr(step, "name", ""),
            "mode": getattr(bar, "mode", ""), "value": "" if value is None else f"{value:.4g}",
            "unit": getattr(bar, "unit", "ratio"), "limit": f"{'>=' if bar.sense == 'at least' else '<='} {bar.limit:g}",
            "status": status,
        }  # fmt: skip
        self._write("bars.csv", BARS, [row])
        if value is not None:
            print(f"    {status:>5}  bar {bar.number}, {backend}: {row['value']} (asked {row['limit']}) {bar.text}", flush=True)

    def _broke(self, error: Exception) -> str:
        self.broken += 1
        return f"broken: {type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _write(self, name: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
        with (self.out / name).open("a", newline="") as file:
            out = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            out.writerows({**row, **self.conditions} for row in rows)


def environment(meter: HostMeter, command: str) -> dict[str, Any]:
    """What env.json holds."""
    from v2drop_kernels import explain

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("torch", "triton", "numpy", "jax", "jaxlib", "cupy-cuda12x", "cupy-cuda13x", "flashinfer-python")
    return {
        "command": command,
        "gpu": meter.facts,
        "machine": harness.machine(),
        "commit": harness.commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "build": os.environ.get("V2DROP_BUILD_NOTE", "the library that is installed"),
        "versions": {name: version(name) for name in packages} | {"python": sys.version.split()[0]},
        "backends": str(explain(device=meter.device, dtype=torch.bfloat16)),
    }


def run_tests(out: Path, seconds: float, dry: bool) -> Outcomes:
    """The tests with marker gpu, for so long at most; dry: a few of those that need none."""
    path = out / "tests.jsonl"
    path.unlink(missing_ok=True)
    chosen = ["tests/ops/test_out.py", "-k", "reference"] if dry else ["tests", "-m", "gpu"]
    parallel = []
    if not dry and importlib.util.find_spec("xdist") and harness.ALL_CORES > 2:
        parallel = ["-n", str(min(harness.ALL_CORES // 2, 8)), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_outcomes", "--outcomes", str(path), "-p", "no:cacheprovider",
               *parallel, *chosen]  # fmt: skip
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    with (out / "tests.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=HERE.parent, stdout=log, stderr=subprocess.STDOUT, env=environ, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
            ended = "" if code in (0, 1) else f"pytest ended with code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # this group is pytest and its workers
            process.wait()
            ended = f"cut after {seconds:.0f} s"
    return Outcomes(path, ended or ("" if path.exists() else "see tests.log"))


def begin(about: str, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, HostMeter, Path, float]:
    """The options of a run, its meter, its folder and when it must be over."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("minutes", nargs="?", type=float, default=8.0, help="time in all, the build included (default 8)")
    parser.add_argument("out", nargs="?", type=Path, help="folder of the results (default bench/results/<device>)")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU: no measurement; needs a folder")
    parser.add_argument("--spent", type=float, default=0.0, help="seconds that are over already")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes - options.spent
    if options.dry:
        if options.out is None or RESULTS in [options.out.resolve(), *options.out.resolve().parents]:
            parser.error("--dry needs a folder outside bench/results, which holds measurements")
    elif not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry runs the same without one")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 would measure Triton's interpreter")
    meter = HostMeter() if options.dry else CudaMeter()
    out = options.out or RESULTS / meter.name
    out.mkdir(parents=True, exist_ok=True)
    return options, meter, out, deadline


def main(arguments: Sequence[str] | None = None) -> int:
    options, meter, out, deadline = begin(__doc__, arguments)
    command = f"bench/gpu_check.sh {'--dry ' if options.dry else ''}{options.minutes:g}"
    env = environment(meter, command)
    write = lambda name, what: (out / name).write_text(json.dumps(what, indent=1) + "\n")
    write("env.json", env)

    outcomes = run_tests(out, max(TEST_SHARE * (deadline - time.monotonic()), 1.0), options.dry)
    print(outcomes.words(), flush=True)
    env["tests"] = outcomes.words()
    write("env.json", env)
    check = Check(out, meter, outcomes, deadline, "dry" if options.dry else "full")
    check.expect()
    for step in urgent():
        check.do(step)
        gpu_report.write(out, env, outcomes.words())
    if not check.late():
        env["constants"] = gpu_constants.measure(meter)
        write("env.json", env)
    for step in others():
        check.do(step)
        gpu_report.write(out, env, outcomes.words())
    gpu_ncu.collect(out, deadline - time.monotonic(), options.dry)
    check.model()
    env["policies"] = check.policies()
    write("env.json", env)
    gpu_report.plot(out)
    gpu_report.write(out, env, outcomes.words())
    print(f"{out}: report.md; {check.broken} broken", flush=True)
    return 1 if outcomes.count("failed") or outcomes.ended or check.broken else 0


if __name__ == "__main__":
    sys.exit(main())
