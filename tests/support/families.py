"""A tiny random model of every type: the default config of its class with small sizes, and what the type needs besides."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers as tf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

DEPTH, IMAGE, VIDEO, VOCAB, WINDOW = 4, 91, 92, 128, 6
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 512, "sliding_window": WINDOW, "attention_chunk_size": 8,
    "intermediate_size_mlp": 48, "text_hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "top_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "global_head_dim": 8, "num_global_key_value_heads": 2,
    "image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO, "video_token_index": VIDEO,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 8, "image_size": 28, "patch_size": 7, "depth": 2, "num_heads": 2, "embed_dim": 16, "out_hidden_size": 32,
    "projection_dim": 16, "spatial_merge_size": 2, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "num_mel_bins": 8, "ffn_dim": 16, "output_dim": 32, "text_hidden_size": 32,
}  # fmt: skip
NEWER = {"smolvlm": "5.21"}  # whose model takes pixels of several items only since then
DROPPED = ("transformers_version", "dtype", "architectures", "id2label", "label2id", "model_type")


def _is_config(name: str, value: Any) -> bool:
    return isinstance(value, dict) and ("model_type" in value or name.endswith("_config"))


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    value = copy.deepcopy(value)
    for rope in (value, *(x for x in value.values() if isinstance(x, dict))):
        if "mrope_section" in rope:
            rope["mrope_section"] = [2, 1, 1]
    return value


def small(config: Mapping[str, Any], changes: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The config with small sizes; ``changes`` by dotted path (``text_config.head_dim``) come on top, None removes nothing."""
    tower = any(word in path for word in ("vision", "audio", "vq", "high_res", "vit", "perceiver"))
    sizes, made = {**TEXT, **TOWER} if tower else TEXT, {}
    for name, value in config.items():
        at = f"{path}.{name}".lstrip(".")
        if name in DROPPED and not (name == "model_type" and path):
            continue
        if _is_config(name, value):
            made[name] = small(value, changes, at)
        elif name in ("layer_types", "mlp_layer_types") and value:
            kinds = list(dict.fromkeys(value))
            made[name] = [kinds[i % len(kinds)] for i in range(sizes["num_hidden_layers"])]
        elif name == "rope_parameters" and value:
            made[name] = _rope(value)
        elif name in sizes and isinstance(value, int) and not isinstance(value, bool):
            made[name] = sizes[name]
        else:
            made[name] = value
    prefix = f"{path}." if path else ""
    own = {k[len(prefix) :]: v for k, v in changes.items() if k.startswith(prefix) and "." not in k[len(prefix) :]}
    return {**made, **own}


def known(kinds: tuple[str, ...]) -> list[str]:
    """Those that the installed transformers has: an older one lacks the newest types."""
    return [kind for kind in kinds if kind in CONFIG_MAPPING and (NEWER.get(kind, "") <= tf.__version__ or kinds != WITH_PICTURES)]


@functools.cache
def made(kind: str) -> Any:
    """The model of a type, whose weights are so large that attention and rotary tables matter."""
    names = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    name = names[kind] if isinstance(names[kind], str) else names[kind][0]
    config = CONFIG_MAPPING[kind]
    torch.manual_seed(5)
    model = getattr(tf, name)(config(**small(config().to_dict(), CHANGES.get(kind, {})))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5 if "embed" in name or "lm_head" in name else 1.5 / weight[0].numel() ** 0.5)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _mrope(section: list[int] = [2, 1, 1], **more: Any) -> dict[str, Any]:  # noqa: B006
    return {"text_config.rope_parameters": {**ROPE, "mrope_section": section}, **more}


VOCABULARY = {f"IMGIMG{chr(65 + i)}Z": 60 + i for i in range(8)} | {"<image>": IMAGE}
CODEBOOK = {f"vq_config.{name}": 32 for name in ("base_channels", "num_embeddings", "embed_dim", "z_channels", "latent_channels")}
PATCHES = {"vision_config.patch_size": [7, 7], "vision_config.image_size": [28, 28]}
PROJECTED = {"projection_dim": 32, "vision_config.projection_dim": 32}
LATENT = {"text_config.num_key_value_heads": 4, "num_key_value_heads": 4}
CHANGES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "chameleon": {"vocabulary_map": VOCABULARY, **CODEBOOK},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": {**ROPE, "mrope_section": [2, 1, 1]}}},
    "emu3": {"vocabulary_map": VOCABULARY | {"<|extra_200|>": 59}, **CODEBOOK},
    "ernie4_5_vl_moe": _mrope([1, 1, 2]),
    "fast_vlm": {"vision_config": {"model_type": "siglip_vision_model", **TOWER}},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {"text_config.per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 16}}},
    "gemma4_unified": {"text_config.per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 16}}},
    "glm46v": _mrope(),
    "glm4v": _mrope(),
    "glm4v_moe": _mrope([1, 1, 0]),
    "glm_ocr": _mrope(),
    "glmga": _mrope(),
    "hunyuan_vl": {"text_config.rope_parameters": {**ROPE, "mrope_section": [1, 1, 1, 1]}, "text_config.head_dim": 8},
    "internvl": PATCHES,
    "janus": {**CODEBOOK, **PROJECTED},
    "kimi_k25": LATENT,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mistral4": {**LATENT, "head_dim": 16},
    "molmo2": {
        "adapter_config.vision_feature_layer": [1, 0],
        "image_patch_id": IMAGE,
        "adapter_config.vision_feature_layers": None,
    },
    "paddleocr_vl": _mrope(),
    "paligemma": PROJECTED,
    "qianfan_ocr": PATCHES,
    "qwen2_5_omni_thinker": _mrope(vision_start_token_id=93),
    "qwen2_5_vl": _mrope(),
    "qwen2_vl": _mrope(**{"vision_config.hidden_size": 32}),
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 93},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "step3p7": {"text_config.rope_parameters": {"full_attention": ROPE}, "text_config.sliding_window": WINDOW},
    "vipllava": {"vision_feature_layers": [-1, -2]},
}

# Types whose configs have a placeholder of images.
WITH_IMAGES = (
    "aria", "aya_vision", "chameleon", "cohere2_vision", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_vl",
    "deepseek_vl_hybrid", "emu3", "ernie4_5_vl_moe", "exaone4_5", "fast_vlm", "fuyu", "gemma3", "gemma4", "gemma4_unified",
    "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "got_ocr2", "granite_docling", "hunyuan_vl", "hyperclovax_vision_v2",
    "idefics2", "idefics3", "internvl", "janus", "kimi_k25", "lfm2_vl", "lighton_ocr", "llama4", "llava", "llava_next",
    "llava_next_video", "llava_onevision", "minimax_m3_vl", "mistral3", "molmo2", "muse_glimmer", "ovis2", "paddleocr_vl",
    "paligemma", "pp_chart2table", "qianfan_ocr", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_omni_moe_thinker",
    "qwen3_vl", "qwen3_vl_moe", "shieldgemma2", "smolvlm", "step3p7", "video_llama_3", "video_llava", "vipllava",
)  # fmt: skip
TEXT_TYPES = (
    "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_oss", "granite", "llama", "ministral3",
    "mistral", "mistral4", "mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
SERVED = (*WITH_IMAGES, *TEXT_TYPES)
# Of these, types whose pixels :func:`pictures` can make.
WITH_PICTURES = (
    "aria", "aya_vision", "cohere2_vision", "cosmos3_edge", "cosmos3_omni", "deepseek_vl", "ernie4_5_vl_moe", "exaone4_5",
    "gemma3", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl",
    "janus", "lighton_ocr", "llava", "minimax_m3_vl", "mistral3", "ovis2", "paligemma", "qianfan_ocr", "qwen2_5_omni_thinker",
    "qwen2_5_vl", "qwen2_vl", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "shieldgemma2", "smolvlm", "video_llava",
    "vipllava",
)  # fmt: skip


def pictures(kind: str, count: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Pixels of ``count`` images, as the processor of the type gives them, and how many tokens each image takes."""
    model = made(kind)
    vision = model.config.vision_config
    body, draw = model.base_model, torch.Generator().manual_seed(7)
    names = inspect.signature(body.get_image_features).parameters
    if "image_grid_thw" in names:
        merge, patch = getattr(vision, "spatial_merge_size", 1), vision.patch_size
        grid = torch.tensor([[1, 2 * merge, 3 * merge]] * count)
        width = 3 * getattr(vision, "temporal_patch_size", 1) * patch**2
        given = {"pixel_values": torch.randn(count * 6 * merge**2, width, generator=draw), "image_grid_thw": grid}
    else:
        side = 28
        shape = (1, count) if kind in NESTED else (count,)
        name = "pixel_values_images" if "pixel_values_images" in names else "pixel_values"
        given = {name: torch.randn(*shape, 3, side, side, generator=draw)}
    if "image_sizes" in names and kind not in ("llava", "vipllava"):
        given["image_sizes"] = torch.tensor([[28, 28]] * count)
    with torch.no_grad():
        features = body.get_image_features(**given, return_dict=True).pooler_output
    tokens = sum(x[..., 0].numel() for x in features) // count
    return given, [tokens] * count


NESTED = ("idefics2", "idefics3", "smolvlm")  # images in a dimension of their own
RESAMPLED = ("aria", "idefics2")  # whose tokens are no patches
# Served by their decoders, which other types here have too; their default configs make no small model.
UNTESTED = ("lfm3_vl", "muse_spark", "perception_lm")
# Blocks with linear attention or convolutions among others.
STATEFUL = ("lfm2", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "qwen3_5", "qwen3_5_moe", "qwen3_next")
