"""DeepStack: features of the vision tower that a decoder adds to its vision rows behind the first blocks (Qwen3-VL).

The model adds them by a mask over all rows of the prompt. Where rows are dropped before the last addition, the hooks take the
features from the decoder's arguments, and add them at the input of the following block, to the rows that are left.
"""

from __future__ import annotations

from typing import Any

import torch

MASK, PLANES = "visual_pos_masks", "deepstack_visual_embeds"


def take_planes(decoder: dict[str, Any], first: int) -> list[torch.Tensor]:
    """Dense ``[B, N, D]`` features by block, taken from the decoder's arguments; none if all are added before ``first - 1``.

    The score of a drop before block ``first`` excludes what was added behind the block before it, so that is taken too.
    """
    embeds, mask = decoder.get(PLANES), decoder.get(MASK)
    if embeds is None or mask is None or len(embeds) < first:
        return []
    decoder[PLANES] = None
    planes, hidden = [], decoder["inputs_embeds"]
    for plane in embeds:
        dense = torch.zeros_like(hidden)
        dense[mask.to(hidden.device)] = plane.to(hidden)
        planes.append(dense)
    return planes


def rows_of(plane: torch.Tensor, keep: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    """The features ``[B, S, D]`` of the rows that are present, ``keep [B, S]`` (-1: padding); all of them without ``keep``."""
    if keep is None:
        return plane.to(hidden)
    at = keep.clamp(min=0)[..., None].expand(-1, -1, plane.shape[-1])
    return plane.gather(1, at.to(plane.device)).to(hidden)
