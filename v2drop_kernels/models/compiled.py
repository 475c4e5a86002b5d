"""Compiled models inside a block: prefills run the hooks eagerly between compiled blocks, single steps stay one compiled graph.

``module.compile()`` stores a compiled ``_call_impl`` on the module, which traces hooks with the forward. For the time of a block a
function takes its place: it runs prefills by the plain ``_call_impl``, whose blocks are compiled one by one with the caller's own
compiler, and hands steps to the compiled one. The tracer inlines the hooks of a step, which read the cache only. A graph that was
compiled without the hooks cannot be taken for them: its guards check the class of the cache, which is another one behind drops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .adapters.arguments import named_arguments
from .adapters.caches import cached_tokens
from .caches import CacheState


class Replaced:
    """An attribute of one module that is replaced until :meth:`remove`."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name = owner, name
        self._missing = name not in owner.__dict__
        self._before = owner.__dict__.get(name)
        owner.__dict__[name] = value

    def remove(self) -> None:
        self.restore(self.owner.__dict__)

    def restore(self, state: dict[str, Any]) -> None:
        """Undo the replacement in a copy of the module's attributes."""
        if self._missing:
            state.pop(self.name, None)
        elif self.name in state:
            state[self.name] = self._before


def compiled_call(module: Any) -> Callable[..., Any] | None:
    """What ``module.compile()`` has stored."""
    found: Callable[..., Any] | None = module.__dict__.get("_compiled_call_impl")
    return found


def around(module: Any, before: Callable[..., Any] | None, behind: Callable[..., Any] | None) -> Replaced:
    """Call hooks around a compiled module, outside its graph."""
    compiled = compiled_call(module)
    assert compiled is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        changed = before(module, args, kwargs) if before is not None else None
        args, kwargs = (args, kwargs) if changed is None else changed
        output = compiled(*args, **kwargs)
        changed = behind(module, args, output) if behind is not None else None
        return output if changed is None else changed

    return Replaced(module, "_compiled_call_impl", call)


def regions(modules: Sequence[Any], layers: Sequence[Any]) -> list[Replaced]:
    """Let compiled ``modules``, which contain the ``layers``, run prefills eagerly and their blocks compiled."""
    replaced, compilers = [], []
    for module in modules:
        if hasattr(module, "_orig_mod"):
            compiled = module.__dict__["forward"]
            eager = module._orig_mod.__call__
            name = "forward"
        elif (compiled := compiled_call(module)) is not None:
            eager, name = module._call_impl, "_compiled_call_impl"
        else:
            continue
        replaced.append(Replaced(module, name, _steps_only(module, compiled, eager)))
        compilers.append(_compiler(module, compiled))
    compiler = next((one for one in compilers if one is not None), None)
    if compiler is not None:
        replaced += [Replaced(layer, "forward", _block(layer, compiler)) for layer in layers if compiled_call(layer) is None]
    return replaced


def _steps_only(module: Any, compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    target = getattr(module, "_orig_mod", module)

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not is_step(named_arguments(target, args, kwargs)):
            return eager(*args, **kwargs)
        return compiled(*args, **kwargs)

    return call


def _block(layer: Any, compiler: Any) -> Callable[..., Any]:
    forward = layer.forward
    compiled = compiler(forward)

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if torch.compiler.is_compiling() else compiled(*args, **kwargs)

    return call


def _compiler(module: Any, compiled: Any) -> Any:
    """The compiler with the caller's backend and options, which a compiled function holds; None if it cannot be found."""
    if (found := getattr(module, "dynamo_ctx", None)) is not None:
        return found
    cells = dict(zip(compiled.__code__.co_freevars, compiled.__closure__ or (), strict=True))
    found = cells["self"].cell_contents if "self" in cells else None
    return found if callable(found) else None


def is_step(given: dict[str, Any]) -> bool:
    """Whether a forward adds one token per item to a filled cache."""
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    cache: Any = given.get("past_key_values")
    if tokens is None or tokens.shape[1] != 1 or cache is None:
        return False
    return CacheState.of(cache) is not None or bool(cached_tokens(cache))
