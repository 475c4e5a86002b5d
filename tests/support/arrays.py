"""NumPy arrays beside torch tensors: conversions, comparison, and calls that the array functions must refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import v2drop_kernels as vk
from support.cases import BATCHES

SPANS = [b for b in BATCHES if not isinstance(b.droppable, torch.Tensor) and getattr(b.droppable, "mask", None) is None]


def numpy_dtype(dtype):
    if dtype == torch.bfloat16:
        return np.dtype(pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16)
    # NumPy has no 8-bit floats; a copy must not care.
    return np.dtype(np.uint8) if dtype == torch.float8_e4m3fn else torch.empty(0, dtype=dtype).numpy().dtype


def to_numpy(x):
    """The same memory: strides too."""
    if isinstance(x, list | tuple):
        return type(x)(map(to_numpy, x))
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    return x.detach().view(bits).numpy().view(numpy_dtype(x.dtype))


def same(got, want):
    """Equal in structure, shape, dtype and every byte; ``want`` is made of torch tensors."""
    if isinstance(want, list | tuple):
        assert type(got) is type(want)
        for g, w in zip(got, want, strict=True):
            same(g, w)
    elif isinstance(want, torch.Tensor):
        assert (got.shape, got.dtype) == (tuple(want.shape), numpy_dtype(want.dtype))
        assert got.tobytes() == to_numpy(want.contiguous()).tobytes()
    else:
        assert got == want


H = np.zeros((2, 6, 4), np.float32)
S = np.zeros((2, 6), np.float32)
MASK = np.ones((2, 6), bool)
WRONG = [
    ("variation_score", (H, H[:1]), {}, ValueError, r"h_prev must have the shape of h_cur \[1, 6, 4\], got \[2, 6, 4\]"),
    ("variation_score", (H, H.astype(np.float16)), {}, TypeError, "h_prev must have the dtype of h_cur float16, got float32"),
    ("variation_score", (H.astype("f8"), H), {}, TypeError, "h_prev must be float32, float16 or bfloat16, got float64"),
    ("variation_score", (H, H.astype(">f4")), {}, TypeError, "h_cur must have a plain dtype"),
    ("variation_score", (H, [[1.0]]), {}, TypeError, "h_cur must be an array, got list"),
    ("variation_score", (H, H.astype(object)), {}, TypeError, "h_cur must have a plain dtype"),
    ("variation_score", (H, H), {"metric": "l3"}, ValueError, "metric must be one of 'l2', 'l1', 'cosine', got 'l3'"),
    ("variation_score", (H, H), {"score_dtype": np.int8}, TypeError, "score_dtype must be None, float32"),
    ("variation_score", (H, H), {"threads": -1}, ValueError, "threads must be an int >= 0"),
    ("variation_score", (H, H), {"threads": "all"}, TypeError, "threads must be an int >= 0"),
    ("segmented_topk", (S[0], 2), {}, ValueError, r"scores must be \[B, N\] \(a packed \[T\] needs cu_seqlens\), got shape \[6\]"),
    ("segmented_topk", (S.astype("i4"), 2), {}, TypeError, "scores must be float32"),
    ("segmented_topk", (S, -1), {}, ValueError, "k must be >= 0, got -1"),
    ("segmented_topk", (S, 1.5), {}, TypeError, "k must be ints that are known on the host, got float 1.5"),
    ("segmented_topk", (S, True), {}, TypeError, "k must be an int"),
    ("segmented_topk", (S, [1, 2, 3]), {}, ValueError, r"k must have one int per segment \(2\), got 3"),
    ("segmented_topk", (S, 2), {"order": "up"}, ValueError, "order must be one of"),
    ("segmented_topk", (S, 2), {"droppable": (4, 2)}, ValueError, r"droppable span \(4, 2\) of item 0 is reversed"),
    ("segmented_topk", (S, 2), {"droppable": MASK}, TypeError, "droppable must be spans or a TokenLayout here, got a mask"),
    ("segmented_topk", (S, 2), {"droppable": "all"}, TypeError, "droppable must be ints that are known on the host"),
    (
        "segmented_topk", (S, 2), {"droppable": vk.TokenLayout.from_mask(torch.from_numpy(MASK))}, TypeError,
        "droppable must be spans or a TokenLayout of spans here",
    ),
    ("segmented_topk", (S[0], 2), {"cu_seqlens": [0, 5]}, ValueError, "cu_seqlens must end at T = 6, got 5"),
    ("segmented_topk", (S[0], 2), {"cu_seqlens": 6}, TypeError, "cu_seqlens must be a list"),
    ("variation_topk", (H, H[0], 2), {}, ValueError, r"h_cur must be \[B, N, D\] \(a packed"),
    ("variation_topk", (None, H, 2), {}, TypeError, "h_prev must be an array, got NoneType"),
    ("compact", (S, H), {}, TypeError, r"keep must be integers \(or a TopK\), got float32"),
    ("compact", (S[:1].astype(int), H), {}, ValueError, r"keep must be \[2, S\], got shape \[1, 6\]"),
    ("compact", (np.full((2, 1), 6), H), {}, ValueError, "keep"),
    ("compact", (S.astype(int), H[0, 0]), {}, ValueError, r"hidden must be \[B, N, \.\.\.\], got shape \[4\]"),
    ("drop_tokens", (H, H, 2), {"scores": S[:, :1]}, ValueError, "scores must have one value per row of h_cur"),
    ("drop_tokens", (H, H, 2), {"kv": H}, ValueError, r"kv must be \[B, H, N, D\] with B = 2, N = 6 to agree with h_cur"),
    ("drop_tokens", (H, H, 2), {"kv": [S, "k"]}, (TypeError, ValueError), "kv must be"),
    ("drop_tokens", (H, H, 2), {"kv_layout": "SBHD"}, ValueError, "kv_layout must be one of 'BHSD', 'BSHD'"),
    ("drop_tokens", (H, H, 2), {"position_ids": S[:, :3]}, ValueError, r"position_ids must be \[B, N\] or \[P, B, N\] with"),
    ("drop_tokens", (H, H, 2), {"position_ids": (S, S)}, TypeError, "position_ids must be an array, got tuple"),
    ("drop_tokens", (H, H, 2), {"rope": S[0]}, ValueError, "rope must be"),
    ("drop_tokens", (H, H, 2), {"labels": S}, TypeError, "labels must be signed integers"),
    (
        "drop_tokens", (H[0], H[0], 2), {"cu_seqlens": [0, 6], "attention_mask": S[0]}, ValueError,
        "attention_mask must be None where cu_seqlens is given",
    ),
]  # fmt: skip
