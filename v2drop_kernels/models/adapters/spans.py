"""Where the vision tokens of a prompt lie, and the patch grids of its images. Host integers; one synchronisation."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...core.layout import TokenLayout
from .model import ModelAdapter

Spans = tuple[tuple[tuple[int, int], ...], ...]
Grid = tuple[int, ...] | None


def given_spans(spans: Any, batch: int, rows: int) -> Spans:
    """``spans=`` of the user for a batch that ``generate`` may have expanded (beams, several sequences per prompt)."""
    if isinstance(spans, list) and spans and len(spans) != batch and batch % len(spans) == 0:
        spans = [item for item in spans for _ in range(batch // len(spans))]
    try:
        return TokenLayout.padded(spans, rows, batch=batch).spans
    except (TypeError, ValueError) as error:
        what = f"spans do not fit a first forward of {batch} x {rows} rows, and cannot reach into a later one"
        raise type(error)(f"{what}: {error}") from None


def placeholder_runs(input_ids: torch.Tensor, token_ids: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """``(item, token id, start, stop)`` of every run of one placeholder."""
    found = []
    for token in token_ids:
        edges = torch.nn.functional.pad((input_ids == token).to(torch.int8), (1, 1)).diff().nonzero().tolist()
        found += [(item, token, start, stop) for (item, start), (_, stop) in zip(edges[::2], edges[1::2], strict=True)]
    return sorted(found)


def prompt_spans(adapter: ModelAdapter, given: dict[str, Any]) -> tuple[Spans, tuple[Grid, ...]]:
    """The spans of vision tokens of every item, and the grid of items with one image or video."""
    input_ids = given["input_ids"]
    runs = placeholder_runs(input_ids, adapter.token_ids)
    spans: list[list[tuple[int, int]]] = [[] for _ in range(input_ids.shape[0])]
    for item, _, start, stop in runs:
        spans[item].append((start, stop))
    grids = _grids(adapter, given, runs)
    return tuple(map(tuple, spans)), tuple(grids.get(item) for item in range(len(spans)))


def _grids(adapter: ModelAdapter, given: dict[str, Any], runs: list[tuple[int, int, int, int]]) -> dict[int, Grid]:
    """The grid of every item that has just one image or video; raises where the tokens of one image lie apart."""
    broken = "the tokens of an image must be contiguous, but "
    found: dict[int, list[tuple[int, ...]]] = {}
    for token in adapter.token_ids:
        mine = [run for run in runs if run[1] == token]
        images = _images(adapter, given, token)
        if isinstance(images, int):  # only their number is known
            if len(mine) > images:
                raise ValueError(f"{broken}input_ids have {len(mine)} runs of them for {images} images")
            continue
        if images is None:
            continue
        left = iter(images)
        for item, _, start, stop in mine:
            n = stop - start
            while n > 0 and (grid := next(left, None)) is not None:
                found.setdefault(item, []).append(grid)
                n -= math.prod(grid)
            if n < 0:
                raise ValueError(f"{broken}the run of {stop - start} tokens at {start} of item {item} ends inside one")
    return {item: grids[0] for item, grids in found.items() if len(grids) == 1}


def _images(adapter: ModelAdapter, given: dict[str, Any], token: int) -> list[tuple[int, ...]] | int | None:
    """The patch grids of the images behind a placeholder, in order; or only their number; or None when nothing is known."""
    config = adapter.config
    video = token == getattr(config, "video_token_id", None)
    if adapter.kind in ("qwen2_vl", "qwen2_5_vl"):
        thw = given.get("video_grid_thw" if video else "image_grid_thw")
        if thw is None:
            return None
        merge = config.vision_config.spatial_merge_size
        return [(h // merge, w // merge) if t == 1 else (t, h // merge, w // merge) for t, h, w in thw.tolist()]
    pixels = given.get("pixel_values_videos" if video else "pixel_values")
    if pixels is None:
        return None
    vision = config.vision_config
    side: Any = getattr(vision, "image_size", None)
    patch: Any = getattr(vision, "patch_size", None)
    square = isinstance(side, int) and isinstance(patch, int) and config.vision_feature_select_strategy == "default"
    if adapter.kind == "llava" and square and given.get("image_sizes") is None:
        return [(side // patch, side // patch)] * pixels.shape[0]
    return int(pixels.shape[0])
