"""Pictures of what was kept. matplotlib (extra ``plot``) is imported when a picture is made, not before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def kept(
    image: Any,
    kept: Any,
    *,
    grid: tuple[int, int] = (24, 24),
    titles: Sequence[str] | None = None,
    caption: str | None = None,
) -> Any:
    """Draw a photo with its dropped patches greyed, one panel per stage.

    Parameters
    ----------
    image : array
        ``[H, W, 3]`` uint8, or floats in [0, 1]; a PIL image will do.
    kept : sequence
        The patches that a stage keeps, numbered row by row as vision tokens are; or a list with one such sequence (or
        Tensor) per stage. ``-1`` (the padding of ragged results) is skipped.
    grid : (int, int)
        Rows and columns of patches.
    titles : sequence of str, optional
        One per panel; default the number of kept patches.
    caption : str, optional
        A line below the panels.

    Returns
    -------
    matplotlib.figure.Figure
        Save it with ``figure.savefig(path)``.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    ValueError
        A patch outside the grid; an image, grid or titles that do not fit.

    Examples
    --------
    >>> figure = kept(np.zeros((336, 336, 3)), [range(576), range(100, 388), []])
    >>> [axis.get_title() for axis in figure.axes]
    ['576 of 576', '288 of 576', '0 of 576']
    """
    pixels = _pixels(image)
    rows, columns = grid
    if rows < 1 or columns < 1 or pixels.shape[0] < rows or pixels.shape[1] < columns:
        raise ValueError(f"grid must be (rows, columns), 1 to the pixels of the image {pixels.shape[:2]}, got {grid}")
    masks = [_mask(stage, rows, columns) for stage in _stages(kept)]
    if titles is None:
        titles = [f"{int(mask.sum())} of {rows * columns}" for mask in masks]
    if len(titles) != len(masks):
        raise ValueError(f"titles must have one entry per stage ({len(masks)}), got {len(titles)}")
    figure_class = _figure_class()

    height, width = pixels.shape[:2]
    panel = 3.2
    top, bottom = 0.42, 0.42 if caption else 0.08  # inches
    size = (panel * len(masks), (panel - 0.12) * height / width + top + bottom)
    figure = figure_class(figsize=size, dpi=150, facecolor="white")
    figure.subplots_adjust(left=0.012, right=0.988, top=1 - top / size[1], bottom=bottom / size[1], wspace=0.04)
    for axis, mask, title in zip(figure.subplots(1, len(masks), squeeze=False)[0], masks, titles, strict=True):
        axis.imshow(_greyed(pixels, mask), interpolation="nearest")
        axis.set_title(title, fontsize=9.5, color="#222222", pad=5)
        axis.axis("off")
    if caption:
        figure.text(0.5, 0.14 / size[1], caption, ha="center", va="bottom", fontsize=8, color="#666666")
    return figure


def savable(suffix: str) -> bool:
    """Whether a picture can be saved under this suffix (``".png"``)."""
    canvas = _figure_class()().canvas
    return suffix.lower().lstrip(".") in canvas.get_supported_filetypes()


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib ({error}): pip install 'v2drop-kernels[plot]'") from error
    return Figure


def _pixels(image: Any) -> np.ndarray[Any, Any]:
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype.kind not in "uf":
        raise ValueError(f"image must be [H, W, 3], uint8 or float, got {pixels.dtype} of shape {pixels.shape}")
    return pixels / 255.0 if pixels.dtype.kind == "u" else pixels.clip(0.0, 1.0)


def _stages(kept: Any) -> list[list[int]]:
    stages: list[Any] = [stage.tolist() if isinstance(stage, torch.Tensor | np.ndarray) else stage for stage in kept]
    if all(isinstance(x, int | np.integer) for x in stages):
        stages = [stages]
    return [[int(x) for x in stage] for stage in stages]


def _mask(stage: Sequence[int], rows: int, columns: int) -> np.ndarray[Any, Any]:
    mask = np.zeros(rows * columns, dtype=bool)
    for patch in stage:
        if not -1 <= patch < rows * columns:
            raise ValueError(f"kept must name patches of the grid, 0 to {rows * columns - 1}, got {patch}")
        if patch >= 0:
            mask[patch] = True
    return mask.reshape(rows, columns)


def _greyed(pixels: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The photo where ``mask``, a pale grey version of it elsewhere, and thin light lines between the patches."""
    rows, columns = mask.shape
    row_of = np.arange(pixels.shape[0]) * rows // pixels.shape[0]
    column_of = np.arange(pixels.shape[1]) * columns // pixels.shape[1]
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    pale = (0.52 + 0.26 * grey)[..., None].repeat(3, axis=2)
    shown = np.where(mask[row_of][:, column_of][..., None], pixels, pale)
    if not mask.all():
        edge = np.zeros(pixels.shape[:2], dtype=bool)
        edge[1:] |= (np.diff(row_of) > 0)[:, None]
        edge[:, 1:] |= (np.diff(column_of) > 0)[None]
        shown[edge] = 0.7 * shown[edge] + 0.3
    return shown
