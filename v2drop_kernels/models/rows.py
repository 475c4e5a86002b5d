"""Rows of a prompt after drops, vision rows that are inserted late, and results put back at their places in the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..ops.host_ints import host_ints


@dataclass
class KeptRows:
    """The rows of the prompt that are left after a drop.

    Attributes
    ----------
    keep : Tensor
        int64 ``[B, S]``: the row of the prompt that each kept row was, ascending, -1 for padding.
    ragged : bool
        Whether there is padding (known on the host).
    shift : Tensor | None
        With compacted positions ``[B, 1]`` or ``[3, B, 1]``: the position ids of later tokens are this much lower than the model's.
    """

    keep: torch.Tensor
    ragged: bool
    shift: torch.Tensor | None = None

    def items(self, select: Any) -> KeptRows:
        """The same for other items of the batch; ``select`` maps a tensor and its batch dimension to the selected tensor."""
        shift = None if self.shift is None else select(self.shift, self.shift.dim() - 2)
        return KeptRows(select(self.keep, 0), self.ragged, shift)

    def without_last(self, count: int, prompt: int) -> KeptRows | None:
        """Without the last ``count`` rows of the prompt; None where an item lacks one of them. Reads the rows on the host."""
        width = self.keep.shape[1]
        expected = torch.arange(prompt - count, prompt, device=self.keep.device)
        if count > width or not bool((self.keep[:, width - count :] == expected).all()):
            return None
        return KeptRows(self.keep[:, : width - count], self.ragged, self.shift)


def rows_behind(old: KeptRows | None, prompt: int, first: int, new: KeptRows | None, added: int) -> KeptRows | None:
    """The rows of a text of ``first + added`` rows: ``old`` of its first ``prompt`` rows, all up to ``first``, then ``new``.

    The numbers of ``new`` count from ``first``. None stands for all rows.
    """
    known = old if new is None else new
    if known is None:
        return None
    batch, device = known.keep.shape[0], known.keep.device
    every = torch.arange(first + added, device=device).expand(batch, -1)
    head, tail = every[:, :first], every[:, first:]
    if old is not None:
        head = torch.cat([old.keep.to(device), every[:, prompt:first]], dim=1)
    if new is not None:
        tail = torch.where(new.keep >= 0, new.keep + first, new.keep)
    ragged = any(rows is not None and rows.ragged for rows in (old, new))
    return KeptRows(torch.cat([head, tail], dim=1), ragged, None if old is None else old.shift)


def insert_vision(hidden: torch.Tensor, rows: KeptRows, embeds: torch.Tensor) -> torch.Tensor:
    """``embeds [B, N, D]`` in which the rows that are present, ``hidden [B, S, D]``, replace theirs: one gather."""
    keep = rows.keep.to(hidden.device)
    (batch, width), n = keep.shape, embeds.shape[1]
    source = torch.arange(width, width + n + 1, device=keep.device).repeat(batch, 1)  # one more, which padding writes to
    source.scatter_(1, torch.where(keep >= 0, keep, n), torch.arange(width, device=keep.device).expand(batch, -1))
    return torch.cat([hidden, embeds], dim=1).gather(1, source[:, :n, None].expand(-1, -1, hidden.shape[2]))


def scatter_to_prompt(hidden: torch.Tensor, rows: KeptRows, lengths: tuple[int, ...], left: bool, prompt: int) -> torch.Tensor:
    """``[B, S, D]`` back to ``[B, prompt, D]``: a dropped row takes the state of the last kept row before it, 0 if there is none.

    Logits and labels thus keep their places in the prompt, and the last kept token before a text token still predicts it.
    ``lengths`` are the real rows of each item in ``hidden``, padded on the left if ``left``.
    """
    keep = rows.keep.to(hidden.device)
    present = torch.zeros(keep.shape[0], prompt + 1, dtype=torch.int64, device=keep.device)
    present.scatter_(1, torch.where(keep >= 0, keep, prompt), 1)
    count = present[:, :prompt].cumsum(1)
    pad = host_ints([keep.shape[1] - n if left else 0 for n in lengths], keep.device)[:, None]
    slot = (count - 1).clamp(min=0) + pad
    gathered = hidden.gather(1, slot[..., None].expand(-1, -1, hidden.shape[2]))
    return gathered.masked_fill((count == 0)[..., None], 0)
