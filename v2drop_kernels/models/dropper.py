"""TokenDropper: the options of dropping vision tokens in an unmodified Hugging Face model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..core import deprecated
from ..core import positions as position_modes
from ..core.schedule import Schedule
from . import policies
from .session import DropSession

if TYPE_CHECKING:
    from .context import DropContext


@dataclass(frozen=True)
class TokenDropper:
    """Drops vision tokens in the models that it is called with.

    Inside ``with TokenDropper(schedule)(model) as session:`` the calls ``model(...)`` and ``model.generate(...)`` drop tokens, and
    ``session.report()`` and ``session.kept(item)`` describe the last prefill. When the block ends, also by an exception, the model
    is unchanged.

    Parameters
    ----------
    schedule : Schedule | str
        When tokens are dropped, how many, and by which ranking; or the name of a preset. An item of a batch has one budget for
        all its images unless ``Schedule(per="image")``; items without images are not changed. The last row of a prompt stays
        also if it is a vision token, for its state gives the first token of the answer. A preset for another number of blocks
        goes to the layers that its paper gives for this number, else to the same shares of the depth, and one line on stderr
        says to which.
    positions : {"persistent", "compacted", "group"}
        Position ids of the kept tokens, see :mod:`v2drop_kernels.positions`. "group" requires models with one id per token, which
        excludes M-RoPE.
    compact_earlier_kv : bool
        Also drop the rows from the KV caches of the layers before a stage. It saves memory and decoding time, and changes the
        method: later tokens cannot attend to dropped tokens in any layer.
    spans : optional
        Where the droppable tokens are, if the model receives ``inputs_embeds`` only or has no image placeholder: one
        ``(start, stop)`` for every item, or a list with the spans of each item, counted along the padded prompt.
    scores : callable, optional
        For the policies "given" and "twigvlm": takes the :class:`DropContext` and returns float ``[B, N]``, higher means keep.
    soft : bool | int
        Training with learnable budgets (HiDivDrop's differentiable top-k, :func:`v2drop_kernels.soft_topk`): ``session.ratios``
        holds, for every stage that keeps something, the share that it drops, initialised from the schedule; pass them to the
        optimiser. ``session.learned_schedule()`` is the schedule to run afterwards. Kept rows are multiplied by the mask, which
        is 1 in the forward pass and passes a gradient to the ratio and the ranking. A schedule that counts tokens needs the
        number of vision tokens of an item: it is known for LLaVA, otherwise give the number here. ``rounding`` and ``at_least``
        of the stages do not apply.
    seed : int
        Of the policy "random"; draws depend on it, the layer and the item's tokens, not on the batch.
    score_dtype : dtype, optional
        For stages of the policy "variation": round the change and its norm to this dtype as eager PyTorch does, which with the
        model's own dtype gives the scores of V2Drop's released code. Rounded scores are often equal; of equal ones at the cut
        the first tokens are kept, where ``torch.topk`` of the released code keeps any of them.
    group : ProcessGroup | DeviceMesh, optional
        The ranks over which the attention heads are sharded. Default: found from the weights of a model that was loaded with
        ``tp_plan="auto"`` or sharded by ``parallelize_module``.
    backend : str, optional
        Force a backend of this package.

    Raises
    ------
    ValueError, TypeError
        On construction for invalid options; on the call for a model that is unsupported or has fewer layers than the
        schedule needs; in a forward for images whose tokens are not contiguous, images in a later chunk or turn with positions
        other than "persistent" or with ``compact_earlier_kv``, and caches whose layers cannot differ in length; after the block
        for a cache that lacks rows, unless a single token can do without the hooks.

    Notes
    -----
    Every call has a state of its own: one block serves calls from several threads, and calls inside calls. A cache holds the record
    of what it lacks, and continues in any block on the model, also under another schedule; ``reorder_cache``, ``crop``, selections
    of items and copies keep the record. In a later turn with images only its own vision tokens compete, and policies that read
    attention weights rank them by the attention within that turn.

    Logits keep their shape: rows of dropped tokens repeat those of the last kept token before them. ``output_hidden_states``
    returns each layer's own rows. Models that add vision features behind their first blocks (DeepStack) add them to the rows
    that are left; the policy "variation" excludes them from the change of a block. Windows and chunks count positions in the
    prompt. With ``soft`` the ratios are read on the host in every prefill. A block normalises its input, so the mask takes
    effect from the following block on, in the residual stream: with only one block between two stages, the first receives no
    gradient. Dropping does not pay off for one-token steps without a prefill, or where images are a small part of the prompt:
    only the prefill, and the cache that decoding reads, become cheaper. Source: V2Drop, Algorithm 1; HiDivDrop for positions,
    late injection, early exit and ``soft``.

    Examples
    --------
    >>> TokenDropper("v2drop-64").schedule.counts(576)
    (28, 1, 1)
    """

    schedule: Schedule | str
    positions: str = "persistent"
    compact_earlier_kv: bool = False
    spans: Any = None
    scores: Callable[[DropContext], torch.Tensor] | None = None
    soft: bool | int = False
    seed: int = 0
    score_dtype: torch.dtype | None = None
    group: Any = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", policies.preset(self.schedule))
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule or the name of a preset, got {type(self.schedule).__name__}")
        if not isinstance(self.soft, int) or self.soft < 0:
            raise ValueError(f"soft must be True, False or a number of vision tokens, got {self.soft!r}")
        if self.positions not in position_modes.MODES:
            raise ValueError(f"positions must be one of {', '.join(position_modes.MODES)}, got {self.positions!r}")
        for stage in self.schedule.stages:
            policies.make(stage.policy, stage.options)
        if self.score_dtype is not None and all(stage.policy != "variation" for stage in self.schedule.stages):
            raise ValueError("score_dtype must be None where no stage has the policy 'variation': other policies score in float32")

    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[DropSession]:
        session = DropSession(self, model)
        try:
            session.attach()
            yield session
        finally:
            session.detach()


def __getattr__(name: str) -> Any:
    if name == "Dropping":
        return deprecated.class_name("Dropping", "DropSession", DropSession)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
