"""ILVAS: how similarly a block and a later block attend to the vision tokens; its maxima suggest where to drop tokens."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.schedule import Schedule
from ..ops.host_ints import host_ints
from .adapters.attention import project, scaling
from .dropper import TokenDropper
from .parallel import all_heads, tensor_parallel_group
from .session import DropSession


@dataclass(frozen=True)
class Ilvas:
    """The curve of a model.

    Attributes
    ----------
    values : tuple of float
        ILVAS of every 0-based block, in [0, 1]; NaN where it or the block ``n`` later does not hold all vision tokens.
    n, top : int
        As given to :func:`ilvas`.
    """

    values: tuple[float, ...]
    n: int
    top: int

    def filters(self, count: int | None = None) -> tuple[int, ...]:
        """Blocks at local maxima, ascending: the ``layers`` of a schedule; the ``count`` highest of them, or all."""
        inner = range(1, len(self.values) - 1)  # no comparison with NaN holds
        found = [x for x in inner if self.values[x - 1] < self.values[x] >= self.values[x + 1]]
        found.sort(key=lambda x: -self.values[x])
        return tuple(sorted(found[:count]))


@torch.no_grad()
def ilvas(
    model: Any,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    n: int = 4,
    top: int = 50,
    schedule: Schedule | None = None,
    spans: Any = None,
) -> Ilvas:
    """Inter-layer visual attention similarity of a model over a few prompts: a diagnostic that suggests where to filter.

    Parameters
    ----------
    model : PreTrainedModel
        As :class:`TokenDropper` takes it.
    inputs : mapping | sequence of mapping
        What the model is called with: one batch, or several. Items without images do not count.
    n : int
        How many blocks later.
    top : int
        The paper's K: of an item's vision tokens those that block ``l`` attends to most, or all if there are fewer.
    schedule : Schedule, optional
        Of the model in the runs: the paper's has late injection and early exit,
        ``Schedule((Stage(24, 0, "hidivdrop"),), inject=8)``. Where it has dropped tokens there is no value.
    spans : optional
        As in :class:`TokenDropper`.

    Returns
    -------
    Ilvas
        The mean over all items; ``.filters(4)`` are the four highest local maxima.

    Raises
    ------
    ValueError
        ``n`` or ``top`` below 1; no item with images.

    Notes
    -----
    ``ILVAS(l, l + n, K) = 1/K sum_i cos(A_i^l, A_i^(l+n))`` over the K vision tokens ``i`` with the highest mean over heads in
    block ``l``, where ``A_i^l`` is the vector, head by head, of the softmax attention that the last token pays to ``i`` in block
    ``l``: the block with whose projections the policy "hidivdrop" ranks before it. Source: HiDivDrop, section 3.2, which does
    not state the query token; here it is the last token, which also ranks. Runs one prefill per batch, and reads the result on the
    host.
    """
    for name, value in (("n", n), ("top", top)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    curves = []
    with TokenDropper(schedule or Schedule(()), spans=spans)(model) as session:
        weights: list[list[torch.Tensor]] = []
        see = functools.partial(_see, session, weights)
        handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in model.get_decoder().layers]
        try:
            for batch in [inputs] if isinstance(inputs, Mapping) else inputs:
                weights.clear()
                model(**{**batch, "use_cache": False})
                for item, image in enumerate(session.vision_token_counts()):
                    if image:
                        curves.append(_curve([layer[item] for layer in weights], image, n, top))
        finally:
            for handle in handles:
                handle.remove()
    if not curves:
        raise ValueError("inputs must have an item with images")
    return Ilvas(tuple(map(statistics.fmean, zip(*curves, strict=True))), n, top)


def _see(session: DropSession, weights: list[list[torch.Tensor]], block: Any, args: Any, kwargs: Any) -> None:
    """Per item ``[H, V]``: the attention of its last token to the vision tokens that are here."""
    hidden = args[0] if args else kwargs["hidden_states"]
    layout = session.layout
    last = host_ints([max(hi - 1, 0) for _, hi in layout.bounds], hidden.device)[:, None]
    query, keys = project(block, hidden, last, kwargs["position_embeddings"])
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    logits = (query.float() @ keys.float().transpose(2, 3))[:, :, 0] * scaling(block)
    seen = layout.real_rows(hidden.device) & (torch.arange(hidden.shape[1], device=hidden.device) <= last)
    shares = all_heads(logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1), tensor_parallel_group(block))
    weights.append([x[:, here] for x, here in zip(shares, layout.droppable_rows(hidden.device), strict=True)])


def _curve(weights: list[torch.Tensor], image: int, n: int, top: int) -> list[float]:
    """The values of one item, of whose ``image`` tokens all must be there."""
    values = [math.nan] * len(weights)
    for x, (a, b) in enumerate(zip(weights, weights[n:], strict=False)):
        if a.shape[1] == b.shape[1] == image:
            best = a.mean(0).topk(min(top, image)).indices
            values[x] = float(torch.cosine_similarity(a[:, best], b[:, best], dim=0).mean())
    return values
