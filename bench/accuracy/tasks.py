"""What is asked: the small trained model with its held-out questions, or a checkpoint with pictures and questions of your own."""

from __future__ import annotations

import json
import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

TINY_LAYERS = (2, 4, 6)  # of eight; the task is made so that dropping all vision tokens before block 2 costs its answers


class Item(NamedTuple):
    """One question. ``relevant`` are the vision tokens that the answer stands on, where that is known."""

    inputs: dict[str, torch.Tensor]
    answer: Any
    relevant: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Task:
    """A model and its questions. ``decode`` makes an answer of the generated ids, ``right`` judges it."""

    name: str
    about: str
    model: Any
    items: Sequence[Item]
    decode: Callable[[torch.Tensor], Any]
    right: Callable[[Any, Any], bool]
    layers: tuple[int, ...]
    batch: int
    max_new_tokens: int
    vision_tokens: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        config = self.model.config
        image = getattr(config, "image_token_id", None)
        image = config.image_token_index if image is None else image
        counts = tuple(int((item.inputs["input_ids"] == image).sum()) for item in self.items)
        object.__setattr__(self, "vision_tokens", counts)

    @property
    def depth(self) -> int:
        """Decoder blocks of the model."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    def batches(self) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Indices of items and their inputs together.

        Only prompts of one length meet, so that no row is padded and an answer cannot depend on its neighbours' lengths.
        """
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, item in enumerate(self.items):
            alike[tuple((name, x.shape[1:]) for name, x in sorted(item.inputs.items()))].append(i)
        for group in alike.values():
            for at in range(0, len(group), self.batch):
                chosen = group[at : at + self.batch]
                names = self.items[chosen[0]].inputs
                yield chosen, {name: torch.cat([self.items[i].inputs[name] for i in chosen]) for name in names}


def progressive_layers(depth: int) -> tuple[int, ...]:
    """V2Drop's layers, 3, 17 and 22 of 32, in a model of another depth."""
    layers = sorted({max(1, round(x * depth / 32)) for x in (3, 17, 22)})
    return tuple(x for x in layers if x < depth)


def tiny(count: int, *, batch: int, layers: tuple[int, ...] | None, seed: int = 0) -> Task:
    """The model of examples/tiny_vlm and ``count`` of its held-out questions."""
    from examples.tiny_vlm import data
    from examples.tiny_vlm.model import load

    return tiny_task(load(), data.examples("held-out", count, seed=seed), batch=batch, layers=layers)


def tiny_task(model: Any, examples: Sequence[Any], *, batch: int, layers: tuple[int, ...] | None) -> Task:
    """Questions of examples/tiny_vlm to a model of its shape."""
    from examples.tiny_vlm import data

    items = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        pixels = torch.as_tensor(example.pixels)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        items.append(Item(inputs, tuple(example.answer), tuple(example.relevant)))
    return Task(
        name="tiny_vlm",
        about=f"examples/tiny_vlm, {len(items)} held-out questions",
        model=model,
        items=items,
        decode=lambda ids: tuple(data.decode(ids.tolist())),
        right=lambda given, wanted: given == wanted,
        layers=layers or TINY_LAYERS,
        batch=batch,
        max_new_tokens=max((len(item.answer) for item in items), default=0) + 1,
    )


def checkpoint(
    name: str,
    images: Path,
    questions: Path,
    count: int | None,
    *,
    batch: int,
    layers: tuple[int, ...] | None,
    device: str,
    dtype: str,
    max_new_tokens: int,
) -> Task:
    """A vision-language checkpoint of transformers, with lines of ``{"image": , "question": , "answer": }``."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(device).eval()
    items = []
    for asked in read_questions(questions)[:count]:
        content = [{"type": "image"}, {"type": "text", "text": asked["question"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        with Image.open(images / asked["image"]) as picture:
            inputs = processor(images=[picture.convert("RGB")], text=[text], return_tensors="pt")
        cast = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        relevant = tuple(asked["relevant"]) if "relevant" in asked else None
        items.append(Item(cast, asked["answer"], relevant))
    return Task(
        name=re.sub(r"[^\w.-]+", "_", name),
        about=f"{name}, {len(items)} questions of {questions.name}",
        model=model,
        items=items,
        decode=lambda ids: normal(processor.decode(ids, skip_special_tokens=True)),
        right=lambda given, wanted: given in [normal(x) for x in (wanted if isinstance(wanted, list) else [wanted])],
        layers=layers or progressive_layers(model.config.get_text_config().num_hidden_layers),
        batch=batch,
        max_new_tokens=max_new_tokens,
    )


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The lines of a questions file, checked."""
    asked = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        missing = [key for key in ("image", "question", "answer") if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(f"{path}, line {number}: needs {', '.join(missing)}")
        asked.append(entry)
    if not asked:
        raise ValueError(f"{path}: holds no question")
    return asked


def normal(text: str) -> str:
    """An answer without case, punctuation, articles and surplus spaces, as the VQA scores compare them."""
    words = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))
