"""The results of the public ops, and the internal description of an array to gather."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the results of NumPy and JAX calls are these too, so that torch need not be there
    import torch

    from .layout import TokenLayout


class TopK(NamedTuple):
    """The kept tokens of every segment.

    Attributes
    ----------
    values : Tensor
        ``[G, K]`` scores of the kept tokens, ``-inf`` where a segment keeps fewer than ``K``.
    indices : Tensor
        ``[G, K]`` int64 rows of the input: positions along ``N`` for a padded batch, rows of ``T`` for a packed
        one. ``-1`` where a segment keeps fewer than ``K``; the empty slots are the last ones.
    """

    values: torch.Tensor
    indices: torch.Tensor


class Compacted(NamedTuple):
    """The compacted arrays: those that were given, with the kept rows only.

    ``S`` is the new number of rows per item; shorter items are padded (zeros, mask 0, labels -100) on the layout's
    padding side. Packed input comes back packed, ``[T', ...]``, with new ``cu_seqlens``. Fields that were not given are None.

    Attributes
    ----------
    hidden : Tensor
        ``[B, S, D]`` or ``[T', D]``.
    keep : Tensor
        int64 ``[B, S]`` (or ``[T']``): the input row of every output row, ``-1`` for padding.
    position_ids, kv, attention_mask, rope, labels
        As given, with ``S`` rows; ``kv`` and ``rope`` keep their nested structure. ``attention_mask`` is created (bool,
        ``keep >= 0``) when none was given and the result is ragged.
    cu_seqlens : Tensor | None
        int32 ``[B + 1]`` of the packed result.
    layout : TokenLayout | None
        Positions of the kept droppable tokens in the result: the ``droppable=`` of the next stage.
    max_seqlen : int | None
        Rows of the longest item of the packed result, which attention over packed batches takes beside ``cu_seqlens``. It
        never needs a synchronisation: exact where counts and lengths are known on the host, and an upper bound where they are
        in a tensor on a GPU or in a ``keep [T']``.
    """

    hidden: torch.Tensor | None
    keep: torch.Tensor
    position_ids: torch.Tensor | None = None
    kv: Any = None
    attention_mask: torch.Tensor | None = None
    rope: Any = None
    labels: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    layout: TokenLayout | None = None
    max_seqlen: int | None = None


class Dropped(NamedTuple):
    """The result of one drop step; the fields are those of :class:`Compacted`."""

    hidden: torch.Tensor
    keep: torch.Tensor
    position_ids: torch.Tensor | None = None
    kv: Any = None
    attention_mask: torch.Tensor | None = None
    rope: Any = None
    labels: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    layout: TokenLayout | None = None
    max_seqlen: int | None = None


class GatherSpec(NamedTuple):
    """One array to gather: rows lie along ``row_dim``, batch entries along ``batch_dim`` (-1 when packed)."""

    tensor: Any
    batch_dim: int
    row_dim: int
    fill: int = 0  # written, as the dtype of the array, into empty rows
    out: Any = None  # where the result is written; None: a new array
