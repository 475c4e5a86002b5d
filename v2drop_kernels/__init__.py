"""Fused kernels that drop vision tokens: score by variation, exact segmented top-k, one-pass compaction."""

from . import positions, reference
from ._backend import Explanation, backend, explain
from ._types import Compacted, Dropped, TopK
from .compact import compact, compact_
from .drop import drop_tokens
from .layout import TokenLayout, n_keep
from .score import variation_score
from .select import segmented_topk, variation_topk

__version__ = "0.1.0"

__all__ = [
    "Compacted",
    "Dropped",
    "Explanation",
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
    "segmented_topk",
    "variation_score",
    "variation_topk",
]
