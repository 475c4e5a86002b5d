"""The tiny model answers a question about a picture, with all its vision tokens and with most of them dropped.

Run by `python -m v2drop_kernels demo` in a source checkout.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import v2drop_kernels as vk
from v2drop_kernels.cli.steps import step

from . import data, model

LAYERS = (2, 4, 6)
# The shares of V2Drop's presets for LLaVA-1.5: 192, 128 and 64 of 576 tokens, from the first drop on.
SHARES = {"192": 33, "128": 22, "64": 11}
RANKINGS = {
    "variation": {"policy": "variation"},
    "variation cosine": {"policy": "variation", "metric": "cosine"},
    "last-token attention": {"policy": "fastv"},
    "random": {"policy": "random"},
}
MORE = 64  # further questions, because one answer may be right or wrong by chance


class Answer(NamedTuple):
    digits: tuple[int, ...]
    report: Any
    kept: tuple[tuple[int, ...], ...]


def schedule_of(preset: str, ranking: str) -> vk.Schedule:
    """Three drops before blocks 2, 4 and 6 of 8, which leave the preset's share of 100 tokens, averaged from block 2 on."""
    share, depth, first = SHARES[preset], 8, LAYERS[0]
    average = data.TOKENS * (first + share / 100 * (depth - first)) / depth
    return vk.schedule.solve(average=average, layers=LAYERS, n=data.TOKENS, depth=depth, at_least=1, **RANKINGS[ranking])


def choose(question: str | None, seed: int) -> data.Example:
    """A held-out picture, and the question in words or one of its own."""
    if question is None:
        return data.examples("held-out", 1, seed=seed, kinds=("trail",), orders=("after",))[0]
    words = tuple(question.removesuffix("?").split())
    rng = np.random.default_rng([seed, data.SPLITS.index("held-out")])
    scenes = data.scenes("held-out", 1, rng)
    for kind in data.KINDS * 1000:  # questions are drawn, so draw until it is this one
        asked = data.ask(scenes.digits[0], scenes.colours[0], kind, rng)
        if asked.words == words:
            relevant = tuple(int(scenes.patches[0, cell]) for cell in dict.fromkeys(asked.cells))
            return data.Example(scenes.pixels[0], data.prompt(words), asked.answer, asked, "after", relevant)
    like = "'trail red', 'row blue', 'list red blue cyan', 'red below right' or 'red next next'"
    raise ValueError(f"question must be one that this picture can answer, such as {like}, got {question!r}")


def ask(net: Any, examples: Sequence[data.Example], schedule: vk.Schedule | None, backend: str | None) -> list[Answer]:
    """Answers to questions that have one length."""
    inputs = {
        "input_ids": torch.tensor([e.input_ids for e in examples]),
        "pixel_values": torch.from_numpy(np.stack([e.pixels for e in examples])),
    }
    dropper = vk.models.TokenDropper(schedule or vk.Schedule(()), backend=backend)
    with torch.inference_mode(), dropper(net) as session:
        ids = net.generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=4, do_sample=False)
        found = ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [Answer(data.decode(row), session.report(), session.kept(i).stages) for i, row in enumerate(found)]


def run(args: argparse.Namespace) -> int:
    """Ask, print and draw; 0 when every ranking keeps what the plain PyTorch reference keeps, else 1."""
    if args.ranking not in RANKINGS:
        raise ValueError(f"ranking must be one of {', '.join(map(repr, RANKINGS))}, got {args.ranking!r}")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # 3 MB are loaded at once
    example = choose(args.question, args.seed)
    with step("loading the trained model"):
        net = model.load()
    words, truth = " ".join(example.question.words), example.answer
    backend = args.backend or vk.explain(torch.zeros(1)).chosen
    print(f"picture   held-out digits, seed {args.seed}: 10 x 10 patches; nine cells, numbered like a telephone's keys")
    print(f'question  "{words}?" is {_text(truth)}; it needs {len(example.relevant)} of the {data.TOKENS} patches')
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"model     examples/tiny_vlm, a LLaVA of {parameters:.2f} M parameters and 8 blocks, trained from scratch")
    layers, share = ", ".join(map(str, LAYERS)), SHARES[args.preset]
    print(
        f"schedule  drops before blocks {layers}; from there on {share} % of the tokens in the mean; backend {backend}\n",
        flush=True,
    )

    more = data.examples("held-out", MORE, seed=args.seed + 1, kinds=("row", "trail"), orders=("after",))
    answers, rows, same = {}, [], True
    for name in ("nothing dropped", *RANKINGS):
        schedule = schedule_of(args.preset, name) if name in RANKINGS else None
        with step(f"{name}: this question, and {MORE} others"):
            (found,), (wanted,) = (ask(net, [example], schedule, which) for which in (args.backend, "reference"))
            right = sum(a.digits == e.answer for a, e in zip(ask(net, more, schedule, args.backend), more, strict=True))
        equal = found.kept == wanted.kept and found.digits == wanted.digits
        same &= equal
        answers[name] = found
        needed = [len(set(kept) & set(example.relevant)) for kept in found.kept]
        rows.append(
            (
                name,
                _text(found.digits),
                "right" if found.digits == truth else "wrong",
                " > ".join(map(str, (len(example.relevant), *needed))),
                f"{right} of {MORE}",
                "equal" if equal else "NOT EQUAL",
            )
        )
    shown = answers[args.ranking]
    report, left, stages = shown.report, data.TOKENS, []
    for number, (layer, kept) in enumerate(zip(LAYERS, shown.kept, strict=True), 1):
        at = report.layers[layer]
        stages.append((str(number), str(layer), f"{left} -> {len(kept)}", str(at.rows), f"{at.kv_bytes:,}", f"{at.flops:,}"))
        left = len(kept)
    _print(("stage", "before block", "vision tokens", "rows", "KV bytes of a block", "FLOPs of a block"), stages)
    print(
        f"KV cache {report.kv_bytes / report.full_kv_bytes:.0%}, FLOPs {report.flops / report.full_flops:.0%} of the undropped "
        f"prompt's; {report.average_tokens():.2f} of {data.TOKENS} vision tokens enter a block in the mean\n"
    )
    _print(("ranking", "answer", "", "needed patches left", "other pictures right", "reference"), rows)
    print("other pictures: 'row' and 'trail' questions. reference: kept tokens and answer with plain PyTorch drops.\n")

    figure = vk.plot.kept(
        example.pixels.transpose(1, 2, 0).clip(0, 1),
        [range(data.TOKENS), *shown.kept],
        grid=(data.SIDE, data.SIDE),
        titles=[f"all {data.TOKENS} tokens", *(f"from block {x} on: {len(k)}" for x, k in zip(LAYERS, shown.kept, strict=True))],
        caption=f'"{words}?" is {_text(truth)}. {args.ranking}: {_text(shown.digits)}',
    )
    try:
        figure.savefig(args.output)
    except OSError as error:
        raise ValueError(f"cannot write the picture: {error}") from error
    print(f"picture   {args.output}: what {args.ranking} keeps")
    print(f"result    {'equal to' if same else 'NOT equal to'} the plain PyTorch reference")
    return 0 if same else 1


def _print(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _text(digits: tuple[int, ...]) -> str:
    return " ".join(map(str, digits)) or "nothing"
