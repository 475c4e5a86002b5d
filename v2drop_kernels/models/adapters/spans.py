"""Where the vision tokens of a prompt lie, and the patch grids of its images. Host integers; one synchronisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ...core.layout import TokenLayout
from .model import ModelAdapter, patch_sides

Spans = tuple[tuple[tuple[int, int], ...], ...]
Grid = tuple[int, ...] | None
GridOf = Callable[[int, list[tuple[int, int, int]]], Grid]  # of an item and its runs: token, start, stop


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


def prompt_spans(adapter: ModelAdapter, given: dict[str, Any], position_ids: Any) -> tuple[Spans, tuple[Grid, ...]]:
    """The spans of vision tokens of every item, and the grid of items with one image or video.

    An image may lie in several spans, with separators or time stamps between them. ``position_ids`` are the decoder's.
    """
    input_ids = given["input_ids"]
    runs = placeholder_runs(input_ids, adapter.token_ids)
    spans: list[list[tuple[int, int]]] = [[] for _ in range(input_ids.shape[0])]
    for item, _, start, stop in runs:
        spans[item].append((start, stop))
    mine: list[list[tuple[int, int, int]]] = [[] for _ in spans]
    for item, token, start, stop in runs:
        mine[item].append((token, start, stop))
    grid_of = _grids_by_position(adapter, position_ids) if _is_mrope(position_ids) else _grids_by_tile(adapter, given, runs)
    return tuple(map(tuple, spans)), tuple(grid_of(item, its) if its else None for item, its in enumerate(mine))


def _is_mrope(position_ids: Any) -> bool:
    """Whether ids count time, rows and columns: ``[3, B, N]``, or ``[4, B, N]`` with the row of the text first."""
    return isinstance(position_ids, torch.Tensor) and position_ids.dim() == 3 and position_ids.shape[0] in (3, 4)


def _grids_by_position(adapter: ModelAdapter, position_ids: torch.Tensor) -> GridOf:
    """Grids from ids of time, row and column, which the model makes from its images also where ``generate`` keeps these."""
    table = position_ids[-3:].tolist()

    def one_run(item: int, start: int, stop: int) -> tuple[int, ...] | None:
        axes = [table[axis][item if len(table[axis]) > 1 else 0][start:stop] for axis in range(3)]
        sizes = tuple(len(set(axis)) for axis in axes)
        return sizes if math.prod(sizes) == stop - start else None

    def grid_of(item: int, runs: list[tuple[int, int, int]]) -> Grid:
        grids = {one_run(item, start, stop) for _, start, stop in runs}
        if len(grids) != 1 or None in grids:
            return None
        frames, rows, columns = grids.pop()  # type: ignore[misc]
        if len(runs) == 1:
            return (rows, columns) if frames == 1 else (frames, rows, columns)
        video = len({token for token, _, _ in runs}) == 1 and runs[0][0] in adapter.video_ids
        return (len(runs), rows, columns) if frames == 1 and video else None  # frames between time stamps

    return grid_of


def _grids_by_tile(adapter: ModelAdapter, given: dict[str, Any], runs: list[tuple[int, int, int, int]]) -> GridOf:
    """The square grid of items whose one image is one tile, if every tile has the same number of tokens."""
    tiles = _tiles(given)
    images = [run for run in runs if run[1] not in adapter.video_ids]
    tokens = sum(stop - start for _, _, start, stop in images)
    side, patch = patch_sides(adapter.config)
    width = math.isqrt(tokens // tiles) if tiles and tokens % tiles == 0 else 0
    regular = bool(width and side and patch) and width * width * tiles == tokens and (side // patch) % width == 0  # type: ignore[operator]

    def grid_of(item: int, runs: list[tuple[int, int, int]]) -> Grid:
        one = len(runs) == 1 and runs[0][0] not in adapter.video_ids and runs[0][2] - runs[0][1] == width * width
        return (width, width) if regular and one else None

    return grid_of


def _tiles(given: dict[str, Any]) -> int:
    """Pictures that the vision tower received for this batch; 0 if that is unknown. ``generate`` runs the tower beforehand."""
    outputs = given.get("mm_encoder_outputs") or {}
    features = getattr(outputs.get("image"), "pooler_output", None)
    if features is not None:
        return len(features)
    pixels = given.get("pixel_values")
    return math.prod(pixels.shape[:-3]) if isinstance(pixels, torch.Tensor) and pixels.dim() >= 4 else 0
