"""What is documented as float32 stays float32 under autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def full_precision(function: Function) -> Function:
    """``function`` without the autocast of its first tensor's device, which would round its products to half precision."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        kind = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)).device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
