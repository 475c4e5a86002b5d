"""ToMe: the most similar patches are merged between attention and MLP of every block of the vision tower.

In each block whose output still matters, tokens alternate between two sets, every one of the first proposes itself to the most
similar of the second by cosine of keys (averaged over heads), and the ``r`` best pairs become means weighted by how many patches
they stand for; CLS stays apart, and attention adds ``log(size)`` to the logits. Blocks, projector and decoder see the merged
tokens only. The projected tokens are copied to all the patches they represent, so that the prompt's placeholders fit, and
before the decoder the first patch of each group is kept. Source: ToMe (ICLR 2023), section 3; LLaVA is not in the paper, so
``tokens`` says how many are left, and ``r`` is spread evenly over the blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...core.arguments import require_int
from ...core.schedule import Schedule, Stage
from ...ops.bipartite_merge import bipartite_merge
from ..adapters import ModelAdapter
from ..adapters.tower import Tower, clip_tower, record_tower
from ..context import DropContext
from ..policy import Method, Policy
from ..ranking import Ranking
from ..tiles import Tiles, check_entry


def _preset(n: int) -> Schedule:
    stage = Stage(0, n / 576, "tome", rounding="round", options={"tokens": n})
    return Schedule((stage,), f"tome-{n}", f"ToMe in LLaVA-1.5's tower, {n} of 576 tokens left, r spread evenly over the blocks")


@dataclass(frozen=True)
class ToMe(Policy):
    """``tokens``: patches left of every picture, as many as the stage should keep; ``proportional``: attention adds log(size)."""

    method = Method(
        paper="ToMe, ICLR 2023, section 3",
        where="vision tower",
        score="cosine of keys in the tower, merged pair by pair",
        needs_weights=False,
        flash=False,
        order="unmerged first",
        positions="compacted",
        deviations="LLaVA-NeXT's tiles are merged before it unpads them; the decoder receives the first patch of every group, in "
        "position order; cosines are computed in float32, where the code rounds them to the model's dtype",
        presets=(_preset(192), _preset(128), _preset(64)),
    )
    tokens: int = 192
    proportional: bool = True

    def __post_init__(self) -> None:
        require_int("tokens", self.tokens)

    def register_hooks(self, adapter: ModelAdapter, tower_cache: dict[str, Any]) -> Iterator[Any]:
        clip, vision = clip_tower(adapter), adapter.config.vision_config
        if str(clip.config._attn_implementation).startswith("flash") and self.proportional:
            raise ValueError(
                "proportional must be False with flash attention in the tower, which cannot add log(size) to its logits"
            )
        layer, blocks = adapter.config.vision_feature_layer, clip.encoder.layers
        if not isinstance(layer, int):
            raise ValueError(f"model must take its features from one block of the tower, got vision_feature_layer {layer}")
        merging, patches = layer % (len(blocks) + 1), (vision.image_size // vision.patch_size) ** 2
        lose = max(patches - self.tokens, 0)
        left = 1 + patches
        record, handles = record_tower(adapter, tower_cache)
        for index, block in enumerate(blocks[:merging]):
            r = lose * (index + 1) // merging - lose * index // merging
            if r > (left - 1) // 2:
                raise ValueError(f"tokens must leave a token two, but {self.tokens} of {patches} in {merging} blocks are too few")
            left -= r
            yield from _watch_block(block, record, index, r, self.proportional)
        # Runs before the hook that counts the projector's outputs.
        yield adapter.body.multi_modal_projector.register_forward_hook(functools.partial(_hand_back, record))
        yield from handles

    def score(self, context: DropContext) -> Ranking:
        check_entry(context)
        tiles = Tiles(context)
        group = tiles.tower.notes["row"][:, 1:]
        size = torch.zeros_like(group).scatter_add(1, group, tiles.present.long())
        index = torch.arange(group.shape[1], device=group.device).expand_as(group)
        first = torch.full_like(group, group.shape[1]).scatter_reduce(
            1, group, index.masked_fill(~tiles.present, group.shape[1]), "amin"
        )
        return tiles.ranking(first.gather(1, group) == index, tiles.rank(size.gather(1, group).float()))


def _watch_block(block: Any, record: Tower, index: int, r: int, proportional: bool) -> Iterator[Any]:
    """Merge before the MLP. The block's own residual sum is unused: it adds zero to tokens that nothing reads."""
    notes = record.notes

    def enter(module: Any, args: Any, kwargs: Any) -> Any:
        if not proportional or index == 0:
            return None
        mask = notes["size", index].log()[:, None, None].to(args[0].dtype)
        return ((args[0], mask, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "attention_mask": mask})

    def compare(module: Any, args: Any, output: torch.Tensor) -> None:
        notes["features"] = output.unflatten(-1, (record.heads, -1)).mean(2)

    def merge(module: Any, args: Any) -> tuple[torch.Tensor]:
        # The order of the released code decides which rows the next block compares.
        merged = bipartite_merge(args[0], notes.pop("features"), r, size=notes.get(("size", index)), order="released")
        notes["hidden"], notes["size", index + 1] = merged.hidden, merged.size
        notes["tokens"] = merged.hidden.shape[1]
        notes["row"] = merged.row.gather(1, notes["row"]) if index else merged.row
        return (merged.hidden,)

    def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        notes["hidden"] = notes["hidden"] + output
        return output.new_zeros(1, 1, 1)

    def leave(module: Any, args: Any, output: Any) -> torch.Tensor:
        return notes.pop("hidden")

    yield block.register_forward_pre_hook(enter, with_kwargs=True)
    yield block.self_attn.k_proj.register_forward_hook(compare)
    yield block.layer_norm2.register_forward_pre_hook(merge)
    yield block.mlp.register_forward_hook(add)
    # Before the hook of transformers that records hidden states.
    yield block.register_forward_hook(leave, prepend=True)


def _hand_back(record: Tower, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Projected tokens ``[T, P', D]``, where CLS may be left out in front, copied to all the patches that they represent."""
    row = record.notes["row"]
    without = record.notes["tokens"] - output.shape[1]
    at = row[:, without:] - without
    return output.gather(1, at[..., None].expand(-1, -1, output.shape[2]))
