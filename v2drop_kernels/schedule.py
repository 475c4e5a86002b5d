"""Schedules: where a model drops tokens and how many it keeps. This module needs no torch.

:class:`Schedule` and :class:`Stage` are defined in ``core/schedule.py``, :func:`solve` and :func:`pyramid` in
``core/budgets.py``, and V2Drop's presets beside its policy in ``models/policies/variation.py``.
"""

from .core.arguments import METRICS, one_of
from .core.budgets import pyramid, solve
from .core.layout import n_keep
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


def presets() -> tuple[str, ...]:
    """The names of V2Drop's presets; those of all methods are in :func:`v2drop_kernels.models.presets`."""
    from .models.policies.variation import PRESETS

    return tuple(schedule.name for schedule in PRESETS)


def preset(name: str) -> Schedule:
    """A published schedule of V2Drop by its name; ``preset(name).source`` says where it was published.

    Parameters
    ----------
    name : str
        One of :func:`presets`.

    Raises
    ------
    ValueError
        Unknown name; the message lists all.

    Examples
    --------
    >>> preset("v2drop-released").average_tokens(576, layers=32)
    202.8125
    """
    from .models.policies.variation import PRESETS

    one_of("name", name, presets())
    return next(schedule for schedule in PRESETS if schedule.name == name)
