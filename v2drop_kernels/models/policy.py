"""What a policy is: a ranking of tokens at a stage, and how a method presents itself. One method is one file in ``policies/``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..core import deprecated
from ..core.schedule import Schedule

if TYPE_CHECKING:
    import torch

    from .adapters import ModelAdapter
    from .context import DropContext
    from .ranking import Ranking


# Part of the deviations of methods whose code rounds to float16 or bfloat16 where this implementation does not.
FLOAT32 = "scores stay in float32, where the code rounds them to the model's dtype"


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
        Where this implementation differs from the published code; "" when it does not. The docstring of the policy and the
        documentation repeat this text.
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

    A stage that keeps nothing of any item calls neither :meth:`score` nor :meth:`merge`.

    ``seeded = True`` fills ``DropContext.seeds``, which reads the prompt's ids on the host.
    """

    method: ClassVar[Method]
    seeded: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "method" in own and cls.method.deviations and cls.__doc__:
            cls.__doc__ += f"\n\n    Not as in the published code: {cls.method.deviations}.\n    "
        if "watch" in own and "register_hooks" not in own:
            deprecated.warn(f"{cls.__name__}.watch()", f"{cls.__name__}.register_hooks()")
            cls.register_hooks = own["watch"]  # type: ignore[method-assign]
        elif "register_hooks" in own and "watch" not in own:
            cls.watch = _watch(own["register_hooks"])  # type: ignore[attr-defined]

    def count(self, n: int, k: int) -> int:
        """How many of ``n`` tokens are kept when the schedule requests ``k``: for methods that cannot keep any number."""
        return k

    def counts(self, left: Sequence[int], kept: Sequence[int], tower_cache: dict[str, Any]) -> tuple[int, ...]:
        """How many of every item's ``left`` tokens are kept when the schedule requests ``kept``, before anything is ranked.

        For budgets that depend on what :meth:`register_hooks` recorded, which costs one read on the host. Default: :meth:`count`.
        """
        return tuple(self.count(n, k) if n else 0 for n, k in zip(left, kept, strict=True))

    def register_hooks(self, adapter: ModelAdapter, tower_cache: dict[str, Any]) -> Iterator[Any]:
        """Register hooks in the vision tower that write to ``tower_cache``; yield their handles."""
        return iter(())

    def score(self, context: DropContext) -> torch.Tensor | Ranking | None:
        """Rank the tokens of a stage.

        Returns
        -------
        Tensor | Ranking | None
            float32 ``[B, N]``, higher means keep, where rows that are not droppable may hold anything; or a :class:`Ranking`
            whose tiers precede the scores; or None for the variation by ``context.stage.metric``.
        """
        raise NotImplementedError

    def merge(self, context: DropContext, kept: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The kept rows ``hidden [B, K, D]`` after dropped rows were merged into them; default: unchanged.

        ``kept [B, K]`` are their rows in ``context.hidden``, -1 for padding.
        """
        return hidden


def _watch(register_hooks: Any) -> Any:
    """``watch`` of a class that defines ``register_hooks``, for subclasses that call ``super().watch``."""

    def watch(self: Policy, adapter: ModelAdapter, tower_cache: dict[str, Any]) -> Iterator[Any]:
        """Deprecated: use :meth:`register_hooks`."""
        deprecated.warn("Policy.watch()", "Policy.register_hooks()")
        handles: Iterator[Any] = register_hooks(self, adapter, tower_cache)
        return handles

    return watch


Policy.watch = _watch(Policy.register_hooks)  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    if name == "Stop":
        from .context import DropContext

        return deprecated.class_name("Stop", "DropContext", DropContext)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
