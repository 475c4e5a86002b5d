"""random_score in plain PyTorch: Philox4x32-10 in 64-bit integers, which wrap as unsigned ones do."""

from __future__ import annotations

import torch

from ...backends.requests import RandomRequest

MULTIPLIERS, WEYL, ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10
_LOW = 0xFFFFFFFF


def run(request: RandomRequest) -> torch.Tensor:
    """Float32 ``[B, N]``."""
    batch, n, seed, items, device = request
    if items is None:
        items = torch.arange(batch, device=device)
    block = torch.arange((n + 3) // 4, device=device)
    words = (block & _LOW, block >> 32, (items & _LOW)[:, None], ((items >> 32) & _LOW)[:, None])
    bits = torch.stack(torch.broadcast_tensors(*philox(words, seed)), dim=2).flatten(1)[:, :n]
    return (bits >> 8).float() * 2.0**-24


def philox(counter: tuple[torch.Tensor, ...], seed: int) -> tuple[torch.Tensor, ...]:
    """The four words of every counter, as int64."""
    c0, c1, c2, c3 = counter
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(ROUNDS):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ key[0], b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ key[1], a & _LOW
        key = [(k + w) & _LOW for k, w in zip(key, WEYL, strict=True)]
    return c0, c1, c2, c3
