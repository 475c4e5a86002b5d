"""Calls of a model inside a block: each has a state of its own, so that threads, replicas and calls inside calls never meet.

A call begins in the hook before the model's body and ends in the hook behind it, also by an exception. Calls of one thread lie on
a stack, for a policy or a hook of the user may call the model again. Of :class:`torch.nn.DataParallel` each replica runs in a
thread of its own, with modules of its own, which the hooks receive; a call therefore holds the adapter of the modules that run.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .forward import Forward
from .prefill import Prefill
from .setup import Setup


@dataclass
class Call:
    """One call of the model.

    Attributes
    ----------
    owner : Module
        Whose hooks begin and end the call: the model that was given, or its body if that is called alone.
    setup : Setup
        With the modules that run.
    labels : Tensor | None
        Of the model's forward.
    arguments : dict | None
        Of the body's forward by name, until the decoder runs.
    entered : bool
        Whether the body runs.
    forward : Forward
        Of the decoder.
    outer : list
        What the policies recorded in the tower for the call around this one.
    """

    owner: Any
    setup: Setup
    labels: torch.Tensor | None = None
    arguments: dict[str, Any] | None = None
    entered: bool = False
    forward: Forward = field(default_factory=Forward)
    outer: list[dict[Any, Any]] = field(default_factory=list)

    def use(self, **modules: Any) -> None:
        """Let the adapter be that of these modules, which differ from the model's in a replica."""
        adapter = self.setup.adapter
        if any(getattr(adapter, name) is not module for name, module in modules.items()):
            self.setup = dataclasses.replace(self.setup, adapter=dataclasses.replace(adapter, **modules))


class Calls(threading.local):
    """The calls of this thread, the innermost last, and the last prefill that finished in it."""

    def __init__(self) -> None:
        self.stack: list[Call] = []
        self.last: Prefill | None = None

    @property
    def top(self) -> Call | None:
        return self.stack[-1] if self.stack else None

    def begin(self, owner: Any, setup: Setup) -> Call:
        call = Call(owner, setup, outer=[cache.swap({}) for cache in setup.tower_caches.values()])
        self.stack.append(call)
        return call

    def end(self, owner: Any) -> None:
        """End the innermost call of ``owner``, and calls inside it that an exception of the interpreter left behind."""
        while any(call.owner is owner for call in self.stack):
            call = self.stack.pop()
            for cache, before in zip(call.setup.tower_caches.values(), call.outer, strict=True):
                cache.swap(before)
            call.forward.close()
            if call.owner is owner:
                return


class ThreadDict(MutableMapping[Any, Any]):
    """A mapping with contents of its own in every thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def _items(self) -> dict[Any, Any]:
        items: dict[Any, Any] = self._local.__dict__.setdefault("items", {})
        return items

    def swap(self, items: dict[Any, Any]) -> dict[Any, Any]:
        """Replace this thread's contents; returns those of before."""
        before, self._local.items = self._items, items
        return before

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
