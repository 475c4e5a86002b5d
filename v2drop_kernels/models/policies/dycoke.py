"""DyCoke, stage 1: before the decoder, three frames in four lose the patches that differ least from an earlier frame.

Frames 1 and 3 of every four are compared with frames 0 and 2, and frame 2 with frame 0, patch by patch by the cosine of the
embeddings; each keeps ``floor((1 - K) P)`` of its ``P`` patches, the least similar. LLaVA-OneVision has 196 patches per frame and
one newline behind the video, which is kept. Source: DyCoke (CVPR 2025), section 3.2, with compacted position ids
(``positions="compacted"``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.arguments import require_int
from ...core.schedule import Schedule, Stage
from ...ops.similarity import frame_similarity
from ...ops.topk.order import ranked
from ..context import DropContext
from ..policy import Method, Policy
from ..ranking import Ranking


@dataclass(frozen=True)
class DyCoke(Policy):
    """``per_frame``: tokens of a frame. One video per item, its frames in order, at the start of the item's vision tokens."""

    method = Method(
        paper="DyCoke, CVPR 2025, section 3.2",
        where="before the decoder",
        score="1 - cosine with the same patch of an earlier frame",
        needs_weights=False,
        order="similarity in pruned frames",
        positions="compacted",
        deviations="position order; every group of four frames is pruned alike, and an incomplete last one too, as in the paper, "
        "where the code never prunes the third frame of the last complete four and loses the last frame of an odd number (32 "
        "frames: 3098 tokens there, 2960 here); stage 2, which re-reads the whole cache while decoding, is left out",
        presets=(
            Schedule(
                (Stage(0, 0.473, "dycoke"),),
                "dycoke",
                "DyCoke with K = 0.7 in LLaVA-OneVision: 58 of 196 patches in three frames of four, 370 of 784 tokens",
            ),
        ),
    )
    per_frame: int = 196

    def __post_init__(self) -> None:
        require_int("per_frame", self.per_frame)
        if not self.per_frame:
            raise ValueError("per_frame must be at least 1, got 0")

    def _frames(self, n: int) -> tuple[int, int]:
        """Frames in ``n`` tokens, and tokens that are never dropped: every fourth frame, and what follows the last."""
        frames = n // self.per_frame
        return frames, -(-frames // 4) * self.per_frame + n % self.per_frame

    def count(self, n: int, k: int) -> int:
        """As many patches of each pruned frame as the budget ``k`` allows."""
        frames, fixed = self._frames(n)
        pruned = frames - -(-frames // 4)
        return fixed + max(k - fixed, 0) // pruned * pruned if pruned else n

    def score(self, context: DropContext) -> Ranking:
        spans = context.layout.spans
        if context.layer or context.layout.counts is not None or any(len(item) > 1 for item in spans):
            raise ValueError("the policy 'dycoke' takes items of one video, where they enter the model (layer 0)")
        scores = torch.zeros(context.hidden.shape[:2], device=context.hidden.device)
        tier = torch.zeros_like(scores, dtype=torch.int64)
        for item, ((start, stop),) in ((i, x) for i, x in enumerate(spans) if x and x[0][1] - x[0][0] >= self.per_frame):
            frames = (stop - start) // self.per_frame
            end = start + frames * self.per_frame
            video = context.hidden[item, start:end].unflatten(0, (frames, self.per_frame))
            order = ranked(frame_similarity(video, pairs="dycoke", backend=context.backend))
            rank = torch.empty_like(order).scatter_(1, order, torch.arange(self.per_frame, device=order.device).expand_as(order))
            never_dropped = torch.zeros_like(rank)
            never_dropped[::4] = 1
            scores[item, start:end] = -rank.flatten().float()
            tier[item, start:end] = never_dropped.flatten()
            tier[item, end:stop] = 1
        return Ranking(scores.masked_fill(tier > 0, 0.0), tier)
