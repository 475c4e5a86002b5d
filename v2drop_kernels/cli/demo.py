"""The demos: ``python -m v2drop_kernels demo [IMAGE]``.

Without a photo, in a source checkout, the small trained model of ``examples/tiny_vlm`` answers a question with and without drops.
A photo is run through a LLaVA-shaped decoder that drops its vision tokens in three stages, each checked and timed. The decoder has
seeded random weights, so the picture shows how tokens are dropped, not what a trained model would keep. Progress is printed on
stderr, results on stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import plot, reference
from ..backends.choice import BACKENDS, backend, explain
from ..core.layout import TokenLayout
from ..ops.drop_tokens import drop_tokens
from ..schedule import Schedule, preset
from .demo_model import GRID, HEAD_DIM, PATCH, SIDE, SYSTEM_TOKENS, Decoder
from .steps import step

PRESETS = {budget: preset(f"v2drop-{budget}") for budget in ("192", "128", "64")}
SAMPLES = ("china", "flower")
TEXT_TOKENS = 24  # a short question and the words that ask for the answer
WARM_UPS = 2


class DemoError(Exception):
    """An error that is shown to the user in one line."""


class Times(NamedTuple):
    """Of repeated runs, in microseconds."""

    median: float
    least: float

    @property
    def noisy(self) -> bool:
        return self.median > 1.5 * self.least

    def __str__(self) -> str:
        return f"{'~' if self.noisy else ''}{self.median:.0f} us"


class Stage(NamedTuple):
    """One drop step."""

    layer: int
    before: int
    after: int
    backend: str
    ours: Times
    torch: Times
    equal: bool
    kept: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo."""
    parser.add_argument(
        "image",
        nargs="?",
        metavar="IMAGE",
        help=f"a photo, or one of scikit-learn's samples: {', '.join(SAMPLES)}, for a LLaVA-shaped decoder with random weights "
        "(default: a picture and a question for the small trained model of a source checkout)",
    )
    parser.add_argument("--question", help="question for the trained model, for instance 'row blue' or 'red below right'")
    parser.add_argument("--ranking", default="variation", help="of the trained model: the one drawn (default: variation)")
    parser.add_argument("--preset", choices=PRESETS, default="192", help="V2Drop's budget for LLaVA-1.5 (default: 192)")
    parser.add_argument("--backend", choices=BACKENDS, help="force a backend (default: the first that can serve)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--seed", type=_seed, default=0, help="of the picture, or of the random weights (default: 0)")
    parser.add_argument("--repeats", type=_positive, default=31, help="timed runs of each drop step (default: 31)")
    parser.add_argument("-o", "--output", type=Path, default=Path("v2drop_demo.png"), help="the picture (default: v2drop_demo.png)")
    # A narrower decoder keeps the tests quick.
    parser.add_argument("--width", type=_width, default=Decoder.width, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run the demo with parsed arguments; 0 when every stage equals the reference, else 1."""
    _check_output(args.output)
    if args.image is not None:
        if args.question is not None:
            raise DemoError("--question is for the trained model; the decoder for photos has random weights")
        return run_photo(args)
    missing = [name for name in ("transformers", "sklearn") if importlib.util.find_spec(name) is None]
    checkout = Path(__file__).resolve().parents[2]
    if not missing and (checkout / "examples" / "tiny_vlm" / "demo.py").exists():
        sys.path.insert(0, str(checkout))
        return int(importlib.import_module("examples.tiny_vlm.demo").run(args))
    why = f"{missing[0]} is not installed" if missing else "it comes with a source checkout"
    if args.question is not None:
        raise DemoError(f"--question needs the trained model of examples/tiny_vlm, and {why}")
    print(f"The trained model of examples/tiny_vlm is not available ({why}): using a photo and random weights instead.\n")
    return run_photo(args)


def run_photo(args: argparse.Namespace) -> int:
    """Run a photo through the decoder with random weights."""
    began = time.perf_counter()
    name, pixels = load_image(args.image or SAMPLES[0])
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise DemoError("no GPU was found: torch.cuda.is_available() is False")
    with backend(args.backend) if args.backend else contextlib.nullcontext():
        explain(torch.zeros(1, device=device))  # raises where the backend cannot serve, before any work is done
    decoder = Decoder(width=args.width, seed=args.seed, device=device)
    schedule = PRESETS[args.preset]

    heads, threads = decoder.width // HEAD_DIM, torch.get_num_threads()
    print(f"photo     {name}, {SIDE} x {SIDE} pixels, {GRID} x {GRID} = {GRID * GRID} patches of {PATCH} x {PATCH}")
    print(f"prompt    {SYSTEM_TOKENS} system tokens, {GRID * GRID} vision tokens, {TEXT_TOKENS} text tokens")
    print(
        f"decoder   {decoder.layers} LLaVA-shaped layers, width {decoder.width}, {heads} heads of {HEAD_DIM}, float32, "
        f"{device}" + (f" with {threads} threads" if device == "cpu" else "")
    )
    print(f"weights   RANDOM (seed {decoder.seed}): the kept patches show how tokens are dropped, not what a trained model keeps")
    steps = ", ".join(f"layer {stage.layer} drops {1 - stage.keep:.0%}" for stage in schedule.stages)
    print(f'schedule  V2Drop "{args.preset} tokens" preset for LLaVA-1.5: {steps}\n', flush=True)

    with torch.inference_mode():
        stages, per_layer, kv_rows = prefill(decoder, pixels, schedule, args.backend, args.repeats)

    _print_table(stages, args.repeats)
    total = GRID * GRID
    print(f"\nvision tokens per layer: {_runs(per_layer)}; average {statistics.mean(per_layer):.2f} of {total}")
    full = SYSTEM_TOKENS + total + TEXT_TOKENS
    print(f"KV cache rows per layer: {_runs(kv_rows)}; {sum(kv_rows) / (full * len(kv_rows)):.0%} of an undropped cache")
    figure = plot.kept(
        pixels.numpy(),
        [range(total), *(stage.kept for stage in stages)],
        grid=(GRID, GRID),
        titles=[f"before: {total} vision tokens", *(f"after the drop at layer {s.layer}: {len(s.kept)}" for s in stages)],
        caption=f'V2Drop "{args.preset} tokens" preset; a decoder with random weights, so not what a trained model would keep',
    )
    try:
        figure.savefig(args.output)
    except OSError as error:
        raise DemoError(f"cannot write the picture: {error}") from error
    print(f"picture   {args.output}")
    wrong = [str(stage.layer) for stage in stages if not stage.equal]
    good, bad = "every stage equals the reference, bit for bit", f"NOT equal to the reference at layer {', '.join(wrong)}"
    print(f"result    {bad if wrong else good}; {time.perf_counter() - began:.1f} s")
    return 1 if wrong else 0


def prefill(
    decoder: Decoder, pixels: Tensor, schedule: Schedule, forced: str | None, repeats: int
) -> tuple[list[Stage], list[int], list[int]]:
    """Run the prompt through all layers; return the drop stages, and the vision tokens and KV rows of every layer."""
    with step("embedding the prompt"):
        h = decoder.embed(pixels, TEXT_TOKENS)
    ids = torch.arange(h.shape[1], device=h.device)[None]
    rope = decoder.rope(ids)
    vision = (SYSTEM_TOKENS, SYSTEM_TOKENS + GRID * GRID)
    layout = TokenLayout.padded(vision, h.shape[1], batch=1)
    h_prev = h
    planned = {stage.layer: stage for stage in schedule.stages}
    stages, per_layer, cache = [], [], []
    starts = sorted({0, *planned})
    for start, stop in zip(starts, [*starts[1:], decoder.layers], strict=True):
        if start in planned:
            # The score is the change by the previous layer: its input against this layer's input. Caches of earlier layers keep
            # all their rows, as in V2Drop; later layers have fewer rows, with their old position ids.
            before = _vision_tokens(layout)
            k = planned[start].count(before)
            with step(f"drop before layer {start}: checked and timed {repeats} times"):
                dropped, used, ours, theirs, equal = _checked(
                    h_prev, h, k, droppable=layout, position_ids=ids, rope=rope, forced=forced, repeats=repeats
                )
            h, ids, rope, layout = dropped.hidden, dropped.position_ids, dropped.rope, dropped.layout
            patches = [p - vision[0] for p in ids[0].tolist() if vision[0] <= p < vision[1]]
            stages.append(Stage(start, before, _vision_tokens(layout), used, ours, theirs, equal, patches))
        with step(f"layers {start} to {stop - 1}: drawing weights and running"):
            for layer in range(start, stop):
                per_layer.append(_vision_tokens(layout))
                h_prev = h
                h, kv = decoder.block(layer, h, rope)
                cache.append(kv)
    return stages, per_layer, [kv[0].shape[2] for kv in cache]


def load_image(source: str) -> tuple[str, Tensor]:
    """A photo as CLIP sees it, uint8 ``[336, 336, 3]``: shortest edge resized to 336, centre cropped; and its name."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise DemoError(f"photos need Pillow ({error}): pip install 'v2drop-kernels[plot]'") from error
    path = Path(source)
    if source in SAMPLES and not path.exists():
        found = importlib.util.find_spec("sklearn")
        if found is None or not found.submodule_search_locations:
            raise DemoError(f"the sample {source!r} ships with scikit-learn: pip install 'v2drop-kernels[plot]', or give a photo")
        path = Path(found.submodule_search_locations[0]) / "datasets" / "images" / f"{source}.jpg"
    if path.is_dir():
        raise DemoError(f"cannot read {path}: it is a directory")
    if not path.exists():
        raise DemoError(f"cannot read {path}: no such file")
    if not path.is_file():  # opening a FIFO would wait for its other end
        raise DemoError(f"cannot read {path}: it is not a file")
    try:
        with Image.open(path) as opened:
            photo = ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError as error:
        raise DemoError(f"cannot read {path}: it is not an image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DemoError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    fitted = ImageOps.fit(photo, (SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)
    return f"{path.name} ({photo.width} x {photo.height})", pixels


def _checked(
    h_prev: Tensor, h: Tensor, k: int, *, forced: str | None, repeats: int, **given: Any
) -> tuple[Any, str, Times, Times, bool]:
    """One drop step, the name of its backend, its time, the reference's time, and whether the two are equal."""
    ours = functools.partial(drop_tokens, h_prev, h, k, backend=forced, **given)
    theirs = functools.partial(reference.drop_tokens, h_prev, h, k, **given)
    if forced is None:
        used = explain(h).chosen
    else:
        with backend(forced):
            used = explain(h).chosen
    dropped, wanted = ours(), theirs()
    pairs = zip(_results(dropped), _results(wanted), strict=True)
    equal = all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b)) for a, b in pairs)
    times: tuple[list[float], list[float]] = ([], [])
    threads = torch.get_num_threads()
    # One thread: on a busy machine torch's threads wait for each other, and 80 ms instead of 0.4 were measured at layer 3.
    torch.set_num_threads(1)
    try:
        for i in range(WARM_UPS + repeats):
            for call, kept in zip((ours, theirs), times, strict=True):
                began = time.perf_counter()
                call()
                if h.is_cuda:
                    torch.cuda.synchronize()
                if i >= WARM_UPS:
                    kept.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    mine, theirs_took = (Times(statistics.median(kept) * 1e6, min(kept) * 1e6) for kept in times)
    return dropped, used, mine, theirs_took, equal


def _results(dropped: Any) -> list[Tensor]:
    return [dropped.keep, dropped.hidden, dropped.position_ids, *dropped.rope]


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _vision_tokens(layout: TokenLayout) -> int:
    return sum(stop - start for start, stop in layout.spans[0])


def _print_table(stages: list[Stage], repeats: int) -> None:
    rows = [("stage", "layer", "tokens", "vision", "backend", "drop step", "reference", "ratio", "result")]
    for number, s in enumerate(stages, 1):
        text = SYSTEM_TOKENS + TEXT_TOKENS
        rows.append(
            (
                str(number),
                str(s.layer),
                f"{s.before + text} -> {s.after + text}",
                f"{s.before} -> {s.after}",
                s.backend,
                str(s.ours),
                str(s.torch),
                f"{'~' if s.ours.noisy or s.torch.noisy else ''}{s.torch.median / s.ours.median:.1f}x",
                "equal" if s.equal else "NOT EQUAL",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for i, row in enumerate(rows):
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
        if i == 0:
            print("  ".join("-" * w for w in widths))
    print(
        f"\ndrop step: hidden states, position ids and rope tables; median of {repeats} runs, one thread. reference: the plain\n"
        "PyTorch specification on the same inputs, run in turn with it and not tuned for speed (make bench compares with tuned\n"
        "PyTorch). equal: kept rows, hidden states, position ids and rope tables have the same bits."
    )
    if any(s.ours.noisy or s.torch.noisy for s in stages):
        print("~: the median is over 1.5 times the shortest run; other programs kept the machine busy, so the ratio is unreliable.")


def _runs(values: list[int]) -> str:
    return ", ".join(f"{value} x{len(list(same))}" for value, same in itertools.groupby(values))


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise DemoError(f"cannot write {path}: it is a directory")
    if not path.parent.is_dir():
        raise DemoError(f"cannot write {path}: no such directory {path.parent}")
    try:
        known = plot.savable(path.suffix)
    except ImportError as error:
        raise DemoError(str(error)) from error
    if not known:
        raise DemoError(f"cannot write {path}: unknown picture format {path.suffix!r} (try .png)")


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**32), got {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _width(text: str) -> int:
    value = int(text)
    if value < HEAD_DIM or value % HEAD_DIM:
        raise argparse.ArgumentTypeError(f"must be a multiple of {HEAD_DIM}, got {text}")
    return value
