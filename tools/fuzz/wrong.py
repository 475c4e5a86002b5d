"""Properties of errors: one argument of a valid call is replaced by nonsense."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import v2drop_kernels as vk

NONSENSE: tuple[Any, ...] = (
    None, True, -1, -(2**70), 2**70, 0.5, float("nan"), float("inf"), "l3", "", b"x", [], [[]], [-1], [0.5], [None], {}, {"a": 1},
    (3, 1), (-2, 2), (0, 10**9), ((0, 1), (0, 1), (0, 1), (0, 1), (0, 1)), object(), Fraction(1, 3), 1j, np.zeros(3), np.int64(2),
    torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(1, 1, 1, 1, 1),
    torch.full((2, 6), -5), torch.full((2, 6), 2**40), torch.zeros(2, 6, 4, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.bool),
    torch.zeros(2, 6, 4, dtype=torch.complex64), torch.zeros(2, 6, 4, device="meta"), torch.zeros(2, 6, 4).to_sparse(),
    torch.zeros(2, 6, dtype=torch.float8_e4m3fn), torch.tensor([0, 5, 3, 12]), torch.tensor([0, 12], dtype=torch.int32),
    torch.zeros(2, 6, requires_grad=True), lambda: 1, torch.float32,
)  # fmt: skip

H = torch.arange(48.0).view(2, 6, 4)
SCORES = torch.arange(12.0).view(2, 6)
Q = torch.ones(2, 2, 1, 4)
PACKED = {"cu_seqlens": [0, 5, 12]}
CALLS: tuple[tuple[Callable[..., Any], dict[str, Any]], ...] = (
    (vk.variation_score, {"h_prev": H, "h_cur": H + 1, "metric": "l2", "cu_seqlens": None, "score_dtype": None}),
    (vk.segmented_topk, {"scores": SCORES, "k": 2, "droppable": (1, 4), "order": "score", "cu_seqlens": None}),
    (vk.segmented_topk, {"scores": SCORES.view(-1), "k": [1, 2], "droppable": None, **PACKED}),
    (vk.variation_topk, {"h_prev": H, "h_cur": H + 1, "k": 2, "metric": "l1", "droppable": [[(0, 2)], [(1, 3)]], "order": "score"}),
    (vk.drop_tokens, {
        "h_prev": H, "h_cur": H + 1, "k": 2, "droppable": (1, 4), "scores": None, "position_ids": torch.arange(12).view(2, 6),
        "kv": (torch.ones(2, 1, 6, 3),), "kv_layout": "BHSD", "attention_mask": torch.ones(2, 6),
        "rope": (torch.ones(6, 2), torch.ones(6, 2)), "labels": torch.zeros(2, 6, dtype=torch.int64), "positions": "persistent",
        "metric": "cosine", "score_dtype": None, "out": None,
    }),
    (vk.drop_tokens, {"h_prev": H.view(12, 4), "h_cur": H.view(12, 4) + 1, "k": 2, "droppable": None, **PACKED}),
    (vk.compact, {
        "keep": torch.tensor([[0, 2], [1, 3]]), "hidden": H, "positions": "compacted", "droppable": None, "k": None, "out": None,
    }),
    (vk.compact_, {"keep": torch.tensor([[0, 2], [1, 3]]), "kv": [torch.ones(2, 1, 6, 3)], "kv_layout": "BHSD", "rows": 6}),
    (vk.attention_score, {
        "q": Q, "k": torch.ones(2, 1, 6, 4), "query_rows": None, "key_mask": torch.ones(2, 6, dtype=torch.bool), "droppable": None,
        "causal": True, "scale": 1.0, "mode": "softmax", "heads": 1, "queries": "mean", "layout": "BHSD",
    }),
    (vk.cls_attention_score, {"q": Q, "k": torch.ones(2, 2, 6, 4), "form": "sum", "scale": None}),
    (vk.key_norm_score, {"k": torch.ones(2, 1, 6, 4), "norm": "l1", "layout": "BHSD"}),
    (vk.cosine_to_pivots, {"x": H, "pivots": torch.zeros(2, 1, dtype=torch.int64)}),
    (vk.frame_similarity, {"x": H, "pairs": "dycoke"}),
    (vk.soft_topk, {"scores": SCORES, "ratio": 0.5, "valid": None, "temperature": None, "ties": "index"}),
    (vk.weighted_merge, {
        "x": H, "offsets": torch.tensor([[0, 1], [0, 2]]), "rows": torch.zeros(2, 2, dtype=torch.int64),
        "weights": torch.ones(2, 2),
    }),
    (vk.bipartite_merge, {"x": H, "r": 1, "size": None, "protected": 1, "order": "position"}),
    (vk.random_score, {"like": (2, 3), "seed": 0, "item_seeds": None}),
    (vk.n_keep, {"n": 10, "ratio": 0.5, "rounding": "floor", "at_least": 0}),
    (vk.TokenLayout.padded, {"spans": (1, 3), "seq_len": 6, "batch": 2, "lengths": None, "padding_side": "left"}),
    (vk.TokenLayout.packed, {"spans": [(1, 3), (0, 2)], "cu_seqlens": [0, 5, 12]}),
    (vk.TokenLayout.from_mask, {"mask": torch.ones(2, 6, dtype=torch.bool), "counts": [6, 6], "lengths": None}),
)  # fmt: skip


def one_wrong_argument(backend: str, data: Any) -> None:
    """ValueError or TypeError that names an argument of the call, or a result where the value happens to be allowed."""
    function, arguments = data.draw(st.sampled_from(CALLS), label="call")
    name = data.draw(st.sampled_from(sorted(arguments)), label="argument")
    value = data.draw(st.sampled_from(NONSENSE), label="value")
    given = {**copy.deepcopy(arguments), name: value}
    if function is vk.bipartite_merge:
        given = {"metric": torch.ones(2, 6, 3), **given}
    if function.__name__ in ("drop_tokens", "segmented_topk", "compact", "attention_score", "weighted_merge", "variation_score"):
        given["backend"] = backend
    try:
        function(**given)
    except (ValueError, TypeError) as error:
        text = str(error)
        named = any(word in text for word in (*given, "backend", "span"))
        assert named, f"{function.__name__}({name}={value!r}) raised a sentence that names no argument: {text!r}"
        assert "\n" not in text.strip(), f"{function.__name__}({name}={value!r}) raised more than a sentence: {text!r}"


ALL = (one_wrong_argument,)
