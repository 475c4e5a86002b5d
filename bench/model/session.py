"""What a block costs around the drops: entering it, hooks that drop nothing, steps behind a dropped prompt, compiled steps.

``python bench/model/session.py`` prints a JSON list of flat objects; ``--dry`` runs everything on tiny shapes (no measurement).
Both sides of a comparison run in turns in one process, and the minima count.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT / "bench"), str(ROOT), str(ROOT / "bench" / "model")]

import harness  # noqa: E402
import torch  # noqa: E402
from decoders import LLAVA, SYSTEM, prompt_of, schedule_of  # noqa: E402

from v2drop_kernels.models import TokenDropper  # noqa: E402
from v2drop_kernels.schedule import Schedule, Stage  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny shapes, one repeat: a dry run, not a measurement")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each side, in turns (default: 15)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: inductor)")
    parser.add_argument("--only", nargs="+", choices=list(MEASURED), default=list(MEASURED))
    args = parser.parse_args(argv)
    if args.dry:
        args.repeats, args.backend = 1, "eager"
    args.device, args.inner = "cpu", 1 if args.dry else 10
    torch.set_num_threads(args.threads)
    harness.recycle_memory()
    shape = LLAVA.narrow(32, 24)._replace(layers=24) if args.dry else LLAVA.narrow(8, 576)
    model = shape.decoder("cpu", torch.float32)
    inputs = prompt_of(shape, 1, args)
    dropper = TokenDropper(schedule_of(shape, "v2drop-64", "variation"), spans=(SYSTEM, SYSTEM + shape.vision))
    with torch.no_grad():
        found = [MEASURED[name](args, model, inputs, dropper) for name in args.only]
    run = {**harness.conditions("dry" if args.dry else "full"), "threads": args.threads, "shape": shape.name}
    print(json.dumps([{**row, **run} for row in found], indent=1))
    return 0


def in_turns(repeats: int, *sides: Callable[[], Any]) -> list[float]:
    """The least processor time of each side in ms: that of a shared machine is less disturbed than the wall clock."""
    best = [float("inf")] * len(sides)
    for _ in range(repeats + 1):  # the first one warms up
        for i, side in enumerate(sides):
            start = time.process_time()
            side()
            best[i] = min(best[i], time.process_time() - start)
    return [x * 1e3 for x in best]


def compared(what: str, target: str, plain: float, ours: float) -> dict[str, Any]:
    return {"what": what, "plain_ms": plain, "ours_ms": ours, "ratio": ours / plain, "target": target}


def entering(args: Any, model: Any, inputs: Any, dropper: TokenDropper) -> dict[str, Any]:
    def block() -> None:
        with dropper(model):
            pass

    (ms,) = in_turns(args.inner * args.repeats, block)
    return {"what": f"entering and leaving a block, {len(model.model.layers)} layers", "ours_ms": ms, "target": "1 ms"}


def hooks(args: Any, model: Any, inputs: Any, dropper: TokenDropper) -> dict[str, Any]:
    keep_all = TokenDropper(Schedule((Stage(3, 1.0), Stage(16, 1.0))), spans=dropper.spans)
    forward = lambda: model(**inputs, use_cache=True, logits_to_keep=1)
    plain, ours = [float("inf")], [float("inf")]
    for _ in range(args.repeats):
        plain += in_turns(1, forward)
        with keep_all(model):
            ours += in_turns(1, forward)
    return compared("prefill with hooks that drop nothing", "1.005", min(plain), min(ours))


def steps(args: Any, model: Any, inputs: Any, dropper: TokenDropper) -> dict[str, Any]:
    """The same cache with the hooks and, behind the block, without them: single tokens behind it need none."""
    with dropper(model):
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    token = torch.tensor([[5]])

    def step() -> None:
        model(input_ids=token, past_key_values=cache)
        cache.crop(-1)

    plain, ours = [float("inf")], [float("inf")]
    for _ in range(args.repeats):
        plain += in_turns(args.inner, step)
        with dropper(model):
            ours += in_turns(args.inner, step)
    return compared("a step behind a dropped prompt, against caches of these lengths without hooks", "1.02", min(plain), min(ours))


def compiled_steps(args: Any, model: Any, inputs: Any, dropper: TokenDropper) -> dict[str, Any]:
    from transformers import StaticCache

    rows = inputs["inputs_embeds"].shape[1]
    twin = copy.deepcopy(model)
    twin.compile(backend=args.backend)
    token = torch.tensor([[5]])

    def filled() -> Any:
        cache = StaticCache(config=model.config, max_cache_len=rows + 16)
        twin(**inputs, past_key_values=cache, logits_to_keep=1)
        return cache

    def step(cache: Any) -> None:
        lengths = [layer.cumulative_length.clone() for layer in cache.layers]
        mask = torch.ones(1, 1, 1, rows + 16, dtype=torch.bool).tril(rows)
        twin(input_ids=token, past_key_values=cache, attention_mask=mask, position_ids=torch.tensor([[rows]]))
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.cumulative_length.copy_(length)

    full = filled()
    (plain,) = in_turns(args.repeats * 2, lambda: step(full))
    with dropper(twin):
        dropped = filled()
        first, ours = in_turns(args.repeats * 2, lambda: step(full), lambda: step(dropped))
    return compared("a compiled step with drops, static cache, against compiled without", "", min(plain, first), ours)


MEASURED = {"entering": entering, "hooks": hooks, "steps": steps, "compiled": compiled_steps}

if __name__ == "__main__":
    sys.exit(main())
