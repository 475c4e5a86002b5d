"""Schedules from budgets: the shares that reach a wanted average, and pyramids of counts. Host numbers only, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .arguments import require_int
from .schedule import Schedule, Stage, positive

MOST_DECIMALS = 12  # of a share that `solve` returns


def solve(
    *, average: float, layers: Sequence[int], n: int, depth: int, last: float | None = None, name: str = "", **stage: Any
) -> Schedule:
    """The schedule that drops before ``layers`` and has a wanted average number of tokens.

    There is one equation, so there is one unknown: every stage keeps the same share of the tokens that are still present.
    ``last`` fixes the share of the last stage instead (0.0 is V2Drop's early exit). Among the shares that come within half a
    token of the average, the one with the fewest decimals is returned. If no such share exists, which requires several stages
    that keep nearly everything, the shares of the stages differ in the twelfth decimal.

    Parameters
    ----------
    average : float
        Droppable tokens that enter a block, averaged over all ``depth`` blocks.
    layers : sequence of int
        Drop before these 0-based blocks.
    n : int
        Droppable tokens before the first drop.
    depth : int
        Number of decoder blocks of the model.
    last : float, optional
        Share that the last stage keeps.
    name : str
        Name of the schedule.
    **stage
        Further fields of every :class:`Stage`, such as ``policy="random"``.

    Returns
    -------
    Schedule

    Raises
    ------
    ValueError
        No share reaches ``average``; the message gives the reachable range.
    TypeError
        ``average`` is not a number.

    Examples
    --------
    >>> found = solve(average=131, layers=(3, 17, 22), n=576, depth=32, last=0.0)
    >>> found.stages[0].keep, found.counts(576), found.average_tokens(576, 32)
    (0.28, (161, 45, 0), 131.46875)
    """
    positive("n", n)
    positive("depth", depth)
    if not layers:
        raise ValueError("layers must name at least one layer")
    if isinstance(average, bool) or not isinstance(average, int | float):
        raise TypeError(f"average must be a number, got {average!r}")
    free = len(layers) - (last is not None)
    if not free:
        raise ValueError("last must leave a stage to solve for, but layers has one only")

    def candidate(*shares: float) -> Schedule:
        keeps = [*shares] if last is None else [*shares, last]
        return Schedule(tuple(Stage(x, keep, **stage) for x, keep in zip(layers, keeps, strict=True)), name)

    least, most = (candidate(*[share] * free).average_tokens(n, depth) for share in (0.0, 1.0))
    if not least - 0.5 <= average <= most + 0.5:
        raise ValueError(f"average must lie between {least:g} and {most:g} with drops before layers {list(layers)}, got {average}")
    return _search(candidate, free, average, lambda schedule: schedule.average_tokens(n, depth))


def _search(candidate: Callable[..., Schedule], free: int, average: float, average_of: Callable[[Schedule], float]) -> Schedule:
    """The candidate nearest to ``average``: one share for all ``free`` stages, by bisection with ever more decimals."""
    miss = lambda schedule: abs(average_of(schedule) - average)
    for digits in range(1, MOST_DECIMALS + 1):
        low, high = 0, 10**digits
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if average_of(candidate(*[middle / 10**digits] * free)) <= average else (low, middle)
        below, above = low / 10**digits, high / 10**digits
        best = min(candidate(*[below] * free), candidate(*[above] * free), key=miss)
        if miss(best) <= 0.5:
            return best
    # Just below 1.0 rounding down removes one token in every stage, so several counts change at once. Raising the shares one
    # stage at a time, from the last to the first, changes no count by more than one, nor the average.
    return min((candidate(*[below] * i, *[above] * (free - i)) for i in range(free + 1)), key=miss)


def pyramid(
    start: int, stop: int, p: float, *, layers: Sequence[int], leave: int | None = None, inject: int = 0, **stage: Any
) -> Schedule:
    """A concave pyramid from ``start`` tokens to ``stop``: the first stage drops the most tokens, each later one fewer.

    Stage ``i`` of ``m`` keeps ``round(stop + (start - stop) * (1 - i / m) ** (1 / p))`` tokens: a straight line for ``p = 1``,
    and a steeper start for smaller ``p``.

    Parameters
    ----------
    start, stop : int
        Tokens before the first of ``layers``, and after the last.
    p : float
        Greater than 0; at most 1 for a concave pyramid.
    layers : sequence of int
        Drop before these 0-based blocks.
    leave : int, optional
        Early exit: the remaining tokens are dropped before this 0-based block.
    inject : int
        Late injection, see :class:`Schedule`.
    **stage
        Further fields of every :class:`Stage`, such as ``policy="hidivdrop"``.

    Returns
    -------
    Schedule

    Raises
    ------
    ValueError, TypeError
        An argument outside its range, or not a number.

    Notes
    -----
    Source: HiDivDrop, section 3.2 and figure 3 (a), which draws curves for several p, "where lower p enforces stronger pruning",
    and prints no formula; this formula is ours. The published counts are close to ``p = 0.15`` (85, 7, 1, 1 for 87, 10, 5, 1).

    Examples
    --------
    >>> pyramid(576, 1, 0.5, layers=(10, 14, 16, 18), leave=24, inject=8).counts(576)
    (324, 145, 37, 1, 0)
    """
    require_int("start", start)
    require_int("stop", stop)
    if stop > start:
        raise ValueError(f"stop must lie between 0 and start = {start}, got {stop}")
    if isinstance(p, bool) or not isinstance(p, int | float):
        raise TypeError(f"p must be a number, got {p!r}")
    if not p > 0:
        raise ValueError(f"p must be greater than 0, got {p}")
    if not layers:
        raise ValueError("layers must name at least one layer")
    m = len(layers)
    keeps = [round(stop + (start - stop) * (1 - i / m) ** (1 / p)) for i in range(1, m + 1)]
    exits = [] if leave is None else [Stage(leave, 0, **stage)]
    return Schedule((*(Stage(x, k, **stage) for x, k in zip(layers, keeps, strict=True)), *exits), inject=inject)
