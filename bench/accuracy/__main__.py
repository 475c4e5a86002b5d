"""Measure accuracy with dropped vision tokens: ``python bench/accuracy``; see README.md beside this file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[1:1] = [str(HERE.parent), str(HERE.parent.parent)]  # bench/harness.py, and examples/

import harness  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import tasks  # noqa: E402
import torch  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Run the program; 0 when the report is written."""
    parser = argparse.ArgumentParser(prog="python bench/accuracy", description=__doc__)
    parser.add_argument("--model", help="a checkpoint (llava-hf/llava-1.5-7b-hf); default: the model of examples/tiny_vlm")
    parser.add_argument("--images", type=Path, metavar="DIR", help="with --model: where the pictures are")
    parser.add_argument("--questions", type=Path, metavar="FILE.jsonl", help="with --model: a question per line")
    parser.add_argument("--count", type=_positive, help="questions (default: 512 of the tiny model, or all in the file)")
    parser.add_argument("--policies", nargs="+", choices=measure.POLICIES, default=list(measure.POLICIES))
    parser.add_argument("--papers", nargs="*", choices=measure.PAPERS, default=list(measure.PAPERS), help="methods of the papers")
    parser.add_argument("--shapes", nargs="+", choices=measure.SHAPES, default=list(measure.SHAPES))
    parser.add_argument("--positions", nargs="+", choices=measure.POSITIONS, default=list(measure.POSITIONS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(measure.BUDGETS), metavar="PERCENT")
    parser.add_argument("--layers", nargs="+", type=_positive, help="drop before these (default: V2Drop's, scaled to the depth)")
    parser.add_argument("--seeds", type=_positive, default=measure.SEEDS, help="of the random policy (default: 3)")
    parser.add_argument("--batch", type=_positive, help="default: 64 for the tiny model, 1 for a checkpoint")
    parser.add_argument("--max-new-tokens", type=_positive, default=16, help="for a checkpoint (default: 16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of a checkpoint")
    parser.add_argument("--dtype", default="bfloat16", help="of a checkpoint (default: bfloat16)")
    parser.add_argument("--threads", type=_positive, help="of torch; 1 is fastest for the tiny model on a busy machine")
    parser.add_argument("--out", type=Path, help="default: bench/results/accuracy/NAME")
    args = parser.parse_args(argv)
    if args.model and not (args.images and args.questions):
        parser.error("--model needs --images and --questions")
    if not args.model and (args.images or args.questions):
        parser.error("--images and --questions need --model")
    if not all(0 < budget < 100 for budget in args.budgets):
        parser.error("--budgets must lie between 0 and 100")

    if args.threads:
        torch.set_num_threads(args.threads)
    layers = tuple(args.layers) if args.layers else None
    if args.model:
        task = tasks.checkpoint(
            args.model, args.images, args.questions, args.count, batch=args.batch or 1, layers=layers,
            device=args.device, dtype=args.dtype, max_new_tokens=args.max_new_tokens,
        )  # fmt: skip
    else:
        task = tasks.tiny(args.count or 512, batch=args.batch or 64, layers=layers)

    undropped = measure.run(task, None)
    print(f"{100 * sum(undropped.right) / len(undropped.right):6.1f}  nothing dropped: {task.about}", flush=True)
    chosen = list(measure.methods(args.policies, args.shapes, args.positions, args.budgets, args.seeds, args.papers))
    runs = []
    for number, method in enumerate(harness.progress(chosen, "methods"), 1):
        began = time.perf_counter()
        try:
            done = measure.run(task, method)
        except ValueError as error:  # a method that needs a CLIP tower, for instance
            if method.policy not in measure.PAPERS:
                raise
            print(f"     -  {method}: {error}", flush=True)
            continue
        runs.append(done)
        seconds = time.perf_counter() - began
        print(f"{100 * sum(done.right) / len(done.right):6.1f}  {method}  ({number} of {len(chosen)}, {seconds:.1f} s)", flush=True)
    folder = args.out or HERE.parent / "results" / "accuracy" / task.name
    conditions = harness.conditions("full")
    import transformers

    conditions["versions"] += f"; transformers {transformers.__version__}"
    given = sys.argv[1:] if argv is None else argv
    report.write(folder, task, undropped, runs, conditions, " ".join(["python bench/accuracy", *given]))
    print(f"written: {folder}/accuracy.md")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
