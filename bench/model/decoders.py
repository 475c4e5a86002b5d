"""Whole models: prefill, time per new token, end to end and memory, undropped, with V2Drop and with attention scores.

``python bench/model/decoders.py`` prints a table, ``--json`` the same as a list of flat objects; ``--dry`` runs everything on tiny
shapes (no measurement). Decoders of the true shapes with random weights on a GPU, an eighth as wide on a CPU, as transformers
builds them; the vision tower is left out, since no policy changes it. ``predicted`` is the speed-up that the papers' FLOPs
formula gives for the schedule and the whole prompt, ``reached`` the share of it that was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT / "bench"), str(ROOT)]

import harness  # noqa: E402
import torch  # noqa: E402

from v2drop_kernels.models import TokenDropper  # noqa: E402
from v2drop_kernels.schedule import Schedule, Stage, preset, solve  # noqa: E402

SYSTEM, QUESTION = 35, 29  # text tokens around the vision tokens
POLICIES = ("none", "variation", "fastv")


class Shape(NamedTuple):
    """A decoder and the prompt that it gets."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision: int
    schedules: tuple[str, ...]  # presets, or "25 %": that share of the tokens on average, by three stages alike

    def narrow(self, by: int, vision: int) -> Shape:
        """The same depth and proportions, ``by`` times as narrow (heads stay 64 or 128 wide)."""
        heads = max(1, self.heads // by)
        width = self.hidden // self.heads
        kv_heads = max(1, self.kv_heads // by)
        heads -= heads % kv_heads
        share = width * heads / self.hidden
        return self._replace(
            name=f"{self.name}/{by}", hidden=width * heads, intermediate=int(self.intermediate * share) // 32 * 32, heads=heads,
            kv_heads=kv_heads, vocabulary=self.vocabulary // by, vision=vision,
        )  # fmt: skip

    def decoder(self, device: str, dtype: torch.dtype) -> Any:
        """A causal language model with random weights."""
        import transformers

        kind = transformers.LlamaConfig if self.heads == self.kv_heads else transformers.Qwen2Config
        config = kind(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.eval()


PRESETS = ("v2drop-192", "v2drop-128", "v2drop-64")
LLAVA = Shape("LLaVA-1.5-7B", 32, 4096, 11008, 32, 32, 32064, 576, PRESETS)
QWEN = Shape("Qwen2-VL-7B", 28, 3584, 18944, 28, 4, 152064, 1024, ("v2drop-qwen2-vl",))
ONEVISION = Shape("LLaVA-OneVision-7B", 28, 3584, 18944, 28, 4, 152064, 32 * 196, ("25 %", "15 %"))  # a video of 32 frames
TWELVE = Shape("12 layers, d 512", 12, 512, 1376, 8, 8, 2048, 576, ("v2drop-64",))
LAYERS = (3, 16, 22)  # of V2Drop's Qwen2-VL code; LLaVA-OneVision has the same decoder

# What V2Drop reports for the same model and budget, on an A100: whole answers, not prefill alone.
PUBLISHED = {
    ("LLaVA-1.5-7B", "v2drop-192"): "summary table: x1.26, peak memory -3.3 %",
    ("LLaVA-1.5-7B", "v2drop-128"): "metric table: throughput x1.22 to x1.26",
    ("LLaVA-OneVision-7B", "25 %"): "summary table: video x1.38, peak memory -7.8 %",
}


@dataclasses.dataclass
class Row:
    """One line of the table; what was not measured is None."""

    model: str
    policy: str
    schedule: str
    batch: int
    prompt: int
    new: int
    prefill_ms: float | None = None
    ms_per_token: float | None = None
    end_to_end_ms: float | None = None
    peak_mb: float | None = None
    cache_mb: float | None = None
    average_tokens: float | None = None
    speedup: float | None = None
    end_to_end_speedup: float | None = None
    predicted: float | None = None
    reached: float | None = None
    published: str = ""
    check: str = ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows instead of a table")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, one repeat: a dry run, not a measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of transformers (default: sdpa)")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes (default: 1 8 32 on a GPU, 1 on a CPU)")
    parser.add_argument("--new", type=int, nargs="+", help="new tokens (default: 1 128 512 on a GPU, 1 32 on a CPU)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each policy, in turns (default: 5)")
    parser.add_argument("--threads", type=int, help="on a CPU (default: 1 when dry, else PyTorch's choice)")
    parser.add_argument("--seconds", type=float, default=900.0, help="begin nothing new after so long (default: 900)")
    args = parser.parse_args(argv)
    gpu = args.device.startswith("cuda")
    if not gpu:
        harness.recycle_memory()
    if args.threads or args.dry:
        torch.set_num_threads(args.threads or 1)
    args.batch = args.batch or ([1, 2] if args.dry else [1, 8, 32] if gpu else [1])
    args.new = args.new or ([1, 3] if args.dry else [1, 128, 512] if gpu else [1, 32])
    if 1 not in args.new:
        args.new.insert(0, 1)  # time per token is the difference to it
    args.repeats = 1 if args.dry else args.repeats
    end = time.monotonic() + args.seconds
    rows: list[Row] = []
    with torch.inference_mode():
        rows += overhead(args)
        for shape in shapes(args):
            if time.monotonic() < end:
                model = shape.decoder(args.device, torch.bfloat16 if gpu else torch.float32)
                model.set_attn_implementation(args.attention)
                for batch in args.batch:
                    for name in shape.schedules:
                        if time.monotonic() < end:
                            rows += measured(args, shape, model, name, batch, end)
                del model
                release(args.device)
    run = {**harness.conditions("dry" if args.dry else "full"), "device": device_name(args.device), "transformers": version()}
    flat = [{**dataclasses.asdict(row), **run} for row in rows]
    print(json.dumps(flat, indent=1) if args.json else table(rows, run))
    return int(any(row.check.startswith("red") for row in rows))


def shapes(args: argparse.Namespace) -> list[Shape]:
    if args.dry:
        tiny = [LLAVA.narrow(32, 24), QWEN.narrow(28, 24), ONEVISION.narrow(28, 24)._replace(schedules=("25 %",))]
        return [shape._replace(layers=24) for shape in tiny]
    if args.device.startswith("cuda"):
        return [LLAVA, QWEN, ONEVISION]
    return [LLAVA.narrow(8, 576), QWEN.narrow(7, 1024), ONEVISION.narrow(7, 8 * 196)]  # 8 frames


def prompt_of(shape: Shape, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    rows = SYSTEM + shape.vision + QUESTION
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    generator = torch.Generator(args.device).manual_seed(1)
    embeds = torch.randn(batch, rows, shape.hidden, device=args.device, generator=generator, dtype=torch.float32) * 0.02
    return {"inputs_embeds": embeds.to(dtype), "attention_mask": torch.ones(batch, rows, dtype=torch.int64, device=args.device)}


def schedule_of(shape: Shape, name: str, policy: str) -> Schedule:
    if name.endswith("%"):
        average = float(name.removesuffix("%")) / 100 * shape.vision
        return solve(average=average, layers=LAYERS, n=shape.vision, depth=shape.layers, name=name, policy=policy)
    found = preset(name)
    return Schedule(tuple(dataclasses.replace(stage, policy=policy) for stage in found.stages), name=found.name)


@contextlib.contextmanager
def dropping(shape: Shape, model: Any, name: str, policy: str) -> Iterator[Any]:
    if policy == "none":
        yield None
        return
    with TokenDropper(schedule_of(shape, name, policy), spans=(SYSTEM, SYSTEM + shape.vision))(model) as found:
        yield found


def overhead(args: argparse.Namespace) -> list[Row]:
    """What the hooks cost where nothing is dropped, and the prefill with the 64-token preset's stages on 12 layers."""
    shape = TWELVE._replace(layers=4, hidden=64, intermediate=96, vision=24, heads=2, kv_heads=2) if args.dry else TWELVE
    model = shape.decoder(args.device, torch.float32)
    inputs = prompt_of(shape, 1, args)
    inputs["inputs_embeds"] = inputs["inputs_embeds"].float()
    keep_all = Schedule((Stage(1, 1.0), Stage(2, 1.0), Stage(3, 1.0)))
    forward = functools.partial(model, **inputs, use_cache=True, logits_to_keep=1)

    def hooked() -> None:
        with TokenDropper(keep_all, spans=(SYSTEM, SYSTEM + shape.vision))(model):
            timed.append(seconds(args.device, forward))

    plain: list[float] = []
    timed: list[float] = []
    hooked()
    timed.clear()
    for _ in range(1 if args.dry else max(15, args.repeats)):
        plain.append(seconds(args.device, forward))
        hooked()
    rows = inputs["inputs_embeds"].shape[1]
    ratio = min(timed) / min(plain)
    return [
        Row(shape.name, "none", "", 1, rows, 0, prefill_ms=min(plain) * 1e3),
        Row(shape.name, "hooks, no drop", "", 1, rows, 0, prefill_ms=min(timed) * 1e3, speedup=1 / ratio,
            check=f"overhead {ratio - 1:+.2%} (target: 2 %)"),
    ]  # fmt: skip


def measured(args: argparse.Namespace, shape: Shape, model: Any, name: str, batch: int, end: float) -> list[Row]:
    """All policies on one model, schedule and batch, in turns."""
    inputs = prompt_of(shape, batch, args)
    prompt = inputs["inputs_embeds"].shape[1]
    share = schedule_of(shape, name, "variation").flops_share(
        shape.vision, shape.layers, shape.hidden, shape.intermediate, text=SYSTEM + QUESTION
    )
    rows = {(p, n): Row(shape.name, p, name, batch, prompt, n) for p in POLICIES for n in args.new}
    for policy in POLICIES if shape.vision else ():
        with dropping(shape, model, name, policy) as found:
            cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            row = rows[policy, args.new[0]]
            row.average_tokens = float(shape.vision) if found is None else found.report().average_tokens()
            row.check = "" if found is None or found.report().kv_bytes == held else "red: the report counts other KV bytes"
            row.cache_mb = held / 1e6
            del cache
    prefill: dict[str, list[float]] = {p: [] for p in POLICIES}
    whole: dict[tuple[str, int], list[float]] = {key: [] for key in rows}
    peak: dict[str, float] = {}
    for _ in range(args.repeats):
        for policy in POLICIES:
            if time.monotonic() > end and prefill[policy]:
                continue
            with dropping(shape, model, name, policy):
                reset_peak(args.device)
                prefill[policy].append(seconds(args.device, functools.partial(model, **inputs, use_cache=True, logits_to_keep=1)))
                for new in args.new:
                    if new > 1 and time.monotonic() > end and whole[policy, new]:
                        continue
                    call = functools.partial(
                        model.generate, **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
                    )
                    whole[policy, new].append(seconds(args.device, call))
                if (found := peak_mb(args.device)) is not None:
                    peak[policy] = found
    for (policy, new), row in rows.items():
        row.prefill_ms = statistics.median(prefill[policy]) * 1e3
        row.end_to_end_ms = statistics.median(whole[policy, new]) * 1e3
        if new > 1:
            row.ms_per_token = (row.end_to_end_ms - statistics.median(whole[policy, 1]) * 1e3) / (new - 1)
        row.peak_mb = peak.get(policy)
        if policy != "none":
            row.speedup = statistics.median(prefill["none"]) / statistics.median(prefill[policy])
            row.end_to_end_speedup = statistics.median(whole["none", new]) / statistics.median(whole[policy, new])
            row.predicted = 1 / share
            row.reached = row.speedup / row.predicted
            row.published = PUBLISHED.get((shape.name, name), "")
    return list(rows.values())


def seconds(device: str, call: Callable[[], Any]) -> float:
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    sync()
    start = time.perf_counter()
    call()
    sync()
    return time.perf_counter() - start


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def peak_mb(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e6 if device.startswith("cuda") else None


def release(device: str) -> None:
    harness.release_memory()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"


def version() -> str:
    import transformers

    return str(transformers.__version__)


def table(rows: list[Row], run: dict[str, str]) -> str:
    names = [field.name for field in dataclasses.fields(Row)]
    cells = [names, *([cell(getattr(row, name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([*lines, "", *(f"{name}: {value}" for name, value in run.items())])


def cell(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
