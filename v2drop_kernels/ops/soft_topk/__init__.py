"""soft_topk: HiDivDrop's differentiable top-k (section 3.2, DTop-K) with a gradient to the scores and to the ratio.

On the CPU one call of the compiled library each way. Elsewhere torch's sort and a few operations around it: apart from the sort
there is little work that a kernel could save, and a kernel that counts comparisons instead would take O(n^2).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ...backends.choice import is_traced, resolve_name, transformed
from ...core import arguments
from ..autograd import by_formula, each
from .reference import soft_topk as _forward
from .reference import soft_topk_backward as _backward

TIES = ("index", "released")


def soft_topk(
    scores: torch.Tensor,
    ratio: float | torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    temperature: float | None = None,
    ties: str = "index",
    hard: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """Keep the highest scores by a mask that multiplies the features, so that scores and ratio can be learnt.

    Parameters
    ----------
    scores : Tensor
        ``[B, N]``; float32, float16, bfloat16 or float64.
    ratio : float or Tensor
        The share ``a`` that is dropped, in [0, 1]; a tensor ``[]`` or ``[B]`` may require a gradient, and NaN in it gives NaN.
    valid : Tensor, optional
        bool ``[B, N]``: the tokens that compete; the mask of the others is 0. Default: all.
    temperature : float, optional
        Sharpness of the soft mask, finite and greater than 0. Default: ``n``, the number of valid tokens, as published.
    ties : {"index", "released"}
        ``"index"``: equal scores rank by index, the lower one higher, and exactly ``round((1 - a) n)`` tokens are kept (half to
        even; clamped to [0, n]). ``"released"``: as in the released code, equal scores share the highest of their ranks
        and tokens with ``c' > a`` are kept, compared in float32: more or fewer where scores tie at the cut.
    hard : bool
        Return 0 and 1, or, if False, the soft mask itself.
    backend : str, optional
        Checked as everywhere; ``"cpu"`` has a kernel, the others run plain PyTorch.

    Returns
    -------
    Tensor
        ``[B, N]`` float32 (float64 for float64 scores).

    Raises
    ------
    ValueError, TypeError
        Shapes or dtypes that do not fit together; a float ``ratio`` outside [0, 1]; a ``temperature`` that is not positive.

    Notes
    -----
    **Values.** ``c'_i = 1/n #{j : c_i >= c_j}`` is the normalised rank of score ``c_i`` (NaN ranks first), and
    ``m_i = sigmoid(temperature * (c'_i - a))`` the soft mask. The hard mask is its straight-through form: forward 0 or 1, backward
    the derivative of ``m``.

    **Gradient to the ratio.** Exact for the soft mask: ``dm_i/da = -temperature * m_i * (1 - m_i)``.

    **Gradient to the scores: nearest-neighbour density.** ``c'_i = F(c_i)`` with ``F`` the empirical distribution function of the
    scores, a step function, whose derivative is 0 or undefined. The gradient uses instead the slope of the chord over the next
    ``w = ceil(sqrt(n) / 2)`` scores on either side: in sorted order these ``w_i`` neighbours (``2 w``, fewer at the ends) span
    ``gap_i``, so ``p_i = dc'_i/dc_i = w_i / (n gap_i)``, the nearest-neighbour estimate of the density at ``c_i`` (Loftsgaarden
    and Quesenberry, 1965; consistent, since ``w`` grows and ``w / n`` falls). ``dc'_i/dc_j = -p_i / w_i`` for each of these
    neighbours, because a growing ``c_i`` passes them. Ranks do not change when the same number is added to all scores; accordingly
    the gradients of an item sum to 0. Scores ``s`` times as large get gradients ``1 / s`` times as large. The density is capped at
    16 times that of an even spread of the middle half of the scores (of all, where that half is tied), so ties leave the gradient
    bounded; where all scores are equal, or the neighbours reach an infinity or a NaN, it is 0.

    O(n log n), and O(n) memory forward and backward; no host synchronisation. Differentiable once. Deterministic, but for the
    last bits of the scores' gradient on a GPU, where torch's ``cumsum`` (float64 here) has no fixed order.
    Equivalent plain torch of the soft mask: ``torch.sigmoid(t * ((c[:, None] >= c[None]).float().mean(1) - a))``.

    Source: HiDivDrop, section 3.2 (DTop-K; after Liu et al., ICML 2024). The released code detaches the scores, keeps ``a``
    constant and uses indices only: nothing is learnt through it.

    Not for inference: :func:`v2drop_kernels.segmented_topk` keeps the same tokens and returns indices.

    Examples
    --------
    >>> a = torch.tensor(0.5, requires_grad=True)
    >>> mask = soft_topk(torch.tensor([[0.1, 0.9, 0.4, 0.9]]), a)
    >>> mask
    tensor([[0., 1., 0., 1.]], grad_fn=<_SoftTopKBackward>)
    >>> mask.sum().backward()
    >>> a.grad < 0
    tensor(True)
    """
    _check(scores, ratio, valid, temperature, ties)
    temperature = None if temperature is None else float(temperature)
    name = resolve_name(scores, backend, torch.float32)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if scores.shape[1] == 0:
        return scores.to(wide)
    if isinstance(ratio, torch.Tensor) and ratio.is_cpu and not scores.is_cpu:
        # One number in host memory: an argument of the kernel that adds it, where .to() would copy.
        ratio = torch.zeros((1, 1), dtype=wide, device=scores.device) + ratio
    elif isinstance(ratio, torch.Tensor):
        ratio = ratio.to(scores.device, wide).reshape(-1, 1)
    else:
        ratio = torch.full((1, 1), ratio, dtype=wide, device=scores.device)
    by_library = name == "cpu" and wide == torch.float32 and not is_traced(scores) and not transformed()
    if by_library:
        scores, valid = arguments.settled(scores), None if valid is None else arguments.settled(valid)
    if transformed() or (torch.is_grad_enabled() and (scores.requires_grad or ratio.requires_grad)):
        function = _Traced if torch.compiler.is_compiling() else _SoftTopK
        return function.apply(scores, ratio, valid, temperature, ties, hard, by_library)[0]
    if by_library:
        return _library().soft_topk(scores, ratio, valid, temperature, ties, hard)
    return _forward(scores, ratio, valid, temperature, ties, hard)[0]


def _library() -> Any:
    """The functions of native.py; imported when the first call needs them."""
    return importlib.import_module(".native", __package__)


def _check(scores: Any, ratio: Any, valid: Any, temperature: Any, ties: Any) -> None:
    """Raise unless the arguments fit together."""
    arguments.tensor("scores", scores)
    arguments.dtype_in("scores", scores, arguments.HIDDEN_DTYPES)
    if scores.dim() != 2:
        raise ValueError(f"scores must be [B, N], got shape {list(scores.shape)}")
    if isinstance(ratio, torch.Tensor):
        if not ratio.is_floating_point():
            raise TypeError(f"ratio must be floating point, got {ratio.dtype}")
        if ratio.dim() > 1 or (ratio.dim() == 1 and ratio.shape != scores.shape[:1]):
            raise ValueError(f"ratio must be a scalar or [B] = [{scores.shape[0]}], got shape {list(ratio.shape)}")
        if ratio.dim():
            arguments.same_device("ratio", ratio, scores.device, "scores")
    elif not isinstance(ratio, int | float):
        raise TypeError(f"ratio must be a float or a tensor, got {type(ratio).__name__}")
    elif not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    if valid is not None:
        arguments.tensor("valid", valid)
        if valid.dtype != torch.bool:
            raise TypeError(f"valid must be bool, got {valid.dtype}")
        if valid.shape != scores.shape:
            raise ValueError(f"valid must have the shape of scores {list(scores.shape)}, got {list(valid.shape)}")
        arguments.same_device("valid", valid, scores.device, "scores")
    if temperature is not None:
        arguments.positive_number("temperature", temperature)
    arguments.one_of("ties", ties, TIES)


class _Traced(torch.autograd.Function):
    """The mask with its gradients; the slope and the order come along for them, and are no results.

    torch.compile uses this class, because it traces no function that has a ``jvp``.
    """

    @staticmethod
    def forward(
        scores: torch.Tensor, ratio: torch.Tensor, valid: torch.Tensor | None, temperature: float | None, ties: str, hard: bool,
        by_library: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        if by_library:
            return _library().with_slope(scores, ratio, valid, temperature, ties, hard)
        return _forward(scores, ratio, valid, temperature, ties, hard)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        scores, ratio, valid = inputs[:3]
        ctx.by_library = inputs[6]
        _, slope, order = output
        ctx.mark_non_differentiable(slope, order)
        ctx.save_for_backward(scores, slope, order, valid)
        ctx.shared = ratio.shape[0] != scores.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        scores, slope, order, valid = ctx.saved_tensors
        with torch.no_grad():
            d_scores = d_ratio = None
            if ctx.needs_input_grad[0]:
                find = _library().backward if ctx.by_library and not by_formula(grad) else _backward
                d_scores = find(grad, slope, scores, order, valid).to(scores.dtype)
            if ctx.needs_input_grad[1]:
                d_ratio = -(grad * slope).sum(1, keepdim=True)
                d_ratio = d_ratio.sum(0, keepdim=True) if ctx.shared else d_ratio
        if torch.is_grad_enabled():
            d_scores, d_ratio = (None if d is None else _Once.apply(d, grad, scores, slope) for d in (d_scores, d_ratio))
        return d_scores, d_ratio, None, None, None, None, None


class _SoftTopK(_Traced):
    """The same with forward-mode derivatives and ``vmap``, for eager calls."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _Traced.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], output[1], output[2], inputs[2])

    @staticmethod
    def jvp(ctx: Any, scores_tangent: Any, ratio_tangent: Any, *_: Any) -> tuple[Any, ...]:
        scores, slope, order, valid = ctx.saved_tensors
        tangent = torch.zeros_like(slope)
        if scores_tangent is not None:  # the gradient is linear in the incoming one: this is its transpose
            pulled: Any = torch.func.vjp(lambda grad: _backward(grad, slope, scores, order, valid), torch.zeros_like(slope))
            tangent = tangent + pulled[1](scores_tangent.to(slope.dtype))[0]
        if ratio_tangent is not None:
            tangent = tangent - slope * ratio_tangent
        return tangent, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return each(_SoftTopK, info, in_dims, args)


class _Once(torch.autograd.Function):
    """A gradient that has none itself: asking for it raises, so that no term of a loss is lost."""

    @staticmethod
    def forward(gradient: torch.Tensor, *of: torch.Tensor) -> torch.Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            "soft_topk is differentiable once, for its gradient to the scores is an estimate: detach() it where it is used again"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return each(_Once, info, in_dims, args)
