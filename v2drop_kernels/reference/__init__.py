"""Every op in plain PyTorch, same names and arguments: the specification.

Item by item, float64 allowed, differentiable by autograd; shares only the argument parsing with the fast paths.
"""

from .compact import compact, compact_, gather
from .drop import drop_tokens, select_and_gather
from .score import variation_score
from .select import segmented_topk, variation_topk

__all__ = [
    "compact",
    "compact_",
    "drop_tokens",
    "gather",
    "segmented_topk",
    "select_and_gather",
    "variation_score",
    "variation_topk",
]
