"""The modules and settings of a model that the hooks need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.schedule import prefill_flops
from . import deepstack
from .arguments import parameters
from .capabilities import (
    ATTENTION,
    STATEFUL,
    WINDOWED,
    check_sequence,
    check_streams,
    layer_kinds,
    norm_of,
    placeholder_ids,
    text_decoder,
)
from .wrappers import unwrapped

OLDEST = (5, 17)  # transformers; the oldest that the tests run with


@dataclass(frozen=True)
class ModelAdapter:
    """The modules and settings of a transformers model that dropping needs.

    Attributes
    ----------
    body : Module
        The model without its head, which receives ``input_ids``; for text-only models the decoder itself.
    decoder : Module
        Has ``layers`` and ``rotary_emb``.
    kind : str
        ``config.model_type``.
    config : PretrainedConfig
        Of the whole model.
    token_ids : tuple of int
        Placeholders of images and videos.
    kinds : tuple of str
        The kind of attention of every block.
    group : ProcessGroup | None
        The ranks over which the attention heads are sharded (tensor parallelism).
    """

    body: Any
    decoder: Any
    kind: str
    config: Any
    token_ids: tuple[int, ...]
    kinds: tuple[str, ...]
    group: Any = None

    @property
    def norm(self) -> Any:
        """The norm behind the last block."""
        return norm_of(self.decoder)

    @property
    def video_ids(self) -> tuple[int, ...]:
        """Those of :attr:`token_ids` that stand for videos."""
        ids = [getattr(self.config, name, None) for name in ("video_token_id", "video_token_index")]
        return tuple(x for x in ids if isinstance(x, int))

    @property
    def windowed(self) -> bool:
        """Whether a block has attention that counts positions."""
        return any(kind in WINDOWED for kind in self.kinds)

    @property
    def stateful(self) -> bool:
        """Whether a block keeps a state in place of keys and values."""
        return any(kind in STATEFUL for kind in self.kinds)

    def window(self, layer: int) -> int | None:
        """The window or chunk of a block, in positions; None for full attention."""
        config, kind = self.decoder.config, self.kinds[layer]
        return int(config.sliding_window if kind == WINDOWED[0] else config.attention_chunk_size) if kind in WINDOWED else None

    def cached_rows(self, layer: int, rows: int) -> int:
        """Of the rows that a block receives in a prefill, those that its dynamic cache holds."""
        if self.kinds[layer] in STATEFUL:
            return 0
        window = self.window(layer)
        return rows if window is None else min(rows, window - 1)

    @property
    def deepstack(self) -> bool:
        """Whether the decoder adds vision features behind its first blocks."""
        return deepstack.PLANES in parameters(type(self.decoder).forward)

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(self.decoder.layers)

    @property
    def vision_tokens(self) -> int | None:
        """Tokens of an image, if all images have the same number; else None."""
        if getattr(self.config, "vision_feature_select_strategy", None) != "default" or hasattr(
            self.config, "image_grid_pinpoints"
        ):
            return None
        side, patch = patch_sides(self.config)
        return (side // patch) ** 2 if side and patch else None

    @property
    def attention(self) -> str:
        """Name of the attention implementation."""
        return str(self.decoder.config._attn_implementation)

    @property
    def flash(self) -> bool:
        """Whether the attention implementation is FlashAttention, which takes 2-D masks only."""
        return self.attention.startswith("flash")

    def kv_row_bytes(self, itemsize: int) -> int:
        """Bytes of the keys and values of one token in one block."""
        config = self.decoder.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        widths = 2 * int(width)
        if getattr(config, "kv_lora_rank", None):  # latent attention caches the keys and values that it makes from the latents
            heads, widths = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        return int(heads) * widths * itemsize

    def block_flops(self, tokens: tuple[int, ...]) -> int:
        """Multiply-adds of one block for items of these lengths, by :func:`prefill_flops`; of experts those that a token visits."""
        config = self.decoder.config
        inner, experts = getattr(config, "intermediate_size", None), getattr(config, "moe_intermediate_size", None)
        inner = max(inner) if isinstance(inner, list | tuple) else inner
        if isinstance(experts, int) and experts:
            chosen = [getattr(config, name, None) for name in ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")]
            inner = experts * next((n for n in chosen if isinstance(n, int)), 1)
        return prefill_flops(tokens, config.hidden_size, int(inner or 4 * config.hidden_size))


def adapter_of(model: Any) -> ModelAdapter:
    """The adapter of ``model``.

    Raises
    ------
    ValueError
        The model lacks a capability; the sentence says which.
    """
    model = unwrapped(model)
    check_version()
    decoder = text_decoder(model)
    check_sequence(model, decoder)
    check_streams(decoder)
    body, config = model.base_model, model.config
    kinds = layer_kinds(decoder)
    adapter = ModelAdapter(body, decoder, config.model_type, config, placeholder_ids(config, body), kinds)
    check_attention(adapter)
    return adapter


def check_version() -> None:
    """Raise RuntimeError for a transformers that is older than those tested."""
    import transformers

    if tuple(int(x) for x in transformers.__version__.split(".")[:2]) < OLDEST:
        raise RuntimeError(
            f"TokenDropper needs transformers >= {OLDEST[0]}.{OLDEST[1]}, but {transformers.__version__} is installed"
        )


def patch_sides(config: Any) -> tuple[int | None, int | None]:
    """Side of the square pictures that the vision tower receives, and of its patches; None where they are not fixed."""
    vision = getattr(config, "vision_config", None)
    sides = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    side, patch = (x[0] if isinstance(x, list | tuple) and len(set(x)) == 1 else x for x in sides)
    return side if isinstance(side, int) else None, patch if isinstance(patch, int) else None


def check_attention(adapter: ModelAdapter) -> None:
    """Raise ValueError unless masks of this attention implementation can be cut."""
    if adapter.attention not in ATTENTION:
        raise ValueError(f"model must use one of {', '.join(ATTENTION)} as attn_implementation, got {adapter.attention!r}")
    if adapter.flash and adapter.windowed:
        raise ValueError(f"model must not use {adapter.attention!r} with windows: its kernel counts them in rows, not in positions")


def check_checkpointing(decoder: Any) -> None:
    """Raise RuntimeError if gradient checkpointing would run the hooks twice, as in transformers up to at least 5.20."""
    layer = decoder.layers[0]
    if decoder.training and getattr(layer, "gradient_checkpointing", False):
        from transformers.modeling_layers import GradientCheckpointingLayer

        if "__call__" in vars(GradientCheckpointingLayer):
            raise RuntimeError("gradient checkpointing needs a transformers that checkpoints forward, not __call__, such as 5.23")
