"""What a policy receives at a stage: the hidden states before a block, where the vision tokens lie, and how many to keep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..core import deprecated
from ..core.layout import TokenLayout
from ..core.schedule import Stage
from ..ops.attention_score import attention_score
from ..ops.host_ints import host_ints
from .adapters import ModelAdapter
from .adapters import attention as block_attention
from .parallel import score_all_heads, unsharded

if TYPE_CHECKING:
    from .adapters.spans import Grid


@dataclass
class DropContext:
    """A batch before block ``layer`` of the decoder, where ``stage`` drops tokens.

    Attributes
    ----------
    layer : int
        0-based block.
    stage : Stage
        The stage of the schedule.
    adapter : ModelAdapter
        The modules of the model.
    hidden : Tensor
        ``[B, N, D]`` input of block ``layer``: the rows that are still present, padding included.
    prev_hidden : Tensor | None
        ``[B, N, D]`` input of block ``layer - 1``, the same rows; None at layer 0.
    rope : tuple of Tensor
        ``(cos, sin)`` of the rows, ``[B or 1, N, Dh]``.
    mask : Tensor | None
        ``[B, 1, N, K]`` bool or additive mask of the rows, independent of ``layout``; None: causal. A static cache has more
        columns than rows, of which the first N count.
    layout : TokenLayout
        Where in the rows the droppable tokens lie; ``layout.bounds`` are the real rows of every item.
    counts, keep : tuple of int
        Droppable tokens of every item, and how many of them to keep.
    origin : Tensor | None
        int64 ``[B, N]``: the row of the prompt that each row was, -1 for padding; None while all rows are present.
    embeds : Tensor
        ``[B, N0, D]`` input of block 0, all rows of the prompt.
    grids : tuple
        Per item ``(rows, columns)`` or ``(frames, rows, columns)`` of its one image or video, or None.
    seeds : list of int
        One per item, from the seed of the run, the layer and the item's tokens.
    tower_cache : dict
        What the hooks of :meth:`Policy.register_hooks` recorded in the vision tower during this forward; the policy may store its
        own values for this forward in it.
    backend : str | None
        Backend of this package that was requested.
    scores : callable | None
        ``TokenDropper(scores=)``.
    labels : Tensor | None
        int64 ``[B, N0]`` that the model was called with, -100 where nothing is trained.
    """

    layer: int
    stage: Stage
    adapter: ModelAdapter
    hidden: torch.Tensor
    prev_hidden: torch.Tensor | None
    rope: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    layout: TokenLayout
    counts: tuple[int, ...]
    keep: tuple[int, ...]
    origin: torch.Tensor | None
    embeds: torch.Tensor
    grids: tuple[Grid, ...]
    seeds: list[int]
    tower_cache: dict[str, Any]
    backend: str | None = None
    scores: Callable[[DropContext], torch.Tensor] | None = None
    labels: torch.Tensor | None = None

    before = deprecated.attribute("DropContext", "before", "prev_hidden")
    family = deprecated.attribute("DropContext", "family", "adapter")
    seen = deprecated.attribute("DropContext", "seen", "tower_cache")
    rows_of = deprecated.method("DropContext", "rows_of", "row_indices")

    @property
    def blocks(self) -> Sequence[Any]:
        """The decoder's blocks."""
        layers: Sequence[Any] = self.adapter.decoder.layers
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
        real = self.real
        if self.mask is None:
            return real
        items = torch.arange(real.shape[0], device=real.device)
        row = self.mask.expand(real.shape[0], -1, -1, -1)[items, 0, self.last[:, 0], : real.shape[1]]
        return real & (row if row.dtype == torch.bool else row >= 0)

    @property
    def last(self) -> torch.Tensor:
        """int64 ``[B, 1]``: the last real row of every item."""
        last = host_ints([max(hi - 1, 0) for _, hi in self.layout.bounds], self.hidden.device)[:, None]
        if self.mask is None:
            return last
        # Padding on both sides of a batch is in the mask only: a padding row behind the text may not attend to itself.
        own = self.mask.expand(last.shape[0], -1, -1, -1)[:, 0].diagonal(dim1=1, dim2=2)
        own = (own if own.dtype == torch.bool else own >= 0) & self.real
        row = torch.where(own, torch.arange(own.shape[1], device=own.device), -1).amax(1, keepdim=True)
        return torch.where(row < 0, last, row)

    def row_indices(self, selected: torch.Tensor, most: int) -> torch.Tensor:
        """int64 ``[B, most]``: the rows where ``selected``, bool ``[B, N]``, is True, ascending; -1 where an item has fewer."""
        slot = torch.where(selected, selected.cumsum(1) - 1, most).clamp(max=most)
        indices = torch.full((selected.shape[0], most + 1), -1, dtype=torch.int64, device=selected.device)
        rows = torch.arange(selected.shape[1], device=selected.device)
        return indices.scatter_(1, slot, rows.expand(selected.shape))[:, :most]

    def answers(self) -> torch.Tensor:
        """int64 ``[B, Q]``: the row before each answer of ``labels``, -1 where an item has fewer; the last row where it has none.

        ``Q``, the largest number of answers of an item, is read on the host.
        """
        assert self.labels is not None
        trained = torch.nn.functional.pad(self.labels != -100, (0, 1)).to(self.hidden.device)
        before_answer = trained[:, 1:] & ~trained[:, :-1]
        if self.origin is not None:
            before_answer = before_answer.gather(1, self.origin.clamp(min=0)) & (self.origin >= 0)
        rows = self.row_indices(before_answer, max(1, int(before_answer.sum(1).max())))
        rows[:, :1] = torch.where(rows[:, :1] < 0, self.last, rows[:, :1])
        return rows

    def given_scores(self) -> torch.Tensor:
        """The scores ``[B, N]`` of the callable given to TokenDropper; raises ValueError without one."""
        if self.scores is None:
            raise ValueError(f"scores must be given to TokenDropper for the policy {self.stage.policy!r}")
        return self.scores(self)

    def previous(self, needs: str) -> torch.Tensor:
        """:attr:`prev_hidden`; raises ValueError at layer 0, where no block precedes, naming what the policy ``needs``."""
        if self.prev_hidden is None:
            raise ValueError(f"the policy {self.stage.policy!r} needs {needs}: not where tokens enter the model")
        return self.prev_hidden

    def project(self, layer: int, hidden: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries ``[B, H, Q, Dh]`` of ``rows`` int64 ``[B, Q]`` and keys ``[B, Hkv, N, Dh]`` of all rows, as block ``layer`` does.

        ``hidden`` is the input of that block. The keys are computed again, because attention kernels that never form the weights
        cannot return them; V2Drop's score avoids this cost.
        """
        if self.adapter.windowed or self.adapter.stateful:
            what = "attention weights, which a model with windows or linear attention forms in a way of each kind of block"
            raise ValueError(f"the policy {self.stage.policy!r} needs {what}")
        with unsharded(self.blocks[layer]):
            return block_attention.project(self.blocks[layer], hidden, rows, self.rope)

    def attention(self, layer: int, hidden: torch.Tensor, rows: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """:func:`v2drop_kernels.attention_score` of the droppable rows in a block; queries at ``rows``, default the last row.

        Over all heads of the model, also where tensor parallelism gives this rank a part of them (``models/parallel.py``).
        """
        rows = self.last if rows is None else rows
        query, keys = self.project(layer, hidden, rows)
        options.setdefault("scale", block_attention.scaling(self.blocks[layer]))
        score: Any = functools.partial(
            attention_score, query_rows=rows, key_mask=self.visible, droppable=self.droppable, backend=self.backend, **options
        )
        return (
            score(query, keys) if self.adapter.group is None else score_all_heads(score, query, keys, options, self.adapter.group)
        )


def __getattr__(name: str) -> Any:
    if name == "Stop":
        return deprecated.class_name("Stop", "DropContext", DropContext)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
