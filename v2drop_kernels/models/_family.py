"""Which models are known, and where in a prompt their vision tokens lie. Host integers out, one synchronisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..core.layout import TokenLayout

VISION = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl")
PLAIN = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
Spans = tuple[tuple[tuple[int, int], ...], ...]
Grid = tuple[int, ...] | None


@dataclass(frozen=True)
class Family:
    """The parts of a model that hooks go to.

    Attributes
    ----------
    body : Module
        Sees ``input_ids``; the decoder itself when the model has no eyes.
    decoder : Module
        Has ``layers``, ``norm`` and ``rotary_emb``.
    kind : str
        ``config.model_type``.
    token_ids : tuple of int
        Placeholders of images and videos.
    """

    body: Any
    decoder: Any
    kind: str
    config: Any
    token_ids: tuple[int, ...]

    @property
    def vision_tokens(self) -> int | None:
        """Tokens of an image, where all images have the same number."""
        if self.kind != "llava" or self.config.vision_feature_select_strategy != "default":
            return None
        vision = self.config.vision_config
        return (int(vision.image_size) // int(vision.patch_size)) ** 2

    @property
    def attention(self) -> str:
        return str(self.decoder.config._attn_implementation)


def family_of(model: Any) -> Family:
    """Find the parts of ``model``; one sentence when it is none that we know."""
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("model must not be compiled: torch.compile bakes hooks in or leaves them out; give the model itself")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in VISION + PLAIN:
        known = ", ".join(VISION + PLAIN)
        raise ValueError(f"model must be one of {known} by its config.model_type, got {kind or type(model).__name__}")
    body, decoder = model.base_model, model.get_decoder()
    missing = [name for name in ("layers", "norm", "rotary_emb") if not hasattr(decoder, name)]
    if missing:
        raise ValueError(f"model must have a decoder with layers, norm and rotary_emb; {type(decoder).__name__} lacks {missing[0]}")
    config = model.config
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index") if kind in VISION else ()
    ids = {x for name in names if isinstance(x := getattr(config, name, None), int)}
    found = Family(body, decoder, kind, config, tuple(sorted(ids)))
    check_attention(found)
    kinds = getattr(decoder.config, "layer_types", None) or ()
    if any(name != "full_attention" for name in kinds) or (not kinds and getattr(decoder.config, "sliding_window", None)):
        raise ValueError("model must have full attention in every layer: a sliding window counts rows, and dropping moves them")
    return found


def check_attention(family: Family) -> None:
    """Raise unless masks of this attention implementation can be cut."""
    if family.attention not in ATTENTION:
        raise ValueError(f"model must use one of {', '.join(ATTENTION)} as attn_implementation, got {family.attention!r}")


def given_spans(spans: Any, batch: int, rows: int) -> Spans:
    """``spans=`` of the user for a batch that ``generate`` may have expanded (beams, several sequences per prompt)."""
    if isinstance(spans, list) and spans and len(spans) != batch and batch % len(spans) == 0:
        spans = [item for item in spans for _ in range(batch // len(spans))]
    try:
        return TokenLayout.padded(spans, rows, batch=batch).spans
    except (TypeError, ValueError) as error:
        what = f"spans do not fit a first forward of {batch} x {rows} rows, and cannot reach into a later one"
        raise type(error)(f"{what}: {error}") from None


def runs_of(input_ids: torch.Tensor, token_ids: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """``(item, token id, start, stop)`` of every run of one placeholder."""
    found = []
    for token in token_ids:
        edges = torch.nn.functional.pad((input_ids == token).to(torch.int8), (1, 1)).diff().nonzero().tolist()
        found += [(item, token, start, stop) for (item, start), (_, stop) in zip(edges[::2], edges[1::2], strict=True)]
    return sorted(found)


def found_spans(family: Family, given: dict[str, Any]) -> tuple[Spans, tuple[Grid, ...]]:
    """The spans of vision tokens of every item, and the grid of items with one image or video."""
    input_ids = given["input_ids"]
    runs = runs_of(input_ids, family.token_ids)
    spans: list[list[tuple[int, int]]] = [[] for _ in range(input_ids.shape[0])]
    for item, _, start, stop in runs:
        spans[item].append((start, stop))
    grids = _grids(family, given, runs)
    return tuple(map(tuple, spans)), tuple(grids.get(item) for item in range(len(spans)))


def _grids(family: Family, given: dict[str, Any], runs: list[tuple[int, int, int, int]]) -> dict[int, Grid]:
    """The grid of every item that has just one image or video; raises where the tokens of one image lie apart."""
    broken = "the tokens of an image must be contiguous, but "
    found: dict[int, list[tuple[int, ...]]] = {}
    for token in family.token_ids:
        mine = [run for run in runs if run[1] == token]
        images = _images(family, given, token)
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


def _images(family: Family, given: dict[str, Any], token: int) -> list[tuple[int, ...]] | int | None:
    """The patch grids of the images behind a placeholder, in order; or only their number; or None when nothing is known."""
    config = family.config
    video = token == getattr(config, "video_token_id", None)
    if family.kind in ("qwen2_vl", "qwen2_5_vl"):
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
    if family.kind == "llava" and square and given.get("image_sizes") is None:
        return [(side // patch, side // patch)] * pixels.shape[0]
    return int(pixels.shape[0])
