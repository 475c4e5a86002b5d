"""DropSession: the hooks on one model, and what the last prefill dropped.

A pre-hook on the first layer of every stage runs ``stage.py``: it gets scores from the stage's policy and drops rows with
:func:`v2drop_kernels.drop_tokens`. Pre-hooks on later layers cut the mask and pass on the rotary tables of the kept rows
(``forward.py``). Keys and values of earlier layers stay, so layers hold caches of different lengths, and every cut mask has the
length of its layer. If even the first layer's cache is shorter than the prompt (drops before it, late injection), the masks of
decoding steps are made here for the whole text (``decode.py``). The hook of the final norm puts the rows back at their places in
the prompt, so logits, labels and loss keep their shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch

from ..core import deprecated
from ..core import positions as position_modes
from ..core.layout import TokenLayout
from ..core.schedule import Schedule
from .adapters import caches, wrappers
from .adapters.arguments import LayerCall, named_arguments
from .adapters.deepstack import rows_of, take_planes
from .adapters.masks import visible_rows
from .adapters.model import check_attention, check_checkpointing
from .adapters.spans import record_sizes
from .caches import CacheState
from .calls import Call, Calls, ThreadDict
from .compiled import is_step, regions
from .decode import brings_images, rotary_ids, state_of
from .forward import Forward
from .hooks import Hooks, refusals
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
        setup = Setup.of(options, model)
        self._setup = dataclasses.replace(setup, tower_caches={key: ThreadDict() for key in setup.tower_caches})
        self._modules = wrappers.chain(model)
        self._hooks = Hooks(self._modules[-1])
        self._traced: CacheState | None = None
        self._calls = Calls()
        self._last: Prefill | None = None  # of all threads

    @property
    def ratios(self) -> torch.nn.ParameterList:
        return self._setup.soft.ratios

    def report(self) -> Report:
        """Tokens, KV bytes and FLOPs of every layer in the last prefill, and the time of its decoder.

        Raises
        ------
        RuntimeError
            No prefill has run.
        """
        run, adapter = self._finished(), self._setup.adapter
        row_bytes = run.batch * adapter.kv_row_bytes(run.itemsize)
        text = run.first + run.rows
        rows = [text if held is None else held.keep.shape[1] for held in run.cache_state.layers]
        rows = [adapter.cached_rows(layer, n) for layer, n in enumerate(rows)]
        layers = tuple(
            LayerReport(layer, tokens, vision, width, row_bytes * cached, adapter.block_flops(tokens))
            for layer, ((tokens, vision, width), cached) in enumerate(zip(run.entering, rows, strict=True))
        )
        return Report(
            layers,
            row_bytes * text * len(layers),
            adapter.block_flops(run.lengths) * len(layers),
            run.watch.seconds if run.watch else 0.0,
        )

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
        call = self._calls.top
        assert call is not None
        assert call.forward.prefill is not None
        return call.forward.prefill.layout

    def _finished(self) -> Prefill:
        found = self._calls.last or self._last
        if found is None:
            raise RuntimeError("there is nothing to report yet: call the model first")
        return found

    def attach(self) -> None:
        """Register the hooks.

        Raises
        ------
        ValueError
            The model already has the hooks of another session, or lacks what a policy needs.
        """
        setup, adapter, hooks = self._setup, self._setup.adapter, self._hooks
        decoder = adapter.decoder
        for hook in decoder._forward_pre_hooks.values():
            if isinstance(getattr(hook, "__self__", None), DropSession):
                raise ValueError("model already drops tokens: leave the first TokenDropper before using another one")
        for module in self._modules:
            if module is not adapter.body:
                hooks.before(module, self._before_model)
                hooks.behind(module, self._after_call, always=True)
        hooks.before(adapter.body, self._before_body)
        hooks.behind(adapter.body, self._after_call, always=True)
        for policy in {id(x): x for x in setup.policies.values()}.values():
            hooks.keep(policy.register_hooks(adapter, setup.tower_caches[id(policy)]))
        hooks.keep(record_sizes(adapter.body))
        hooks.before(decoder, self._before_decoder)
        hooks.before(decoder.rotary_emb, self._before_rotary, part=True)
        # Decoding steps run these hooks too, so only layers that need one get it.
        all_layers = setup.schedule.inject or setup.options.compact_earlier_kv or adapter.deepstack
        self._cover(0 if all_layers else max(0, min(setup.stages, default=adapter.depth) - 1))
        hooks.behind(adapter.norm, self._after_norm, part=True)
        containing = {id(module): module for module in (*self._modules, adapter.body, decoder)}
        hooks.keep(regions(list(containing.values()), list(decoder.layers)))
        hooks.keep(refusals(self._modules[-1]))

    def _cover(self, first: int) -> None:
        """Register the hooks of the first layer and of all from ``first`` on: a cache may lack rows before this schedule does."""
        for index, layer in enumerate(self._setup.adapter.decoder.layers):
            if not index or index >= first:
                self._hooks.once(index, layer, functools.partial(self._before_layer, index))

    def detach(self) -> None:
        """Remove the hooks."""
        self._hooks.remove()
        self._calls = Calls()

    def _before_model(self, module: Any, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        call = self._calls.top
        if call is None or call.entered:  # else a module around this one has begun it
            call = self._calls.begin(module, self._setup)
        if (labels := named_arguments(module, args, kwargs).get("labels")) is not None:
            call.labels = labels

    def _before_body(self, module: Any, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            if not is_step(named_arguments(module, args, kwargs)):
                _refuse_compilation()
            return
        call = self._calls.top
        if call is None or call.entered:
            call = self._calls.begin(module, self._setup)
        call.entered, call.arguments = True, named_arguments(module, args, kwargs)
        call.use(body=module)

    def _after_call(self, module: Any, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._calls.end(module)

    def _before_decoder(self, module: Any, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            self._trace_step(kwargs)
            return None
        call = self._calls.top
        if call is None or call.arguments is None:
            raise RuntimeError("call the model that TokenDropper was given: its decoder alone does not receive the image tokens")
        call.use(decoder=module)
        top, decoder = call.arguments, named_arguments(module, args, kwargs)
        call.arguments, call.forward = None, Forward()
        check_attention(call.setup.adapter)
        check_checkpointing(module)
        cache: Any = decoder.get("past_key_values")
        state, first = CacheState.of(cache), 0
        call.forward.visible = visible_rows(top)
        if state is not None or caches.cached_tokens(cache):
            state = state_of(cache)
            if not brings_images(call.setup, top):
                if state is not None:
                    call.forward.state, state.active = state, True
                    self._cover(state.first_layer)
                return None
            first = caches.cached_tokens(cache)
        call.forward.prefill = prefill = begin(call.setup, top, decoder, call.labels, first, state)
        call.forward.state = prefill.cache_state
        if state is not None:
            prefill.cache_state.resume(cache)
            self._cover(state.first_layer)
        if call.setup.adapter.deepstack and prefill.budgets:
            prefill.planes = take_planes(decoder, min(prefill.budgets))
        return ((), decoder) if prefill.planes else None

    def _trace_step(self, kwargs: Any) -> None:
        """A step that is being compiled: its hooks read and write the cache's state only, which each step leaves as it was."""
        self._traced = state = CacheState.of(kwargs["past_key_values"])
        if state is not None:
            state.active = True
            state.traced = Forward(state=state, position_ids=rotary_ids(kwargs, state))
            self._cover(state.first_layer)

    def _before_rotary(self, module: Any, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or (call := self._calls.top) is None:
            return None
        given, prefill = named_arguments(module, args, kwargs), call.forward.prefill
        ids = given["position_ids"]
        if prefill is not None and self._setup.options.positions == "group":
            if ids.dim() != 2:
                raise ValueError("positions='group' needs models with one id per token, not M-RoPE")
            given["position_ids"] = ids = position_modes.group_position_ids(prefill.layout, ids.device)
        call.forward.position_ids = ids
        if prefill is not None:
            prefill.itemsize = next(iter(given.values())).element_size()
        return (), given

    def _before_layer(self, index: int, module: Any, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            step = self._traced
            if step is None or step.layers[index] is None:
                return None
            return step.traced.cut(self._setup.adapter, LayerCall(args, kwargs), index).result()
        running = self._calls.top
        if running is None or (state := running.forward.state) is None:
            return None
        forward, adapter, prefill = running.forward, running.setup.adapter, running.forward.prefill
        if prefill is None:
            return None if state.layers[index] is None else forward.cut(adapter, LayerCall(args, kwargs), index).result()
        if not (prefill.budgets or prefill.inject or prefill.earlier):
            return None
        call = LayerCall(args, kwargs)
        hidden = self._prefill_layer(index, running, prefill, call)
        if prefill.current is not None or (prefill.first and state.layers[index] is not None):
            return forward.cut(adapter, call.with_hidden(hidden), index).result()
        return None if hidden is call.hidden else call.with_hidden(hidden).result()

    def _prefill_layer(self, index: int, running: Call, prefill: Prefill, call: LayerCall) -> torch.Tensor:
        """The hidden states that layer ``index`` receives in a prefill."""
        hidden, setup = call.hidden, running.setup
        if 0 < index <= len(prefill.planes):
            plane = rows_of(prefill.planes[index - 1], None if prefill.current is None else prefill.current.keep, hidden)
            hidden = hidden + plane
            if prefill.prev_hidden is not None:  # what the block changed, not what was added behind it
                prefill.prev_hidden = prefill.prev_hidden + plane
        if index == 0:
            prefill.embeds = hidden
            if prefill.inject:
                hidden = remove_vision(setup, prefill, hidden, call)
        if index == prefill.inject > 0:
            hidden = inject_vision(prefill, hidden)
        if index in prefill.budgets:
            hidden = run_stage(setup, running.forward, index, call.with_hidden(hidden))
        # Kept for a drop before the next layer, whose policy may compare it with that layer's input.
        prefill.prev_hidden = None
        if index + 1 in prefill.budgets and index + 1 != prefill.inject:
            prefill.prev_hidden = hidden if setup.soft else hidden.detach()
        return hidden

    def _after_norm(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if torch.compiler.is_compiling():
            if (step := self._traced) is not None:
                step.active, step.traced, self._traced = False, None, None
            return None
        call = self._calls.top
        if call is None or (prefill := call.forward.prefill) is None:
            return None
        call.forward.prefill, self._last, self._calls.last = None, prefill, prefill
        prefill.finish(call.setup.adapter)
        if prefill.current is None:
            return None
        left = prefill.layout.padding_side == "left"
        return scatter_to_prompt(output, prefill.current, real_lengths(prefill.layout), left, prefill.rows)


@torch.compiler.disable  # otherwise the tracer would stop at the raise and run the hook uncompiled, without the error
def _refuse_compilation() -> None:
    raise RuntimeError("prefills must run eagerly where tokens are dropped: pass the compiled model itself to TokenDropper")
