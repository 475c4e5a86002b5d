"""A decoder stack shaped like LLaVA-1.5's, in plain PyTorch, with seeded random weights: what the demo drops tokens from.

Blocks are Llama's: RMSNorm, rotary attention with a KV cache through ``F.scaled_dot_product_attention``, SwiGLU. A block's
weights are drawn when it is reached and thrown away after it, so 32 blocks need the memory of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]
KV = tuple[Tensor, Tensor]

GRID = 24
PATCH = 14
SIDE = GRID * PATCH  # what CLIP ViT-L/14-336 sees
SYSTEM_TOKENS = 35  # LLaVA-1.5's prompt up to the image
HEAD_DIM = 128
# The statistics that CLIP's image processor normalises with.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Decoder:
    """The sizes of the stack and the seed of its weights; LLaVA-1.5-7B is 32 blocks of width 4096 with 32 heads."""

    width: int = 1024
    layers: int = 32
    seed: int = 0
    device: str = "cpu"

    def _draw(self, stream: int, *shapes: tuple[int, int]) -> list[Tensor]:
        # On the CPU, so that a seed means the same weights on every device.
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + stream)
        return [torch.randn(shape, generator=rng).mul_(shape[1] ** -0.5).to(self.device) for shape in shapes]

    def embed(self, pixels: Tensor, text_tokens: int) -> Tensor:
        """Hidden states ``[1, 35 + 576 + text, D]`` of a prompt around an image given as uint8 ``[336, 336, 3]``."""
        normal = ((pixels.float() / 255 - torch.tensor(_CLIP_MEAN)) / torch.tensor(_CLIP_STD)).to(self.device)
        patches = normal.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).reshape(GRID * GRID, -1)  # [576, 588]
        (projection,) = self._draw(0, (self.width, patches.shape[1]))
        (text,) = self._draw(1, (SYSTEM_TOKENS + text_tokens, self.width))
        text = text * self.width**0.5  # unit variance, as the patches have
        return torch.cat([text[:SYSTEM_TOKENS], patches @ projection.T, text[SYSTEM_TOKENS:]])[None]

    def rope(self, position_ids: Tensor) -> Rope:
        """Rotary tables ``[B, N, Dh]`` for ``position_ids`` ``[B, N]``."""
        inverse = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, device=self.device).float() / HEAD_DIM)
        angle = (position_ids[..., None] * inverse).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    def block(self, layer: int, x: Tensor, rope: Rope, past: KV | None = None) -> tuple[Tensor, KV]:
        """Run one block on ``x`` ``[B, N, D]``; return the new hidden states and this layer's keys and values."""
        d, m = self.width, self.width * 11008 // 4096
        qkv, out, gate_up, down = self._draw(2 + layer, (3 * d, d), (d, d), (2 * m, d), (d, m))
        heads = F.linear(_rms_norm(x), qkv).view(*x.shape[:2], 3, d // HEAD_DIM, HEAD_DIM)  # [B, N, 3, H, Dh]
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, rope), _rotate(k, rope)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), out)
        gate, up = F.linear(_rms_norm(x), gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, down), (k, v)


def _rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    cos, sin = (table[:, None] for table in rope)  # [B, 1, N, Dh]
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin
