"""What a policy is given at a stage: the hidden states before a block, where the vision tokens lie, and how many to keep."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..core.layout import TokenLayout
from ..core.schedule import Stage
from ..ops.attention_score import attention_score

if TYPE_CHECKING:
    from ._family import Family, Grid


@dataclass
class Stop:
    """A batch on its way through the decoder, before block ``layer``, where ``stage`` drops tokens.

    Attributes
    ----------
    hidden : Tensor
        ``[B, N, D]`` input of block ``layer``: the rows that are still there, padding included.
    before : Tensor | None
        ``[B, N, D]`` input of block ``layer - 1``, the same rows; None at layer 0.
    rope : tuple of Tensor
        ``(cos, sin)`` of the rows, ``[B or 1, N, Dh]``.
    mask : Tensor | None
        ``[B, 1, N, K]`` bool or additive for the rows, whatever ``layout`` knows; None: causal. A static cache has more columns
        than rows, of which the first N count.
    layout : TokenLayout
        Where in the rows the droppable tokens lie; ``layout.bounds`` are the real rows of every item.
    counts, keep : tuple of int
        Droppable tokens of every item, and how many of them are to stay.
    origin : Tensor | None
        int64 ``[B, N]``: which row of the prompt each row was, -1 for padding; None while all are there.
    embeds : Tensor
        ``[B, N0, D]`` input of block 0, all rows of the prompt.
    grids : tuple
        Per item ``(rows, columns)`` or ``(frames, rows, columns)`` of its one image or video, or None.
    seeds : list of int
        One per item, from the run's seed, the layer and the item's tokens.
    seen : dict
        What the policy's :meth:`Policy.watch` saw in the vision tower during this forward, and what it wants to remember of it.
    scores : callable | None
        What the user gave as ``TokenDropper(scores=)``.
    labels : Tensor | None
        int64 ``[B, N0]`` that the model was called with, -100 where nothing is learnt.
    """

    layer: int
    stage: Stage
    family: Family
    hidden: torch.Tensor
    before: torch.Tensor | None
    rope: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    layout: TokenLayout
    counts: tuple[int, ...]
    keep: tuple[int, ...]
    origin: torch.Tensor | None
    embeds: torch.Tensor
    grids: tuple[Grid, ...]
    seeds: list[int]
    seen: dict[str, Any]
    backend: str | None = None
    scores: Callable[[Stop], torch.Tensor] | None = None
    labels: torch.Tensor | None = None

    @property
    def blocks(self) -> Sequence[Any]:
        """The decoder's blocks."""
        layers: Sequence[Any] = self.family.decoder.layers
        return layers

    @property
    def droppable(self) -> torch.Tensor:
        """bool ``[B, N]``."""
        return self.layout.droppable_rows(self.hidden.device)

    @property
    def real(self) -> torch.Tensor:
        """bool ``[B, N]``: not padding."""
        return self.layout.real_rows(self.hidden.device)

    @property
    def visible(self) -> torch.Tensor:
        """bool ``[B, N]``: neither padding nor hidden from the item's last row by the model's mask."""
        seen = self.real
        if self.mask is None:
            return seen
        items = torch.arange(seen.shape[0], device=seen.device)
        row = self.mask.expand(seen.shape[0], -1, -1, -1)[items, 0, self.last[:, 0], : seen.shape[1]]
        return seen & (row if row.dtype == torch.bool else row >= 0)

    @property
    def last(self) -> torch.Tensor:
        """int64 ``[B, 1]``: the last real row of every item."""
        last = torch.tensor([[max(hi - 1, 0)] for _, hi in self.layout.bounds], device=self.hidden.device)
        if self.mask is None:
            return last
        # Only the mask knows padding on both sides of a batch: a padding row behind the text does not see itself.
        sees = self.mask.expand(last.shape[0], -1, -1, -1)[:, 0].diagonal(dim1=1, dim2=2)
        sees = (sees if sees.dtype == torch.bool else sees >= 0) & self.real
        found = torch.where(sees, torch.arange(sees.shape[1], device=sees.device), -1).amax(1, keepdim=True)
        return torch.where(found < 0, last, found)

    def rows_of(self, which: torch.Tensor, most: int) -> torch.Tensor:
        """int64 ``[B, most]``: the rows where ``which``, bool ``[B, N]``, is True, ascending; -1 where an item has fewer."""
        slot = torch.where(which, which.cumsum(1) - 1, most).clamp(max=most)
        found = torch.full((which.shape[0], most + 1), -1, dtype=torch.int64, device=which.device)
        rows = torch.arange(which.shape[1], device=which.device)
        return found.scatter_(1, slot, rows.expand(which.shape))[:, :most]

    def answers(self) -> torch.Tensor:
        """int64 ``[B, Q]``: the row before each answer of ``labels``, -1 where an item has fewer; the last row where it has none.

        How many there are at most is read on the host.
        """
        assert self.labels is not None
        learnt = torch.nn.functional.pad(self.labels != -100, (0, 1)).to(self.hidden.device)
        asks = learnt[:, 1:] & ~learnt[:, :-1]
        if self.origin is not None:
            asks = asks.gather(1, self.origin.clamp(min=0)) & (self.origin >= 0)
        rows = self.rows_of(asks, max(1, int(asks.sum(1).max())))
        rows[:, :1] = torch.where(rows[:, :1] < 0, self.last, rows[:, :1])
        return rows

    def given_scores(self) -> torch.Tensor:
        """The user's scores ``[B, N]`` for this stop."""
        if self.scores is None:
            raise ValueError(f"scores must be given to TokenDropper for the policy {self.stage.policy!r}")
        return self.scores(self)

    def project(self, layer: int, hidden: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries ``[B, H, Q, Dh]`` of ``rows`` int64 ``[B, Q]`` and keys ``[B, Hkv, N, Dh]`` of all, as block ``layer`` does.

        ``hidden`` is the input of that block. Keys are projected again: an attention kernel that never forms the weights cannot
        hand them out, which is the cost of such scores that V2Drop avoids.
        """
        return project(self.blocks[layer], hidden, rows, self.rope)

    def attention(self, layer: int, hidden: torch.Tensor, rows: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """:func:`v2drop_kernels.attention_score` of the droppable rows in block ``layer``; queries at ``rows``, or the last."""
        rows = self.last if rows is None else rows
        query, keys = self.project(layer, hidden, rows)
        options.setdefault("scale", self.blocks[layer].self_attn.scaling)
        return attention_score(
            query, keys, query_rows=rows, key_mask=self.visible, droppable=self.droppable, backend=self.backend, **options
        )


def project(
    block: Any, hidden: torch.Tensor, rows: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """:meth:`Stop.project` of one block."""
    attn = block.self_attn
    items = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
    normed = block.input_layernorm(hidden)

    def heads(projection: Any, norm: str, x: torch.Tensor) -> torch.Tensor:
        y = projection(x).unflatten(-1, (-1, attn.head_dim))
        return (getattr(attn, norm)(y) if hasattr(attn, norm) else y).transpose(1, 2)

    at = rows.clamp(min=0)
    query, keys = heads(attn.q_proj, "q_norm", normed[items, at]), heads(attn.k_proj, "k_norm", normed)
    cos, sin = (x.expand(hidden.shape[0], -1, -1) for x in rope)
    rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb
    query, _ = rotate(query, query, cos[items, at], sin[items, at])
    keys, _ = rotate(keys, keys, cos, sin)
    return query, keys
