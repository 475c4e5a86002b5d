"""Train the tiny vision-language model from scratch: `python -m examples.tiny_vlm.train`.

Step 1 trains the vision tower to recognise what each patch contains, through a linear head that is discarded; LLaVA also starts
from a trained tower. Step 2 trains all parameters on questions. Several questions share one picture: a mask lets each attend to the
picture and itself only, which gives the same result as one prompt per question for a fraction of the work. On a terminal, progress
bars show both steps (rich).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from . import data, model

SLOT = 8  # Longest question and answer: four words, "?", three digits.
BAND = torch.bucketize(torch.arange(data.SIDE), torch.tensor(data.BANDS[1:3]), right=True)
CELLS = (3 * BAND[:, None] + BAND).flatten()  # The cell of each patch.
HIDE = torch.finfo(torch.float32).min


class Batch(NamedTuple):
    pixels: torch.Tensor  # [B, 3, 100, 100]
    input_ids: torch.Tensor  # [B, S]
    position_ids: torch.Tensor  # [B, S]
    visible: torch.Tensor  # [B, 1, S, S] bool: what may be attended to
    labels: torch.Tensor  # [B, S] the next token, -100 where none is asked
    hints: torch.Tensor  # [B, S] the digit where the path stands after a word of the question, -100 where there is none
    places: torch.Tensor  # [B, S] the cell of the digit of `hints` or `labels`, -100 where there is none
    kinds: torch.Tensor  # [B, Q]
    patches: torch.Tensor  # [B, 100, 2] digit (0: none) and colour (9: none) of each patch
    image: slice  # where the image tokens lie


def pack(scenes: data.Scenes, questions: int, kinds: tuple[str, ...], rng: np.random.Generator, order: str = "after") -> Batch:
    """Questions about each picture in one sequence; for `order="before"` one question, in front of the picture."""
    count = len(scenes.pixels)
    width = 1 + data.TOKENS + questions * SLOT if order == "after" else data.TOKENS + 1 + SLOT
    ids = np.full((count, width), data.PAD)
    positions = np.zeros((count, width), dtype=np.int64)
    visible = np.zeros((count, 1, width, width), dtype=bool)
    labels = np.full((count, width), -100)
    hints, places = np.full((2, count, width), -100)
    chosen = np.empty((count, questions), dtype=np.int64)
    causal = np.tril(np.ones((width, width), dtype=bool))
    image = slice(1, 1 + data.TOKENS)
    if order == "after":
        visible[:] = causal
        visible[:, :, 1 + data.TOKENS :, 1 + data.TOKENS :] &= np.kron(
            np.eye(questions, dtype=bool), np.ones((SLOT, SLOT), dtype=bool)
        )
        ids[:, 0], ids[:, image] = data.BOS, data.IMAGE
        positions[:] = np.concatenate([np.arange(1 + data.TOKENS), 1 + data.TOKENS + np.tile(np.arange(SLOT), questions)])
    else:
        image = slice(width - SLOT + 4 - data.TOKENS, width - SLOT + 4)
    for i in range(count):
        for q in range(questions):
            kind = int(rng.integers(len(kinds)))
            question = data.ask(scenes.digits[i], scenes.colours[i], kinds[kind], rng)
            chosen[i, q] = data.KINDS.index(kinds[kind])
            answer = [data.IDS[str(d)] for d in question.answer]
            if order == "after":
                tokens = [*(data.IDS[w] for w in question.words), data.ASK, *answer]
                at = 1 + data.TOKENS + q * SLOT
                ask = at + len(question.words)
                hints[i, at:ask] = [data.IDS[str(scenes.digits[i, c])] if c >= 0 else -100 for c in question.hints]
                places[i, at:ask] = [c if c >= 0 else -100 for c in question.hints]
            else:
                # Padded on the left, so that the picture lies at one place in all rows.
                tokens = [*data.prompt(question.words, "before"), *answer]
                ask = image.stop
                at = ask + 1 + len(answer) - len(tokens)
                visible[i, 0, at:, at:] = causal[at:, at:]
                visible[i, 0, :at, :at] = np.eye(at, dtype=bool)
                positions[i, at:] = np.arange(width - at)
            ids[i, at : at + len(tokens)] = tokens
            labels[i, ask : ask + len(answer) + 1] = [*answer, data.EOS]
            places[i, ask : ask + len(answer)] = question.cells[-len(answer) :]
    patches = np.zeros((count, data.TOKENS, 2), dtype=np.int64)
    patches[:, :, 1] = 9
    np.put_along_axis(patches[:, :, 0], scenes.patches, scenes.digits, axis=1)
    np.put_along_axis(patches[:, :, 1], scenes.patches, scenes.colours, axis=1)
    arrays = (scenes.pixels, ids, positions, visible, labels, hints, places, chosen, patches)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays), image)


def mask(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill_(~visible, HIDE)


def hidden_states(net: Any, batch: Batch, per_layer: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
    """Last hidden states [B, S, D]; `per_layer` replaces the mask `batch.visible` of single decoder blocks."""
    masks = {layer: mask(visible) for layer, visible in (per_layer or {}).items()}

    def replace(layer: int) -> Any:
        return lambda _module, args, kwargs: (args, {**kwargs, "attention_mask": masks[layer]})

    hooks = [net.model.language_model.layers[layer].register_forward_pre_hook(replace(layer), with_kwargs=True) for layer in masks]
    try:
        return net.model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixels,
            attention_mask=mask(batch.visible),
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()


def text_reads_from(batch: Batch, layer: int) -> dict[int, torch.Tensor]:
    """Masks under which the text after the picture sees the picture from decoder block `layer` on only."""
    visible = batch.visible.clone()
    visible[:, :, batch.image.stop :, batch.image] = False
    return dict.fromkeys(range(layer), visible)


def answers_right(net: Any, batch: Batch, per_layer: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
    """Whether each question's whole answer is right [B, Q]: greedy decoding is right exactly if every next token is."""
    with torch.no_grad():
        hidden = hidden_states(net, batch, per_layer)
        guess = net.lm_head(hidden[:, batch.image.stop :]).argmax(-1)
    labels = batch.labels[:, batch.image.stop :]
    right = (guess == labels) | (labels < 0)
    questions = batch.kinds.shape[1]
    return right.view(len(right), questions, -1).all(-1) if questions > 1 else right.all(-1, keepdim=True)


def optimizers(net: Any, head: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's matrices, AdamW for everything else (the tower, embeddings, norms, projector)."""
    decoder = [p for p in net.model.language_model.layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in decoder}
    rest = [p for p in (*net.parameters(), *head.parameters()) if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(decoder, lr=1.5 * lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True),
    ]


def rate(progress: float, peak: float) -> float:
    """Linear warm-up over 2 % of the run, then a cosine down to 2 % of the peak."""
    if progress < 0.02:
        return peak * (0.05 + progress / 0.02)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.02) / 0.98))))


def curriculum(mistakes: np.ndarray) -> np.ndarray:
    """The kinds of questions to ask, given the share of wrong answers of each: look-ups, paths, then the two whose middle steps
    are not asked for."""
    share = dict(zip(data.KINDS, mistakes, strict=True))
    hidden = ("steps", "hops")
    paths = [v for k, v in share.items() if k not in ("list", *hidden)]
    return np.array([k == "list" or (share["list"] < 0.5 if k not in hidden else max(paths) < 0.3) for k in data.KINDS])


def patch_loss(features: torch.Tensor, head: torch.nn.Module, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of every patch's digit, colour and cell, empty patches at a tenth of the weight; share of wrong digits."""
    out = head(F.rms_norm(features, features.shape[-1:])).flatten(0, 1)
    digit, colour = patches.flatten(0, 1).unbind(-1)
    held = digit > 0
    weight = torch.where(held, 1.0, 0.1)
    loss = F.cross_entropy(out[:, :10], digit, reduction="none") + F.cross_entropy(out[:, 10:20], colour, reduction="none")
    # The cell too: without it the projector lost the place, and paths were not learned.
    loss = loss + F.cross_entropy(out[:, 20:], CELLS.repeat(len(patches)), reduction="none")
    return (loss * weight).sum() / weight.sum(), (out[held, :10].argmax(-1) != digit[held]).float().mean()


def image_features(net: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the decoder gets [B, 100, D]."""
    return net.model.multi_modal_projector(net.model.vision_tower(pixels).last_hidden_state[:, 1:])


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[float], None]]:
    """A function to call with the share that is done, which moves a bar if stdout is a terminal and rich is installed."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda done: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda done: bar.update(task, completed=done)


def measure(net: Any, head: torch.nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Held-out accuracy by kind and order, and with the whole picture hidden from block 2 on."""
    net.eval()
    after, before = batches
    found = {"after": answers_right(net, after), "before": answers_right(net, before)}
    row = {order: right.float().mean().item() for order, right in found.items()}
    for i, kind in enumerate(data.KINDS):
        row[kind] = found["after"][after.kinds == i].float().mean().item()
    blind = after.visible.clone()
    blind[..., after.image] = False
    # A row without any visible key gives NaN; these rows are not read.
    blind |= torch.eye(blind.shape[-1], dtype=torch.bool)
    row["dropped_at_2"] = (
        answers_right(net, after, dict.fromkeys(range(2, net.config.text_config.num_hidden_layers), blind)).float().mean().item()
    )
    with torch.no_grad():
        row["digit_error"] = patch_loss(image_features(net, after.pixels), head, after.patches)[1].item()
    net.train()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4500, help="training steps on questions")
    parser.add_argument("--tower-steps", type=int, default=600, help="training steps of the vision tower alone")
    parser.add_argument("--minutes", type=float, default=1e9, help="shorten the run so that it ends after this long")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=12, help="pictures per step")
    parser.add_argument("--questions", type=int, default=10, help="questions about each picture")
    parser.add_argument("--before", type=float, default=0.5, help="share of the steps with the question before the picture")
    parser.add_argument("--init", type=Path, help="start from this checkpoint, and leave out the tower's own training")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=model.HERE)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    from transformers import LlavaForConditionalGeneration
    from transformers import __version__ as transformers_version

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    net = (model.load(args.init) if args.init else LlavaForConditionalGeneration(model.config())).train()
    width = net.config.text_config.hidden_size
    head, where = torch.nn.Linear(width, 29), torch.nn.Linear(width, 9)
    held_rng = np.random.default_rng(1000)
    held_out = [
        pack(data.scenes("held-out", 64, held_rng), 8, data.KINDS, held_rng),
        pack(data.scenes("held-out", 128, held_rng), 1, data.KINDS, held_rng, "before"),
    ]
    start = time.time()

    tower_optimizer = torch.optim.AdamW(
        [*net.model.vision_tower.parameters(), *net.model.multi_modal_projector.parameters(), *head.parameters()],
        betas=(0.9, 0.98),
        weight_decay=0.05,
        fused=True,
    )
    with contextlib.nullcontext() if args.init else progress_bar("vision tower") as advance:
        for step in range(0 if args.init else args.tower_steps):
            tower_optimizer.param_groups[0]["lr"] = rate(step / args.tower_steps, 2e-3)
            batch = pack(data.scenes("train", 2 * args.batch, rng, warp=True), 1, ("step",), rng)
            loss, wrong = patch_loss(image_features(net, batch.pixels), head, batch.patches)
            tower_optimizer.zero_grad()
            loss.backward()
            tower_optimizer.step()
            advance((step + 1) / args.tower_steps)
            if step % 100 == 99:
                print(
                    f"tower {step + 1}: {time.time() - start:.0f} s, loss {loss.item():.3f}, digits wrong {wrong.item():.3f}",
                    flush=True,
                )

    if not args.no_compile:
        for layer in net.model.language_model.layers:
            layer.forward = torch.compile(layer.forward)
    opts = optimizers(net, torch.nn.ModuleList([head, where]), args.lr)
    seen: list[torch.Tensor] = []
    net.model.multi_modal_projector.register_forward_hook(lambda _module, _args, out: seen.append(out))
    rows: list[dict[str, float]] = []
    mistakes = {order: np.ones(len(data.KINDS)) for order in ("after", "before")}
    step, progress, begun = 0, 0.0, time.time()
    with progress_bar("questions") as advance:
        while progress < 1.0:
            progress = max(step / args.steps, (time.time() - begun) / max(1.0, args.minutes * 60 - (begun - start)))
            for opt in opts:
                for group in opt.param_groups:
                    group["lr"] = rate(progress, 1.5 * args.lr if isinstance(opt, torch.optim.Muon) else args.lr)
            turn = math.floor((step + 1) * args.before) > math.floor(step * args.before)
            order = "before" if turn and mistakes["after"][0] < 0.5 else "after"
            weights = (0.1 + mistakes[order]) * curriculum(mistakes["after"])
            kinds = tuple(rng.choice(data.KINDS, 64, p=weights / weights.sum()).tolist())
            # One question each: more pictures make up for it.
            scenes = data.scenes("train", args.batch * (3 if order == "before" else 1), rng, warp=True)
            batch = pack(scenes, args.questions if order == "after" else 1, kinds, rng, order)
            seen.clear()
            hidden = hidden_states(net, batch)[:, batch.image.stop :]
            labels = batch.labels[:, batch.image.stop :]
            logits = net.lm_head(hidden)
            answer_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            place_loss = F.cross_entropy(where(hidden).flatten(0, 1), batch.places[:, batch.image.stop :].flatten())
            if order == "after":
                answer_loss = answer_loss + F.cross_entropy(logits.flatten(0, 1), batch.hints[:, batch.image.stop :].flatten())
            seen_loss, _ = patch_loss(seen[-1], head, batch.patches)
            for opt in opts:
                opt.zero_grad()
            (answer_loss + 0.5 * seen_loss + 0.5 * place_loss).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            for opt in opts:
                opt.step()
            right = ((logits.argmax(-1) == labels) | (labels < 0)).view(*batch.kinds.shape, -1).all(-1)
            for i in range(len(data.KINDS)):
                if (asked := batch.kinds == i).any():
                    mistakes[order][i] += 0.05 * (1 - right[asked].float().mean().item() - mistakes[order][i])
            step += 1
            advance(min(progress, 1.0))
            if step % 100 == 0 or progress >= 1.0:
                row = {
                    "at": step,
                    "seconds": round(time.time() - start, 1),
                    "lr": rate(progress, args.lr),
                    "loss": answer_loss.item(),
                    "place_loss": place_loss.item(),
                }
                rows.append({**row, **measure(net, head, held_out)})
                print(" ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
                with open(args.out / "curve.csv", "w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0])
                    writer.writeheader()
                    writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
                save(net, args.out)
    about = {
        "command": " ".join(["python", "-m", "examples.tiny_vlm.train", *sys.argv[1:]]),
        "steps_done": step, "seconds": round(time.time() - start, 1), "seed": args.seed, "threads": args.threads,
        "machine": f"{platform.machine()}, CPU, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers_version, "numpy": np.__version__,
        },
        "parameters": sum(p.numel() for p in net.parameters()),
        "sha256": hashlib.sha256((args.out / "model.safetensors").read_bytes()).hexdigest(),
        "last": rows[-1],
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    plot(rows, args.out / "curve.png")


def save(net: Any, path: Path) -> None:
    """Weights in float16 and the configuration."""
    from safetensors.torch import save_file

    # The head shares the embedding's tensor; the configuration says so.
    weights = {k: v.detach().half().contiguous() for k, v in net.state_dict().items() if not k.startswith("lm_head")}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    net.config.architectures = [type(net).__name__]
    net.config.save_pretrained(path)


def plot(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name in (*data.KINDS, "before", "dropped_at_2"):
        style = {"before": ":", "dropped_at_2": "--"}.get(name, "-")
        axes.plot([r["at"] for r in rows], [100 * r[name] for r in rows], style, label=name)
    axes.set(xlabel="step", ylabel="held-out answers right (%)", ylim=(0, 101))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
