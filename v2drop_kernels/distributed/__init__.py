"""Drop steps over sequences that are sharded across processes (sequence or context parallelism), exactly as on one process.

``segmented_topk``, ``variation_topk`` and ``drop_tokens`` take this rank's shard and ``group=``, the process group that holds the
sequence; spans, offsets and indices count rows of the whole sequence. :class:`Sharding` says which rows every rank holds. Works
with gloo and NCCL, and inside torch.compile.
"""

from .agreement import check_equal
from .collectives import Collective, average_gradients, record
from .drop import ShardedDropped, drop_tokens
from .select import cost
from .sharding import Sharding
from .topk import ShardedTopK, segmented_topk, variation_topk

__all__ = [
    "Collective",
    "ShardedDropped",
    "ShardedTopK",
    "Sharding",
    "average_gradients",
    "check_equal",
    "cost",
    "drop_tokens",
    "record",
    "segmented_topk",
    "variation_topk",
]
