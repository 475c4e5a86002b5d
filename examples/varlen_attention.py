"""Attention over a packed batch after a drop: what ``drop_tokens`` returns goes into flash-attn's or torch's kernels as it is.

``python examples/varlen_attention.py`` drops two thirds of the image tokens of three prompts of different lengths and attends with
the first of these that is installed and takes the tensors: FlashAttention 3, FlashAttention 2, ``torch.nn.attention.varlen`` (torch
2.9 and later). They are GPU kernels; on a CPU every prompt is attended by itself with ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F

import v2drop_kernels as vk

IMPLEMENTATIONS = ("flash_attn_interface", "flash_attn", "torch.nn.attention.varlen", "sdpa")
DIM, HEADS, KV_HEADS = 512, 8, 2


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, using: str | None = None
) -> torch.Tensor:
    """Causal attention ``[T, H, Dh]`` of every packed item over itself.

    ``q`` is ``[T, H, Dh]``, ``k`` and ``v`` are ``[T, Hkv, Dh]``; ``cu_seqlens`` int32 ``[B + 1]`` and ``max_seqlen`` are those of
    the drop. ``using`` names one of ``IMPLEMENTATIONS``; None takes the first that can run.
    """
    using = using or next(name for name in IMPLEMENTATIONS if can_run(name, q))
    if using == "sdpa":
        return one_by_one(q, k, v, cu_seqlens)
    module = importlib.import_module(using)
    if using == "torch.nn.attention.varlen":
        return module.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **torch_options(module.varlen_attn))
    found = module.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, causal=True
    )
    return found[0] if isinstance(found, tuple) else found  # some versions of FlashAttention 3 return the log-sum-exp as well


def can_run(name: str, q: torch.Tensor) -> bool:
    """Whether an implementation is installed and takes such tensors."""
    if name == "sdpa":
        return True
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def torch_options(function: Any) -> dict[str, Any]:
    """Causal attention with grouped heads, in the words of this version of torch."""
    parameters = inspect.signature(function).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    return causal | ({"enable_gqa": True} if "enable_gqa" in parameters else {})


def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The same, item by item; the rows after the last item, which a result of GPU offsets may have, are zero."""
    out = torch.zeros_like(q)
    offsets = cu_seqlens.tolist()
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        one = [x[start:stop].transpose(0, 1) for x in (q, k, v)]
        out[start:stop] = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True).transpose(0, 1)
    return out


def main() -> None:
    """Drop, attend, and print the shapes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    lengths, images = [300, 620, 90], [(20, 276), [(10, 266), (300, 556)], []]  # the last prompt is text only
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    layout = vk.TokenLayout.packed(images, offsets)
    h_prev, h_cur = (torch.randn(offsets[-1], DIM, generator=g).to(device, torch.bfloat16) for _ in range(2))
    kv = [torch.randn(offsets[-1], KV_HEADS, DIM // HEADS, generator=g).to(device, torch.bfloat16) for _ in range(2)]

    # K and V of an earlier layer lie as FlashAttention takes them, [T, H, Dh], which is the layout "BSHD" without a batch.
    out = vk.drop_tokens(h_prev, h_cur, [85, 85, 85], droppable=layout, kv=kv, kv_layout="BSHD")
    assert out.cu_seqlens is not None
    assert out.max_seqlen is not None
    k, v = out.kv
    q = out.hidden.view(-1, HEADS, DIM // HEADS)  # a model projects here
    using = next(name for name in IMPLEMENTATIONS if can_run(name, q))
    attended = attend(q, k, v, out.cu_seqlens, out.max_seqlen, using)
    print(f"rows per prompt: {lengths} before, {out.cu_seqlens.diff().tolist()} after, at most {out.max_seqlen}")
    print(f"{using}: q {list(q.shape)}, k and v {list(k.shape)} to {list(attended.shape)}")


if __name__ == "__main__":
    main()
