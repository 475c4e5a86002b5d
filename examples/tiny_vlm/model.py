"""The tiny LLaVA: transformers' own classes, their configuration and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import data

HERE = Path(__file__).parent


def config(hidden: int = 96, layers: int = 8, vision: int = 128) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    tower = CLIPVisionConfig(
        hidden_size=vision, intermediate_size=4 * vision, num_hidden_layers=2, num_attention_heads=4,
        image_size=data.PIXELS, patch_size=data.PATCH, projection_dim=vision,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(data.WORDS), hidden_size=hidden, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, head_dim=hidden // 4, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.05,
        pad_token_id=data.PAD, bos_token_id=data.BOS, eos_token_id=data.EOS,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=data.IMAGE, image_seq_length=data.TOKENS,
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=True,
        pad_token_id=data.PAD, bos_token_id=data.BOS, eos_token_id=data.EOS,
    )  # fmt: skip


def load(path: str | Path = HERE, **kwargs: Any) -> Any:
    """The trained model, a `LlavaForConditionalGeneration` in float32 and in evaluation mode; `kwargs` go to `from_pretrained`."""
    import torch
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(
        path, **{"dtype": torch.float32, "local_files_only": True, **kwargs}
    ).eval()
