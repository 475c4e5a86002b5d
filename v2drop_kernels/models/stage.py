"""One stage of a schedule: rank the vision tokens, drop rows, and update all that travels with the hidden states."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from ..core.types import Dropped
from ..distributed.agreement import check_equal, checks_ranks
from ..ops.drop_tokens import drop_tokens
from ..ops.host_ints import host_ints
from ..ops.variation_score import variation_score
from .adapters import caches
from .adapters.arguments import LayerCall, is_pair
from .caches import compact_static
from .context import DropContext
from .forward import Forward
from .images import by_image
from .prefill import Prefill, real_lengths
from .ranking import Ranking
from .rows import KeptRows
from .setup import Setup
from .soft import apply_mask


def run_stage(setup: Setup, forward: Forward, index: int, call: LayerCall) -> torch.Tensor:
    """The hidden states that layer ``index`` receives: the rows of ``call.hidden`` that the stage keeps."""
    prefill, policy = forward.prefill, setup.policies[index]
    assert prefill is not None
    cache = prefill.cache_state.attach(call)
    context = _context(setup, forward, prefill, index, call)
    ratio = setup.soft.parameter(index)
    scores = _scores(setup, context, prefill, ratio)
    early = setup.options.compact_earlier_kv and cache is not None
    if early:
        caches.check_plain(cache)
    earlier = caches.filled_layers(cache, prefill.inject, index) if early else []
    static = bool(earlier) and caches.is_static(cache)
    ids = forward.position_ids if prefill.position_ids is None else prefill.position_ids
    dropped = _drop(setup, context, scores, ids, [] if static else earlier)
    if setup.adapter.group is not None and checks_ranks(torch.device("meta")):
        check_equal(f"the tokens kept before layer {index}", dropped.keep, setup.adapter.group)
    rows = _kept_rows(prefill, dropped)
    _update_positions(setup, prefill, rows, dropped, ids)
    prefill.rope_source = call.rope
    if static:
        compact_static(earlier, dropped.keep, ragged=rows.ragged, mask=call.mask, rows=prefill.rows, backend=setup.options.backend)
    elif earlier:
        caches.replace_keys_and_values(earlier, dropped.kv)
    _record(prefill, index, rows, dropped, compacted=bool(earlier))
    merged = policy.merge(context, dropped.keep, dropped.hidden) if any(context.keep) else dropped.hidden
    if ratio is None:
        return merged
    assert scores is not None
    return apply_mask(merged, context, scores, ratio, dropped.keep)


def _context(setup: Setup, forward: Forward, prefill: Prefill, index: int, call: LayerCall) -> DropContext:
    assert prefill.embeds is not None
    options, current, mask = setup.options, prefill.current, call.mask
    before = prefill.first  # columns of earlier turns: a policy ranks among the rows of this one
    if index and (held := prefill.cache_state.layers[index - 1]) is not None and (current is not None or before):
        mask = forward.mask(setup.adapter, call, index - 1)
        before = before and held.keep.shape[1] - call.hidden.shape[1]
    if mask is not None and before:
        mask = mask[..., before:]
    if mask is not None and mask.dim() == 2:
        mask = mask.bool()[:, None, None].expand(-1, -1, call.hidden.shape[1], -1)
    return DropContext(
        layer=index, stage=setup.stages[index], adapter=setup.adapter, hidden=call.hidden, prev_hidden=prefill.prev_hidden,
        rope=forward.rope(call), mask=mask, layout=prefill.layout, counts=prefill.vision,
        keep=prefill.budgets[index], origin=None if current is None else current.keep, embeds=prefill.embeds,
        grids=prefill.grids, seeds=_seeds(options.seed, index, prefill.item_ids), tower_cache=setup.tower_cache(index),
        backend=options.backend, scores=options.scores, labels=prefill.labels,
    )  # fmt: skip


def _seeds(seed: int, layer: int, items: list[list[int]]) -> list[int]:
    """One seed per item from the seed of the run, the layer and the item's real token ids."""
    return [zlib.crc32(repr((seed, layer, ids)).encode()) for ids in items]


def _scores(setup: Setup, context: DropContext, prefill: Prefill, ratio: torch.Tensor | None) -> torch.Tensor | None:
    """Scores of the stage's policy, with a gradient in soft training; None: the variation, scored while dropping."""
    hidden, last_stays, images = context.hidden, prefill.last_stays, prefill.images
    with torch.set_grad_enabled(ratio is not None):
        if not any(context.keep):  # nothing is ranked if nothing is kept
            return hidden.new_zeros(hidden.shape[:2], dtype=torch.float32)
        scores = setup.policies[context.layer].score(context)
        if scores is None and (ratio is not None or any(last_stays) or images):
            assert context.prev_hidden is not None
            scores = variation_score(
                context.prev_hidden, hidden, metric=context.stage.metric, score_dtype=setup.options.score_dtype
            )
        if any(last_stays) and scores is not None:
            scores = _last_first(context, scores, last_stays)
        if images and scores is not None:
            scores = by_image(context, scores, prefill.spans, images[context.layer], prefill.rows)
        if isinstance(scores, Ranking):
            return scores.ordinals(context.droppable) if ratio is None else scores.shifted(context.droppable)
        return scores


def _last_first(context: DropContext, scores: torch.Tensor | Ranking, last_stays: tuple[bool, ...]) -> Ranking:
    """The ranking with the last real row of these items in a tier above all others."""
    known = scores if isinstance(scores, Ranking) else Ranking(scores, torch.zeros_like(scores, dtype=torch.int64))
    stops = [stop - 1 if stays else -1 for stays, (_, stop) in zip(last_stays, context.layout.bounds, strict=True)]
    rows = torch.arange(known.tier.shape[1], device=known.tier.device)
    last = rows == host_ints(stops, known.tier.device)[:, None]
    return Ranking(known.scores, torch.where(last, known.tier.max() + 1, known.tier))


def _drop(setup: Setup, context: DropContext, scores: torch.Tensor | None, ids: Any, earlier: list[Any]) -> Dropped:
    """One fused drop of hidden states, rotary tables or ids, and the caches of ``earlier`` layers."""
    options, layout, keep = setup.options, context.layout, context.keep
    compacted = options.positions == "compacted"
    per_segment = [keep[item] for item, spans in enumerate(layout.spans) if spans] if layout.counts is None else list(keep)
    return drop_tokens(
        context.prev_hidden, context.hidden, per_segment, droppable=layout,
        scores=None if scores is None else scores.detach(), metric=context.stage.metric, score_dtype=options.score_dtype,
        rope=context.rope if is_pair(context.rope) and not compacted else None, position_ids=ids if compacted else None,
        positions="compacted" if compacted else "persistent", kv=caches.keys_and_values(earlier) or None,
        backend=options.backend,
    )  # fmt: skip


def _kept_rows(prefill: Prefill, dropped: Dropped) -> KeptRows:
    """The kept rows by their numbers in the prompt."""
    assert dropped.layout is not None
    keep = dropped.keep
    origin = keep
    if prefill.current is not None:
        origin = torch.where(keep >= 0, prefill.current.keep.gather(1, keep.clamp(min=0)), keep)
    return KeptRows(origin, any(n != keep.shape[1] for n in real_lengths(dropped.layout)))


def _update_positions(setup: Setup, prefill: Prefill, rows: KeptRows, dropped: Dropped, ids: Any) -> None:
    """Rotary tables of the kept rows; with compacted positions also their ids, and the shift of later tokens."""
    if setup.options.positions != "compacted":
        prefill.rope = dropped.rope
        return
    assert dropped.layout is not None
    shift = _last_ids(ids, prefill.batch, prefill.layout.bounds) - _last_ids(
        dropped.position_ids, prefill.batch, dropped.layout.bounds
    )
    earlier = None if prefill.current is None else prefill.current.shift
    rows.shift = shift if earlier is None else shift + earlier
    prefill.position_ids = dropped.position_ids
    prefill.rope = setup.adapter.decoder.rotary_emb.forward(dropped.hidden, prefill.position_ids)


def _last_ids(ids: Any, batch: int, bounds: Any) -> torch.Tensor:
    """``[..., B, 1]``: the id of the last real row of every item in ``ids [..., 1 or B, N]``."""
    table = ids.expand(*ids.shape[:-2], batch, -1)
    columns = host_ints([max(stop - 1, 0) for _, stop in bounds], table.device)
    return table.gather(-1, columns[:, None].expand(*table.shape[:-1], 1))


def _record(prefill: Prefill, index: int, rows: KeptRows, dropped: Dropped, *, compacted: bool) -> None:
    """Note which rows every layer holds from here on; ``compacted``: the caches of earlier layers lost the rows too."""
    assert dropped.layout is not None
    held = prefill.held[:index]
    if compacted:  # their position ids stay
        inject = prefill.inject
        moved = {id(x): KeptRows(rows.keep, rows.ragged, None if x is None else x.shift) for x in held[inject:]}
        held = (*held[:inject], *(moved[id(x)] for x in held[inject:]))
    keep, later = prefill.budgets[index], prefill.depth - index
    prefill.layout, prefill.vision, prefill.current = dropped.layout, keep, rows
    prefill.hold((*held, *(rows,) * later))
    prefill.entering[index:] = [(real_lengths(dropped.layout), keep, rows.keep.shape[1])] * later
    prefill.stages.append((index, rows))
