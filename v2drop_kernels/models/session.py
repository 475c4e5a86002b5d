"""DropSession: the hooks on one model, and what the last prefill dropped.

A pre-hook on the first layer of every stage runs ``stage.py``: it gets scores from the stage's policy and drops rows with
:func:`v2drop_kernels.drop_tokens`. Pre-hooks on later layers cut the mask and pass on the rotary tables of the kept rows
(``forward.py``). Keys and values of earlier layers stay, so layers hold caches of different lengths, and every cut mask has the
length of its layer. If even the first layer's cache is shorter than the prompt (drops before it, late injection), the masks of
decoding steps are made here for the whole text (``decode.py``). The hook of the final norm puts the rows back at their places in
the prompt, so logits, labels and loss keep their shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..core import deprecated
from ..core import positions as position_modes
from ..core.layout import TokenLayout
from ..core.schedule import Schedule
from .adapters import caches
from .adapters.arguments import LayerCall, named_arguments
from .adapters.model import check_attention, check_checkpointing
from .caches import CacheState
from .decode import begin_step
from .forward import Forward
from .prefill import Prefill, begin, inject_vision, real_lengths, remove_vision
from .report import Kept, LayerReport, Report
from .rows import scatter_to_prompt
from .setup import Setup
from .stage import run_stage

if TYPE_CHECKING:
    from .dropper import TokenDropper


class DropSession:
    """A model that drops tokens: the value of ``with TokenDropper(...)(model)``, which constructs it.

    Attributes
    ----------
    ratios : ParameterList
        With ``soft`` the share that each stage drops, for the optimiser; else empty.
    """

    def __init__(self, options: TokenDropper, model: Any) -> None:
        self._setup = Setup.of(options, model)
        self._model = model
        self._handles: list[Any] = []
        self._labels: torch.Tensor | None = None
        self._arguments: dict[str, Any] | None = None  # of the model's forward, until its decoder runs
        self._forward = Forward()
        self._last: Prefill | None = None

    @property
    def ratios(self) -> torch.nn.ParameterList:
        return self._setup.soft.ratios

    def report(self) -> Report:
        """Tokens, KV bytes and FLOPs of every layer in the last prefill.

        Raises
        ------
        RuntimeError
            No prefill has run.
        """
        run, adapter = self._finished(), self._setup.adapter
        row_bytes = run.batch * adapter.kv_row_bytes(run.itemsize)
        rows = [run.rows if held is None else held.keep.shape[1] for held in run.cache_state.layers]
        layers = tuple(
            LayerReport(layer, tokens, vision, width, row_bytes * cached, adapter.block_flops(tokens))
            for layer, ((tokens, vision, width), cached) in enumerate(zip(run.entering, rows, strict=True))
        )
        return Report(layers, row_bytes * run.rows * len(layers), adapter.block_flops(run.lengths) * len(layers))

    def kept(self, item: int = 0) -> Kept:
        """The droppable tokens of an item of the batch that each stage of the last prefill kept.

        Parameters
        ----------
        item : int
            Of the batch that the model received: with ``num_beams`` or ``num_return_sequences`` every prompt is repeated.

        Raises
        ------
        ValueError
            No such item.
        RuntimeError
            No prefill has run.
        """
        run = self._finished()
        if not 0 <= item < len(run.spans):
            raise ValueError(f"item must be one of the {len(run.spans)} of the last prefill, got {item}")
        number = {row: i for i, row in enumerate(row for start, stop in run.spans[item] for row in range(start, stop))}
        left, stages, done = tuple(number.values()), [], dict(run.stages)
        for layer in self._setup.stages:
            if layer in done:
                left = tuple(number[row] for row in done[layer].keep[item].tolist() if row in number)
            stages.append(left)
        return Kept(tuple(stages), len(number), run.grids[item])

    def learned_schedule(self) -> Schedule:
        """The schedule with the shares that ``soft`` training has reached, to run without it. Reads the ratios on the host."""
        return self._setup.soft.learned_schedule(self._setup.schedule)

    def vision_token_counts(self) -> tuple[int, ...]:
        """Droppable tokens of every item of the last prefill, before anything was dropped."""
        return tuple(sum(stop - start for start, stop in item) for item in self._finished().spans)

    learnt = deprecated.method("DropSession", "learnt", "learned_schedule")
    totals = deprecated.method("DropSession", "totals", "vision_token_counts")

    @property
    def layout(self) -> TokenLayout:
        """In a prefill, the layout of the rows that the current layer receives."""
        assert self._forward.prefill is not None
        return self._forward.prefill.layout

    def _finished(self) -> Prefill:
        if self._last is None:
            raise RuntimeError("there is nothing to report yet: call the model first")
        return self._last

    def attach(self) -> None:
        """Register the hooks.

        Raises
        ------
        ValueError
            The model already has the hooks of another session, or lacks what a policy needs.
        """
        setup, adapter, decoder = self._setup, self._setup.adapter, self._setup.adapter.decoder
        for hook in decoder._forward_pre_hooks.values():
            if isinstance(getattr(hook, "__self__", None), DropSession):
                raise ValueError("model already drops tokens: leave the first TokenDropper before using another one")
        if self._model is not adapter.body:
            self._before(self._model, self._before_model)
        self._before(adapter.body, self._before_body)
        for policy in {id(x): x for x in setup.policies.values()}.values():
            self._handles.extend(policy.register_hooks(adapter, setup.tower_caches[id(policy)]))
        self._before(decoder, self._before_decoder)
        self._before(decoder.rotary_emb, self._before_rotary)
        # Decoding steps run these hooks too, so only layers that need one get it.
        all_layers = setup.schedule.inject or setup.options.compact_earlier_kv
        first = 0 if all_layers else max(0, min(setup.stages, default=adapter.depth) - 1)
        for index in sorted({0, *range(first, adapter.depth)}):
            self._before(decoder.layers[index], functools.partial(self._before_layer, index))
        self._handles.append(adapter.norm.register_forward_hook(self._after_norm))

    def _before(self, module: Any, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._setup.clear_tower_caches()
        self._labels = self._arguments = None
        self._forward = Forward()

    def _before_model(self, module: Any, args: Any, kwargs: Any) -> None:
        self._labels = named_arguments(module, args, kwargs).get("labels")

    def _before_body(self, module: Any, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            _refuse_compilation()
        self._setup.clear_tower_caches()
        self._arguments = named_arguments(module, args, kwargs)

    def _before_decoder(self, module: Any, args: Any, kwargs: Any) -> Any:
        decoder, top, adapter = named_arguments(module, args, kwargs), self._arguments, self._setup.adapter
        self._arguments, self._forward = None, Forward()
        if top is None:
            raise RuntimeError("call the model that TokenDropper was given: its decoder alone does not receive the image tokens")
        check_attention(adapter)
        check_checkpointing(module)
        cache: Any = decoder.get("past_key_values")
        cached = caches.cached_tokens(cache)
        if cached:
            changed = begin_step(adapter, top, decoder, cached, self._forward)
            return None if changed is None else ((), changed)
        labels, self._labels = self._labels, None
        self._forward.prefill = begin(self._setup, top, decoder, labels)
        CacheState.remove(cache)
        return None

    def _before_rotary(self, module: Any, args: Any, kwargs: Any) -> Any:
        given, prefill = named_arguments(module, args, kwargs), self._forward.prefill
        ids = given["position_ids"]
        if prefill is not None and self._setup.options.positions == "group":
            if ids.dim() != 2:
                raise ValueError("positions='group' needs models with one id per token, not M-RoPE")
            given["position_ids"] = ids = position_modes.group_position_ids(prefill.layout, ids.device)
        self._forward.position_ids = ids
        if prefill is not None:
            prefill.itemsize = next(iter(given.values())).element_size()
        return (), given

    def _before_layer(self, index: int, module: Any, args: Any, kwargs: Any) -> Any:
        forward, call = self._forward, LayerCall(args, kwargs)
        state, prefill = forward.decoding, forward.prefill
        if state is not None:
            rows = state.layers[index]
            return None if rows is None else forward.cut(self._setup.adapter, call, index, rows, state).result()
        if prefill is None or not (prefill.budgets or prefill.inject):
            return None
        hidden = self._prefill_layer(index, prefill, call)
        if prefill.current is not None:
            rows = prefill.current
            return forward.cut(self._setup.adapter, call.with_hidden(hidden), index, rows, prefill.cache_state).result()
        return None if hidden is call.hidden else call.with_hidden(hidden).result()

    def _prefill_layer(self, index: int, prefill: Prefill, call: LayerCall) -> torch.Tensor:
        """The hidden states that layer ``index`` receives in a prefill."""
        hidden = call.hidden
        if index == 0:
            prefill.embeds = hidden
            if prefill.inject:
                hidden = remove_vision(self._setup, prefill, hidden, call)
        if index == prefill.inject > 0:
            hidden = inject_vision(prefill, hidden)
        if index in prefill.budgets:
            hidden = run_stage(self._setup, self._forward, index, call.with_hidden(hidden))
        # Kept for a drop before the next layer, whose policy may compare it with that layer's input.
        prefill.prev_hidden = None
        if index + 1 in prefill.budgets and index + 1 != prefill.inject:
            prefill.prev_hidden = hidden if self._setup.soft else hidden.detach()
        return hidden

    def _after_norm(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        prefill = self._forward.prefill
        if prefill is None:
            return None
        self._forward.prefill, self._last = None, prefill
        prefill.finish()
        self._setup.clear_tower_caches()
        if prefill.current is None:
            return None
        left = prefill.layout.padding_side == "left"
        return scatter_to_prompt(output, prefill.current, real_lengths(prefill.layout), left, prefill.rows)


@torch.compiler.disable  # otherwise the tracer would stop at the raise and run the hook uncompiled, without the error
def _refuse_compilation() -> None:
    raise RuntimeError("TokenDropper does not run under torch.compile, for its hooks choose shapes: generate(disable_compile=True)")
