"""What a model must have so that dropping rows is exact, found in its modules and its config, never in its name."""

from __future__ import annotations

from typing import Any

from .arguments import parameters

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
FULL = "full_attention"
STATEFUL = ("linear_attention", "conv")  # keep a state: a dropped row is absent from it, from the layer of its drop on
WINDOWED = ("sliding_attention", "chunked_attention")  # count positions, which dropping keeps
NORMS = ("norm", "final_layernorm", "embedding_norm", "final_layer_norm", "norm_f")
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "image_patch_id")


def text_decoder(model: Any) -> Any:
    """The decoder: the module that has the blocks, their norm and the rotary embedding.

    Raises
    ------
    ValueError
        There is none, or its vision tokens come from a query former or are read from an encoder.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise ValueError(f"model must be a language model of transformers, got {name}")
    if any("qformer" in child.lower() for child, _ in model.base_model.named_children()):
        raise ValueError("model must have vision tokens that are patches; a query former makes a few of its own for every picture")
    if getattr(config, "is_encoder_decoder", False):
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


def check_streams(decoder: Any) -> None:
    """Raise ValueError where rows of a block are more than one hidden state each and its own keys and values."""
    streams = getattr(decoder.config, "altup_num_inputs", None) or getattr(decoder.config, "hc_mult", None)
    if streams:
        raise ValueError(f"model must have one hidden state per token; {type(decoder).__name__} has {streams}")
    if shared := getattr(decoder.config, "num_kv_shared_layers", None):
        what = f"the last {shared} of {type(decoder).__name__} use those of earlier blocks, which hold other rows"
        raise ValueError(f"model must have keys and values of its own in every block; {what}")
    if "deepstack_features" in parameters(type(decoder).forward):
        raise ValueError(
            f"model must add vision features behind its first blocks only; {type(decoder).__name__} adds them anywhere"
        )


def check_sequence(model: Any, decoder: Any) -> None:
    """Raise ValueError where vision tokens are not rows of the decoder's sequence but read by cross-attention."""
    blocks = list(decoder.layers) if hasattr(decoder, "layers") else [decoder]
    parts = [part for block in blocks for part in (block, *block.children())]
    inside = [part for block in {type(x): x for x in blocks}.values() for part in block.modules()]  # one block of each class
    odd = next((kind for module in parts + inside if "cross" in (kind := type(module).__name__).lower()), None)
    if odd is not None:
        raise ValueError(f"model must have vision tokens in its sequence of tokens; {type(decoder).__name__} reads them by {odd}")


def layer_kinds(decoder: Any) -> tuple[str, ...]:
    """The kind of attention of every block, from the decoder's config.

    Raises
    ------
    ValueError
        A kind other than full attention and windows.
    """
    config = decoder.config
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
        kinds = ["sliding_attention" if window else "chunked_attention" if chunk else FULL] * len(decoder.layers)
    kinds = [{"mamba": "linear_attention", "attention": FULL}.get(kind, kind) for kind in kinds]
    for index, kind in enumerate(kinds):
        if kind not in (FULL, *WINDOWED, *STATEFUL):
            raise ValueError(f"model must have full, windowed or linear attention in every block: {kind!r}, in block {index} of "
                             f"{type(decoder).__name__}, chooses keys itself")  # fmt: skip
    return tuple(kinds[: len(decoder.layers)])


def placeholder_ids(config: Any, body: Any) -> tuple[int, ...]:
    """The token ids that stand for patches of images and videos; empty if the model has none."""
    holders = [config, getattr(body, "vocabulary_mapping", None)]
    return tuple(sorted({x for holder in holders for name in PLACEHOLDERS if isinstance(x := getattr(holder, name, None), int)}))
