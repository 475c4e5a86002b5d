"""The CLIP tower of LLaVA and LLaVA-NeXT: hooks that record what a policy needs, and which of its tokens became which row.

A *tile* is one picture that the tower receives; *tower tokens* are numbered ``tile * P + token``, and token 0 is CLS. The order in
which the model places features in the prompt is read from the model itself: LLaVA keeps it, and for LLaVA-NeXT
``pack_image_features`` is called a second time with token numbers in place of features, so that tiles, unpadding and newlines are
placed as it places them. ``generate`` runs the tower before the model's forward, so nothing here relies on their nesting. Nothing
is read on the host that the model does not read itself.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ops.attention_score import cls_attention_score
from .arguments import MethodReplacement
from .model import ModelAdapter

TOWER = "tower"  # key of the Tower in a policy's tower_cache


@dataclass
class Tower(threading.local):
    """One run of the tower; every thread has its own.

    Attributes
    ----------
    heads : int
        Attention heads of a block.
    tiles, width : int
        ``T`` pictures of ``P`` tokens, CLS counted.
    queries, keys : dict
        By block, as it was requested (-1 is the last one): the CLS token's ``[T, 1, C]``, and all tokens' ``[T, P, C]``, as
        ``q_proj`` and ``k_proj`` return them.
    features : Tensor | None
        ``[T, P - 1 or P, C']``: the input of the projector.
    grids : list
        Per image the ``(rows, columns)`` of its tiles, which follow one tile of the whole image; ``(0, 0)`` if there is only that.
    order : Tensor | None
        int64 ``[M]``: the tower token of each feature that the model places in the prompts, in order; -1 for a newline.
    input_ids : Tensor | None
        int64 ``[B, N]`` of the forward.
    notes : dict
        Written and read by a policy's own hooks in the tower.
    """

    heads: int
    tiles: int = 0
    width: int = 0
    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    features: torch.Tensor | None = None
    grids: list[tuple[int, int]] = field(default_factory=list)
    order: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    notes: dict[Any, Any] = field(default_factory=dict)

    def cls(self, layer: int, form: str, backend: str | None = None) -> torch.Tensor:
        """:func:`v2drop_kernels.cls_attention_score` of a recorded block: float32 ``[T, P - 1]``."""
        query, keys = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.queries[layer], self.keys[layer]))
        return cls_attention_score(query, keys, form=form, backend=backend)

    def number(self, tiles: range, features: int, device: torch.device) -> torch.Tensor:
        """The tower tokens of projected features ``[tiles, features]``: the last ones of each tile if CLS was left out."""
        start = torch.arange(tiles.start, tiles.stop, device=device)[:, None] * self.width
        return start + torch.arange(self.width - features, self.width, device=device)

    def clear(self) -> None:
        self.queries, self.keys = {}, {}
        self.features = self.order = None
        self.grids = []
        self.notes.clear()


def clip_tower(adapter: ModelAdapter) -> Any:
    """The CLIP tower; raises ValueError for models without one."""
    tower = getattr(adapter.body, "vision_tower", None)
    kind = getattr(getattr(tower, "config", None), "model_type", None)
    if adapter.kind not in ("llava", "llava_next") or kind != "clip_vision_model":
        what = f"{adapter.kind!r} with {kind or 'no vision_tower'}"
        raise ValueError(f"policy must rank by a CLS token, which the CLIP tower of llava and llava_next has; the model is {what}")
    return getattr(tower, "vision_model", tower)


def tower_block(adapter: ModelAdapter, layer: int) -> int:
    """The 0-based number of a tower block that is counted from the end if negative."""
    depth = len(clip_tower(adapter).encoder.layers)
    if not -depth <= layer < depth:
        raise ValueError(f"layer must be one of the {depth} blocks of the vision tower, got {layer}")
    return layer % depth


def project_features(adapter: ModelAdapter, features: torch.Tensor) -> torch.Tensor:
    """Embeddings ``[..., D]`` of tower features ``[..., C]``. Calls ``forward``, which skips the hooks that record features."""
    embeddings: torch.Tensor = adapter.body.multi_modal_projector.forward(features)
    return embeddings


def record_tower(adapter: ModelAdapter, tower_cache: dict[str, Any]) -> tuple[Tower, Iterator[Any]]:
    """A :class:`Tower`, and handles of hooks that fill it and store it in ``tower_cache`` for the model's forward."""
    record = Tower(clip_tower(adapter).config.num_attention_heads)
    return record, _register(adapter, tower_cache, record)


def _register(adapter: ModelAdapter, tower_cache: dict[str, Any], record: Tower) -> Iterator[Any]:
    body = adapter.body

    def start(module: Any, args: Any, output: torch.Tensor) -> None:
        record.clear()
        record.tiles, record.width = output.shape[:2]

    def project(module: Any, args: Any, output: torch.Tensor) -> None:
        record.features = args[0]
        if adapter.kind == "llava":
            record.order = record.number(range(record.tiles), output.shape[1], output.device).flatten()
            record.grids = [(0, 0)] * record.tiles

    def prompt(module: Any, args: Any, kwargs: Any) -> None:
        record.input_ids = kwargs.get("input_ids", args[0] if args else None)

    def publish(module: Any, args: Any) -> None:
        tower_cache[TOWER] = dataclasses.replace(record)  # which a call inside this one does not clear

    def stop(module: Any, args: Any, output: Any) -> None:
        record.clear()

    yield clip_tower(adapter).embeddings.register_forward_hook(start)
    yield body.multi_modal_projector.register_forward_hook(project)
    yield body.register_forward_pre_hook(prompt, with_kwargs=True)
    yield adapter.decoder.register_forward_pre_hook(publish)
    yield body.register_forward_hook(stop)
    if adapter.kind == "llava_next":
        yield _record_packing(body, record)


def _record_packing(body: Any, record: Tower) -> MethodReplacement:
    pack = body.pack_image_features
    grid_of = sys.modules[type(body).__module__].get_anyres_image_grid_shape
    pinpoints, side = body.config.image_grid_pinpoints, body.config.vision_config.image_size

    @functools.wraps(pack)  # transformers reads signatures
    def packing(image_features: Any, image_sizes: Any, *args: Any, **kwargs: Any) -> Any:
        device, tiles, numbers = image_features[0].device, 0, []
        for x in image_features:
            numbers.append(record.number(range(tiles, tiles + len(x)), x.shape[1], device)[..., None])
            tiles += len(x)
        line = {"image_newline": torch.full((1,), -1, device=device)} if kwargs.get("image_newline") is not None else {}
        record.order = torch.cat(pack(numbers, image_sizes, *args, **{**kwargs, **line})[0]).flatten()
        sizes = zip(image_features, image_sizes, strict=False)
        record.grids = [grid_of(size, pinpoints, side) if len(x) > 1 else (0, 0) for x, size in sizes]
        return pack(image_features, image_sizes, *args, **kwargs)

    return MethodReplacement(body, "pack_image_features", packing)


def record_cls(adapter: ModelAdapter, tower_cache: dict[str, Any], layers: Sequence[int]) -> Iterator[Any]:
    """Handles of hooks that put the CLS queries and all keys of these blocks into ``tower_cache["tower"]``."""
    blocks = {layer: tower_block(adapter, layer) for layer in layers}
    record, handles = record_tower(adapter, tower_cache)
    yield from handles
    for layer, index in blocks.items():
        attn = clip_tower(adapter).encoder.layers[index].self_attn
        # A slice would keep all queries in memory.
        yield attn.q_proj.register_forward_hook(lambda m, a, out, i=layer: record.queries.update({i: out[:, :1].clone()}))
        yield attn.k_proj.register_forward_hook(lambda m, a, out, i=layer: record.keys.update({i: out}))
