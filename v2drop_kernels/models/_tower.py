"""The CLIP tower of LLaVA and LLaVA-NeXT: what a policy wants to know of it, and which of its tokens became which row.

A *tile* is one picture that the tower sees; *tower tokens* are numbered ``tile * P + token``, its CLS token being token 0. The map
from rows to tower tokens is the model's own: LLaVA gives features in order, and LLaVA-NeXT's ``pack_image_features`` is called
again with numbers for features, so that tiles, unpadding and newlines lie where it puts them. ``generate`` runs the tower before
the model's forward, so nothing here relies on their nesting. Nothing is read by the host that the model does not read itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..ops.attention_score import cls_attention_score
from ..ops.topk.order import ranked

if TYPE_CHECKING:
    from ._family import Family
    from .context import Stop

SEEN = "tower"  # where a policy's ``seen`` carries its Tower


@dataclass
class Tower:
    """One run of the tower.

    Attributes
    ----------
    heads : int
    tiles, width : int
        ``T`` pictures of ``P`` tokens, CLS counted.
    queries, keys : dict
        By block, as it was asked for (-1: the last one): the CLS token's ``[T, 1, C]``, and all tokens' ``[T, P, C]``, as
        ``q_proj`` and ``k_proj`` give them.
    features : Tensor | None
        ``[T, P - 1 or P, C']``: what the projector took.
    grids : list
        Per image the ``(rows, columns)`` of its tiles, which come behind one tile of the whole image; ``(0, 0)``: that one alone.
    order : Tensor | None
        int64 ``[M]``: the tower token of each feature that the model scatters into the prompts, in order; -1 for a newline.
    input_ids : Tensor | None
        int64 ``[B, N]`` of the forward.
    notes : dict
        Of a policy's own hooks in the tower.
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
        """:func:`cls_attention_score` of a watched block: float32 ``[T, P - 1]``."""
        query, keys = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.queries[layer], self.keys[layer]))
        return cls_attention_score(query, keys, form=form, backend=backend)

    def number(self, tiles: range, features: int, device: torch.device) -> torch.Tensor:
        """The tower tokens of projected features ``[tiles, features]``: the last ones, when CLS was left out."""
        start = torch.arange(tiles.start, tiles.stop, device=device)[:, None] * self.width
        return start + torch.arange(self.width - features, self.width, device=device)

    def forget(self) -> None:
        self.queries, self.keys = {}, {}
        self.features = self.order = None
        self.grids = []
        self.notes.clear()


class _Shadow:
    """A method of one object, replaced until :meth:`remove`."""

    def __init__(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        self._owner, self._name = owner, name
        setattr(owner, name, method)

    def remove(self) -> None:
        self._owner.__dict__.pop(self._name, None)


def clip_of(family: Family) -> Any:
    """The CLIP tower; one sentence when the model has another one."""
    tower = getattr(family.body, "vision_tower", None)
    kind = getattr(getattr(tower, "config", None), "model_type", None)
    if family.kind not in ("llava", "llava_next") or kind != "clip_vision_model":
        what = f"{family.kind!r} with {kind or 'no vision_tower'}"
        raise ValueError(f"policy must rank by a CLS token, which the CLIP tower of llava and llava_next has; the model is {what}")
    return getattr(tower, "vision_model", tower)


def block_of(family: Family, layer: int) -> int:
    """A block of the tower, counted from 0, or from its end when negative."""
    depth = len(clip_of(family).encoder.layers)
    if not -depth <= layer < depth:
        raise ValueError(f"layer must be one of the {depth} blocks of the vision tower, got {layer}")
    return layer % depth


def watch_tower(family: Family, seen: dict[str, Any]) -> tuple[Tower, Iterator[Any]]:
    """A :class:`Tower`, and handles of hooks that fill it and keep it in ``seen["tower"]`` while the model's forward lasts."""
    record = Tower(clip_of(family).config.num_attention_heads)
    return record, _watch(family, seen, record)


def _watch(family: Family, seen: dict[str, Any], record: Tower) -> Iterator[Any]:
    body = family.body

    def start(module: Any, args: Any, output: torch.Tensor) -> None:
        record.forget()
        record.tiles, record.width = output.shape[:2]

    def project(module: Any, args: Any, output: torch.Tensor) -> None:
        record.features = args[0]
        if family.kind == "llava":
            record.order = record.number(range(record.tiles), output.shape[1], output.device).flatten()
            record.grids = [(0, 0)] * record.tiles

    def prompt(module: Any, args: Any, kwargs: Any) -> None:
        record.input_ids = kwargs.get("input_ids", args[0] if args else None)

    def publish(module: Any, args: Any) -> None:
        seen[SEEN] = record

    def stop(module: Any, args: Any, output: Any) -> None:
        record.forget()

    yield clip_of(family).embeddings.register_forward_hook(start)
    yield body.multi_modal_projector.register_forward_hook(project)
    yield body.register_forward_pre_hook(prompt, with_kwargs=True)
    yield family.decoder.register_forward_pre_hook(publish)
    yield body.register_forward_hook(stop)
    if family.kind == "llava_next":
        yield _watch_packing(body, record)


def _watch_packing(body: Any, record: Tower) -> _Shadow:
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

    return _Shadow(body, "pack_image_features", packing)


def watch_cls(family: Family, seen: dict[str, Any], layers: Sequence[int]) -> Iterator[Any]:
    """Handles of hooks that put the CLS queries and all keys of these blocks into ``seen["tower"]``."""
    blocks = {layer: block_of(family, layer) for layer in layers}
    record, handles = watch_tower(family, seen)
    yield from handles
    for layer, index in blocks.items():
        attn = clip_of(family).encoder.layers[index].self_attn
        # A slice would keep all queries alive.
        yield attn.q_proj.register_forward_hook(lambda m, a, out, i=layer: record.queries.update({i: out[:, :1].clone()}))
        yield attn.k_proj.register_forward_hook(lambda m, a, out, i=layer: record.keys.update({i: out}))


def check_entry(at: Stop) -> None:
    """Raise unless the stage is where embeddings are: what comes of the projector fits there alone."""
    if at.layer:
        raise ValueError(f"layer must be 0 for the policy {at.stage.policy!r}, which makes embeddings, got {at.layer}")


def tower_of(at: Stop) -> Tower:
    """What the tower left behind in this forward."""
    found: Tower | None = at.seen.get(SEEN)
    if found is None or found.order is None:
        raise ValueError(
            "pixel_values must go through the model's own vision tower in this forward: the policy ranks by what it saw"
        )
    if found.input_ids is None:
        raise ValueError("input_ids must be given: the policy finds the tower's tokens at their placeholders")
    return found


def places_of(at: Stop) -> torch.Tensor:
    """The tower token of every row, int64 ``[B, N]``; -1 for newlines, and for rows that are not droppable."""
    tower = tower_of(at)
    assert tower.order is not None
    assert tower.input_ids is not None
    mask = tower.input_ids == at.family.token_ids[0]
    counts = mask.sum(1)
    # generate() repeats every item for beams behind the tower: copies of an item share its tokens.
    copies = (counts.sum() // tower.order.shape[0]).clamp(min=1)
    before = counts.cumsum(0) - counts
    first = torch.arange(len(counts), device=mask.device) // copies * copies
    number = (before[first] // copies)[:, None] + mask.cumsum(1) - 1
    order = tower.order.to(mask.device)
    found = order[number.clamp(0, order.shape[0] - 1)].masked_fill(~mask, -1)
    if at.origin is not None:
        found = found.gather(1, at.origin.clamp(min=0)).masked_fill(at.origin < 0, -1)
    return found.masked_fill(~at.droppable.to(mask.device), -1)


class Tiles:
    """The patches of every tile, for ranks and budgets inside tiles: ``[T, W]`` with ``W = P - 1``, all on the device.

    Attributes
    ----------
    present : Tensor
        bool ``[T, W]``: the patch is a droppable row. LLaVA-NeXT unpads the others away.
    item, count, number : Tensor
        int64 ``[T]``: the tile's item (the first of copies), how many tiles that has, and which of them it is.
    """

    def __init__(self, at: Stop) -> None:
        self.tower, self.at = tower_of(at), at
        assert self.tower.order is not None
        place = places_of(at).to(self.tower.order.device)  # the decoder may be elsewhere
        batch, tiles, width = len(place), self.tower.tiles, self.tower.width - 1
        inside = (place >= 0) & (place % (width + 1) > 0)
        nowhere = tiles * width
        self._patch = torch.where(inside, place // (width + 1) * width + place % (width + 1) - 1, nowhere)  # [B, N]
        self._extra = (at.droppable.to(place.device) & ~inside).sum(1)  # newlines, and CLS where it has a row
        self.present = self._marked(self._patch)
        items = torch.arange(batch, device=place.device)[:, None].expand_as(place)
        owner = torch.full((nowhere + 1,), batch - 1, device=place.device)
        owner = owner.scatter_reduce(0, self._patch.flatten(), items.flatten(), "amin")
        self.item = owner[:-1].view(tiles, width).amin(1)
        there = self.present.any(1).long()
        per_item = torch.zeros(batch, dtype=torch.int64, device=place.device).scatter_add(0, self.item, there)
        self.count = per_item[self.item].clamp(min=1)
        self.number = there.cumsum(0) - 1 - (per_item.cumsum(0) - per_item)[self.item]

    def _marked(self, patch: torch.Tensor) -> torch.Tensor:
        shape = self.tower.tiles, self.tower.width - 1
        mask = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.bool, device=patch.device)
        return mask.scatter_(0, patch.flatten(), True)[:-1].view(shape)

    def cls(self, layer: int, form: str) -> torch.Tensor:
        """:func:`cls_attention_score` of a watched block: float32 ``[T, W]``."""
        return self.tower.cls(layer, form, self.at.backend)

    @property
    def features(self) -> torch.Tensor:
        """What the projector took of every patch: ``[T, W, C]``."""
        assert self.tower.features is not None
        return self.tower.features[:, -self.present.shape[1] :]

    def rank(self, score: torch.Tensor) -> torch.Tensor:
        """Ranks from 0 by (score descending, patch ascending) of the patches that are present; the others come behind."""
        order = ranked(score, self.present)
        return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))

    def budget(self, keep_extra: bool = True) -> torch.Tensor:
        """What the tile's item keeps, int64 ``[T]``, less the rows that are no patches when these are kept first."""
        keep = torch.tensor(self.at.keep, device=self.item.device)
        return (keep - self._extra if keep_extra else keep).clamp(min=0)[self.item]

    def even(self, total: torch.Tensor) -> torch.Tensor:
        """An item's ``total``, split evenly over its tiles; the first ones get what is left over."""
        return total // self.count + (self.number < total % self.count)

    def score(self, tier: torch.Tensor, rank: torch.Tensor, extra: float = 9.0) -> torch.Tensor:
        """Scores ``[B, N]``: higher tiers (small integers) first, lower ranks first among equals; ``extra`` for what is no patch.

        So an item's top k are exactly the patches of its upper tiers, when these are k.
        """
        found = tier.float() - rank / (rank.shape[1] + 1)
        return torch.nn.functional.pad(found.flatten(), (0, 1), value=extra)[self._patch].to(self.at.hidden.device)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The patches of these rows ``[B, K]`` (-1: none), by tile: int64 ``[T, K']``, ascending, -1 for padding."""
        mask = self._marked(self._of(rows))
        order = ranked(mask.float())[:, : rows.shape[1]]
        return order.masked_fill(~mask.gather(1, order), -1)

    def embed(self, patches: torch.Tensor, features: torch.Tensor, rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` ``[B, K, D]`` of ``rows``, in which these patches ``[T, K']`` (-1: none) embed ``features`` ``[T, K', C]``."""
        # forward, for a call would run the hooks that keep what the tower gave.
        made = self.at.family.body.multi_modal_projector.forward(features).flatten(0, 1).to(hidden)
        start = torch.arange(len(patches), device=patches.device)[:, None] * self.present.shape[1]
        nowhere = self.present.numel()
        source = torch.full((nowhere + 1,), -1, device=patches.device)
        source.scatter_(
            0, torch.where(patches >= 0, start + patches, nowhere).flatten(), torch.arange(len(made), device=patches.device)
        )
        source[-1] = -1
        found = source[self._of(rows)].to(hidden.device)[..., None]
        return torch.where(found >= 0, made[found[..., 0].clamp(min=0)], hidden)

    def _of(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(self._patch.device)
        return self._patch.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, self.present.numel())
