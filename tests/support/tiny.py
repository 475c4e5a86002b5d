"""Tiny models of every family with random weights, and batches for them: an item is a list of text lengths and pictures."""

from __future__ import annotations

import functools

import torch
import transformers as tf

IMAGE, VIDEO, VOCAB, LAYERS = 90, 91, 96, 5
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
}  # fmt: skip
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_TOWER = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
}  # fmt: skip
FAMILIES = ("llama", "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl")


def _llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))


def _llava():
    vision = tf.CLIPVisionConfig(**TOWER)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_index=IMAGE)
    )


def _llava_next():
    # The decoder of the 7B checkpoint of LLaVA-NeXT is Mistral's.
    text = tf.MistralConfig(**TEXT, sliding_window=None)
    return tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(
            vision_config=tf.CLIPVisionConfig(**TOWER), text_config=text, image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS
        )
    )


def _llava_onevision():
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**TOWER, vision_use_head=False), text_config=tf.Qwen2Config(**TEXT),
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return tf.LlavaOnevisionForConditionalGeneration(config)


def _qwen2_vl():
    vision = {**QWEN_TOWER, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    text = {**TEXT, "rope_parameters": dict(MROPE)}
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO)
    )


def _qwen2_5_vl():
    vision = {**QWEN_TOWER, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16,
              "fullatt_block_indexes": [1]}  # fmt: skip
    text = {**TEXT, "rope_parameters": dict(MROPE)}
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO)
    )


def made(family, attention="sdpa", dtype=torch.float32):
    return _made(family, attention, dtype)


@functools.cache  # which tells a default from the same value given
def _made(family, attention, dtype):
    """A model whose attention and rotary tables matter: initial weights are so small that every choice would look alike."""
    torch.manual_seed(5)
    model = globals()[f"_{family}"]().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name and "lm_head" not in name:
                weight.normal_(0, 2.0 / weight[0].numel() ** 0.5)
            elif "embed" in name or "lm_head" in name:
                weight.normal_(0, 0.5)
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def text(n, seed):
    return torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def item(*parts, seed):
    """``item(5, "image", 3, seed=1)``: five text tokens, an image, three text tokens. Sizes: ``("image", 40, 28)``."""
    return [(part, seed * 100 + i) for i, part in enumerate(parts)]


def _picture(family, model, part, seed):
    """Pixels of one picture, what goes with them, and how many tokens it takes."""
    kind, *size = (part,) if isinstance(part, str) else part
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    if family == "llava":
        return kind, {"pixel_values": draw(1, 3, 28, 28)}, 16
    if family in ("qwen2_vl", "qwen2_5_vl"):
        t, h, w = (1, *(size or (8, 8))) if kind == "image" else (*(size or (2, 4, 8)),)
        patches = draw(t * h * w, 3 * 2 * 4 * 4)
        names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
        return kind, dict(zip(names, (patches, torch.tensor([[t, h, w]])), strict=True)), t * h * w // 4
    if kind == "video":
        return kind, {"pixel_values_videos": draw(1, *(size or (2,)), 3, 28, 28)}, (size or (2,))[0] * 4 + 1
    size = torch.tensor([size or (28, 56)])
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    tiles = image_size_to_num_patches(size[0], PINPOINTS, 28)
    given = {"pixel_values": draw(1, tiles, 3, 28, 28), "image_sizes": size}
    given = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in given.items()}
    with torch.no_grad():
        return kind, given, sum(len(x) for x in model.get_image_features(**given).pooler_output)


def batch(family, items, side="left", attention="sdpa", dtype=torch.float32):
    """The inputs of a model for several items, padded on one side, and the spans of every item."""
    model, rows, pixels, spans = made(family, attention, dtype), [], {}, []
    for parts in items:
        ids, places = [], []
        for part, seed in parts:
            if isinstance(part, int):
                ids += text(part, seed)
                continue
            if family == "llama":
                places.append((len(ids), len(ids) + 12))
                ids += text(12, seed)
                continue
            kind, given, n = _picture(family, model, part, seed)
            places.append((len(ids), len(ids) + n))
            ids += [IMAGE if kind == "image" else VIDEO] * n
            for name, value in given.items():
                pixels.setdefault(name, []).append(value)
        rows.append(ids)
        spans.append(places)
    width = max(map(len, rows))
    pads = [width - len(ids) for ids in rows]
    put = lambda ids, pad, fill: [fill] * pad + ids if side == "left" else ids + [fill] * pad
    inputs = {
        "input_ids": torch.tensor([put(ids, pad, 0) for ids, pad in zip(rows, pads, strict=True)]),
        "attention_mask": torch.tensor([put([1] * len(ids), pad, 0) for ids, pad in zip(rows, pads, strict=True)]),
    }
    for name, values in pixels.items():
        if name == "pixel_values" and values[0].dim() == 5:  # tiles: padded to the largest number
            most = max(v.shape[1] for v in values)
            values = [torch.nn.functional.pad(v, (0, 0) * 3 + (0, most - v.shape[1])) for v in values]
        value = torch.cat(values)
        inputs[name] = value.to(dtype) if value.is_floating_point() else value
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE) + 2 * (inputs["input_ids"] == VIDEO)
    shifts = pads if side == "left" else [0] * len(pads)
    return model, inputs, [[(a + s, b + s) for a, b in places] for places, s in zip(spans, shifts, strict=True)]
