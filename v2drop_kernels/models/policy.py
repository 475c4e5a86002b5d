"""What a policy is: a ranking of tokens at a stage, and how a method presents itself. One method is one file in ``policies/``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.schedule import Schedule

if TYPE_CHECKING:
    import torch

    from ._family import Family
    from .context import Stop


@dataclass(frozen=True)
class Method:
    """One row of ``python -m v2drop_kernels methods``.

    Attributes
    ----------
    paper : str
        Name, venue, section.
    where : {"decoder", "before the decoder", "vision tower", "mask"}
    score : str
        In a phrase.
    needs_weights : bool
        Whether the published code reads the attention weights of whole layers, which FlashAttention does not form.
    flash : bool
        Whether it runs here with FlashAttention.
    trainable : bool
        Whether the model can be trained with it in place: gradients reach the kept tokens, or the ranking itself.
    order, positions : str
        Of the kept tokens, as published.
    deviations : str
        Where this implementation differs from the published code; "" when it does not.
    presets : tuple of Schedule
        Published budgets; the first one stands in the table.
    """

    paper: str
    where: str
    score: str
    needs_weights: bool
    flash: bool = True
    trainable: bool = True
    order: str = "position"
    positions: str = "persistent"
    deviations: str = ""
    presets: tuple[Schedule, ...] = ()


class Policy:
    """Base of all policies. Subclass it as a frozen dataclass; its fields are what ``Stage(options={...})`` may set.

    At a stop that keeps nothing of any item, nobody is asked: neither :meth:`score` nor :meth:`merge` is called.

    ``seeded = True`` fills ``Stop.seeds``, which reads the prompt's ids on the host.
    """

    method: ClassVar[Method]
    seeded: ClassVar[bool] = False

    def count(self, n: int, k: int) -> int:
        """How many of ``n`` tokens stay when the schedule asks for ``k``: for methods that cannot keep any number."""
        return k

    def counts(self, left: Sequence[int], kept: Sequence[int], seen: dict[str, Any]) -> tuple[int, ...]:
        """What stays of every item's ``left`` tokens when the schedule asks for ``kept``, before anything is ranked.

        For budgets that depend on what :meth:`watch` saw, which costs one read by the host. Default: :meth:`count`.
        """
        return tuple(self.count(n, k) if n else 0 for n, k in zip(left, kept, strict=True))

    def watch(self, family: Family, seen: dict[str, Any]) -> Iterator[Any]:
        """Register hooks in the vision tower that write to ``seen``; yield their handles."""
        return iter(())

    def score(self, at: Stop) -> torch.Tensor | None:
        """float32 ``[B, N]``, higher means keep; rows that are not droppable may hold anything. None: variation by its metric."""
        raise NotImplementedError

    def merge(self, at: Stop, kept: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The kept rows ``hidden [B, K, D]`` after dropped ones flowed in; ``kept [B, K]`` of ``at.hidden``, -1 for padding."""
        return hidden
