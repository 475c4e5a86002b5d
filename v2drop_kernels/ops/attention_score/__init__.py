"""Attention scores: the attention of one or several queries to cached keys, without computing the [S, S] matrix."""

from __future__ import annotations

from typing import Any

import torch

from ...backends.choice import resolve_backend
from ...backends.requests import AttentionRequest
from ...core import arguments
from ..autograd import differentiable
from ..precision import full_precision
from . import reference
from .checks import head_reduction, query_and_keys
from .gradient import attention_score_backward
from .queries import last_rows
from .torch_op import OP

MODES = ("softmax", "dot")
QUERIES = ("mean", "l2")
FLOAT32_MAX = 3.4028234663852886e38


def attention_score(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    query_rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    droppable: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    mode: str = "softmax",
    heads: str | int = "mean",
    queries: str = "mean",
    layout: str = "BHSD",
    backend: str | None = None,
) -> torch.Tensor:
    """Score keys by the attention that the given queries pay to them.

    Parameters
    ----------
    q : Tensor
        ``[B, H, Q, Dh]`` queries after RoPE; float32, float16 or bfloat16 (float64 on the reference backend).
    k : Tensor
        ``[B, Hkv, S, Dh]`` keys after RoPE, as the KV cache holds them, in the dtype of ``q``. ``H`` is a multiple of ``Hkv``:
        query head ``h`` reads key head ``h // (H / Hkv)``, and no key is repeated. Any strides; a last dimension whose stride is
        not 1 costs one contiguous copy.
    query_rows : Tensor, optional
        int64 ``[B, Q]``: which row of ``k`` each query is, negative where an item has no such query, so that items may have
        different numbers of queries. Default: the last ``Q`` rows.
    key_mask : Tensor, optional
        bool ``[B, S]``, False where a key is padding.
    droppable : Tensor, optional
        bool ``[B, S]``: the rows that get a score; the others hold 0, but take their share of the softmax. Default: all.
    causal : bool
        A query at row ``r`` sees the keys up to and with row ``r``; otherwise it sees all.
    scale : float, optional
        Of the logits. Default ``Dh ** -0.5``.
    mode : {"softmax", "dot"}
        The softmax over all keys that the query sees, in float32, or the scaled logit itself.
    heads : {"mean", "sum", "max"} or int
        Reduction over the heads of a query. An int ``h``: the mean over the ``h`` heads that give most to the droppable rows
        (equal totals, as all are where every visible row is droppable: the lower head).
    queries : {"mean", "l2"}
        Reduction over the queries of an item: their mean, or their 2-norm ``sqrt(sum s^2)``.
    layout : {"BHSD", "BSHD"}
        Of both ``q`` and ``k``; ``"BSHD"`` is ``[B, Q, H, Dh]`` and ``[B, S, Hkv, Dh]``.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Tensor
        float32 ``[B, S]``. A key that no query sees scores 0, and so do all keys of an item without a query.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that do not fit; an unknown word; more queries than rows when ``query_rows`` is not given.

    Notes
    -----
    One read of ``k`` whatever the number of heads that share it; the queries are processed in chunks, so that scratch memory is at
    most 64 MB, or the logits of one query. Accumulates in float32, in an order that depends on the backend and on ``S``, never on
    the batch or the thread count. Differentiable in ``q`` and ``k``: the backward is plain PyTorch, recomputes the logits and
    treats the choice of heads as constant. Equivalent plain torch for one query, the last row::

        k = k.repeat_interleave(H // Hkv, 1)
        (q @ k.transpose(2, 3) * Dh**-0.5).float().softmax(-1).mean(1)[:, 0]

    Source: HiDivDrop, section 3.3 and appendix F.3 (the last text token, one or n rounds, all text tokens, L2 norm); FastV (mean
    over heads); SparseVLM (raters, top heads); cross-modal pruning, appendix C (dot products).

    Not for models that run FlashAttention throughout, where one more projection would cost too much: :func:`variation_score` needs
    no queries or keys.

    Examples
    --------
    >>> q, k = torch.zeros(1, 4, 1, 8), torch.ones(1, 2, 5, 8)
    >>> attention_score(q, k, droppable=torch.tensor([[False, True, True, False, False]]))
    tensor([[0.0000, 0.2000, 0.2000, 0.0000, 0.0000]])
    """
    q, k = query_and_keys(q, k, layout)
    batch, n, s = q.shape[0], q.shape[2], k.shape[2]
    for word, value, allowed in (("mode", mode, MODES), ("queries", queries, QUERIES)):
        arguments.one_of(word, value, allowed)
    head_reduction(heads, q.shape[1])
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {arguments.shown(causal)}")
    for name, mask in (("key_mask", key_mask), ("droppable", droppable)):
        if mask is not None:
            arguments.table(name, mask, (batch, s), torch.bool, k)
    if query_rows is not None:
        arguments.table("query_rows", query_rows, (batch, n), torch.int64, k)
    elif causal and n > s:
        raise ValueError(f"q must have at most as many queries as k has rows ({s}) unless query_rows is given, got {n}")
    else:
        query_rows = last_rows(q, k, causal)
    if scale is None:
        scale = q.shape[3] ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= FLOAT32_MAX:
        raise TypeError(f"scale must be a float within float32, got {arguments.shown(scale)}")
    runner = resolve_backend(OP, k, backend)
    if not runner.traced:
        q, k, query_rows = (arguments.settled(x) for x in (q, k, query_rows))
    request = AttentionRequest(q, k, query_rows, key_mask, droppable, causal, float(scale), mode, heads, queries)
    if 0 in (batch, n, s):  # the kernels expect at least one of each
        return reference.run(request)
    return differentiable(OP, runner, request, lambda _, grad, *fields: attention_score_backward(grad, *fields))


def cls_attention_score(
    q: torch.Tensor, k: torch.Tensor, *, form: str = "mean", scale: float | None = None, backend: str | None = None
) -> torch.Tensor:
    """Score the patches of a vision tower by the attention of its [CLS] token.

    Parameters
    ----------
    q : Tensor
        ``[B, H, 1, Dh]``, the query of [CLS].
    k : Tensor
        ``[B, H, 1 + P, Dh]``, all keys; row 0 is the key of [CLS] itself, which takes part in the softmax.
    form : {"mean", "sum", "single-head"}
        The mean over heads (FasterVLM), their sum (VisionZip, HiRED), or one softmax over the concatenated heads, at scale
        ``(H Dh) ** -0.5`` (LLaVA-PruMerge).
    scale : float, optional
        Of the logits, in place of the form's own.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Tensor
        float32 ``[B, P]``.

    Raises
    ------
    ValueError, TypeError
        As :func:`attention_score`; more than one query; no key of [CLS].

    Notes
    -----
    Differentiable as :func:`attention_score`. Keys that are a view of ``[B, 1 + P, H Dh]`` are not copied. Equivalent plain torch
    for ``"mean"``: ``(q @ k.transpose(2, 3) * Dh**-0.5).softmax(-1).mean(1)[:, 0, 1:]``.

    Source: FasterVLM and VisionZip (the second last layer of CLIP), HiRED (the first and a late one), LLaVA-PruMerge (section 3.2).

    Not for towers without [CLS] (SigLIP, Qwen's).

    Examples
    --------
    >>> cls_attention_score(torch.zeros(1, 2, 1, 4), torch.ones(1, 2, 5, 4))
    tensor([[0.2000, 0.2000, 0.2000, 0.2000]])
    """
    arguments.one_of("form", form, ("mean", "sum", "single-head"))
    q, k = query_and_keys(q, k, "BHSD")
    if q.shape[2] != 1:
        raise ValueError(f"q must hold the one query of [CLS], got {q.shape[2]} queries")
    if k.shape[2] < 1:
        raise ValueError("k must have the key of [CLS] in row 0, got no rows")
    if form == "single-head":
        if k.shape[1] != q.shape[1]:
            raise ValueError(f"k must have the {q.shape[1]} heads of q for form='single-head', got {k.shape[1]}")
        q, k = (x.transpose(1, 2).flatten(2)[:, None] for x in (q, k))
    heads = "sum" if form == "sum" else "mean"
    return attention_score(q, k, causal=False, scale=scale, heads=heads, backend=backend)[:, 1:]


@full_precision
def text_raters(vision_rows: torch.Tensor, text_rows: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Choose SparseVLM's text raters: the text tokens whose similarity to the vision tokens is above average.

    Parameters
    ----------
    vision_rows, text_rows : Tensor
        Rows of ``embeds``: int64 ``[B, V]`` and ``[B, T]``, negative where an item has fewer, or bool ``[B, N]``.
    embeds : Tensor
        ``[B, N, D]`` input embeddings of the language model.

    Returns
    -------
    Tensor
        int64 ``[B, T]`` (``[B, N]`` for a bool ``text_rows``): the row of every rater in its place, -1 elsewhere; the
        ``query_rows`` of :func:`attention_score`.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that do not fit.

    Notes
    -----
    Each vision token has a weight for every text token of its item, ``softmax(v . t)``. A text token is a rater when its mean
    weight over the vision tokens exceeds the average of these means over the text tokens. An item with fewer than two text tokens,
    or with no vision token, has no rater. Computed in float32; no gradient. Equivalent plain torch for one item:
    ``r = (v @ t.T).softmax(-1).mean(0); r > r.mean()``.

    Source: SparseVLM, section 3.2 (the released code takes them once, from the input embeddings).

    Examples
    --------
    >>> embeds = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])
    >>> text_raters(torch.tensor([[0]]), torch.tensor([[1, 2]]), embeds)
    tensor([[-1,  2]])
    """
    arguments.hidden("embeds", embeds, False)
    vision_rows, text_rows = (_rows(name, x, embeds) for name, x in (("vision_rows", vision_rows), ("text_rows", text_rows)))
    with torch.no_grad():
        items = torch.arange(embeds.shape[0], device=embeds.device)[:, None]
        vision, text = (embeds[items, rows.clamp(min=0)].float() for rows in (vision_rows, text_rows))
        there = text_rows >= 0
        drawn = (vision @ text.transpose(1, 2)).masked_fill(~there[:, None], -torch.inf).softmax(-1)  # [B, V, T]
        drawn = drawn.masked_fill(~(there[:, None] & (vision_rows >= 0)[..., None]), 0).sum(1)
        # Against the sum, so that neither mean needs a count of 0 kept apart; with no vision token all are 0.
        rates = there & (drawn * there.sum(1, keepdim=True) > drawn.sum(1, keepdim=True))
        return torch.where(rates, text_rows, -1)


def text_rater_score(q: torch.Tensor, k: torch.Tensor, raters: torch.Tensor, **options: Any) -> torch.Tensor:
    """Score keys by the attention of the text raters, the mean over heads and raters.

    Parameters
    ----------
    q : Tensor
        ``[B, H, T, Dh]`` queries of the rows that ``raters`` names; where it names none, any values.
    k : Tensor
        ``[B, Hkv, S, Dh]`` keys.
    raters : Tensor
        int64 ``[B, T]``, from :func:`text_raters`: rows of ``k``, or -1.
    **options
        Those of :func:`attention_score`: ``key_mask``, ``droppable``, ``heads`` (14 in SparseVLM's second version), ...

    Returns
    -------
    Tensor
        float32 ``[B, S]``.

    Raises
    ------
    ValueError, TypeError
        As :func:`attention_score`.

    Notes
    -----
    This is ``attention_score(q, k, query_rows=raters, **options)``: the raters of an item are its queries.

    Source: SparseVLM, section 3.2.

    Examples
    --------
    >>> text_rater_score(torch.zeros(1, 2, 2, 4), torch.ones(1, 2, 4, 4), torch.tensor([[-1, 3]]))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return attention_score(q, k, query_rows=raters, **options)


def cross_modal_score(
    text: torch.Tensor, cls: torch.Tensor, alignment: float | torch.Tensor, scale: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """Mix the text's attention, weighted by how well text and image agree, with the attention of the tower's [CLS].

    Parameters
    ----------
    text : Tensor
        ``[B, N]`` attention of the text to the vision tokens.
    cls : Tensor
        ``[B, N]`` attention of [CLS] to them.
    alignment : float or Tensor
        I(V, T): one number, or ``[B]``. The paper leaves its formula open.
    scale : float or Tensor
        The paper's lambda: one number, or ``[B]``.

    Returns
    -------
    Tensor
        float32 ``[B, N]``: ``scale * alignment * text + cls``.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that do not fit.

    Notes
    -----
    Differentiable in all four. Source: cross-modal weighted pruning, appendix D, equation 1.

    Examples
    --------
    >>> cross_modal_score(torch.tensor([[0.5, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5, scale=2.0)
    tensor([[0.5000, 1.0000]])
    """
    for name, x in (("text", text), ("cls", cls)):
        arguments.tensor(name, x)
        if x.dim() != 2:
            raise ValueError(f"{name} must be [B, N], got shape {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if cls.shape != text.shape:
        raise ValueError(f"cls must have the shape of text {list(text.shape)}, got {list(cls.shape)}")
    arguments.same_device("cls", cls, text.device, "text")
    weights = []
    for name, weight in (("alignment", alignment), ("scale", scale)):
        if isinstance(weight, torch.Tensor):
            if weight.shape not in ((), text.shape[:1]):
                raise ValueError(f"{name} must be one number or [B] = [{text.shape[0]}], got shape {list(weight.shape)}")
            arguments.same_device(name, weight, text.device, "text")
            weight = weight.float().unsqueeze(-1)
        elif not isinstance(weight, int | float):
            raise TypeError(f"{name} must be a number or a tensor, got {type(weight).__name__}")
        weights.append(weight)
    return weights[1] * weights[0] * text.float() + cls.float()


def _rows(name: str, x: Any, embeds: torch.Tensor) -> torch.Tensor:
    """Row numbers, -1 for none, of a table of them or of a mask."""
    arguments.tensor(name, x)
    if x.dim() != 2 or x.shape[0] != embeds.shape[0] or (x.dtype == torch.bool and x.shape[1] != embeds.shape[1]):
        raise ValueError(f"{name} must be int64 [B, ...] or bool [B, N], [B, N] = {list(embeds.shape[:2])}, got {list(x.shape)}")
    if x.dtype not in (torch.bool, torch.int64):
        raise TypeError(f"{name} must be int64 or bool, got {x.dtype}")
    arguments.same_device(name, x, embeds.device, "embeds")
    return torch.where(x, torch.arange(x.shape[1], device=x.device), -1) if x.dtype == torch.bool else x
