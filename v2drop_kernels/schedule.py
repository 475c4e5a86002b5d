"""Schedules: where a model drops tokens and how many it keeps. This module needs no torch.

:class:`Schedule` and :class:`Stage` are defined in ``core/schedule.py``, :func:`solve` and :func:`pyramid` in
``core/budgets.py``, and V2Drop's presets in ``core/presets.py``.
"""

from .core.arguments import METRICS
from .core.budgets import pyramid, solve
from .core.counts import n_keep
from .core.presets import preset, presets
from .core.schedule import LAYER_OFFSETS, Schedule, Stage, layer_of, model_sizes, prefill_flops

__all__ = [
    "LAYER_OFFSETS",
    "METRICS",
    "Schedule",
    "Stage",
    "layer_of",
    "model_sizes",
    "n_keep",
    "prefill_flops",
    "preset",
    "presets",
    "pyramid",
    "solve",
]
