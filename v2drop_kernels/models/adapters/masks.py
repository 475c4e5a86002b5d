"""transformers' attention masks: padding read from them, masks of decoding steps, and masks cut to the rows that are left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..rows import KeptRows


def full_attention(mask: Any) -> Any:
    """The mask of layers with full attention, where the model was given one mask per attention type."""
    return mask.get("full_attention") if isinstance(mask, dict) else mask


def visible_rows(given: dict[str, Any]) -> torch.Tensor | None:
    """bool ``[B, N]`` of the 2-D mask that the model was called with; None without one."""
    mask = given.get("attention_mask")
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def last_row(mask: torch.Tensor, prompt: int) -> torch.Tensor:
    """bool ``[B, prompt]``: which rows of the prompt the last row of a 4-D mask may attend to."""
    last = mask[:, 0, -1, :prompt]
    return last if last.dtype == torch.bool else last >= 0


def padding_of(mask: Any, rows: int) -> tuple[list[int] | None, str]:
    """Real tokens of each item and the padded side, read from the mask on the host.

    ``None`` for the lengths means that every row counts as a token: there is no padding, or it is not on one side. Padding rows
    are then kept, and stay masked.
    """
    mask = full_attention(mask)
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[2] == rows <= mask.shape[3]:
        # generate() makes such masks for static caches. A mask of the caller may hide more than padding.
        real = last_row(mask, rows)
        visible = mask[:, 0, :, :rows] if mask.dtype == torch.bool else mask[:, 0, :, :rows] >= 0
        if not bool(((visible == (visible.new_ones(rows, rows).tril() & real[:, None])) | ~real[:, :, None]).all()):
            return None, "left"
    elif not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[1] != rows:
        return None, "left"
    else:
        real = mask.bool()
    # The padding before and behind the tokens; rows that are masked between tokens stay, and stay masked.
    full, lead, trail = torch.stack([real.any(1), real.int().argmax(1), real.flip(1).int().argmax(1)]).tolist()
    if not any(lead) and not any(trail) and all(full):
        return None, "left"
    if not any(trail):
        return [rows - n if some else 0 for some, n in zip(full, lead, strict=True)], "left"
    if not any(lead):
        return [rows - n if some else 0 for some, n in zip(full, trail, strict=True)], "right"
    return None, "left"


def cut_mask(
    mask: torch.Tensor | None, rows: KeptRows, prompt: int, *, prefill: bool, length: int, flash: bool
) -> torch.Tensor | None:
    """The mask of a layer whose keys are ``rows`` and then the tokens after the prompt.

    ``mask`` is what the model made for all rows: None (causal, no padding), ``[B, 1, Q, K]`` bool or additive, or for
    FlashAttention ``[B, K]``. ``length`` is the number of keys that the layer attends to.
    """
    if mask is None:
        return _mask_of_padding(rows, prefill=prefill, length=length, flash=flash)
    keep = rows.keep.to(mask.device)
    valid, at = keep >= 0, keep.clamp(min=0)
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


def _mask_of_padding(rows: KeptRows, *, prefill: bool, length: int, flash: bool) -> torch.Tensor | None:
    """:func:`cut_mask` where the model made no mask: the padding that dropping made is all that must be hidden."""
    if not rows.ragged:
        return None
    keep = rows.keep
    valid = torch.nn.functional.pad(keep >= 0, (0, length - keep.shape[1]), value=True)
    if flash:
        return valid
    causal = torch.ones(keep.shape[1], length, dtype=torch.bool, device=keep.device).tril() if prefill else True
    return valid[:, None, None, :] & causal


def state_mask(mask: Any, rows: KeptRows | None) -> Any:
    """The 2-D mask ``[B, S]`` of the rows that a layer with a state receives; None where all are real, or for new tokens."""
    if rows is None:
        return mask
    real = rows.keep >= 0
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        real = real & mask.to(real.device).bool().gather(1, rows.keep.clamp(min=0))
    elif not rows.ragged:
        return None
    return real.to(mask.dtype) if isinstance(mask, torch.Tensor) else real


def position_mask(
    keep: torch.Tensor,
    prompt: int,
    new: int,
    length: int,
    visible: torch.Tensor | None,
    hidden: torch.Tensor,
    *,
    later: int,
    window: int | None,
    chunked: bool,
    attention: str,
) -> torch.Tensor:
    """The mask of ``new`` tokens over the keys of a layer, rows of the prompt and all tokens behind it, by places in the text.

    Parameters
    ----------
    keep : Tensor
        int64 ``[B, S]``: the rows of the prompt that the layer received, -1 for padding.
    prompt, later : int
        Rows of the prompt; tokens behind it, the new ones included.
    length : int
        Keys that the layer attends to: the last ones, for a windowed cache forgets the first.
    visible : Tensor | None
        bool ``[B, prompt + later]``: not padding.
    window : int | None
        Of the layer, in places; ``chunked``: places are cut into chunks of this size, from the first real token on.
    """
    text = torch.arange(prompt, prompt + later, device=keep.device).expand(keep.shape[0], -1)
    place = torch.cat([keep, text], dim=1)[:, -length:]  # [B, length]
    query = text[:, -new:, None]
    seen = (place >= 0)[:, None] & (place[:, None] <= query)
    if visible is not None:
        seen = seen & visible.to(keep.device).gather(1, place.clamp(min=0))[:, None]
    if window is not None and chunked:
        first = 0 if visible is None else visible.to(keep.device).int().argmax(1)[:, None, None]
        seen = seen & ((place[:, None] - first) // window == (query - first) // window)
    elif window is not None:
        seen = seen & (query - place[:, None] < window)
    seen = seen[:, None].to(hidden.device)
    if attention == "eager":
        return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
    return seen
