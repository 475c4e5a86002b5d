"""Which models of the installed transformers can drop tokens, judged as :class:`TokenDropper` judges them: from their structure.

A type is judged by the model of its default config, whose tensors are on the device "meta" and take no memory. Where the default
config makes no model, for it needs a vocabulary or a package, its text decoder alone is judged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

COLUMNS = ("type", "served", "why not, or how")
# What a default config lacks to make a model.
_NEEDS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}},
    "emu3": {"vocabulary_map": {"<image>": 151646, "<|extra_200|>": 151846}},
    "hunyuan_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "head_dim": 128}},
}


def types() -> tuple[str, ...]:
    """Every type of the installed transformers that takes images or videos and returns text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))


def judge(name: str) -> tuple[str, str]:
    """``("yes", "")``, ``("with spans=", why)`` or ``("no", why)`` for a type."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if name not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"types must be among those that take images and return text, got {name!r}")
    classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name]
    kind = getattr(transformers, classes if isinstance(classes, str) else classes[0])
    try:
        with torch.device("meta"):
            return _judged(kind(CONFIG_MAPPING[name](**_NEEDS.get(name, {}))))
    except Exception as error:
        try:
            return _judged_text(CONFIG_MAPPING[name]())
        except Exception:
            return "no", f"its default config makes no model ({type(error).__name__})"


def _judged(model: Any, config: Any = None) -> tuple[str, str]:
    from .adapters import adapter_of
    from .adapters.capabilities import placeholder_ids

    try:
        adapter = adapter_of(model)
    except ValueError as error:
        return "no", str(error)
    if adapter.token_ids or (config is not None and placeholder_ids(config, None)):
        return "yes", ", ".join(sorted({x.replace("_", " ") for x in adapter.kinds if x != "full_attention"}))
    return "with spans=", "its config names no placeholder of images"


def _judged_text(config: Any) -> tuple[str, str]:
    """By the text decoder of a config whose whole model cannot be made."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return _judged(AutoModelForCausalLM.from_config(config.get_text_config()), config)


def rows(names: Iterable[str] | None = None) -> list[tuple[str, str, str]]:
    """One row per type; :data:`COLUMNS` are the headings."""
    import logging

    import transformers

    logging.disable(logging.WARNING)  # default configs draw advice about their sizes
    transformers.logging.set_verbosity_error()
    try:
        return [(name, *judge(name)) for name in (types() if names is None else names)]
    finally:
        logging.disable(logging.NOTSET)


def markdown(names: Iterable[str] | None = None) -> str:
    """The table and its counts, as they stand in docs/models.md."""
    import transformers

    found = rows(names)
    count = {answer: sum(row[1] == answer for row in found) for answer in ("yes", "with spans=", "no")}
    lines = [COLUMNS, ("---",) * len(COLUMNS), *((f"`{name}`", answer, why) for name, answer, why in found)]
    table = "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)
    yes, spans, no = count.values()
    yes, spans, no = count.values()
    head = f"transformers {transformers.__version__}: {len(found)} types, {yes} served, {spans} with `spans=`, {no} refused."
    return "\n\n".join([head, table])
