"""TwigVLM: a small trained decoder ("twig") ranks the tokens behind block K; all of them are dropped before block T.

Here the twig's scores come from the caller, ``TokenDropper("twigvlm-192", scores=callable)``: ``callable(context)`` takes the
:class:`~v2drop_kernels.models.DropContext` before block K, whose ``hidden`` is the input of the twig's blocks, and returns
float ``[B, N]`` (published: attention of the last token in the twig's last block, mean over heads). The ``k`` highest stay before
block K, none before block T. With an average of ``R`` tokens over ``L`` blocks ``k = ceil((L R - K n) / (T - K))``: 227 for 192.
Source: TwigVLM (ICCV 2025); K = 2, T = 24, both 0-based "before block". Twig training and its speculative decoding
are not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch

from ...core.schedule import Schedule, Stage
from ..context import DropContext
from ..policy import Method, Policy


def twig_schedule(average: float, n: int = 576, depth: int = 32, *, twig: int = 2, wipe: int = 24, name: str = "") -> Schedule:
    """The schedule with ``average`` of ``n`` vision tokens per block: all before ``twig``, none from ``wipe`` on.

    Parameters
    ----------
    average : float
        Vision tokens that enter a block, averaged over all ``depth`` blocks; the count is rounded up, so this much or a bit more.
    n, depth : int
        Vision tokens at first; blocks of the model.
    twig, wipe : int
        Rank before block ``twig`` (K), drop the rest before block ``wipe`` (T).

    Raises
    ------
    ValueError
        ``twig < wipe < depth`` does not hold, or no count from 0 to ``n`` gives the average.

    Examples
    --------
    >>> twig_schedule(192).counts(576)
    (227, 0)
    """
    if not 0 < twig < wipe < depth:
        raise ValueError(f"twig, wipe and depth must satisfy 0 < twig < wipe < depth, got {twig}, {wipe} and {depth}")
    k = ceil((depth * Fraction(str(average)) - twig * n) / (wipe - twig))
    if not 0 <= k <= n:
        low, high = twig * n / depth, wipe * n / depth
        raise ValueError(f"average must lie between {low:g} and {high:g} with twig {twig} and wipe {wipe}, got {average}")
    source = f"TwigVLM (LLaVA-1.5-7B): k = ceil(({depth} R - {twig} n) / {wipe - twig}) before block {twig}, none before {wipe}"
    return Schedule((Stage(twig, k, policy="twigvlm"), Stage(wipe, 0, policy="twigvlm")), name, source)


@dataclass(frozen=True)
class TwigVLM(Policy):
    """No options; ``TokenDropper(scores=)`` is the twig."""

    method = Method(
        paper="TwigVLM, ICCV 2025",
        where="decoder",
        score="given: last token's attention in a trained twig",
        needs_weights=True,
        deviations="the trained twig is not included; the caller gives its scores",
        presets=tuple(twig_schedule(average, name=f"twigvlm-{average}") for average in (192, 128, 64)),
    )

    def score(self, context: DropContext) -> torch.Tensor:
        return context.given_scores()
