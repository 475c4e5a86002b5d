"""V2Drop's published schedules. They are data that users read without torch and without the models, so they stand here and not
beside the policy in ``models/policies/variation.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .arguments import one_of
from .schedule import Schedule, Stage

_SUPPLEMENT = "V2Drop, supplement: LLaVA-1.5-7B (32 blocks), drop {} % before layers 3, 17 and 22; one token stays, as in the code"
_ONE_TIME = (
    "V2Drop's ablation of one-time dropping; the paper prints neither layer nor count, so: layer 3, and of LLaVA-1.5's 576 "
    "tokens the count whose average is nearest to the progressive preset's {}"
)


def _v2drop(name: str, dropped: Mapping[int, float], source: str) -> Schedule:
    return dataclasses.replace(Schedule.from_paper("v2drop", dropped, at_least=1), name=name, source=source)


PRESETS = (
    _v2drop("v2drop-192", {3: 50, 17: 70, 22: 100}, _SUPPLEMENT.format("50/70/100")),
    _v2drop("v2drop-128", {3: 72, 17: 75, 22: 100}, _SUPPLEMENT.format("72/75/100")),
    _v2drop("v2drop-64", {3: 95, 17: 95, 22: 100}, _SUPPLEMENT.format("95/95/100")),
    _v2drop(
        "v2drop-released",
        {3: 50, 17: 50, 22: 100},
        "V2Drop's released LLaVA code: drop 50/50/100 % before layers 3, 17 and 22, one token stays",
    ),
    _v2drop(
        "v2drop-qwen2-vl",
        {3: 75, 16: 95, 22: 100},
        "V2Drop's released Qwen2-VL-7B code (28 blocks): drop 75/95/100 % before layers 3, 16 and 22, one token stays",
    ),
    Schedule((Stage(3, 0.2674),), "one-time-192", _ONE_TIME.format(193.75)),
    Schedule((Stage(3, 0.1476),), "one-time-128", _ONE_TIME.format("131.0")),
    Schedule((Stage(3, 0.0244),), "one-time-64", _ONE_TIME.format(66.72)),
)


# Blocks of the models that schedules were published for, where not 32; and the layers of V2Drop's three stages by blocks.
_BLOCKS = {"v2drop-qwen2-vl": 28}
_V2DROP_LAYERS = {28: (3, 16, 22), 32: (3, 17, 22)}


def fitted(schedule: Schedule, layers: int) -> Schedule:
    """A published schedule for a model of another depth.

    V2Drop's stages go to the layers that it gives for this depth (32 and 28 blocks); others to the same share of the depth, see
    :meth:`Schedule.scaled`. A schedule of the depth that it was published for stays as it is.

    Parameters
    ----------
    schedule : Schedule
        A preset of any method.
    layers : int
        Blocks of the model.
    """
    one = schedule.name.rsplit("-", 1)[-1]
    blocks = _BLOCKS.get(schedule.name, 40 if schedule.name.startswith("cross-modal") and one in ("288", "144", "58") else 32)
    if layers == blocks:
        return schedule
    if schedule.name.startswith("v2drop-") and layers in _V2DROP_LAYERS:
        stages = zip(schedule.stages, _V2DROP_LAYERS[layers], strict=True)
        return dataclasses.replace(schedule, stages=tuple(dataclasses.replace(stage, layer=layer) for stage, layer in stages))
    return schedule.scaled(layers, of=blocks)


def presets() -> tuple[str, ...]:
    """The names of V2Drop's presets; those of all methods are in :func:`v2drop_kernels.models.presets`."""
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
    one_of("name", name, presets())
    return next(schedule for schedule in PRESETS if schedule.name == name)
