"""The Triton backend: plain tensors in and out, no argument checks (the public functions made them).

Serves CUDA and ROCm tensors, and CPU tensors under ``TRITON_INTERPRET=1``. No kernel spins, counts in global memory or uses
atomics; nothing synchronises with the host. Device tables of a plan are copied once, so the first call of a plan must lie
outside a CUDA graph capture.
"""

from .attention_score.triton import attention_score
from .compact.triton import compact, compact_, compact_backward
from .drop_tokens.triton import drop
from .similarity.triton import cosine_to_pivots, key_norm
from .topk.triton import topk
from .variation_score.triton import variation_score, variation_score_backward

__all__ = [
    "attention_score",
    "compact",
    "compact_",
    "compact_backward",
    "cosine_to_pivots",
    "drop",
    "key_norm",
    "topk",
    "variation_score",
    "variation_score_backward",
]
