"""What stands around a transformers model: pipelines, PEFT, data parallelism, ``torch.compile``."""

from __future__ import annotations

from typing import Any

import torch


def unwrapped(model: Any) -> Any:
    """The transformers model inside ``model``, or ``model`` itself.

    Pipelines hold it as ``model``, DistributedDataParallel, DataParallel and FSDP as ``module``, ``torch.compile`` as
    ``_orig_mod``; PEFT returns it from ``get_base_model``. accelerate, FSDP2 and quantised linear layers change the model in place.
    """
    while True:
        inner = _inside(model)
        if inner is None:
            return model
        model = inner


def chain(model: Any) -> list[Any]:
    """The modules whose forward a caller may call: ``model`` and what it wraps, down to the transformers model."""
    found = [model] if isinstance(model, torch.nn.Module) else []
    while (inner := _inside(model)) is not None:
        model = inner
        found.append(model)
    return found


def _inside(model: Any) -> Any:
    if not isinstance(model, torch.nn.Module):
        inner = getattr(model, "model", None)
        return inner if isinstance(inner, torch.nn.Module) else None
    inner = model.__dict__.get("_orig_mod") or model._modules.get("_orig_mod")
    if inner is not None:
        return inner
    if not hasattr(model, "config") or isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
        inner = model._modules.get("module")
        return inner if inner is not None and hasattr(inner, "config") else None
    base = getattr(type(model), "get_base_model", None)
    inner = None if base is None else base(model)
    return None if inner is model else inner
