"""The arguments of transformers' forwards, by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@functools.cache
def parameters(forward: Any) -> tuple[str, ...]:
    """Names of the parameters of a function."""
    return tuple(inspect.signature(forward).parameters)


def named_arguments(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of ``module.forward`` by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(parameters(type(module).forward)[1:], args, strict=False)), **kwargs}


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a decoder layer, as a hook receives and returns them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """``[B, N, D]``."""
        hidden: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    @property
    def cache(self) -> Any:
        return self.kwargs.get("past_key_values")

    @property
    def mask(self) -> Any:
        return self.kwargs.get("attention_mask")

    @property
    def rope(self) -> Any:
        return self.kwargs["position_embeddings"]

    def with_hidden(self, hidden: torch.Tensor) -> LayerCall:
        if self.args:
            return LayerCall((hidden, *self.args[1:]), self.kwargs)
        return LayerCall(self.args, {**self.kwargs, "hidden_states": hidden})

    def with_mask(self, mask: Any) -> LayerCall:
        return LayerCall(self.args, {**self.kwargs, "attention_mask": mask})

    def with_rope(self, rope: Any) -> LayerCall:
        return LayerCall(self.args, {**self.kwargs, "position_embeddings": rope})

    def result(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a pre-hook returns."""
        return self.args, self.kwargs

    def with_ids_of(self, keep: torch.Tensor, *, flash: bool) -> LayerCall:
        """The position ids of rows ``keep``, for attention that scales by them; None for FlashAttention, which reads them only to
        find packed sequences by jumps between ids, and dropping makes jumps."""
        ids = self.kwargs.get("position_ids")
        if ids is None:
            return self
        return LayerCall(self.args, {**self.kwargs, "position_ids": None if flash else rows_of_ids(ids, keep)})

    def with_rows_of(self, keep: torch.Tensor) -> LayerCall:
        """Other positional tensors ``[B, N, ...]``, such as inputs of every layer, as those of the rows ``keep [B, S]``."""
        others = (rows_of_table(x, keep) if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in self.args[1:])
        return self if len(self.args) < 2 else LayerCall((self.args[0], *others), self.kwargs)


def rows_of_ids(ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Ids ``[..., 1 or B, N]`` of all rows as those of the rows ``keep [B, S]``, -1 for padding."""
    at = keep.clamp(min=0).to(ids.device).expand(*ids.shape[:-2], -1, -1)
    return ids.expand(*ids.shape[:-2], at.shape[-2], -1).gather(-1, at)


def rows_of_table(table: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """A table ``[1 or B, N, D]`` of all rows as that of the rows ``keep [B, S]``, -1 for padding."""
    at = keep.clamp(min=0).to(table.device)[..., None].expand(-1, -1, table.shape[-1])
    return table.expand(at.shape[0], -1, -1).gather(1, at)


def is_pair(rope: Any) -> bool:
    """Whether rotary tables are ``(cos, sin)``."""
    return isinstance(rope, tuple | list) and len(rope) == 2


def cut_rope(rope: Any, keep: torch.Tensor) -> Any:
    """The rotary tables of the rows ``keep [B, S]``: of ``(cos, sin)``, or of one tensor, such as complex numbers."""
    return tuple(rows_of_table(x, keep) for x in rope) if is_pair(rope) else rows_of_table(rope, keep)


class MethodReplacement:
    """A method of one object that is replaced until :meth:`remove`, which makes it a handle like those of hooks."""

    def __init__(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        self.owner, self.name = owner, name
        setattr(owner, name, method)

    def restore(self, state: dict[str, Any]) -> None:
        """Undo the replacement in a copy of the owner's attributes."""
        state.pop(self.name, None)

    def remove(self) -> None:
        self.restore(self.owner.__dict__)
