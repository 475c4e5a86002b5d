"""The table of all methods, from the ``method`` of every policy: ``python -m v2drop_kernels methods``."""

from __future__ import annotations

from . import policies, voco
from .policy import Method

LLAVA = (576, 32, 4096, 11008)  # LLaVA-1.5-7B: vision tokens, blocks, hidden size, intermediate size
COLUMNS = (
    "method", "paper", "where", "score", "order", "positions", "attention weights", "FlashAttention", "trainable", "FLOPs",
)  # fmt: skip


def rows() -> list[tuple[str, ...]]:
    """One row per method, by where it drops and then by name; :data:`COLUMNS` are the headings.

    "attention weights" says whether the published code reads those of whole layers; "FlashAttention" and "trainable" are of this
    implementation. FLOPs is the share that the first preset leaves of the vision tokens' in LLaVA-1.5-7B, by the papers' formula.
    """
    return [
        (
            name,
            method.paper,
            method.where,
            method.score,
            method.order,
            method.positions,
            _yes(method.needs_weights),
            _yes(method.flash),
            _yes(method.trainable),
            _flops(method),
        )
        for name, method in _methods()
    ]


def _methods() -> list[tuple[str, Method]]:
    found: list[tuple[str, Method]] = [(name, policy.method) for name, policy in policies.known().items()]
    found.append(("voco_mask", voco.method))
    order = ("decoder", "before the decoder", "vision tower", "mask")
    return sorted(found, key=lambda x: (order.index(x[1].where), x[0]))


def markdown() -> str:
    """The table and what differs from the published code, as they stand in README."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    differ = [f"- `{name}`: {method.deviations}." for name, method in _methods() if method.deviations]
    return "\n\n".join([table, "Not as in the published code:", "\n".join(differ)])


def _flops(method: Method) -> str:
    if not method.presets:
        return "-"
    preset = method.presets[0]
    return f"{preset.flops_share(*LLAVA):.0%} ({preset.name})"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
