"""What the ops for NumPy and JAX share beyond ``core``: codes of the native library, and plans from arguments of these libraries.

No array library is imported here.
"""

from __future__ import annotations

import operator
from typing import Any

from .. import native
from ..core.arguments import kind, score_dtype_name
from ..core.calls import Resolved, resolve
from ..core.layout import TokenLayout
from ..core.plan import Plan


def code(name: str, value: Any, codes: dict[str, int]) -> int:
    """The library's number of a word."""
    if not isinstance(value, str) or value not in codes:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, codes))}, got {value!r}")
    return codes[value]


def rounding(score_dtype: Any) -> int:
    """The library's number of ``score_dtype=``: None, a dtype, a scalar type or the name of one."""
    return int(native.DTYPES[score_dtype_name(score_dtype)])


def host_ints(name: str, x: Any) -> Any:
    """``x`` with Python ints in it, which NumPy's integers are not: shapes depend on them, so they must be on the host."""
    try:
        x = x.tolist() if hasattr(x, "tolist") else x
        if isinstance(x, list | tuple):
            return [host_ints(name, y) for y in x]
        return x if x is None or isinstance(x, bool) else operator.index(x)  # per_segment_k refuses a bool
    except TypeError:
        raise TypeError(f"{name} must be ints that are known on the host, got {kind(x)}") from None


def planned(op: str, h: Any, k: Any, droppable: Any, cu_seqlens: Any) -> tuple[Plan, Resolved]:
    """The plan of ``op`` ("topk" or "drop") on ``h``, and what is known about the result."""
    if isinstance(droppable, TokenLayout):
        if droppable.mask is not None:
            raise TypeError("droppable must be spans or a TokenLayout of spans here, got a TokenLayout with a mask")
    elif "bool" in str(getattr(droppable, "dtype", "")):
        raise TypeError(f"droppable must be spans or a TokenLayout here, got a mask: {kind(droppable)}")
    else:
        droppable = host_ints("droppable", droppable)
    found = resolve(op, h, host_ints("k", k), droppable, host_ints("cu_seqlens", cu_seqlens), traced=False)
    assert isinstance(found.plan, Plan)  # a CuPlan needs offsets in a tensor
    return found.plan, found
