"""Which models are supported, and the modules of a model that the hooks are registered on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.schedule import prefill_flops

VISION_TYPES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl")
TEXT_TYPES = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True)
class ModelAdapter:
    """The modules and settings of a transformers model that dropping needs.

    Attributes
    ----------
    body : Module
        The model without its head, which receives ``input_ids``; for text-only models the decoder itself.
    decoder : Module
        Has ``layers``, ``norm`` and ``rotary_emb``.
    kind : str
        ``config.model_type``.
    config : PretrainedConfig
        Of the whole model.
    token_ids : tuple of int
        Placeholders of images and videos.
    """

    body: Any
    decoder: Any
    kind: str
    config: Any
    token_ids: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(self.decoder.layers)

    @property
    def vision_tokens(self) -> int | None:
        """Tokens of an image, if all images have the same number; else None."""
        if self.kind != "llava" or self.config.vision_feature_select_strategy != "default":
            return None
        vision = self.config.vision_config
        return (int(vision.image_size) // int(vision.patch_size)) ** 2

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
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * int(config.num_key_value_heads) * int(width) * itemsize

    def block_flops(self, tokens: tuple[int, ...]) -> int:
        """Multiply-adds of one block for items of these lengths, by :func:`prefill_flops`."""
        return prefill_flops(tokens, self.decoder.config.hidden_size, self.decoder.config.intermediate_size)


def adapter_of(model: Any) -> ModelAdapter:
    """The adapter of ``model``.

    Raises
    ------
    ValueError
        A compiled model, an unsupported model type or attention implementation, a decoder without the expected modules, or
        layers with sliding-window attention.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("model must not be compiled: torch.compile ignores hooks that are added later; pass the original model")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in VISION_TYPES + TEXT_TYPES:
        known = ", ".join(VISION_TYPES + TEXT_TYPES)
        raise ValueError(f"model must be one of {known} by its config.model_type, got {kind or type(model).__name__}")
    body, decoder = model.base_model, model.get_decoder()
    missing = [name for name in ("layers", "norm", "rotary_emb") if not hasattr(decoder, name)]
    if missing:
        raise ValueError(f"model must have a decoder with layers, norm and rotary_emb; {type(decoder).__name__} lacks {missing[0]}")
    config = model.config
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index") if kind in VISION_TYPES else ()
    ids = {x for name in names if isinstance(x := getattr(config, name, None), int)}
    adapter = ModelAdapter(body, decoder, kind, config, tuple(sorted(ids)))
    check_attention(adapter)
    kinds = getattr(decoder.config, "layer_types", None) or ()
    if any(name != "full_attention" for name in kinds) or (not kinds and getattr(decoder.config, "sliding_window", None)):
        raise ValueError("model must have full attention in every layer: a sliding window counts rows, and dropping moves them")
    return adapter


def check_attention(adapter: ModelAdapter) -> None:
    """Raise ValueError unless masks of this attention implementation can be cut."""
    if adapter.attention not in ATTENTION:
        raise ValueError(f"model must use one of {', '.join(ATTENTION)} as attn_implementation, got {adapter.attention!r}")


def check_checkpointing(decoder: Any) -> None:
    """Raise RuntimeError if gradient checkpointing would run the hooks twice, as in transformers up to at least 5.20."""
    layer = decoder.layers[0]
    if decoder.training and getattr(layer, "gradient_checkpointing", False):
        from transformers.modeling_layers import GradientCheckpointingLayer

        if "__call__" in vars(GradientCheckpointingLayer):
            raise RuntimeError("gradient checkpointing needs a transformers that checkpoints forward, not __call__, such as 5.23")
