"""Every policy on one LLaVA at one budget: prefill time and peak memory beside the undropped model, and what FLOPs predict.

``python bench/model/policies.py`` prints a Markdown table; ``--out FOLDER`` writes policies.csv and policies.md there; ``--dry``
runs everything on tiny shapes (no measurement). A LLaVA-1.5 with random weights, of the true shape on a GPU, an eighth as wide on
a CPU; or, with ``--small``, the trained model of examples/tiny_vlm. Times are medians of calls taken in turns, the vision tower
included. Memory is what tensors hold beyond the model and its inputs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(BENCH), str(BENCH / "accuracy"), str(BENCH.parent)]

import harness  # noqa: E402
import measure  # noqa: E402
import torch  # noqa: E402
from decoders import seconds  # noqa: E402
from peak import Peak  # noqa: E402

from v2drop_kernels.models import TokenDropper, policies  # noqa: E402
from v2drop_kernels.schedule import Schedule, model_sizes  # noqa: E402

SYSTEM, QUESTION = 35, 29  # text tokens around the image
BUDGET = 33.0
COLUMNS = (
    "method", "policy", "layers", "kept", "average_tokens", "prefill_ms", "speedup", "predicted", "reached", "peak_mb",
    "peak_share", "reads_weights",
)  # fmt: skip


def model_of(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    gpu = args.device.startswith("cuda")
    hidden, inner, layers, tower, heads, image = (
        (64, 96, 12, 4, 2, 56) if args.dry else (4096, 11008, 32, 24, 32, 336) if gpu else (512, 1376, 32, 6, 4, 336)
    )
    vision = CLIPVisionConfig(
        hidden_size=hidden // 4, intermediate_size=hidden, num_hidden_layers=tower, num_attention_heads=max(1, heads // 2),
        image_size=image, patch_size=14, projection_dim=hidden // 4,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-2)
    torch.manual_seed(0)
    with torch.device(args.device):  # 7e9 weights are not drawn on a CPU first
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16 if gpu else torch.float32)
    model.set_attn_implementation("sdpa")
    return model.eval()


def inputs_of(model: Any, batch: int) -> dict[str, torch.Tensor]:
    vision = model.config.vision_config
    n = (vision.image_size // vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 1024, (batch, SYSTEM + n + QUESTION), generator=generator)
    ids[:, SYSTEM : SYSTEM + n] = 3
    pixels = torch.randn(batch, 3, vision.image_size, vision.image_size, generator=generator)
    return {
        "input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }  # fmt: skip


def small(args: argparse.Namespace) -> tuple[Any, dict[str, torch.Tensor]]:
    """The trained model, and held-out questions of one length."""
    from tasks import tiny

    task = tiny(28 * args.batch, batch=args.batch, layers=None)
    _, inputs = next(task.batches())
    return task.model.to(args.device), {name: x.to(args.device) for name, x in inputs.items()}


def schedules(n: int, layers: tuple[int, ...], depth: int) -> dict[str, tuple[Schedule, str]]:
    """Every method at the same mean of tokens over all blocks, with its position ids."""
    chosen = [measure.Method(name, "progressive", "persistent", BUDGET) for name in ("variation L2", "random")]
    chosen += [measure.Method(name, *home[:2], BUDGET) for name, home in measure.PAPERS.items()]
    return {method.policy: (method.schedule(layers, n, depth), method.positions) for method in chosen}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny shapes, one repeat: a dry run, not a measurement")
    parser.add_argument("--small", action="store_true", help="the trained model of examples/tiny_vlm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="on a CPU (default: 1 when dry, else PyTorch's choice)")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    args = parser.parse_args(argv)
    if not args.device.startswith("cuda"):
        harness.recycle_memory()
    if args.threads or args.dry:
        torch.set_num_threads(args.threads or 1)
    with torch.inference_mode():
        rows = measured(args)
    import transformers

    run = {**harness.conditions("dry" if args.dry else "full"), "transformers": transformers.__version__, "batch": str(args.batch)}
    text = report(args, rows, run, " ".join(["python bench/model/policies.py", *(sys.argv[1:] if argv is None else argv)]))
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "policies.md").write_text(text)
        with (args.out / "policies.csv").open("w", newline="") as file:
            out = csv.DictWriter(file, (*COLUMNS, *run), lineterminator="\n")
            out.writeheader()
            out.writerows({**row, **run} for row in rows)
    return 0


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    from tasks import TINY_LAYERS, progressive_layers

    if args.small:
        model, inputs = small(args)
    else:
        model = model_of(args)
        inputs = inputs_of(model, args.batch)
    n = int((inputs["input_ids"][0] == model.config.image_token_index).sum())
    depth, *_ = model_sizes(model.config)
    layers = TINY_LAYERS if args.small else progressive_layers(depth)
    methods = {"nothing dropped": (Schedule(()), "persistent"), **schedules(n, layers, depth)}
    rows, times = {}, {name: [] for name in methods}  # type: ignore[var-annotated]
    for name, (schedule, positions) in methods.items():
        with TokenDropper(schedule, positions=positions)(model) as dropping:
            model(**inputs, use_cache=True, logits_to_keep=1)  # what is made once is made before it is counted
            with Peak() as peak:
                model(**inputs, use_cache=True, logits_to_keep=1)
            report = dropping.report()
        policy = schedule.stages[0].policy if schedule.stages else ""
        rows[name] = {
            "method": name,
            "policy": policy,
            "layers": " ".join(map(str, schedule.layers)),
            "kept": " ".join(map(str, measure.counts(schedule, n))),
            "average_tokens": round(report.average_tokens(), 2),
            "predicted": round(report.full_flops / report.flops, 3),
            "peak_mb": round(peak.bytes / 1e6, 2),
            "reads_weights": "" if not policy else "yes" if policies.known()[policy].method.needs_weights else "no",
        }
    for _ in range(1 if args.dry else args.repeats):
        for name, (schedule, positions) in methods.items():
            with TokenDropper(schedule, positions=positions)(model):
                times[name].append(seconds(args.device, lambda: model(**inputs, use_cache=True, logits_to_keep=1)))
    full = rows["nothing dropped"]
    for name, row in rows.items():
        middle = statistics.median(times[name])
        speedup = statistics.median(times["nothing dropped"]) / middle
        row |= {
            "prefill_ms": round(1e3 * middle, 2),
            "speedup": round(speedup, 3),
            "reached": round(speedup / row["predicted"], 3),
            "peak_share": round(row["peak_mb"] / full["peak_mb"], 4),
        }
    return list(rows.values())


def report(args: argparse.Namespace, rows: list[dict[str, Any]], run: dict[str, str], command: str) -> str:
    head = ("method", "drops before", "kept", "tokens per block", "prefill", "speed-up", "by FLOPs", "peak memory", "of undropped")
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    for row in rows:
        lines.append((
            row["method"], row["layers"] or "-", row["kept"] or "-", f"{row['average_tokens']:.1f}", f"{row['prefill_ms']:.1f} ms",
            f"{row['speedup']:.2f}x", f"{row['predicted']:.2f}x", f"{row['peak_mb']:.1f} MB", f"{row['peak_share']:.1%}",
        ))  # fmt: skip
    about = (
        "Prefill of one prompt, the vision tower included (the FLOPs are the decoder's alone); medians of calls in turns. Peak "
        "memory: what tensors hold at once beyond the model and its inputs, counted exactly. "
        + ("So small a model spends its time between the ops, not in them." if args.small else "Random weights: only costs count.")
    )
    made = f"{', '.join(f'{k} {v}' for k, v in run.items())}. Made by `{command}`."
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    title = "# All methods on the small trained model" if args.small else "# All methods on one LLaVA"
    return "\n\n".join([title, made, about, table]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
