"""Drop vision tokens in unmodified Hugging Face models, by hooks that are removed when a ``with`` block ends.

Use ``with vk.models.TokenDropper(schedule)(model) as session: model.generate(...)``. The names below are imported when they are
first used, so that schedules and presets can be read without torch; transformers is imported inside functions only.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from .context import DropContext
    from .dropper import TokenDropper
    from .inter_layer import Ilvas, ilvas
    from .policies import preset, presets
    from .policies.twigvlm import twig_schedule
    from .policy import Method, Policy
    from .ranking import Ranking
    from .report import Kept, LayerReport, Report
    from .session import DropSession
    from .voco import voco_mask

__all__ = [
    "DropContext",
    "DropSession",
    "Ilvas",
    "Kept",
    "LayerReport",
    "Method",
    "Policy",
    "Ranking",
    "Report",
    "TokenDropper",
    "ilvas",
    "preset",
    "presets",
    "twig_schedule",
    "voco_mask",
]

if not typing.TYPE_CHECKING:  # otherwise type checkers would accept every name
    _HOMES = {
        "context": ("DropContext",),
        "dropper": ("TokenDropper",),
        "inter_layer": ("Ilvas", "ilvas"),
        "policies": ("preset", "presets"),
        "policies.twigvlm": ("twig_schedule",),
        "policy": ("Method", "Policy"),
        "ranking": ("Ranking",),
        "report": ("Kept", "LayerReport", "Report"),
        "session": ("DropSession",),
        "voco": ("voco_mask",),
    }
    _HOME = {name: home for home, names in _HOMES.items() for name in names}
    _DEPRECATED = {"Dropping": "DropSession", "Stop": "DropContext"}

    def __getattr__(name: str) -> object:
        if name in _DEPRECATED:
            from ..core import deprecated

            return deprecated.class_name(name, _DEPRECATED[name], __getattr__(_DEPRECATED[name]))
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
