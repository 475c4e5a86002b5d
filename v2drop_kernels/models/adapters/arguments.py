"""The arguments of transformers' forwards, by name."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch


@functools.cache
def _parameters(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


def named_arguments(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of ``module.forward`` by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(_parameters(type(module).forward)[1:], args, strict=False)), **kwargs}


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

    def without_position_ids(self) -> LayerCall:
        """Attention reads the ids only to find packed sequences by jumps between ids, and dropping makes jumps."""
        return LayerCall(self.args, {**self.kwargs, "position_ids": None})
