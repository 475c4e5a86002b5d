"""TokenDropper: drop vision tokens between the layers of an unmodified Hugging Face model, while a ``with`` lasts.

A pre-hook on the first layer of every stage asks the stage's policy for scores and hands hidden states, rotary tables and ids to
:func:`v2drop_kernels.drop_tokens`; pre-hooks on the layers behind it cut the mask and pass on the tables. Keys and values of
earlier layers stay, so layers hold caches of different lengths, and each cut mask has the length of its layer; where even the first
layer's cache is shorter than the prompt (drops before it, late injection), the masks of steps are made here for the whole text. The
final norm's hook spreads the rows to their old places: logits, labels and loss look as ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core import positions as position_modes
from ..core.layout import TokenLayout
from ..core.schedule import Schedule, Stage, prefill_flops
from ..ops.compact import compact_
from ..ops.drop_tokens import drop_tokens
from ..ops.soft_topk import soft_topk
from ..ops.variation_score import variation_score
from . import policies
from ._family import Family, Grid, Spans, check_attention, family_of, found_spans, given_spans, runs_of
from ._rows import CacheRows, Rows, cut_mask, injected, spread, step_mask
from .context import Stop
from .policy import Policy
from .report import Kept, LayerReport, Report

STATE = "_v2drop_rows"  # where a cache carries its CacheRows


@dataclass(frozen=True)
class TokenDropper:
    """Drops vision tokens in the models it is called with.

    ``with TokenDropper(schedule)(model) as dropping:`` then ``model(...)`` and ``model.generate(...)`` drop, and
    ``dropping.report()`` and ``dropping.kept(item)`` tell what happened in the last prefill. On leaving, also by an exception,
    the model is what it was.

    Parameters
    ----------
    schedule : Schedule | str
        When, how many and by which ranking; or the name of a preset. Every item of a batch has one budget for all its
        images; items without images are never touched.
    positions : {"persistent", "compacted", "group"}
        See :mod:`v2drop_kernels.positions`. "group" is for models with one id per token, not M-RoPE.
    compact_earlier_kv : bool
        Also drop the rows from the caches of the layers before a stage. It saves memory and time of decoding, and changes the
        method: later tokens no longer see the dropped ones anywhere.
    spans : optional
        Where the droppable tokens are, when the model sees ``inputs_embeds`` only or has no image placeholder: one
        ``(start, stop)`` for every item, or a list with the spans of each item, counted along the padded prompt.
    scores : callable, optional
        For the policies "given" and "twigvlm": gets the :class:`Stop` and returns float ``[B, N]``, higher means keep.
    soft : bool | int
        Training with learnable budgets (HiDivDrop's differentiable top-k, :func:`v2drop_kernels.soft_topk`): ``dropping.ratios``
        holds for every stage that keeps something the share that it drops, at first the schedule's; hand them to the optimiser.
        ``dropping.learnt()`` is what to run with afterwards. Kept rows are multiplied by the mask, 1 going forward, whose gradient
        reaches the ratio and the ranking. A schedule that counts tokens needs to know the vision tokens of an item: LLaVA tells;
        else give their number here. ``rounding`` and ``at_least`` of the stages do not apply.
    seed : int
        Of the policy "random"; draws depend on it, the layer and the item's tokens, not on the batch.
    score_dtype : dtype, optional
        As in :func:`v2drop_kernels.drop_tokens`: round scores as a peer's code does.
    backend : str, optional
        Force a backend of this package.

    Raises
    ------
    ValueError, TypeError
        Here for wrong options; when called with a model that is unknown, compiled or shallower than the schedule; in a forward
        for images whose tokens lie apart, images in a later chunk or turn, and caches that cannot be ragged.

    Notes
    -----
    Logits keep their shape: rows of dropped tokens repeat those of the last kept token before them. ``output_hidden_states``
    gives each layer's own rows. With ``soft`` the ratios are read on the host in every prefill; and since a block normalises its
    input, the mask is felt from the next one on, in the residual stream: two stages with a single block between them teach the
    first nothing. Not when one-token steps are all that is run, or images are a small part of the prompt: only the prefill, and the
    cache that decoding reads, get cheaper. Source: V2Drop, Algorithm 1; HiDivDrop for positions, injection, exit and ``soft``.

    Examples
    --------
    >>> TokenDropper("v2drop-64").schedule.counts(576)
    (28, 1, 1)
    """

    schedule: Schedule | str
    positions: str = "persistent"
    compact_earlier_kv: bool = False
    spans: Any = None
    scores: Callable[[Stop], torch.Tensor] | None = None
    soft: bool | int = False
    seed: int = 0
    score_dtype: torch.dtype | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", policies.preset(self.schedule))
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule or the name of a preset, got {type(self.schedule).__name__}")
        if not isinstance(self.soft, int) or self.soft < 0:
            raise ValueError(f"soft must be True, False or a number of vision tokens, got {self.soft!r}")
        if self.positions not in position_modes.MODES:
            raise ValueError(f"positions must be one of {', '.join(position_modes.MODES)}, got {self.positions!r}")
        for stage in self.schedule.stages:
            policies.make(stage.policy, stage.options)

    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[Dropping]:
        dropping = Dropping(self, model)
        try:
            dropping.attach()
            yield dropping
        finally:
            dropping.detach()


@dataclass
class _Prefill:
    """One prompt on its way through the layers."""

    batch: int
    rows: int
    spans: Spans
    grids: tuple[Grid, ...]
    layout: TokenLayout
    lengths: tuple[int, ...]  # real rows of each item
    vision: tuple[int, ...]  # droppable tokens of each item that are left
    budgets: dict[int, tuple[int, ...]]  # layer -> tokens to keep of each item
    seeds_from: list[list[int]]
    entering: list[tuple[tuple[int, ...], tuple[int, ...], int]]  # per layer: tokens, droppable ones, rows
    inject: int  # the vision rows are away before this layer
    state: CacheRows
    current: Rows | None = None
    whole: TokenLayout | None = None  # where the vision rows will lie, while they are away
    embeds: torch.Tensor | None = None  # the input of layer 0, which the model holds anyway
    before: torch.Tensor | None = None  # the input of the previous layer
    stages: list[tuple[int, Rows]] = field(default_factory=list)
    rope: Any = None
    ids: Any = None
    labels: torch.Tensor | None = None
    itemsize: int = 0


class Dropping:
    """A model that drops: what ``with TokenDropper(...)(model)`` gives. Made by it, not by hand."""

    def __init__(self, options: TokenDropper, model: Any) -> None:
        assert isinstance(options.schedule, Schedule)
        self._options, self._schedule = options, options.schedule
        self._family: Family = family_of(model)
        self._depth = len(self._family.decoder.layers)
        self._schedule.validate(self._depth)
        if not self._family.token_ids and options.spans is None:
            raise ValueError(f"spans must be given for {self._family.kind!r}, which has no placeholder of images")
        self._stages: dict[int, Stage] = {stage.layer: stage for stage in self._schedule.stages}
        # Stages that say the same share a policy, which then watches the vision tower once.
        made = {(stage.policy, repr(stage.options)): policies.make(stage.policy, stage.options) for stage in self._schedule.stages}
        self._policies: dict[int, Policy] = {at: made[x.policy, repr(x.options)] for at, x in self._stages.items()}
        self._seen: dict[int, dict[str, Any]] = {id(policy): {} for policy in made.values()}
        self.ratios = torch.nn.ParameterList()
        self._soft: dict[int, torch.nn.Parameter] = {}
        if options.soft:
            self._make_ratios(int(options.soft) if options.soft is not True else self._family.vision_tokens)
        self._handles: list[Any] = []
        self._model = model
        self._labels: torch.Tensor | None = None
        self._given: dict[str, Any] | None = None
        self._prefill: _Prefill | None = None
        self._decode: CacheRows | None = None
        self._ids: Any = None
        self._step: object = None
        self._mask: Any = None  # of a step, for all rows of the prompt, where the model cannot make it
        self._last: _Prefill | None = None

    def _make_ratios(self, n: float | None) -> None:
        device = self._family.decoder.norm.weight.device
        for stage in self._schedule.stages:
            if isinstance(stage.keep, float) or not stage.keep:
                share = float(stage.keep)
            elif n is None:
                raise ValueError("soft must be the number of vision tokens of an item, which this model does not tell")
            else:
                share = min(stage.keep, n) / n
            n = None if n is None else n * share
            if share:
                self._soft[stage.layer] = torch.nn.Parameter(torch.tensor(1 - share, dtype=torch.float32, device=device))
        self.ratios.extend(self._soft.values())

    def _counts(self, left: tuple[int, ...], layer: int, ratio: float | None) -> tuple[int, ...]:
        """What of ``left`` tokens a stage keeps."""
        stage, policy = self._stages[layer], self._policies[layer]
        if ratio is None:
            return policy.counts(left, tuple(map(stage.count, left)), self._seen[id(policy)])
        # As soft_topk rounds it.
        share = 1 - torch.tensor(ratio, dtype=torch.float32)
        kept = tuple(int(k) for k in (share * torch.tensor(left)).round().clamp(min=0).tolist())
        kept = tuple(map(min, kept, left))
        if policy.counts(left, kept, self._seen[id(policy)]) != kept:
            raise ValueError(f"soft must not be used with the policy {stage.policy!r}, which cannot keep any number of tokens")
        return kept

    def report(self) -> Report:
        """Tokens, KV bytes and FLOPs of every layer in the last prefill."""
        run, config = self._finished(), self._family.decoder.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        row_bytes = 2 * config.num_key_value_heads * width * run.itemsize
        flops = lambda tokens: prefill_flops(tokens, config.hidden_size, config.intermediate_size)
        cached = [run.batch * row_bytes * (run.rows if held is None else held.keep.shape[1]) for held in run.state.layers]
        layers = tuple(
            LayerReport(layer, tokens, vision, rows, kv_bytes, flops(tokens))
            for layer, ((tokens, vision, rows), kv_bytes) in enumerate(zip(run.entering, cached, strict=True))
        )
        return Report(layers, run.batch * row_bytes * run.rows * len(layers), flops(run.lengths) * len(layers))

    def kept(self, item: int = 0) -> Kept:
        """The droppable tokens of an item of the batch that survived each stage of the last prefill.

        Items are those that the model saw: with ``num_beams`` or ``num_return_sequences`` every prompt is there so many times.
        """
        run = self._finished()
        if not 0 <= item < len(run.spans):
            raise ValueError(f"item must be one of the {len(run.spans)} of the last prefill, got {item}")
        number = {row: i for i, row in enumerate(row for start, stop in run.spans[item] for row in range(start, stop))}
        left, stages, done = tuple(number.values()), [], dict(run.stages)
        for layer in self._stages:
            if layer in done:
                left = tuple(number[row] for row in done[layer].keep[item].tolist() if row in number)
            stages.append(left)
        return Kept(tuple(stages), len(number), run.grids[item])

    def learnt(self) -> Schedule:
        """The schedule with the shares that ``soft`` training has come to, for runs without it. Reads the ratios on the host."""
        keep = {layer: max(0.0, min(1.0, 1 - ratio.item())) for layer, ratio in self._soft.items()}
        stages = (
            dataclasses.replace(stage, keep=keep[stage.layer], rounding="round", at_least=0) if stage.layer in keep else stage
            for stage in self._schedule.stages
        )
        return dataclasses.replace(self._schedule, stages=tuple(stages))

    def totals(self) -> tuple[int, ...]:
        """Droppable tokens of every item of the last prefill, before anything was dropped."""
        return tuple(sum(stop - start for start, stop in item) for item in self._finished().spans)

    @property
    def layout(self) -> TokenLayout:
        """Of the rows that the layer that runs now is given, in a prefill."""
        assert self._prefill is not None
        return self._prefill.layout

    def _finished(self) -> _Prefill:
        if self._last is None:
            raise RuntimeError("there is nothing to tell yet: call the model first")
        return self._last

    def attach(self) -> None:
        """Register the hooks."""
        family = self._family
        for handle in family.decoder._forward_pre_hooks.values():
            if isinstance(getattr(handle, "__self__", None), Dropping):
                raise ValueError("model already drops tokens: leave the first TokenDropper before using another one")
        before = functools.partial(self._handle, "register_forward_pre_hook", with_kwargs=True)
        if self._model is not family.body:
            before(self._model, self._before_model)
        before(family.body, self._before_body)
        for policy in {id(x): x for x in self._policies.values()}.values():
            self._handles.extend(policy.watch(family, self._seen[id(policy)]))
        before(family.decoder, self._before_decoder)
        before(family.decoder.rotary_emb, self._before_rotary)
        # Steps of decoding pass these hooks too: only the layers that need one get it.
        whole = self._schedule.inject or self._options.compact_earlier_kv
        first = 0 if whole else max(0, min(self._stages, default=self._depth) - 1)
        for index in sorted({0, *range(first, self._depth)}):
            before(family.decoder.layers[index], functools.partial(self._before_layer, index))
        self._handle("register_forward_hook", family.decoder.norm, self._after_norm)

    def _handle(self, register: str, module: Any, hook: Callable[..., Any], **options: Any) -> None:
        self._handles.append(getattr(module, register)(hook, **options))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for seen in self._seen.values():
            seen.clear()
        self._labels = None
        self._given = self._prefill = self._decode = self._ids = self._step = self._mask = None

    def _before_model(self, module: Any, args: Any, kwargs: Any) -> None:
        self._labels = _named(module, args, kwargs).get("labels")

    def _before_body(self, module: Any, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            _refuse_compilation()
        for seen in self._seen.values():
            seen.clear()
        self._given = _named(module, args, kwargs)

    def _before_decoder(self, module: Any, args: Any, kwargs: Any) -> Any:
        given, top = _named(module, args, kwargs), self._given
        cache: Any = given.get("past_key_values")
        self._given = self._prefill = self._decode = self._mask = None
        self._step = object()
        if top is None:
            raise RuntimeError("call the model that TokenDropper was given: its decoder alone does not see where images are")
        check_attention(self._family)
        _check_checkpointing(module)
        seen = 0 if cache is None else int(cache.get_seq_length())
        if not seen:
            self._prefill = self._begin(top, given)
            if cache is not None and hasattr(cache, STATE):
                delattr(cache, STATE)
            return None
        tensor: Any = top.get("input_ids") if top.get("input_ids") is not None else top["inputs_embeds"]
        if tensor.shape[1] > 1 and tensor.dim() == 2 and runs_of(tensor, self._family.token_ids):
            raise ValueError("input_ids must not bring images behind a filled cache: chunked prefill and later turns with images "
                             "are not supported")  # fmt: skip
        self._decode = getattr(cache, STATE, None)
        if self._decode is None:
            # A static layer's length is on the device, and would be waited for at every step.
            lengths = {n for layer in cache.layers if isinstance(n := layer.get_seq_length(), int)}
            if len(lengths) > 1:
                raise ValueError("past_key_values must be of a prefill under a TokenDropper, but its layers differ in length")
            return None
        return ((), self._logical(top, given, self._decode, seen, tensor)) if self._decode.short else None

    def _logical(self, top: Any, given: dict[str, Any], state: CacheRows, seen: int, tensor: torch.Tensor) -> dict[str, Any]:
        """A step's arguments where even the first layer's cache is shorter than the text that the model counts."""
        assert state.layers[0] is not None
        cache, new, missing = given["past_key_values"], tensor.shape[1], state.prompt - state.layers[0].keep.shape[1]
        first = seen + missing
        if given.get("position_ids") is None:
            given["position_ids"] = torch.arange(first, first + new, device=tensor.device)[None]
        elif top.get("position_ids") is None and top.get("attention_mask") is None:  # Qwen2-VL counted from the cache's length
            given["position_ids"] = given["position_ids"] + missing
        weight = self._family.decoder.norm.weight
        hidden = weight.new_empty(()).expand(tensor.shape[0], new, 1)
        mask, static = given.get("attention_mask"), _is_static(cache)
        if isinstance(mask, dict):
            mask = mask["full_attention"]
        if static and mask is not None and mask.dim() == 4:  # generate() made it, for a first layer that holds all
            later = torch.ones(tensor.shape[0], first + new - state.prompt, dtype=torch.bool, device=mask.device)
            mask = None if state.seen is None else torch.cat([state.seen, later], dim=1)
        self._mask = step_mask(mask, first, new, hidden, self._family.attention, static=static)
        given["attention_mask"] = self._mask if self._mask is not None and self._mask.dim() == 4 else None
        return given

    def _begin(self, top: dict[str, Any], given: dict[str, Any]) -> _Prefill:
        """Find the vision tokens of a new prompt and what every stage keeps of them."""
        input_ids: Any = top.get("input_ids")
        shape = (given["inputs_embeds"] if input_ids is None else input_ids).shape
        batch, rows = int(shape[0]), int(shape[1])
        grids: tuple[Grid, ...] = (None,) * batch
        if self._options.spans is not None:
            spans = given_spans(self._options.spans, batch, rows)
        elif input_ids is None:
            raise ValueError("spans must be given where inputs_embeds take the place of input_ids")
        else:
            spans, grids = found_spans(self._family, top)
        device = self._family.decoder.norm.weight.device if input_ids is None else input_ids.device
        mask = given.get("attention_mask")
        lengths, side = _lengths(mask, rows)
        layout = _layout(spans, rows, lengths, side, device)
        vision = tuple(sum(stop - start for start, stop in item) for item in spans)
        real = tuple(hi - lo for lo, hi in layout.bounds)
        inject = self._schedule.inject if any(vision) else 0
        budgets, left = {}, vision
        without = [item for item, (n, rows_) in enumerate(zip(vision, real, strict=True)) if n and n == rows_]
        if inject and without:
            raise ValueError(f"schedule must not inject late in item {without[0]}: it has nothing but vision tokens")
        ratios = dict(zip(self._soft, torch.stack(list(self._soft.values())).tolist(), strict=True)) if self._soft else {}
        for layer in self._stages:
            kept = self._counts(left, layer, ratios.get(layer))
            for item in without:
                if not kept[item]:
                    raise ValueError(
                        f"schedule must keep a token of item {item} at layer {layer}: it has nothing but vision tokens"
                    )
            if kept != left or (layer in ratios and any(left)):
                budgets[layer] = left = kept
        seeds: list[list[int]] = [[]] * batch
        if input_ids is not None and any(policy.seeded for policy in self._policies.values()):
            seeds = [ids[lo:hi] for ids, (lo, hi) in zip(input_ids.tolist(), layout.bounds, strict=True)]
        state = CacheRows(rows, (None,) * self._depth)
        entering = [(real, vision, rows)] * self._depth
        labels, self._labels = self._labels, None
        if labels is not None and tuple(labels.shape) != (batch, rows):
            labels = None
        return _Prefill(batch, rows, spans, grids, layout, real, vision, budgets, seeds, entering, inject, state, labels=labels)

    def _before_rotary(self, module: Any, args: Any, kwargs: Any) -> Any:
        given = _named(module, args, kwargs)
        run, ids = self._prefill, given["position_ids"]
        if run is not None and self._options.positions == "group":
            if ids.dim() != 2:
                raise ValueError("positions='group' needs models with one id per token, not M-RoPE")
            given["position_ids"] = ids = position_modes.group_position_ids(run.layout, ids.device)
        self._ids = ids
        if run is not None:
            run.itemsize = next(iter(given.values())).element_size()
        return (), given

    def _before_layer(self, index: int, module: Any, args: Any, kwargs: Any) -> Any:
        state, run = self._decode, self._prefill
        if state is not None:
            rows = state.layers[index]
            return None if rows is None else self._cut(index, args, kwargs, rows, state, prefill=False)
        if run is None or not (run.budgets or run.inject):
            return None
        hidden = came = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            run.embeds = hidden
            if run.inject:
                hidden = self._strip(run, hidden, kwargs)
        if index == run.inject > 0:
            hidden = self._inject(run, hidden)
        if index in run.budgets:
            hidden = self._drop(index, run, hidden, kwargs)
        # Compared with the next layer's input, if that is where something is dropped.
        run.before = None
        if index + 1 in run.budgets and index + 1 != run.inject:
            run.before = hidden if self._soft else hidden.detach()
        if hidden is came and run.current is None:
            return None
        args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
        return (args, kwargs) if run.current is None else self._cut(index, args, kwargs, run.current, run.state, prefill=True)

    def _strip(self, run: _Prefill, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Late injection: the layers before it see the text alone, under the ids that it has among the vision tokens."""
        self._mark(kwargs, run)
        dropped = drop_tokens(
            None, hidden, 0, droppable=run.layout, scores=hidden.new_zeros(hidden.shape[:2], dtype=torch.float32),
            rope=kwargs["position_embeddings"], backend=self._options.backend,
        )  # fmt: skip
        assert dropped.layout is not None
        real, width = tuple(hi - lo for lo, hi in dropped.layout.bounds), dropped.keep.shape[1]
        run.current, run.rope = Rows(dropped.keep, any(n != width for n in real)), dropped.rope
        run.layout, run.whole = dropped.layout, run.layout
        every = torch.arange(run.rows, device=dropped.keep.device).expand(run.batch, -1)
        run.state.layers = (run.current,) * run.inject + (Rows(every, False),) * (self._depth - run.inject)
        run.entering[: run.inject] = [(real, (0,) * run.batch, width)] * run.inject
        return dropped.hidden

    def _inject(self, run: _Prefill, hidden: torch.Tensor) -> torch.Tensor:
        assert run.current is not None
        assert run.embeds is not None
        assert run.whole is not None
        hidden = injected(hidden, run.current, run.embeds)
        run.current.forget()
        run.current = run.rope = None
        run.layout, run.whole = run.whole, None
        return hidden

    def _mark(self, kwargs: dict[str, Any], run: _Prefill) -> Any:
        """The cache, which from now on carries the rows of its layers."""
        cache = kwargs.get("past_key_values")
        if cache is not None:
            _check_cache(cache)
            setattr(cache, STATE, run.state)
            mask = kwargs.get("attention_mask")
            if run.state.seen is None and mask is not None and mask.dim() == 4 and _is_static(cache):
                run.state.seen = _last_row(mask, run.rows).clone()  # or the whole mask would live as long as the cache
        return cache

    def _drop(self, index: int, run: _Prefill, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """One stage: rank, drop, and make the rows of all that travels with the hidden states."""
        options, stage, keep = self._options, self._stages[index], run.budgets[index]
        cache = self._mark(kwargs, run)
        compacted = options.positions == "compacted"
        rope = kwargs["position_embeddings"] if run.rope is None else run.rope
        ids = self._ids if run.ids is None else run.ids
        shared = [keep[item] for item, spans in enumerate(run.layout.spans) if spans] if run.layout.counts is None else list(keep)
        policy, stop = self._policies[index], self._stop(index, run, hidden, rope, kwargs)
        learnt = self._soft.get(index) if torch.is_grad_enabled() else None
        with torch.set_grad_enabled(learnt is not None):  # where nothing stays, nothing is ranked
            scores = policy.score(stop) if any(keep) else hidden.new_zeros(hidden.shape[:2], dtype=torch.float32)
            if learnt is not None and scores is None:
                assert run.before is not None
                scores = variation_score(run.before, hidden, metric=stage.metric, score_dtype=options.score_dtype)
        static = cache is not None and options.compact_earlier_kv and _is_static(cache)
        earlier = cache.layers[run.inject : index] if cache is not None and options.compact_earlier_kv else []
        earlier = [layer for layer in earlier if layer.is_initialized]  # under gradient checkpointing nothing is cached
        dropped = drop_tokens(
            run.before, hidden, shared, droppable=run.layout, scores=None if scores is None else scores.detach(),
            metric=stage.metric, score_dtype=options.score_dtype,
            rope=None if compacted else rope, position_ids=ids if compacted else None,
            positions="compacted" if compacted else "persistent",
            kv=[(layer.keys, layer.values) for layer in earlier] if earlier and not static else None, backend=options.backend,
        )  # fmt: skip
        assert dropped.layout is not None
        kept, origin = dropped.keep, dropped.keep
        if run.current is not None:
            origin = torch.where(kept >= 0, run.current.keep.gather(1, kept.clamp(min=0)), kept)
        width = kept.shape[1]
        real = tuple(hi - lo for lo, hi in dropped.layout.bounds)
        rows = Rows(origin, any(n != width for n in real))
        if compacted:
            last = lambda table, bounds: _at(table.expand(*table.shape[:-2], run.batch, -1), [max(hi - 1, 0) for _, hi in bounds])
            step = last(ids, run.layout.bounds) - last(dropped.position_ids, dropped.layout.bounds)
            rows.shift = step if run.current is None or run.current.shift is None else step + run.current.shift
            run.ids = dropped.position_ids
            run.rope = self._family.decoder.rotary_emb.forward(dropped.hidden, run.ids)
        else:
            run.rope = dropped.rope
        if static and earlier:
            mask = kwargs.get("attention_mask")
            if rows.ragged or (mask is not None and not bool(_last_row(mask, run.rows).all())):
                raise ValueError("compact_earlier_kv with a static cache needs items of one length without padding")
            compact_(kept, [(layer.keys, layer.values) for layer in earlier], backend=options.backend)
            for layer in earlier:
                layer.cumulative_length.fill_(width)
        elif earlier:
            for layer, (keys, values) in zip(earlier, dropped.kv, strict=True):
                layer.keys, layer.values = keys, values
        held = run.state.layers[:index]
        if earlier:  # their ids stay
            moved = {id(x): Rows(rows.keep, rows.ragged, None if x is None else x.shift) for x in held[run.inject :]}
            held = (*held[: run.inject], *(moved[id(x)] for x in held[run.inject :]))
        run.layout, run.vision, run.current = dropped.layout, keep, rows
        run.state.layers = (*held, *(rows,) * (self._depth - index))
        run.entering[index:] = [(real, keep, width)] * (self._depth - index)
        run.stages.append((index, rows))
        found = policy.merge(stop, kept, dropped.hidden) if any(keep) else dropped.hidden
        if learnt is None:
            return found
        assert scores is not None
        at, competed = kept.clamp(min=0), stop.droppable
        mask = soft_topk(scores, learnt, valid=competed, backend=options.backend).gather(1, at)
        return found * torch.where(competed.gather(1, at), mask, 1.0)[..., None].to(found.dtype)

    def _stop(self, index: int, run: _Prefill, hidden: torch.Tensor, rope: Any, kwargs: Any) -> Stop:
        assert run.embeds is not None
        options, current = self._options, run.current
        mask = kwargs.get("attention_mask") if current is None else self._cut_mask(index - 1, kwargs, current, run.state, hidden)
        if mask is not None and mask.dim() == 2:
            mask = mask.bool()[:, None, None].expand(-1, -1, hidden.shape[1], -1)
        return Stop(
            layer=index, stage=self._stages[index], family=self._family, hidden=hidden, before=run.before, rope=rope, mask=mask,
            layout=run.layout, counts=run.vision, keep=run.budgets[index], origin=None if current is None else current.keep,
            embeds=run.embeds, grids=run.grids, seeds=_seeds_of(options.seed, index, run.seeds_from),
            seen=self._seen[id(self._policies[index])], backend=options.backend, scores=options.scores, labels=run.labels,
        )  # fmt: skip

    def _cut_mask(self, index: int, kwargs: Any, rows: Rows, state: CacheRows, hidden: torch.Tensor) -> Any:
        """The mask of a layer that holds only some rows, made once for all layers that hold the same."""
        cache, prefill, attention = kwargs.get("past_key_values"), self._prefill is not None, self._family.attention
        length = hidden.shape[1] if cache is None else cache.get_mask_sizes(hidden.shape[1], index)[0]
        mask = kwargs.get("attention_mask") if prefill or not state.short else self._mask
        make = lambda: cut_mask(mask, rows, state.prompt, prefill=prefill, length=length, flash=attention.startswith("flash"))
        return rows.once("mask", self._step, make)

    def _cut(self, index: int, args: Any, kwargs: Any, rows: Rows, state: CacheRows, *, prefill: bool) -> Any:
        """The arguments of a layer that holds only some rows."""
        hidden = args[0] if args else kwargs["hidden_states"]
        new = {**kwargs, "attention_mask": self._cut_mask(index, kwargs, rows, state, hidden)}
        if prefill:
            assert self._prefill is not None
            new["position_embeddings"] = self._prefill.rope
            # Attention reads ids only to tell packed sequences by their jumps, and dropping makes jumps.
            new["position_ids"] = None
        elif rows.shift is not None:
            rotary = self._family.decoder.rotary_emb
            new["position_embeddings"] = rows.once("rope", self._step, lambda: rotary.forward(hidden, self._ids - rows.shift))
        return args, new

    def _after_norm(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        run = self._prefill
        if run is None:
            return None
        self._prefill, self._last = None, run
        run.rope = run.ids = run.before = run.embeds = run.labels = None
        for seen in self._seen.values():
            seen.clear()
        for _, rows in run.stages:
            rows.forget()
        if run.current is None:
            return None
        left = run.layout.padding_side == "left"
        return spread(output, run.current, tuple(hi - lo for lo, hi in run.layout.bounds), left, run.rows)


@torch.compiler.disable  # or the tracer would give up at the raise and run the hook uncompiled, as if nothing were
def _refuse_compilation() -> None:
    raise RuntimeError("TokenDropper does not run under torch.compile, for its hooks choose shapes: generate(disable_compile=True)")


@functools.cache
def _parameters(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


def _named(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of a forward by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(_parameters(type(module).forward)[1:], args, strict=False)), **kwargs}


def _lengths(mask: Any, rows: int) -> tuple[list[int] | None, str]:
    """Real tokens per item and the padded side; None where no 2-D mask could tell (padding rows are then kept, and masked)."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[2] == rows <= mask.shape[3]:
        # As generate() makes it for static caches; the caller may have made one that says more than what is padding.
        real = _last_row(mask, rows)
        seen = mask[:, 0, :, :rows] if mask.dtype == torch.bool else mask[:, 0, :, :rows] >= 0
        if not bool(((seen == (seen.new_ones(rows, rows).tril() & real[:, None])) | ~real[:, :, None]).all()):
            return None, "left"
    elif not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[1] != rows:
        return None, "left"
    else:
        real = mask.bool()
    # How much padding lies in front and behind; holes inside are rows that stay, and stay masked.
    facts = torch.stack([real.any(1), real.int().argmax(1), real.flip(1).int().argmax(1)])
    full, lead, trail = facts.tolist()
    if not any(lead) and not any(trail) and all(full):
        return None, "left"
    if not any(trail):
        return [rows - n if some else 0 for some, n in zip(full, lead, strict=True)], "left"
    if not any(lead):
        return [rows - n if some else 0 for some, n in zip(full, trail, strict=True)], "right"
    return None, "left"


def _layout(spans: Spans, rows: int, lengths: list[int] | None, side: str, device: torch.device) -> TokenLayout:
    """One competition per item, also where it has several images."""
    if all(len(item) <= 1 for item in spans):
        return TokenLayout.padded(list(spans), rows, batch=len(spans), lengths=lengths, padding_side=side)
    mask = torch.zeros(len(spans), rows, dtype=torch.bool)
    for item, pairs in enumerate(spans):
        for start, stop in pairs:
            mask[item, start:stop] = True
    counts = mask.sum(1).tolist()
    return TokenLayout.from_mask(mask.to(device), counts, lengths=lengths, padding_side=side)


def _seeds_of(seed: int, layer: int, items: list[list[int]]) -> list[int]:
    """One seed per item from the run's seed, the stage and the item's real token ids."""
    return [zlib.crc32(repr((seed, layer, ids)).encode()) for ids in items]


def _check_cache(cache: Any) -> None:
    """Raise unless every layer of the cache keeps its own length."""
    from transformers.cache_utils import DynamicLayer, StaticLayer

    kinds = {type(layer) for layer in getattr(cache, "layers", [None])} | {getattr(cache, "layer_class_to_replicate", None)}
    odd = sorted(kind.__name__ for kind in kinds - {DynamicLayer, StaticLayer, None} if isinstance(kind, type))
    if odd or not hasattr(cache, "layers"):
        what = odd[0] if odd else type(cache).__name__
        raise ValueError(f"past_key_values must be a DynamicCache or StaticCache with full attention; {what} cannot be ragged")


def _check_checkpointing(decoder: Any) -> None:
    """Raise where hooks would lie inside what gradient checkpointing runs twice, as up to transformers 5.20 at least."""
    layer = decoder.layers[0]
    if decoder.training and getattr(layer, "gradient_checkpointing", False):
        from transformers.modeling_layers import GradientCheckpointingLayer

        if "__call__" in vars(GradientCheckpointingLayer):
            raise RuntimeError("gradient checkpointing needs a transformers that checkpoints forward, not __call__, such as 5.23")


def _is_static(cache: Any) -> bool:
    from transformers.cache_utils import StaticLayer

    return any(isinstance(layer, StaticLayer) for layer in cache.layers)


def _last_row(mask: torch.Tensor, prompt: int) -> torch.Tensor:
    """bool ``[B, prompt]``: what of the prompt its last row sees."""
    last = mask[:, 0, -1, :prompt]
    return last if last.dtype == torch.bool else last >= 0


def _at(table: torch.Tensor, columns: list[int]) -> torch.Tensor:
    """``[..., B, N]`` at one column of each row: ``[..., B, 1]``."""
    index = torch.tensor(columns, device=table.device)[:, None].expand(*table.shape[:-1], 1)
    return table.gather(-1, index)
