"""VoCo-LLaMA's attention mask: text attends to vision tokens only through a few VoCo tokens. Nothing is dropped."""

from __future__ import annotations

import torch

from ..core import arguments
from .policy import Method

method = Method(
    paper="VoCo-LLaMA, CVPR 2025",
    where="mask",
    score="none: text sees VoCo tokens in place of vision tokens",
    needs_weights=False,
    flash=False,
    positions="unchanged",
)


def voco_mask(
    vision: torch.Tensor,
    voco: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    queries: int | None = None,
) -> torch.Tensor:
    """The additive attention mask of VoCo-LLaMA, in which text does not attend to vision tokens.

    Parameters
    ----------
    vision : Tensor
        bool ``[B, N]``: vision tokens.
    voco : Tensor
        bool ``[B, N]``: the VoCo tokens behind them.
    attention_mask : Tensor, optional
        ``[B, N]``, 0 or False on padding, left or right.
    dtype : dtype
        Floating: that of the model.
    queries : int, optional
        Only the last ``queries`` rows: 1 in a decoding step, with the tables of all ``N`` tokens so far. Default: all.

    Returns
    -------
    Tensor
        ``dtype`` ``[B, 1, Q, N]``: 0 where a token may attend to another, ``finfo(dtype).min`` elsewhere.

    Raises
    ------
    ValueError, TypeError
        Tables that do not fit; a dtype that is not floating.

    Notes
    -----
    Token i attends to token j if ``j <= i``, j is not padding, and not (j is vision and i is text); text is what is neither vision
    nor VoCo. Vision and VoCo tokens attend to all tokens before them, also of earlier images. A row of padding attends to nothing;
    it holds ``min`` everywhere, which makes its weights equal, not NaN. A transformers model takes the mask as
    ``attention_mask`` with ``sdpa`` or ``eager`` attention (give ``position_ids`` when padding is on the left);
    FlashAttention takes no such mask. The released code masks and does not drop, and so does this.

    Source: VoCo-LLaMA (CVPR 2025). Equivalent plain torch: the condition above, row by row.

    Examples
    --------
    >>> vision, voco = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    >>> (voco_mask(vision, voco)[0, 0] == 0).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """
    arguments.tensor("vision", vision)
    if vision.dim() != 2 or vision.dtype != torch.bool:
        raise ValueError(f"vision must be bool [B, N], got {vision.dtype} {list(vision.shape)}")
    arguments.table("voco", voco, tuple(vision.shape), torch.bool, vision)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    n = vision.shape[1]
    if queries is None:
        queries = n
    elif isinstance(queries, bool) or not isinstance(queries, int) or not 0 <= queries <= n:
        raise ValueError(f"queries must be an int from 0 to N = {n}, got {queries!r}")
    row = torch.arange(n, device=vision.device)
    text = ~(vision | voco)[:, n - queries :]
    seen = (row <= row[n - queries :, None]) & ~(text[:, :, None] & vision[:, None])
    if attention_mask is not None:
        if attention_mask.shape != vision.shape:
            raise ValueError(f"attention_mask must be [B, N] = {list(vision.shape)}, got {list(attention_mask.shape)}")
        seen = seen & attention_mask.bool()[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=vision.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
