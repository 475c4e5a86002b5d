"""Argument rules that the merges share."""

from __future__ import annotations

from typing import Any

import torch

from ...core import arguments


def integers(name: str, t: Any, x: torch.Tensor, width: str) -> None:
    """Raise unless ``t`` is int64 ``[B, width]``, on the device of ``x``."""
    arguments.tensor(name, t)
    if t.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {t.dtype}")
    if t.dim() != 2 or t.shape[0] != x.shape[0]:
        raise ValueError(f"{name} must be [B, {width}] with B = {x.shape[0]}, got {list(t.shape)}")
    arguments.same_device(name, t, x.device, "x")


def floats(name: str, t: Any, x: torch.Tensor, n: int) -> None:
    """Raise unless ``t`` is floating point ``[B, n]``, on the device of ``x``."""
    arguments.tensor(name, t)
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {t.dtype}")
    if t.shape != (x.shape[0], n):
        raise ValueError(f"{name} must be {[x.shape[0], n]}, got {list(t.shape)}")
    arguments.same_device(name, t, x.device, "x")


def rows_of(name: str, t: Any, x: torch.Tensor) -> None:
    """Raise unless ``t`` is floating point ``[B, N, C]``, on the device of ``x [B, N, D]``."""
    arguments.tensor(name, t)
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {t.dtype}")
    if t.dim() != 3 or t.shape[:2] != x.shape[:2]:
        raise ValueError(f"{name} must be [B, N, C] with [B, N] = {list(x.shape[:2])}, got {list(t.shape)}")
    arguments.same_device(name, t, x.device, "x")


def mask(name: str, t: Any, x: torch.Tensor) -> None:
    """Raise unless ``t`` is None or bool ``[B, N]``, on the device of ``x [B, N, D]``."""
    if t is None:
        return
    arguments.tensor(name, t)
    if t.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {t.dtype}")
    if t.dim() != 2 or t.shape != x.shape[:2]:
        raise ValueError(f"{name} must be [B, N] = {list(x.shape[:2])}, got {list(t.shape)}")
    arguments.same_device(name, t, x.device, "x")


def count(name: str, n: Any) -> None:
    """Raise unless ``n`` is an integer of at least 0."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {arguments.shown(n)}")


def edges_exist(offsets: torch.Tensor, rows: torch.Tensor, n: int) -> None:
    """Raise unless ``offsets`` ascend inside the edges and every edge between them is one of ``n`` rows."""
    edges = rows.shape[1]
    if offsets.numel() and (int(offsets.min()) < 0 or int(offsets.max()) > edges or bool((offsets.diff(dim=1) < 0).any())):
        raise ValueError(f"offsets must ascend from 0 to at most the {edges} edges, got others")
    if rows.numel() and offsets.numel() and (int(rows.min()) < 0 or int(rows.max()) >= n):
        edge = torch.arange(edges, device=rows.device)
        wrong = rows[(edge >= offsets[:, :1]) & (edge < offsets[:, -1:]) & ((rows < 0) | (rows >= n))]
        if len(wrong):
            raise ValueError(f"rows must lie in [0, {n}), got {int(wrong[0])}")
