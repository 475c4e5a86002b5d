"""Held-out accuracy of the tiny model, with the picture and after it is dropped: `python -m examples.tiny_vlm.evaluate`.

Dropping before block L is done by masks that hide the dropped tokens from block L on. That equals removing their rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import data, model, train


def dropped_from(batch: train.Batch, layer: int, layers: int, kept: torch.Tensor) -> dict[int, torch.Tensor]:
    """Masks that hide the image tokens not in `kept` [B, 100] (bool) from block `layer` on."""
    visible = batch.visible.clone()
    visible[:, 0, :, batch.image] &= kept[:, None, :]
    # A hidden row sees itself, for a softmax over nothing is NaN; nothing reads such a row.
    visible |= torch.eye(visible.shape[-1], dtype=torch.bool)
    if bool(kept.all()):
        visible = batch.visible
    return dict.fromkeys(range(layer, layers), visible)


def keep_random(count: int, share: float, seed: int) -> torch.Tensor:
    noise = torch.rand(count, data.TOKENS, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(1).argsort(1) < int(share * data.TOKENS)


def batches(count: int, seed: int) -> list[train.Batch]:
    """One question about each of `count` held-out pictures, half of them after the picture and half before; kinds at random."""
    rng = np.random.default_rng([seed, data.SPLITS.index("held-out")])
    orders = ("after",) * (count // 128) + ("before",) * (count // 128)
    return [train.pack(data.scenes("held-out", 64, rng), 1, data.KINDS, rng, order) for order in orders]


def evaluate(net: Any, count: int = 1024, seed: int = 1, layers: tuple[int, ...] = (2, 3), share: float = 0.11) -> dict[str, Any]:
    """Percent of `count` answers that are exact: undropped, by order and kind, and after dropping before each of `layers`."""
    made = batches(count, seed)
    kinds = torch.cat([batch.kinds[:, 0] for batch in made])

    def right(layer: int = 0, seen: float = 1.0, draw: int = 0) -> torch.Tensor:
        kept = [keep_random(64, seen, 1000 * draw + i) for i in range(len(made))]
        masks = [
            dropped_from(batch, layer, net.config.text_config.num_hidden_layers, k) for batch, k in zip(made, kept, strict=True)
        ]
        return torch.cat([train.answers_right(net, batch, m)[:, 0] for batch, m in zip(made, masks, strict=True)])

    percent = lambda answers: round(100 * answers.float().mean().item(), 2)
    whole = right()
    found: dict[str, Any] = {"questions": len(whole), "accuracy": percent(whole)}
    found["orders"] = {"after": percent(whole[: len(whole) // 2]), "before": percent(whole[len(whole) // 2 :])}
    found["kinds"] = {kind: percent(whole[kinds == i]) for i, kind in enumerate(data.KINDS)}
    first = torch.arange(len(whole)) < len(whole) // 2
    for order, asked in (("after", first), ("before", ~first)):
        found[f"kinds, {order}"] = {kind: percent(whole[asked & (kinds == i)]) for i, kind in enumerate(data.KINDS)}
    for layer in layers:
        some = [percent(right(layer, share, draw)) for draw in range(3)]
        blind = right(layer, 0.0)
        found[f"before block {layer}"] = {
            "all dropped": percent(blind),
            "all dropped, kinds": {kind: percent(blind[kinds == i]) for i, kind in enumerate(data.KINDS)},
            f"random {share:.0%} kept, 3 seeds": some,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=model.HERE)
    parser.add_argument("--count", type=int, default=1024, help="held-out questions, a multiple of 128")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = evaluate(model.load(args.model), args.count, args.seed, tuple(args.layers))
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
