"""Fused kernels that drop vision tokens: score by variation, exact segmented top-k, one-pass compaction.

The names below are imported when they are first used, and what needs torch imports it then, so that v2drop_kernels.array and
v2drop_kernels.jax work without torch. Where torch is imported already, they are imported at once, and torch.ops.v2drop is there.
"""

import importlib
import sys
import typing

if typing.TYPE_CHECKING:
    from . import distributed as distributed
    from . import models as models
    from . import plot as plot
    from . import reference, schedule
    from .backends.choice import Explanation, backend, explain
    from .core import positions
    from .core.counts import n_keep
    from .core.layout import TokenLayout
    from .core.schedule import Schedule, Stage
    from .core.types import Compacted, Dropped, TopK
    from .ops.attention_score import attention_score, cls_attention_score, cross_modal_score, text_rater_score, text_raters
    from .ops.bipartite_merge import bipartite_merge
    from .ops.compact import compact, compact_
    from .ops.drop_tokens import drop_tokens
    from .ops.merge_dropped import merge_dropped
    from .ops.random_score import random_score
    from .ops.similarity import cosine_to_pivots, frame_similarity, key_norm_score
    from .ops.soft_topk import soft_topk
    from .ops.topk import segmented_topk, variation_topk
    from .ops.variation_score import variation_score
    from .ops.weighted_merge import weighted_merge

__version__ = "0.1.0"

__all__ = [
    "Compacted",
    "Dropped",
    "Explanation",
    "Schedule",
    "Stage",
    "TokenLayout",
    "TopK",
    "attention_score",
    "backend",
    "bipartite_merge",
    "cls_attention_score",
    "compact",
    "compact_",
    "cosine_to_pivots",
    "cross_modal_score",
    "drop_tokens",
    "explain",
    "frame_similarity",
    "key_norm_score",
    "merge_dropped",
    "n_keep",
    "positions",
    "random_score",
    "reference",
    "schedule",
    "segmented_topk",
    "soft_topk",
    "text_rater_score",
    "text_raters",
    "variation_score",
    "variation_topk",
    "weighted_merge",
]

if not typing.TYPE_CHECKING:  # or every name would be there for type checkers
    _HOMES = {
        "backends.choice": ("Explanation", "backend", "explain"),
        "core.types": ("Compacted", "Dropped", "TopK"),
        "ops.attention_score": ("attention_score", "cls_attention_score", "cross_modal_score", "text_rater_score", "text_raters"),
        "ops.compact": ("compact", "compact_"),
        "ops.drop_tokens": ("drop_tokens",),
        "core.counts": ("n_keep",),
        "core.layout": ("TokenLayout",),
        "ops.bipartite_merge": ("bipartite_merge",),
        "ops.merge_dropped": ("merge_dropped",),
        "ops.weighted_merge": ("weighted_merge",),
        "distributed": ("distributed",),  # this, models and plot are imported when they are used: not in __all__
        "models": ("models",),
        "plot": ("plot",),
        "core.positions": ("positions",),
        "reference": ("reference",),
        "core.schedule": ("Schedule", "Stage"),
        "schedule": ("schedule",),
        "ops.variation_score": ("variation_score",),
        "ops.topk": ("segmented_topk", "variation_topk"),
        "ops.similarity": ("cosine_to_pivots", "frame_similarity", "key_norm_score"),
        "ops.random_score": ("random_score",),
        "ops.soft_topk": ("soft_topk",),
    }
    _HOME = {name: home for home, names in _HOMES.items() for name in names}
    _MODULES = ("distributed", "models", "plot", "positions", "reference", "schedule")

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
        value: object = module if name in _MODULES else getattr(module, name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

    if sys.modules.get("torch") is not None:
        for _name in __all__:
            __getattr__(_name)
