"""The rules for arguments: every error is one sentence that names the argument, what was expected and what was given.

The rules read ``.shape``, ``.ndim`` and names of dtypes, so that they serve torch, NumPy and JAX alike. Those that apply to torch
tensors only (strided layout, device) import torch when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import torch

METRICS = ("l2", "l1", "cosine")
ORDERS = ("position", "score")
FLOATS = ("float32", "float16", "bfloat16")  # the dtypes that the native library computes with
HIDDEN_DTYPES = (*FLOATS, "float64")  # those of the torch ops


def dtype_name(dtype: Any) -> str:
    """The name of a dtype of torch, NumPy or JAX, such as ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")


def tensor(name: str, x: Any) -> None:
    """Raise unless ``x`` is a strided torch tensor."""
    import torch

    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")


def same_device(name: str, x: torch.Tensor, device: torch.device, of: str) -> None:
    """Raise unless ``x`` is on the device of the argument ``of``."""
    if x.device != device:
        raise ValueError(f"{name} must be on the device of {of} ({device}), got {x.device}")


def dtype_in(name: str, x: Any, dtypes: tuple[str, ...]) -> None:
    """Raise unless ``x`` has one of these dtypes."""
    if str(x.dtype).removeprefix("torch.") not in dtypes:  # dtype_name, without a call on the way of every op
        raise TypeError(f"{name} must be {', '.join(dtypes[:-1])} or {dtypes[-1]}, got {x.dtype}")


def hidden_array(name: str, h: Any, packed: bool | None, dtypes: tuple[str, ...]) -> None:
    """Raise unless ``h`` is ``[B, N, D]`` (``[T, D]`` when packed; either when None) of one of these dtypes."""
    dtype_in(name, h, dtypes)
    if packed is None:
        if h.ndim not in (2, 3):
            raise ValueError(f"{name} must be [B, N, D] or [T, D], got shape {list(h.shape)}")
    elif h.ndim != (2 if packed else 3):
        want = "[T, D] because cu_seqlens is given" if packed else "[B, N, D] (a packed [T, D] needs cu_seqlens)"
        raise ValueError(f"{name} must be {want}, got shape {list(h.shape)}")


def array_pair(h_prev: Any, h_cur: Any, packed: bool | None, dtypes: tuple[str, ...]) -> None:
    """Raise unless both are hidden states of the same shape and dtype."""
    hidden_array("h_cur", h_cur, packed, dtypes)
    if h_prev.shape == h_cur.shape and h_prev.dtype == h_cur.dtype:
        return
    hidden_array("h_prev", h_prev, packed, dtypes)
    if h_prev.shape != h_cur.shape:
        raise ValueError(f"h_prev must have the shape of h_cur {list(h_cur.shape)}, got {list(h_prev.shape)}")
    raise TypeError(f"h_prev must have the dtype of h_cur {h_cur.dtype}, got {h_prev.dtype}")


def score_shape(scores: Any, h_cur: Any) -> None:
    """Raise unless ``scores`` has one value per row of ``h_cur``."""
    if scores.shape != h_cur.shape[:-1]:
        raise ValueError(f"scores must have one value per row of h_cur {list(h_cur.shape[:-1])}, got {list(scores.shape)}")


def score_dims(scores: Any, packed: bool) -> None:
    """Raise unless ``scores`` is ``[B, N]``, or ``[T]`` when packed."""
    if scores.ndim != (1 if packed else 2):
        want = "[T] because cu_seqlens is given" if packed else "[B, N] (a packed [T] needs cu_seqlens)"
        raise ValueError(f"scores must be {want}, got shape {list(scores.shape)}")


def score_dtype_name(score_dtype: Any) -> str:
    """The name of the dtype to which scores are rounded, ``"float32"`` for None; raise unless it is known."""
    if score_dtype is None:
        return "float32"
    name = getattr(score_dtype, "name", getattr(score_dtype, "__name__", dtype_name(score_dtype)))
    if name not in FLOATS:
        raise TypeError(f"score_dtype must be None, float32, float16 or bfloat16, got {shown(score_dtype)}")
    return name


def hidden(name: str, h: Any, packed: bool | None) -> None:
    """Raise unless ``h`` is a torch tensor ``[B, N, D]`` (``[T, D]`` when packed; either when None) of a supported dtype."""
    tensor(name, h)
    hidden_array(name, h, packed, HIDDEN_DTYPES)


def pair(h_prev: Any, h_cur: Any, packed: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both hidden states; raise unless they are torch tensors of the same shape, dtype and device."""
    tensor("h_cur", h_cur)
    tensor("h_prev", h_prev)
    array_pair(h_prev, h_cur, packed, HIDDEN_DTYPES)
    same_device("h_prev", h_prev, h_cur.device, "h_cur")
    return h_prev, h_cur


def score_options(metric: Any, score_dtype: Any) -> None:
    """Raise unless the metric and the rounding of a torch op are known."""
    one_of("metric", metric, METRICS)
    if score_dtype is None:
        return
    if isinstance(score_dtype, str):
        raise TypeError(f"score_dtype must be None, float32, float16 or bfloat16, got {score_dtype}")
    score_dtype_name(score_dtype)


def ranked(h_prev: Any, h_cur: Any, scores: Any, packed: bool) -> None:
    """Raise unless ``scores`` has one floating-point value per row of ``h_cur``, on its device; where None, as :func:`pair`."""
    if scores is None:
        pair(h_prev, h_cur, packed)
        return
    hidden("h_cur", h_cur, packed)
    tensor("scores", scores)
    score_shape(scores, h_cur)
    dtype_in("scores", scores, HIDDEN_DTYPES)
    same_device("scores", scores, h_cur.device, "h_cur")


def keys(name: str, x: Any, layout: Any) -> torch.Tensor:
    """``x`` as ``[B, H, S, Dh]``; raise unless it is that, or ``[B, S, H, Dh]``, of a served dtype."""
    one_of("layout", layout, ("BHSD", "BSHD"))
    tensor(name, x)
    dtype_in(name, x, HIDDEN_DTYPES)
    if x.dim() != 4:
        raise ValueError(f"{name} must have four dimensions ({layout}), got shape {list(x.shape)}")
    return x if layout == "BHSD" else x.transpose(1, 2)


def table(name: str, x: Any, shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> None:
    """Raise unless ``x`` is a tensor of this shape and dtype, on the device of ``like``."""
    tensor(name, x)
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")


def unit_stride(h: torch.Tensor) -> torch.Tensor:
    """``h`` with a last dimension of stride 1: as it is, or one contiguous copy."""
    return h if h.stride(-1) == 1 or h.shape[-1] <= 1 else h.contiguous()


def settled(x: torch.Tensor) -> torch.Tensor:
    """``x`` with a memory that holds its values: as it is, or one copy in which a lazy negation or conjugation is carried out.

    For eager calls only, where memory is read; the dispatcher does this for the traced ones.
    """
    if type(x).__name__ not in _MEMORY:
        _require_memory(x)
    return x.clone() if x.is_neg() or x.is_conj() else x


_MEMORY = ("Tensor", "Parameter")  # types that certainly have one


def _require_memory(x: torch.Tensor) -> None:
    """Raise for a subclass that wraps other tensors, or none, among plain tensors: only the dispatcher can read it."""
    try:
        found = bool(x.untyped_storage().data_ptr()) or not x.numel()
    except RuntimeError:
        found = False
    if not found:
        raise TypeError(
            f"h_cur, hidden or x must be a {type(x).__name__} as well where another tensor is: it has no memory to read"
        )


def settled_gradient(grad: torch.Tensor) -> torch.Tensor:
    """:func:`settled` for what autograd delivers, which may also be zeros without any memory."""
    return grad.clone() if grad._is_zerotensor() else settled(grad)


def per_segment_k(k: Any, groups: int) -> tuple[int, ...]:
    """Normalise ``k=`` to one int per segment."""
    if is_tensor(k):
        import torch

        if k.device.type != "cpu":
            raise ValueError("k must be known on the host (an int, a list or a CPU tensor): shapes depend on it")
        if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool or k.dim() > 1:
            raise TypeError(f"k as a tensor must be integer with 0 or 1 dimensions, got {kind(k)}")
        k = k.tolist()
    if isinstance(k, list | tuple):
        if len(k) != groups:
            raise ValueError(f"k must have one int per segment ({groups}), got {len(k)}")
        ks = tuple(k)
    else:
        ks = (k,) * groups
        if groups == 0:
            require_int("k", k)
    for x in ks:
        require_int("k", x)
    return ks


def host_cu_seqlens(cu_seqlens: Any, total: int | None = None) -> tuple[int, ...]:
    """Check cumulative lengths and return them as ints."""
    if is_tensor(cu_seqlens):
        check_offsets(cu_seqlens)
        cu_seqlens = cu_seqlens.tolist()
    if not isinstance(cu_seqlens, list | tuple):
        raise TypeError(f"cu_seqlens must be a list or a tensor of ints, got {kind(cu_seqlens)}")
    cu = tuple(cu_seqlens)
    for x in cu:
        require_int("cu_seqlens", x)
    if not cu or cu[0] != 0:
        raise ValueError(f"cu_seqlens must start with 0, got {list(cu[:1])}")
    for a, b in zip(cu[:-1], cu[1:], strict=True):
        if b < a:
            raise ValueError(f"cu_seqlens must ascend, got {a} before {b}")
    if total is not None and cu[-1] != total:
        raise ValueError(f"cu_seqlens must end at T = {total}, got {cu[-1]}")
    return cu


def check_offsets(cu_seqlens: torch.Tensor) -> None:
    """Raise unless a tensor of offsets has the right shape and dtype; its values are not read."""
    import torch

    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be int32 [B + 1], got {kind(cu_seqlens)}")


def check_padding_side(side: str) -> None:
    """Raise unless ``side`` is a side."""
    one_of("padding_side", side, ("right", "left"))


def is_tensor(x: Any) -> TypeGuard[torch.Tensor]:
    """Whether ``x`` is a torch tensor. torch is imported only for values that have a dtype."""
    if x is None or isinstance(x, int | list | tuple) or not hasattr(x, "dtype"):
        return False
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return isinstance(x, torch.Tensor)


def is_int(x: Any) -> bool:
    """Whether ``x`` is an int, or the symbolic one of a traced call."""
    return isinstance(x, int) or type(x).__name__ == "SymInt"


def is_pair(x: Any) -> bool:
    """Whether ``x`` is one (start, stop)."""
    return isinstance(x, list | tuple) and len(x) == 2 and isinstance(x[0], int) and isinstance(x[1], int)


def check_spans(item: int, spans: tuple[tuple[int, int], ...], lo: int, hi: int) -> None:
    """Raise unless the spans of an item ascend inside its rows."""
    at = lo
    for start, stop in spans:
        if stop < start:
            raise ValueError(f"droppable span ({start}, {stop}) of item {item} is reversed")
        if start < lo or stop > hi:
            raise ValueError(f"droppable span ({start}, {stop}) of item {item} lies outside its rows [{lo}, {hi})")
        if start < at:
            raise ValueError(f"droppable span ({start}, {stop}) of item {item} overlaps or precedes the one before it")
        at = stop


def require_int(name: str, x: Any) -> None:
    """Raise unless ``x`` is an int >= 0 (symbolic ones included)."""
    if isinstance(x, bool) or not is_int(x):
        raise TypeError(f"{name} must be an int, got {kind(x)}")
    if x < 0:
        raise ValueError(f"{name} must be >= 0, got {x}")


def kind(x: Any) -> str:
    """How an error message names a value."""
    return shown(x) if _is_array(x) else f"{type(x).__name__} {shown(x)}"


def shown(x: Any) -> str:
    """A value in an error message: on one line, and not longer than one."""
    if _is_array(x):
        return f"{x.dtype} tensor of shape {tuple(x.shape)}"
    text = " ".join(repr(x).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape") and not isinstance(x, type)


def positive_number(name: str, x: Any) -> None:
    """Raise unless ``x`` is an int or float greater than 0 that a float32 can hold."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a number, got {kind(x)}")
    if not 0 < x < 3.5e38:
        raise ValueError(f"{name} must be greater than 0 and finite, got {x}")


def sequence_of(name: str, x: Any, n: int) -> None:
    """Raise unless ``x`` is a list or tuple with one entry per item of a batch of ``n``."""
    if not isinstance(x, list | tuple):
        raise TypeError(f"{name} must be a list or tuple of ints, got {kind(x)}")
    if len(x) != n:
        raise ValueError(f"{name} must have one int per item ({n}), got {len(x)}")


def is_packed(droppable: Any, cu_seqlens: Any) -> bool:
    """Whether a call is about a packed batch: it has offsets, or its layout is packed."""
    return cu_seqlens is not None or bool(getattr(droppable, "is_packed", False))


def check_device(droppable: Any, device: torch.device, of: str) -> None:
    """Raise unless a mask, or that of a layout, is on the device of the argument ``of``."""
    if droppable is None or isinstance(droppable, list | tuple):
        return
    mask = droppable if is_tensor(droppable) else getattr(droppable, "mask", None)
    if is_tensor(mask) and mask.device != device:
        raise ValueError(f"droppable must be on the device of {of} ({device}), got {mask.device}")
