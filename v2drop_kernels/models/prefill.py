"""A prompt on its way through the layers: where its vision tokens lie, what every stage keeps of them, and late injection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.layout import TokenLayout
from ..ops.drop_tokens import drop_tokens
from .adapters import ModelAdapter
from .adapters.arguments import LayerCall, is_pair
from .adapters.masks import padding_of
from .adapters.spans import Grid, Spans, given_spans, prompt_spans
from .caches import CacheState
from .images import Counts, run_counts
from .report import Stopwatch
from .rows import KeptRows, insert_vision, rows_behind
from .setup import Setup


@dataclass
class Prefill:
    """The state of one prefill.

    Attributes
    ----------
    batch, rows : int
        Shape of the prompt, padding included.
    spans, grids : tuple
        Vision tokens of every item, and the patch grid of items with one image or video.
    layout : TokenLayout
        Of the rows that the next layer receives.
    lengths, vision : tuple of int
        Real rows of each item of the prompt; droppable tokens of each item that are left.
    budgets : dict
        Tokens to keep of each item, for every layer at which something is dropped.
    item_ids : list
        Real token ids of every item, if a policy draws random numbers.
    entering : list
        Per layer: tokens and droppable tokens of each item, and rows of the batch.
    inject : int
        The vision rows are absent before this layer.
    cache_state : CacheState
        The rows that each layer's cache holds, those of earlier turns included.
    first : int
        Rows of earlier turns, which the cache holds.
    earlier : CacheState | None
        What the cache held of them, if not all.
    held : tuple
        Per layer the rows of this prompt that its cache holds; None for all.
    current : KeptRows | None
        The rows that are present; None while all are.
    full_layout : TokenLayout | None
        The layout with the vision rows, while they are absent.
    embeds, prev_hidden : Tensor | None
        Input of layer 0, which the model keeps anyway; input of the previous layer.
    stages : list
        ``(layer, rows)`` after every drop.
    rope, position_ids, labels
        Rotary tables and ids of the present rows, if they differ from the model's; labels of the prompt.
    rope_source
        The model's tables that ``rope`` was made from; layers of another kind may receive others.
    planes : list
        Vision features that are added behind the first blocks, see ``adapters/deepstack.py``.
    itemsize : int
        Bytes of an element of the hidden states.
    watch : Stopwatch
        From the start of the decoder to its final norm.
    last_stays : tuple of bool
        Whether an item ends in a vision token, which is kept: its state gives the first token of the answer.
    images : dict
        With budgets per image what every stage keeps of each.
    """

    batch: int
    rows: int
    spans: Spans
    grids: tuple[Grid, ...]
    layout: TokenLayout
    lengths: tuple[int, ...]
    vision: tuple[int, ...]
    budgets: dict[int, tuple[int, ...]]
    item_ids: list[list[int]]
    entering: list[tuple[tuple[int, ...], tuple[int, ...], int]]
    inject: int
    cache_state: CacheState
    first: int = 0
    earlier: CacheState | None = None
    held: tuple[KeptRows | None, ...] = ()
    current: KeptRows | None = None
    full_layout: TokenLayout | None = None
    embeds: torch.Tensor | None = None
    prev_hidden: torch.Tensor | None = None
    stages: list[tuple[int, KeptRows]] = field(default_factory=list)
    rope: Any = None
    rope_source: Any = None
    planes: list[torch.Tensor] = field(default_factory=list)
    position_ids: Any = None
    labels: torch.Tensor | None = None
    itemsize: int = 0
    watch: Stopwatch | None = None
    last_stays: tuple[bool, ...] = ()
    images: dict[int, Counts] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return len(self.entering)

    def hold(self, held: tuple[KeptRows | None, ...]) -> None:
        """Note which rows of this prompt every layer's cache holds, behind those of earlier turns."""
        self.held = self.cache_state.layers = held
        if not self.first:
            return
        old, prompt = ((None,) * self.depth, 0) if self.earlier is None else (self.earlier.layers, self.earlier.prompt)
        pairs = {(id(a), id(b)): (a, b) for a, b in zip(old, held, strict=True)}
        joined = {key: rows_behind(a, prompt, self.first, b, self.rows) for key, (a, b) in pairs.items()}
        self.cache_state.layers = tuple(joined[id(a), id(b)] for a, b in zip(old, held, strict=True))

    def finish(self, adapter: ModelAdapter) -> None:
        """Release everything but row numbers, and note whether single tokens can do without hooks."""
        held = [rows for rows in self.cache_state.layers if rows is not None]
        self.cache_state.plain = (
            adapter.attention == "sdpa"
            and all(n == self.rows for n in self.lengths)
            and not any(rows.ragged or rows.shift is not None for rows in held)
            and (self.earlier is None or self.earlier.plain)
            and not adapter.windowed
        )
        if self.watch is not None:
            self.watch.stop()
        self.planes = []
        self.rope = self.rope_source = self.position_ids = self.prev_hidden = self.embeds = self.labels = None


def real_lengths(layout: TokenLayout) -> tuple[int, ...]:
    """Real rows of every item."""
    return tuple(stop - start for start, stop in layout.bounds)


def begin(
    setup: Setup, top: dict[str, Any], decoder: dict[str, Any], labels: torch.Tensor | None, first: int = 0,
    earlier: CacheState | None = None,
) -> Prefill:  # fmt: skip
    """Find the vision tokens of a new prompt, or a new turn, and what every stage keeps of them.

    Parameters
    ----------
    setup : Setup
    top, decoder : dict
        Arguments of the model and of its decoder, by name.
    labels : Tensor | None
        Of the model, ignored unless ``[B, N]``.
    first, earlier : int, CacheState | None
        Rows of earlier turns in the cache, and what the cache holds of them.
    """
    input_ids: Any = top.get("input_ids")
    shape = (decoder["inputs_embeds"] if input_ids is None else input_ids).shape
    batch, rows = int(shape[0]), int(shape[1])
    spans, grids = _vision(setup, top, batch, rows, decoder.get("position_ids"))
    device = setup.adapter.norm.weight.device if input_ids is None else input_ids.device
    real, side = padding_of(_of_new_rows(_padding_mask(top, decoder), first), rows)
    ends = [item for item, runs in enumerate(spans) if runs and runs[-1][1] == rows]
    if earlier is not None and earlier.ends_in_image and earlier.prompt == first and any(runs and not runs[0][0] for runs in spans):
        raise ValueError("input_ids must hold whole images: the chunk before this one ends inside an image")
    layout = _layout(spans, rows, real, side, device)
    last = tuple(bool(runs) and runs[-1][1] == stop for runs, (_, stop) in zip(spans, layout.bounds, strict=True))
    vision = tuple(sum(stop - start for start, stop in item) for item in spans)
    lengths = real_lengths(layout)
    inject = setup.schedule.inject if any(vision) else 0
    if inject and (alone := [item for item, (n, length) in enumerate(zip(vision, lengths, strict=True)) if n and n == length]):
        raise ValueError(f"schedule must not inject late in item {alone[0]}: it has nothing but vision tokens")
    images = _images(setup, spans, last) if setup.schedule.per == "image" else {}
    budgets = _budgets(setup, vision, last, images)
    item_ids: list[list[int]] = [[]] * batch
    if input_ids is not None and any(policy.seeded for policy in setup.policies.values()):
        item_ids = [ids[start:stop] for ids, (start, stop) in zip(input_ids.tolist(), layout.bounds, strict=True)]
    depth = setup.adapter.depth
    if first and budgets and (setup.options.positions != "persistent" or setup.options.compact_earlier_kv):
        raise ValueError(
            "input_ids must not bring images behind a filled cache with positions other than 'persistent' or compact_earlier_kv"
        )
    made = Prefill(
        batch=batch, rows=rows, spans=spans, grids=grids, layout=layout, lengths=lengths, vision=vision, budgets=budgets,
        item_ids=item_ids, entering=[(lengths, vision, rows)] * depth, inject=inject,
        cache_state=CacheState(first + rows, (None,) * depth, ends_in_image=bool(ends)), first=first, earlier=earlier,
        labels=labels if labels is not None and tuple(labels.shape) == (batch, rows) else None,
    )  # fmt: skip
    made.hold((None,) * depth)
    made.last_stays, made.images = last, images
    made.watch = Stopwatch(device)
    return made


def _of_new_rows(mask: Any, first: int) -> Any:
    """The mask without its columns for the ``first`` rows, which the cache holds."""
    if isinstance(mask, dict):
        return {kind: _of_new_rows(one, first) for kind, one in mask.items()}
    return mask[..., first:] if first and isinstance(mask, torch.Tensor) else mask


def _padding_mask(top: dict[str, Any], decoder: dict[str, Any]) -> Any:
    """The mask that was given to the model, where the model itself made one of it for its decoder."""
    made, given = decoder.get("attention_mask"), top.get("attention_mask")
    return given if isinstance(made, dict) and not isinstance(given, dict) else made


def _vision(setup: Setup, top: dict[str, Any], batch: int, rows: int, position_ids: Any) -> tuple[Spans, tuple[Grid, ...]]:
    if setup.options.spans is not None:
        return given_spans(setup.options.spans, batch, rows), (None,) * batch
    if top.get("input_ids") is None:
        raise ValueError("spans must be given where inputs_embeds take the place of input_ids")
    return prompt_spans(setup.adapter, top, position_ids)


def _layout(spans: Spans, rows: int, lengths: list[int] | None, side: str, device: torch.device) -> TokenLayout:
    """One selection per item, also if the item has several images."""
    if all(len(item) <= 1 for item in spans):
        return TokenLayout.padded(list(spans), rows, batch=len(spans), lengths=lengths, padding_side=side)
    mask = torch.zeros(len(spans), rows, dtype=torch.bool, device=device)
    for item, pairs in enumerate(spans):
        for start, stop in pairs:
            mask[item, start:stop] = True  # filled on the device, not copied to it
    counts = [sum(stop - start for start, stop in item) for item in spans]
    return TokenLayout.from_mask(mask, counts, lengths=lengths, padding_side=side)


def _images(setup: Setup, spans: Spans, last: tuple[bool, ...]) -> dict[int, Counts]:
    """Tokens to keep of each image, for every stage."""
    left, kept = tuple(tuple(stop - start for start, stop in item) for item in spans), {}
    for layer, stage in setup.stages.items():
        kept[layer] = left = run_counts(stage, left, last)
    return kept


def _budgets(
    setup: Setup, vision: tuple[int, ...], last: tuple[bool, ...], images: dict[int, Counts]
) -> dict[int, tuple[int, ...]]:
    """Tokens to keep of each item, for every layer at which something is dropped."""
    ratios, budgets, left = setup.soft.values(), {}, vision
    for layer in setup.stages:
        kept = tuple(map(sum, images[layer])) if images else setup.counts(left, layer, ratios.get(layer))
        kept = tuple(max(n, 1) if ends else n for n, ends in zip(kept, last, strict=True))
        if kept != left or (layer in ratios and any(left)):
            budgets[layer] = left = kept
    return budgets


def remove_vision(setup: Setup, prefill: Prefill, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Late injection: the layers before it receive the text alone, with the position ids that it has among the vision tokens."""
    prefill.cache_state.attach(call)
    dropped = drop_tokens(
        None, hidden, 0, droppable=prefill.layout, scores=hidden.new_zeros(hidden.shape[:2], dtype=torch.float32),
        rope=call.rope if is_pair(call.rope) else None, backend=setup.options.backend,
    )  # fmt: skip
    assert dropped.layout is not None
    lengths, width = real_lengths(dropped.layout), dropped.keep.shape[1]
    prefill.rope_source = call.rope
    prefill.current, prefill.rope = KeptRows(dropped.keep, any(n != width for n in lengths)), dropped.rope
    prefill.layout, prefill.full_layout = dropped.layout, prefill.layout
    every = KeptRows(torch.arange(prefill.rows, device=dropped.keep.device).expand(prefill.batch, -1), False)
    inject = prefill.inject
    prefill.hold((prefill.current,) * inject + (every,) * (prefill.depth - inject))
    prefill.entering[:inject] = [(lengths, (0,) * prefill.batch, width)] * inject
    return dropped.hidden


def inject_vision(prefill: Prefill, hidden: torch.Tensor) -> torch.Tensor:
    """Late injection: put the embeddings of the vision tokens among the hidden states of the text."""
    assert prefill.current is not None
    assert prefill.embeds is not None
    assert prefill.full_layout is not None
    hidden = insert_vision(hidden, prefill.current, prefill.embeds)
    prefill.current = prefill.rope = None
    prefill.layout, prefill.full_layout = prefill.full_layout, None
    return hidden
