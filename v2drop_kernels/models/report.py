"""What a prefill dropped: tokens, KV bytes and FLOPs of every layer, and the kept patches of every item."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Stopwatch:
    """Seconds from now to :meth:`stop`: of a GPU by events, without waiting for it; else of the host."""

    def __init__(self, device: torch.device) -> None:
        self._stream = None
        if device.type == "cuda":
            import torch

            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._stream = torch.cuda.current_stream(device)
            self._events[0].record(self._stream)
        self._times = [time.perf_counter()]

    def stop(self) -> None:
        self._times.append(time.perf_counter())
        if self._stream is not None:
            self._events[1].record(self._stream)

    @property
    def seconds(self) -> float:
        """Waits for the GPU."""
        if self._stream is None:
            return self._times[-1] - self._times[0]
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1000


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer in the last prefill.

    Attributes
    ----------
    layer : int
        0-based.
    tokens, vision : tuple of int
        Per item the tokens that entered the layer, padding not counted, and how many of them are droppable.
    rows : int
        Rows of the batch, padding included: what the layer computed for every item.
    kv_bytes : int
        Keys and values that the prompt leaves in this layer's cache, padding included.
    flops : int
        Multiply-adds for the tokens by the papers' formula (see :func:`v2drop_kernels.schedule.prefill_flops`).
    """

    layer: int
    tokens: tuple[int, ...]
    vision: tuple[int, ...]
    rows: int
    kv_bytes: int
    flops: int


@dataclass(frozen=True)
class Report:
    """All layers of the last prefill, and the same prompt without dropping for comparison.

    Attributes
    ----------
    layers : tuple of LayerReport
    full_kv_bytes, full_flops : int
        Of all layers together without dropping.
    seconds : float
        What the prefill took from the start of the decoder to its final norm: GPU time on a GPU, else time of the host.
    """

    layers: tuple[LayerReport, ...]
    full_kv_bytes: int
    full_flops: int
    seconds: float = 0.0

    @property
    def kv_bytes(self) -> int:
        return sum(x.kv_bytes for x in self.layers)

    @property
    def flops(self) -> int:
        return sum(x.flops for x in self.layers)

    def average_tokens(self, item: int = 0) -> float:
        """Droppable tokens of an item that enter a layer, averaged over the layers: the papers' "192 tokens"."""
        return sum(x.vision[item] for x in self.layers) / len(self.layers)

    def __str__(self) -> str:
        lines = [f"{'layer':>5} {'rows':>6} {'KV bytes':>12} {'FLOPs':>16}  tokens (vision) per item"]
        for x in self.layers:
            items = ", ".join(f"{t} ({v})" for t, v in zip(x.tokens, x.vision, strict=True))
            lines.append(f"{x.layer:>5} {x.rows:>6} {x.kv_bytes:>12,} {x.flops:>16,}  {items}")
        share = f"KV {self.kv_bytes / self.full_kv_bytes:.0%}, FLOPs {self.flops / self.full_flops:.0%} of the undropped prompt's"
        return "\n".join([*lines, f"{share}; {self.seconds * 1e3:.1f} ms in the decoder"])


@dataclass(frozen=True)
class Kept:
    """The droppable tokens of one item that were kept.

    Attributes
    ----------
    stages : tuple of tuple of int
        After every stage of the schedule the kept tokens, ascending, numbered from 0 among the droppable tokens of the item.
    total : int
        Droppable tokens before the first stage.
    grid : tuple of int | None
        ``(rows, columns)``, or ``(frames, rows, columns)``, of the patches when the item has one image or video and the
        model lays its tokens out that way; else None.
    """

    stages: tuple[tuple[int, ...], ...]
    total: int
    grid: tuple[int, ...] | None
