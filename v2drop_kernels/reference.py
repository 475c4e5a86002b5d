"""Every op in plain PyTorch, same names and arguments: the specification.

Item by item, float64 allowed, differentiable by autograd; shares only the argument parsing with the fast paths.
"""

from .ops.attention_score.gradient import attention_score_backward
from .ops.attention_score.queries import last_rows
from .ops.attention_score.reference import attention_score
from .ops.compact.reference import compact, compact_, gather
from .ops.drop_tokens.reference import drop_tokens, select_and_gather
from .ops.similarity.gradient import cosine_to_pivots_backward, key_norm_backward
from .ops.similarity.reference import cosine_to_pivots, key_norm
from .ops.topk.reference import segmented_topk, variation_topk
from .ops.variation_score.reference import variation_score

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
