"""Every op in plain PyTorch, same names and arguments: the specification.

Item by item, float64 allowed, differentiable by autograd; shares only the argument parsing with the fast paths.
"""

from .attention_score import attention_score, attention_score_backward, last_rows
from .compact import compact, compact_, gather
from .drop import drop_tokens, select_and_gather
from .score import variation_score
from .select import segmented_topk, variation_topk
from .similarity import cosine_to_pivots, cosine_to_pivots_backward, key_norm, key_norm_backward

__all__ = [
    "attention_score",
    "attention_score_backward",
    "compact",
    "compact_",
    "cosine_to_pivots",
    "cosine_to_pivots_backward",
    "drop_tokens",
    "gather",
    "key_norm",
    "key_norm_backward",
    "last_rows",
    "segmented_topk",
    "select_and_gather",
    "variation_score",
    "variation_topk",
]
