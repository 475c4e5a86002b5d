"""The hooks of a session on a model: registered, removed, and left out of every copy of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from . import compiled

_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class Hooks:
    """Handles of hooks on ``model`` and its parts.

    While hooks are registered, copying and pickling a hooked module goes through ``__getstate__`` of the instance, which leaves
    the hooks of this session out.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._handles: list[Any] = []
        self._ids: set[int] = set()
        self._modules: dict[int, Any] = {}
        self._done: set[int] = set()
        self._lock = threading.Lock()

    def before(self, module: Any, hook: Callable[..., Any], *, part: bool = False) -> None:
        """A forward pre-hook with keyword arguments. ``part``: the module contains no other hooked one; if compiled it stays so."""
        if part and compiled.compiled_call(module) is not None:
            self._handles.append(compiled.around(module, hook, None))
        else:
            self._add(module, module.register_forward_pre_hook(hook, with_kwargs=True))

    def behind(self, module: Any, hook: Callable[..., Any], *, part: bool = False, always: bool = False) -> None:
        """A forward hook; ``always``: also after an exception; ``part`` as in :meth:`before`."""
        if part and compiled.compiled_call(module) is not None:
            self._handles.append(compiled.around(module, None, hook))
        else:
            self._add(module, module.register_forward_hook(hook, always_call=always))

    def once(self, key: int, module: Any, hook: Callable[..., Any]) -> None:
        """:meth:`before`, unless a hook of this key is there; also while forwards run in other threads."""
        if key in self._done:
            return
        with self._lock:
            if key not in self._done:
                self.before(module, hook, part=True)
                self._done.add(key)

    def keep(self, handles: Iterable[Any]) -> None:
        """Handles of hooks somewhere in the model; those that exist when ``handles`` raises are removed with the others."""
        added = []
        for handle in handles:
            self._handles.append(handle)
            added.append(handle)
        tables = {id(table) for handle in added if (table := _table(handle)) is not None}
        self._ids |= {handle.id for handle in added if _table(handle) is not None}
        for module in self.model.modules() if tables else ():
            if any(id(module.__dict__.get(name)) in tables for name in _TABLES):
                self._guard(module)
        for handle in added:
            if _table(handle) is None and (owner := getattr(handle, "owner", None)) is not None:
                self._guard(owner)

    def remove(self) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        for module in self._modules.values():
            module.__dict__.pop("__getstate__", None)
        self._handles.clear()
        self._modules.clear()
        self._done.clear()

    def _add(self, module: Any, handle: Any) -> None:
        self._handles.append(handle)
        self._ids.add(handle.id)
        self._guard(module)

    def _guard(self, module: Any) -> None:
        if id(module) not in self._modules:
            self._modules[id(module)] = module
            module.__dict__["__getstate__"] = _State(self, module)

    def state_without(self, module: Any) -> dict[str, Any]:
        """What copies of the module are made of."""
        state: dict[str, Any] = type(module).__getstate__(module)
        state.pop("__getstate__", None)
        for name in _TABLES:
            if name in state and not self._ids.isdisjoint(state[name]):
                state[name] = type(state[name])((key, value) for key, value in state[name].items() if key not in self._ids)
        for handle in self._handles:
            if getattr(handle, "owner", None) is module:
                handle.restore(state)
        return state


def refusals(model: Any) -> list[compiled.Replaced]:
    """Continuous batching packs prompts into one paged cache and calls the model without a mask: refuse it by name."""

    def refused(*_: Any, **__: Any) -> Any:
        raise ValueError("generate_batch must not be called while tokens are dropped: continuous batching has one paged cache")

    names = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
    return [compiled.Replaced(model, name, refused) for name in names if hasattr(model, name)]


class _State:
    """``__getstate__`` of one module."""

    def __init__(self, hooks: Hooks, module: Any) -> None:
        self._hooks, self._module = hooks, module

    def __call__(self) -> dict[str, Any]:
        return self._hooks.state_without(self._module)


def _table(handle: Any) -> Any:
    reference = getattr(handle, "hooks_dict_ref", None)
    return None if reference is None else reference()
