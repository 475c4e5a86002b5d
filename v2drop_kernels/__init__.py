"""Fused kernels that drop vision tokens: score by variation, exact segmented top-k, one-pass compaction.

The names below are imported when they are first used, and what needs torch imports it then, so that v2drop_kernels.array and
v2drop_kernels.jax work without torch. Where torch is imported already, they are imported at once, and torch.ops.v2drop is there.
"""

import importlib
import sys
import types
import typing

if typing.TYPE_CHECKING:
    from . import models as models
    from . import plot as plot
    from . import positions, reference, schedule
    from ._backend import Explanation, backend, explain
    from ._types import Compacted, Dropped, TopK
    from .compact import compact, compact_
    from .drop import drop_tokens
    from .layout import TokenLayout, n_keep
    from .schedule import Schedule, Stage
    from .score import variation_score
    from .select import segmented_topk, variation_topk

__version__ = "0.1.0"

__all__ = [
    "Compacted",
    "Dropped",
    "Explanation",
    "Schedule",
    "Stage",
    "TokenLayout",
    "TopK",
    "backend",
    "compact",
    "compact_",
    "drop_tokens",
    "explain",
    "n_keep",
    "positions",
    "reference",
    "schedule",
    "segmented_topk",
    "variation_score",
    "variation_topk",
]

if not typing.TYPE_CHECKING:  # or every name would be there for type checkers
    _HOMES = {
        "_backend": ("Explanation", "backend", "explain"),
        "_types": ("Compacted", "Dropped", "TopK"),
        "compact": ("compact", "compact_"),
        "drop": ("drop_tokens",),
        "layout": ("TokenLayout", "n_keep"),
        "models": ("models",),  # this and plot need more than torch: not in __all__
        "plot": ("plot",),
        "positions": ("positions",),
        "reference": ("reference",),
        "schedule": ("Schedule", "Stage", "schedule"),
        "score": ("variation_score",),
        "select": ("segmented_topk", "variation_topk"),
    }
    _HOME = {name: home for home, names in _HOMES.items() for name in names}

    class _Package(types.ModuleType):
        def __setattr__(self, name: str, value: object) -> None:
            # The import system binds every submodule to its name in the package; this one names the function.
            if name == "compact" and isinstance(value, types.ModuleType):
                value = value.compact
            super().__setattr__(name, value)

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f".{_HOME[name]}", __name__)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            alternative = "for NumPy arrays use v2drop_kernels.array, for JAX v2drop_kernels.jax"
            raise ImportError(f"v2drop_kernels.{name} needs torch: pip install torch; {alternative}") from None
        value: object = module if name == _HOME[name] != "compact" else getattr(module, name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

    sys.modules[__name__].__class__ = _Package
    if sys.modules.get("torch") is not None:
        for _name in __all__:
            __getattr__(_name)
