"""Figures of the kept tokens and of their positions. matplotlib (extra ``plot``) is imported when a figure is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        ``[H, W, 3]`` uint8, or floats in [0, 1]; a PIL image is accepted.
    kept : sequence
        The patches that a stage keeps, numbered row by row like vision tokens; or a list with one such sequence (or Tensor) per
        stage. ``-1`` (the padding of ragged results) is skipped.
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


def retention(kept: Any, n: int | Sequence[int], *, intervals: int = 10) -> np.ndarray[Any, Any]:
    """The share of the tokens that is kept in each of equal intervals of the sequence, over all prompts together.

    Parameters
    ----------
    kept : sequence
        Per prompt the kept tokens, numbered from 0; for one prompt, its sequence (or Tensor) alone is accepted. ``-1`` is skipped.
    n : int | sequence of int
        How many tokens each prompt had.
    intervals : int
        Token ``i`` of ``n`` lies in interval ``floor(i * intervals / n)``.

    Returns
    -------
    numpy.ndarray
        float64 ``[intervals]``; NaN where no prompt had a token.

    Examples
    --------
    >>> retention([0, 1, 2, 5], 8, intervals=2)
    array([0.75, 0.25])
    """
    if intervals < 1:
        raise ValueError(f"intervals must be at least 1, got {intervals}")
    prompts = _stages(kept)
    sizes = [n] * len(prompts) if isinstance(n, int | np.integer) else list(n)
    if len(sizes) != len(prompts):
        raise ValueError(f"n must be an int or one per prompt ({len(prompts)}), got {len(sizes)}")
    had, left = np.zeros(intervals), np.zeros(intervals)
    for prompt, size in zip(prompts, sizes, strict=True):
        where = np.arange(size) * intervals // max(size, 1)
        had += np.bincount(where, minlength=intervals)
        left += np.bincount(where[_mask(prompt, 1, size, "tokens")[0]], minlength=intervals)
    return np.divide(left, had, out=np.full(intervals, np.nan), where=had > 0)


def positional_bias(
    kept: Mapping[str, Any], n: int | Sequence[int], *, intervals: int = 10, title: str | None = None, caption: str | None = None
) -> Any:
    """Draw which part of the sequence each method keeps: V2Drop's figure on positional bias.

    A method without bias lies on the dashed line, the share that is kept of all tokens (drawn when it is the same for all
    methods). The paper's setting is ten intervals and half of the tokens dropped before layer 3.

    Parameters
    ----------
    kept : mapping
        Name of each method in the legend, and the argument ``kept`` of :func:`retention` for it.
    n, intervals
        As in :func:`retention`.
    title, caption : str, optional
        Above and below.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> figure = positional_bias({"the first half": [range(50)], "every other": [range(0, 100, 2)]}, 100)
    >>> figure.axes[0].get_lines()[1].get_ydata().tolist()
    [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    if not isinstance(kept, Mapping) or not kept:
        raise ValueError("kept must map at least one method's name to its kept tokens")
    shares = {name: retention(prompts, n, intervals=intervals) for name, prompts in kept.items()}
    overall = {float(retention(prompts, n, intervals=1)[0]) for prompts in kept.values()}

    at = np.arange(1, intervals + 1)
    figure, axis = _lines(shares, at)
    if len(overall) == 1:
        axis.axhline(overall.pop(), color="#888888", linewidth=0.8, linestyle="--", zorder=0, label="no bias")
    axis.set_xlabel(
        f"interval of the vision tokens, first to last of {intervals}" + (f"\n{caption}" if caption else ""), fontsize=9
    )
    axis.set_ylabel("share kept", fontsize=9)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xticks(at)
    axis.legend(fontsize=8, frameon=False)
    if title:
        axis.set_title(title, fontsize=10)
    return figure


def ilvas(curves: Mapping[str, Any], *, filters: Sequence[int] = (), title: str | None = None) -> Any:
    """Draw ILVAS over the layers, one line per curve, and the filter layers: HiDivDrop's figure 6.

    Parameters
    ----------
    curves : mapping
        Name of each curve in the legend, and an :class:`v2drop_kernels.models.Ilvas` or its values.
    filters : sequence of int
        Layers to mark, such as ``curve.filters(4)``.
    title : str, optional
        Above.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> figure = ilvas({"n = 4": [float("nan"), 0.5, 0.75, 0.25]}, filters=[2])
    >>> figure.axes[0].get_lines()[0].get_ydata().tolist()
    [nan, 0.5, 0.75, 0.25]
    """
    values = {name: list(getattr(curve, "values", curve)) for name, curve in curves.items()}
    if len({len(x) for x in values.values()}) != 1:
        raise ValueError("curves must be at least one, all of them over the same layers")
    depth = len(next(iter(values.values())))
    figure, axis = _lines(values, np.arange(depth))
    for i, layer in enumerate(filters):
        if not 0 <= layer < depth:
            raise ValueError(f"filters must name layers, 0 to {depth - 1}, got {layer}")
        axis.axvline(layer, color="#888888", linewidth=0.8, linestyle="--", zorder=0, label="" if i else "filter layers")
    axis.set_xlabel("layer, 0-based", fontsize=9)
    axis.set_ylabel("ILVAS", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    if title:
        axis.set_title(title, fontsize=10)
    return figure


def _lines(series: Mapping[str, Any], at: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    figure = _figure_class()(figsize=(6.4, 3.8), dpi=150, facecolor="white", layout="constrained")
    axis = figure.subplots()
    for i, (name, values) in enumerate(series.items()):
        axis.plot(at, values, label=name, marker="os^Dv"[i % 5], markersize=4, linewidth=1.5)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


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
    return pixels / float(np.iinfo(pixels.dtype).max) if pixels.dtype.kind == "u" else pixels.clip(0.0, 1.0)


def _stages(kept: Any) -> list[list[int]]:
    stages: list[Any] = [stage.tolist() if isinstance(stage, torch.Tensor | np.ndarray) else stage for stage in kept]
    if all(isinstance(x, int | np.integer) for x in stages):
        stages = [stages]
    return [[int(x) for x in stage] for stage in stages]


def _mask(stage: Sequence[int], rows: int, columns: int, what: str = "patches of the grid") -> np.ndarray[Any, Any]:
    mask = np.zeros(rows * columns, dtype=bool)
    for patch in stage:
        if not -1 <= patch < rows * columns:
            raise ValueError(f"kept must name {what}, 0 to {rows * columns - 1}, got {patch}")
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
