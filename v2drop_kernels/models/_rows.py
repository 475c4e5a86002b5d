"""Rows of a prompt after drops: what becomes of masks and rotary tables, and how results find their old places again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Rows:
    """The rows that are left from one drop on.

    Attributes
    ----------
    keep : Tensor
        int64 ``[B, S]``: which row of the prompt each one was, ascending, -1 for padding.
    ragged : bool
        Whether there is padding (known on the host).
    shift : Tensor | None
        With compacted positions ``[B, 1]`` or ``[3, B, 1]``: how much lower than the model's the ids of later tokens are.
    """

    keep: torch.Tensor
    ragged: bool
    shift: torch.Tensor | None = None
    _memo: dict[str, tuple[Any, Any]] = field(default_factory=dict, repr=False, compare=False)

    def once(self, what: str, source: Any, make: Any) -> Any:
        """``make()``, made once for all the layers that are called with the same ``source``."""
        found = self._memo.get(what)
        if found is None or found[0] is not source:
            found = self._memo[what] = (source, make())
        return found[1]

    def forget(self) -> None:
        self._memo.clear()


@dataclass
class CacheRows:
    """What a cache must know about the drops in it; lives on the cache, so that copies of the cache have it too.

    Attributes
    ----------
    prompt : int
        Rows of the prompt as the model counts them.
    layers : tuple
        Per layer the :class:`Rows` that its cache holds; None where all rows are there.
    seen : Tensor | None
        bool ``[B, prompt]``: which rows are no padding, where the prompt came with a 4-D mask, as ``generate`` makes it for
        static caches.
    """

    prompt: int
    layers: tuple[Rows | None, ...]
    seen: torch.Tensor | None = None

    @property
    def short(self) -> bool:
        """Whether rows are missing in the first layer already, whose length the model takes for that of the text."""
        return self.layers[0] is not None


def step_mask(mask: torch.Tensor | None, first: int, new: int, hidden: torch.Tensor, attention: str, *, static: bool) -> Any:
    """The mask of ``new`` tokens behind ``first`` others, for all rows of the prompt, as the model would make it; or None.

    ``mask`` is the caller's: ``[B, first + new]``, or ``[B, 1, new, first + new]`` and final, or None. As transformers does, one
    for a single token is read, to do without where nothing is padded.
    """
    if mask is not None and mask.dim() == 4:
        return mask
    if mask is not None:
        if mask.shape[1] != first + new:
            raise ValueError(f"attention_mask must be [B, {first + new}], the prompt and all that follows, got {list(mask.shape)}")
        mask = mask.bool()
    if not static and attention != "eager" and (new == 1 or attention != "sdpa") and (mask is None or bool(mask.all())):
        return None
    if attention.startswith("flash"):
        return mask
    seen = torch.ones(new, first + new, dtype=torch.bool, device=hidden.device).tril(first)[None, None]
    seen = (seen if mask is None else seen & mask[:, None, None]).expand(hidden.shape[0], -1, -1, -1)
    if attention == "eager":
        return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
    return seen


def cut_mask(mask: torch.Tensor | None, rows: Rows, prompt: int, *, prefill: bool, length: int, flash: bool) -> torch.Tensor | None:
    """The mask of a layer whose keys are ``rows`` and then the tokens after the prompt.

    ``mask`` is what the model made for all rows: None (causal, nothing padded), ``[B, 1, Q, K]`` bool or additive, or for
    flash attention ``[B, K]``. ``length`` is the number of keys that the layer will see.
    """
    keep = rows.keep if mask is None else rows.keep.to(mask.device)
    valid = keep >= 0
    if mask is None:
        if not rows.ragged:
            return None
        valid = torch.nn.functional.pad(valid, (0, length - keep.shape[1]), value=True)
        if flash:
            return valid
        causal = torch.ones(keep.shape[1], length, dtype=torch.bool, device=keep.device).tril() if prefill else True
        return valid[:, None, None, :] & causal
    at = keep.clamp(min=0)
    if flash:
        return torch.cat([mask.gather(1, at) & valid, mask[:, prompt:]], dim=1)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    mask = mask.expand(keep.shape[0], -1, -1, -1)
    if prefill:
        items = torch.arange(keep.shape[0], device=keep.device)[:, None, None]
        cut = mask[items, :, at[:, :, None], at[:, None, :]].permute(0, 3, 1, 2)
    else:
        cut = mask.gather(3, at[:, None, None, :].expand(-1, *mask.shape[1:3], -1))
    if rows.ragged:
        cut = cut.masked_fill(~valid[:, None, None, :], hidden)
    if not prefill:
        cut = torch.cat([cut, mask[..., prompt:]], dim=-1)
    return torch.nn.functional.pad(cut, (0, length - cut.shape[-1]), value=hidden) if cut.shape[-1] < length else cut


def injected(hidden: torch.Tensor, rows: Rows, embeds: torch.Tensor) -> torch.Tensor:
    """``embeds [B, N, D]`` with the rows that are there already, ``hidden [B, S, D]``, in their places: one gather."""
    keep = rows.keep.to(hidden.device)
    (batch, width), n = keep.shape, embeds.shape[1]
    source = torch.arange(width, width + n + 1, device=keep.device).repeat(batch, 1)  # one more, for what is padding
    source.scatter_(1, torch.where(keep >= 0, keep, n), torch.arange(width, device=keep.device).expand(batch, -1))
    return torch.cat([hidden, embeds], dim=1).gather(1, source[:, :n, None].expand(-1, -1, hidden.shape[2]))


def spread(hidden: torch.Tensor, rows: Rows, kept: tuple[int, ...], left: bool, prompt: int) -> torch.Tensor:
    """``[B, S, D]`` back to ``[B, prompt, D]``: a dropped row takes the state of the last kept row before it, 0 if there is none.

    So logits and labels keep the places that the caller knows, and the last kept token before a text token still predicts it.
    """
    keep = rows.keep.to(hidden.device)
    there = torch.zeros(keep.shape[0], prompt + 1, dtype=torch.int64, device=keep.device)
    there.scatter_(1, torch.where(keep >= 0, keep, prompt), 1)
    count = there[:, :prompt].cumsum(1)
    pad = torch.tensor([keep.shape[1] - n if left else 0 for n in kept], device=keep.device)[:, None]
    slot = (count - 1).clamp(min=0) + pad
    found = hidden.gather(1, slot[..., None].expand(-1, -1, hidden.shape[2]))
    return found.masked_fill((count == 0)[..., None], 0)
