"""Where the vision tokens of a prompt lie, and the patch grids of its images. Host integers; one synchronisation."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...core.layout import TokenLayout
from .arguments import MethodReplacement
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
    if _is_mrope(position_ids):
        grid_of = _grids_by_position(adapter, position_ids)
    else:
        sizes = grid_thw(given)
        grid_of = _grids_by_tile(adapter, given, runs) if sizes is None else _grids_by_size(adapter, sizes, runs)
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


def _grids_by_size(adapter: ModelAdapter, sizes: torch.Tensor, runs: list[tuple[int, int, int, int]]) -> GridOf:
    """Grids of images whose patches ``(frames, rows, columns)`` the tower was given, where each image is one run."""
    images = [run for run in runs if run[1] not in adapter.video_ids]
    found: dict[int, list[tuple[int, ...]]] = {}
    if len(images) == len(sizes):
        for (item, _, start, stop), (frames, rows, columns) in zip(images, sizes.tolist(), strict=True):
            merge = math.isqrt(frames * rows * columns // (stop - start))
            fits = frames * (rows // merge) * (columns // merge) == stop - start
            found.setdefault(item, []).append((rows // merge, columns // merge) if fits and frames == 1 else ())

    def grid_of(item: int, runs: list[tuple[int, int, int]]) -> Grid:
        grids = found.get(item, [])
        return grids[0] or None if len(grids) == len(runs) == 1 else None

    return grid_of


def _grids_by_tile(adapter: ModelAdapter, given: dict[str, Any], runs: list[tuple[int, int, int, int]]) -> GridOf:
    """The square grid of items whose one image is one tile, if every tile has the same number of tokens."""
    images = [run for run in runs if run[1] not in adapter.video_ids]
    tokens = sum(stop - start for _, _, start, stop in images)
    side, patch = patch_sides(adapter.config)
    width = 0
    for tiles in _tiles(given) if side and patch else ():
        n = math.isqrt(tokens // tiles)
        if n and n * n * tiles == tokens and (side // patch) % n == 0:  # type: ignore[operator]
            width = n
            break

    def grid_of(item: int, runs: list[tuple[int, int, int]]) -> Grid:
        one = len(runs) == 1 and runs[0][0] not in adapter.video_ids and runs[0][2] - runs[0][1] == width * width
        return (width, width) if width and one else None

    return grid_of


def _tiles(given: dict[str, Any]) -> list[int]:
    """How many pictures the vision tower may have received for this batch. ``generate`` runs the tower beforehand."""
    outputs, pixels = given.get("mm_encoder_outputs") or {}, given.get("pixel_values")
    if isinstance(pixels, torch.Tensor) and pixels.dim() >= 4:
        return [n for n in (math.prod(pixels.shape[:-3]),) if n]
    features, hidden = (getattr(outputs.get("image"), name, None) for name in ("pooler_output", "last_hidden_state"))
    return [n for n in (len(x) for x in (features, hidden) if x is not None) if n]


GRID = "_v2drop_grid_thw"  # attribute of an output of the vision tower


def grid_thw(given: dict[str, Any]) -> torch.Tensor | None:
    """int64 ``[images, 3]`` that the model, or its vision tower in ``generate``, was called with; None without."""
    sizes = given.get("image_grid_thw")
    return sizes if sizes is not None else getattr((given.get("mm_encoder_outputs") or {}).get("image"), GRID, None)


def record_sizes(body: Any) -> Iterator[Any]:
    """A handle of a replaced ``get_image_features``, which notes the sizes of images on its output, for ``generate``."""
    encode = getattr(body, "get_image_features", None)
    if encode is None or "image_grid_thw" not in inspect.signature(encode).parameters:
        return

    @functools.wraps(encode)  # transformers reads signatures
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)
        sizes = inspect.signature(encode).bind(*args, **kwargs).arguments.get("image_grid_thw")
        if sizes is not None and not isinstance(output, tuple):
            object.__setattr__(output, GRID, sizes)
        return output

    yield MethodReplacement(body, "get_image_features", get_image_features)
