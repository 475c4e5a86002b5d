"""What a model must have so that dropping rows is exact, found in its modules and its config, never in its name."""

from __future__ import annotations

from typing import Any

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
FULL = "full_attention"
NORMS = ("norm", "final_layernorm", "embedding_norm", "final_layer_norm")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "image_patch_id")


def text_decoder(model: Any) -> Any:
    """The decoder: the module that has the blocks, their norm and the rotary embedding.

    Raises
    ------
    ValueError
        There is none.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise ValueError(f"model must be a language model of transformers, got {name}")
    if getattr(config, "is_encoder_decoder", False) or getattr(getattr(model, "language_model", None), "config", config) is None:
        raise ValueError(f"model must be a decoder over its vision tokens; {name} is an encoder-decoder")
    decoder = model.get_decoder()
    while not hasattr(decoder, "layers") and hasattr(decoder, "model") and decoder.model is not decoder:
        decoder = decoder.model  # a language model with a head inside a larger one
    for what, missing in (("layers, a list of blocks", not hasattr(decoder, "layers")),
                          ("norm, behind the last block", norm_of(decoder) is None),
                          ("rotary_emb, one rotary embedding for all blocks", not hasattr(decoder, "rotary_emb"))):  # fmt: skip
        if missing:
            raise ValueError(f"model must have a decoder with {what}; {type(decoder).__name__} lacks it")
    return decoder


def norm_of(decoder: Any) -> Any:
    """The norm behind the last block; None if there is none."""
    return next((norm for name in NORMS if (norm := getattr(decoder, name, None)) is not None), None)


def check_sequence(model: Any, decoder: Any) -> None:
    """Raise ValueError where vision tokens are not rows of the decoder's sequence: cross-attention and query formers."""
    odd = next((kind for module in decoder.modules() if "cross" in (kind := type(module).__name__).lower()), None)
    if odd is not None:
        raise ValueError(f"model must have vision tokens in its sequence of tokens; {type(decoder).__name__} reads them by {odd}")
    if any("qformer" in name.lower() for name, _ in model.base_model.named_children()):
        raise ValueError("model must have vision tokens that are patches; a query former makes a few of its own for every picture")


def layer_kinds(decoder: Any) -> tuple[str, ...]:
    """The kind of attention of every block, from the decoder's config.

    Raises
    ------
    ValueError
        A kind other than full attention.
    """
    config = decoder.config
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
        kinds = ["sliding_attention" if window else "chunked_attention" if chunk else FULL] * len(decoder.layers)
    kinds = [{"mamba": "linear_attention", "attention": FULL}.get(kind, kind) for kind in kinds]
    for index, kind in enumerate(kinds):
        if kind != FULL:
            raise ValueError(f"model must have full attention in every block: {kind!r}, as in block {index} of "
                             f"{type(decoder).__name__}, counts rows or keeps a state, and dropping moves rows")  # fmt: skip
    return tuple(kinds[: len(decoder.layers)])


def placeholder_ids(config: Any, body: Any) -> tuple[int, ...]:
    """The token ids that stand for patches of images and videos; empty if the model has none."""
    holders = [config, getattr(body, "vocabulary_mapping", None)]
    return tuple(sorted({x for holder in holders for name in _PLACEHOLDERS if isinstance(x := getattr(holder, name, None), int)}))
