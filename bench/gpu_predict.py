"""Predicted times of the candidates of a group of the GPU check, by name: ours from gpu_paths, the others from their bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import gpu_clocks
import gpu_paths
from gpu_clocks import Launch, Work, time_of
from gpu_machine import Constants, Machine, Time
from gpu_problems import ragged_lengths
from gpu_registry import Group
from gpu_targets import COMPILED, READS
from registry import Case, moved_bytes

# torch.topk beside that of 512 scores: 72 to 95 us at 8192 and 96 to 140 us at 65536 where an index transform was part of it
# (SGLang pull request 33237, B200), so less without.
TOPK = ((512, 1.0), (8192, 3.0), (65536, 4.1))
GUARDED_CALL = 6.6  # eager ops that take as long on the host as one compiled call: 33 us of guards (tritonbench pull request 1016)
EAGER_OPS, PUBLISHED_OPS = 8, 12  # ops of the plain reference, and of the published code for one item
TIES = 30.0  # rounds of a bisection where most scores are equal: 23 to 26, and the moves to the next real score
REAL_KEYS = 13.0  # the same in Triton, where both ends move on to real keys after 12 rounds (triton_keys.py)
TIED_PASSES = 4.0  # passes of bins: as many as 32 bits need


class Predictor(NamedTuple):
    """A machine and the constants."""

    machine: Machine
    c: Constants

    def seconds(self, time: Time[str]) -> float:
        return self.c.us(time) / 1e6

    def times(self, group: Group, mode: str) -> dict[str, Time[str]]:
        """Predicted time by candidate; nothing for those that the model does not know."""
        build = getattr(group.build, "func", group.build)
        options: dict[str, Any] = getattr(group.build, "keywords", {})
        found: dict[str, Time[str]] = getattr(self, f"_{build.__name__}")(group.case, mode, **options)
        if mode == "eager":
            return {name: self._wall(name, time, group.case) for name, time in found.items()}
        return found

    # --- parts

    def streamed(self, nbytes: float, term: str = "copy", edge: str = "plain_edge") -> Time[str]:
        """A kernel that moves so many bytes from and to memory."""
        return Time({edge: 1, "ramp": 1, term: self.machine.dram_us(nbytes)})

    def topk(self, batch: int, n: int) -> Time[str]:
        """torch.topk of rows of n scores."""
        at = TOPK[0][1]
        for (low, x), (high, y) in zip(TOPK[:-1], TOPK[1:], strict=True):
            if n > low:
                at = x + (y - x) * math.log2(min(n, high) / low) / math.log2(high / low)
        return Time({"plain_edge": 1, "torch_topk": at * (1 + 0.02 * (batch - 1))})

    def sort(self, k: int) -> Time[str]:
        return Time({"plain_edge": 1, "torch_sort": 1 + math.log2(max(2.0, k / 128)) / 6})

    def copies(self, nbytes: float, name: str = "copy") -> dict[str, Time[str]]:
        return {name: self.streamed(nbytes), f"{name}-kernel": self.streamed(nbytes)}

    def _wall(self, name: str, time: Time[str], case: Case) -> Time[str]:
        """The longer of the GPU's time and the host's."""
        own = {"triton": "host_triton", "cuda": "host_cuda"}.get(name.split("-")[0])
        ops = {"eager": EAGER_OPS, "v2drop": PUBLISHED_OPS * case.batch, "compile": GUARDED_CALL, "topk+gather": 2}.get(name, 1)
        host = Time({own: 1}) if own else Time({"host_torch_op": ops})
        return max(time, host, key=self.c.us)

    # --- groups, by the function that builds their candidates

    def _drop(self, case: Case, mode: str) -> dict[str, Time[str]]:
        full, kept, warm = case.input_bytes / 2, case.batch * case.k * case.row_bytes, mode == "warm"
        select = self.topk(case.batch, case.n) + self.sort(case.k)
        score = self.streamed(3 * full) + self.streamed(full)
        eager = score + select + self.streamed(2 * kept) + Time({"plain_edge": 3 * 2.0})
        found = {
            "one-block": Time({"plain_edge": 1, "ramp": 1}), **self.copies(moved_bytes("drop", case)), "eager": eager,
            "v2drop": eager + self.streamed(2 * full) + self.streamed(2 * full),
            "topk+gather": self.topk(case.batch, case.n) + self.streamed(2 * kept),
        }  # fmt: skip
        return found | self.own_drop(case, warm)

    def _compiled_drop(self, case: Case, mode: str, **_: Any) -> dict[str, Time[str]]:
        full, kept = case.input_bytes / 2, case.batch * case.k * case.row_bytes
        made = self.streamed(2 * full, "kernel") + self.topk(case.batch, case.n) + self.sort(case.k) + self.streamed(2 * kept)
        return dict.fromkeys(COMPILED, made) | self.own_drop(case, mode == "warm")

    def own_drop(self, case: Case, warm: bool = False) -> dict[str, Time[str]]:
        """The whole step, by backend and launch mode."""
        return {name: time_of(launches, self.machine, self.c, warm) for name, launches in drop_launches(case, self.machine).items()}

    def _extras(self, case: Case, mode: str, layers: int) -> dict[str, Time[str]]:
        found = self.own_drop(case)
        for suffix, added in (("@ids", ids_bytes(case)), ("@kv", kv_bytes(case, layers))):
            key = "@ids" if suffix == "@ids" else f"@kv{layers}"
            for name, launches in drop_launches(case, self.machine, key, added).items():
                if "-" not in name:
                    found[name + suffix] = time_of(launches, self.machine, self.c)
        return found | self.copies(2 * sum(nbytes for nbytes, _ in kv_bytes(case, layers)), "copy-kv")

    def _select(self, case: Case, mode: str) -> dict[str, Time[str]]:
        found = {"topk+sort": self.topk(case.batch, case.n) + self.sort(case.k), "topk": self.topk(case.batch, case.n)}
        # Equal scores, NaN among them, are seen at once: the smallest is the largest.
        for suffix, rounds, passes in (("", 0.0, 0.0), ("@equal", 1.0, 1.0), ("@three", TIES, TIED_PASSES), ("@nan", 1.0, 1.0)):
            for name, made in self.select_launches(case, rounds, passes).items():
                found[name + suffix] = time_of(made, self.machine, self.c, True)
        return found

    def select_launches(self, case: Case, rounds: float = 0.0, passes: float = 0.0) -> dict[str, list[Launch]]:
        """A select alone, by backend; ``rounds`` of a bisection and ``passes`` of bins: 0 for those that random scores need."""
        work = Work(n=case.n, again=4.0 * case.batch * case.n, write=8.0 * case.batch * case.k, rounds=rounds)
        real = work._replace(rounds=max(min(rounds, REAL_KEYS), gpu_clocks.bisection_rounds(case.n)) if rounds > 1 else rounds)
        teams = work._replace(rounds=passes) if case.n > gpu_paths.tuning()["kFusedSelect"] else work
        return {
            "triton": gpu_paths.triton(f"select {case}", {"": real}),
            "cuda": [gpu_paths.cuda_select(self.machine, case.batch, teams, "plain_edge")],
        }

    def _score(self, case: Case, mode: str) -> dict[str, Time[str]]:
        work = Work(read=case.input_bytes, write=4.0 * case.batch * case.n)
        template = {"bfloat16": "BFloat16", "float16": "Float16", "float32": "Float32"}[str(case.dtype).removeprefix("torch.")]
        reads = self.streamed(case.input_bytes / 2, "read") + self.streamed(case.input_bytes / 2, "read")
        own = {
            "triton": gpu_paths.triton(f"score {case}", {"": work}),
            "cuda": [gpu_paths.cuda_score(case, work, f"{template}, true")],
        }
        found = {name: time_of(launches, self.machine, self.c) for name, launches in own.items()}
        return found | dict.fromkeys(READS, reads) | self.copies(moved_bytes("score", case))

    def _gather(self, case: Case, mode: str, heads: int, layers: int) -> dict[str, Time[str]]:
        kept = case.batch * case.k * (2 * layers * heads * 256 if heads else case.row_bytes)
        classes = [(2 * layers * heads, 256)] if heads else [(1, case.row_bytes)]
        work = Work(copied=(float(kept),), read=float(kept) + 8 * case.batch * case.k, write=float(kept))
        if heads:
            work = work._replace(copied=(float(2 * case.batch * case.k), float(kept)))
        own = {
            "triton": gpu_paths.triton(f"compact {case} heads={heads}", {"": work}),
            "cuda": [gpu_paths.cuda_gather(self.machine, case, classes, work, "plain_edge")],
        }
        made = {name: time_of(launches, self.machine, self.c) for name, launches in own.items()}
        eager = Time()
        for _ in range(2 * layers if heads else 1):
            eager += self.streamed(2 * kept / (2 * layers if heads else 1))
        found = {f"{name}@{kind}": time for name, time in made.items() for kind in ("random", "clustered")}
        return found | {f"eager@{kind}": eager for kind in ("random", "clustered")} | self.copies(2 * kept)

    def _backward(self, case: Case, mode: str) -> dict[str, Time[str]]:
        full, kept = float(case.batch * case.n * case.row_bytes), float(case.batch * case.k * case.row_bytes)
        invert = Work(again=8.0 * case.batch * case.k, write=8.0 * case.batch * case.n)
        gather = Work(copied=(full,), read=kept, write=full)
        launches = {
            "triton": gpu_paths.triton(f"backward {case}", {"invert": invert, "gather": gather}),
            "cuda": gpu_paths.cuda_backward(self.machine, case, invert, gather),
        }
        found = {name: time_of(made, self.machine, self.c) for name, made in launches.items()}
        zeros = self.streamed(full) + self.streamed(2 * kept)
        return found | {"zeros+index_copy": zeros} | self.copies(full + kept)

    def _ragged(self, case: Case, mode: str) -> dict[str, Time[str]]:
        lengths = ragged_lengths(case)
        dense = case._replace(n=sum(lengths) // case.batch)
        found = {}
        for name, made in drop_launches(dense, self.machine, key="ragged @dense").items():
            if "-" not in name:
                time = time_of(made, self.machine, self.c)
                found |= {f"{name}@dense": time, f"{name}@dense-in-runs": time}
        for name, made in ragged_launches(case, lengths, self.machine).items():
            time = time_of(made, self.machine, self.c)
            found |= {f"{name}@ragged": time, f"{name}@ragged-in-runs": time}
        return found

    def _attention(self, case: Case, mode: str, heads: int, kv_heads: int) -> dict[str, Time[str]]:
        """By bytes alone: the keys, and the logits of every head written and read."""
        keys, logits = case.batch * case.n * kv_heads * case.row_bytes, 4 * case.batch * heads * case.n
        own = self.streamed(keys + logits, "kernel") + Time({"pdl_edge": 1, "l2": self.machine.dram_us(logits)})
        repeated = case.batch * case.n * heads * case.row_bytes
        eager = self.streamed(keys + repeated) + self.streamed(repeated) + Time({"plain_edge": 4})
        return {"triton": own, "cuda": own, "eager": eager} | dict.fromkeys(READS, self.streamed(keys, "read"))


Classes = Sequence[tuple[float, tuple[int, int]]]  # output bytes of a class, and (tensors times planes, bytes of a row)


def ids_bytes(case: Case) -> list[tuple[float, tuple[int, int]]]:
    """M-RoPE ids and a mask."""
    rows = case.batch * case.k
    return [(3.0 * rows * 8, (3, 8)), (float(rows), (1, 1))]


def kv_bytes(case: Case, layers: int) -> list[tuple[float, tuple[int, int]]]:
    """K and V of some layers, four heads of 128 in two bytes."""
    return [(2.0 * layers * case.batch * case.k * 4 * 256, (8 * layers, 256))]


def drop_launches(case: Case, machine: Machine, key: str = "", added: Classes = ()) -> dict[str, list[Launch]]:
    """The launches of a drop, by backend and, without additions, by launch mode of the CUDA library."""
    kept, extra = float(case.batch * case.k * case.row_bytes), sum(nbytes for nbytes, _ in added)
    score = Work(read=case.input_bytes, write=4.0 * case.batch * case.n)
    select = Work(n=case.n, again=4.0 * case.batch * case.n, write=8.0 * case.batch * case.k)
    copied = (kept, *(nbytes for nbytes, _ in added))
    gather = Work(copied=copied, read=extra, again=kept, again_of=case.input_bytes / 2, write=kept + extra)
    named = key if " " in key else f"drop {case}{' ' + key if key else ''}"
    names = [item["name"] for item in gpu_paths.counts()["triton"]["launches"][named]]
    fused = not any(name.startswith("select") for name in names)
    work = {"variation_score": score, "select": select, "gather": gather._replace(n=case.n if fused else 0)}
    found = {"triton": gpu_paths.triton(named, work)}
    classes = [(1, case.row_bytes), *(geometry for _, geometry in added)]
    modes = gpu_paths.cuda_drop(machine, case, classes, score, select, gather)
    chosen = next(iter(modes.values()))
    return found | {"cuda": chosen} | ({} if added or key else {f"cuda-{mode}": made for mode, made in modes.items()})


def ragged_launches(case: Case, lengths: Sequence[int], machine: Machine) -> dict[str, list[Launch]]:
    """The same of a packed batch: each segment has its own length, and the longest select is the one that takes longest."""
    rows, longest = sum(lengths), max(lengths)
    kept = float(sum(n // case.ratio.denominator for n in lengths) * case.row_bytes)
    score = Work(read=2.0 * rows * case.row_bytes, write=4.0 * rows)
    select = Work(n=longest, again=4.0 * rows, write=kept / case.row_bytes * 8)
    gather = Work(copied=(kept,), again=kept, again_of=float(rows * case.row_bytes), write=kept)
    flat = case._replace(batch=1, n=rows)
    made = gpu_paths.triton("ragged @ragged", {"variation_score": score, "select": select, "gather": gather})
    cuda = [
        gpu_paths.cuda_score(flat, score), gpu_paths.cuda_select(machine, len(lengths), select, "pdl_edge"),
        gpu_paths.cuda_gather(machine, flat, [(1, case.row_bytes)], gather, "pdl_edge"),
    ]  # fmt: skip
    return {"triton": made, "cuda": cuda}
