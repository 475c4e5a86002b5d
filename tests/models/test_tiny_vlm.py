"""The shipped tiny vision-language model: what it is, what it was trained on, and that it answers."""

import hashlib
import json

import numpy as np
import pytest
import torch

from examples.tiny_vlm import data, evaluate, model, train

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def net():
    return model.load()


def generate(net, examples):
    """Greedy answers, left-padded in one batch."""
    width = max(len(e.input_ids) for e in examples)
    ids = torch.tensor([[data.PAD] * (width - len(e.input_ids)) + list(e.input_ids) for e in examples])
    pixels = torch.from_numpy(np.stack([e.pixels for e in examples]))
    out = net.generate(
        input_ids=ids, attention_mask=(ids != data.PAD).long(), pixel_values=pixels, max_new_tokens=4, do_sample=False
    )
    return [data.decode(row) for row in out[:, width:].tolist()]


def test_checkpoint():
    weights = model.HERE / "model.safetensors"
    assert weights.stat().st_size <= 8 << 20
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == json.loads((model.HERE / "training.json").read_text())["sha256"]


def test_readme_has_what_was_evaluated():
    found = json.loads((model.HERE / "evaluation.json").read_text())
    assert found["accuracy"] >= 90
    for before in ("before block 2", "before block 3"):
        assert found["accuracy"] - found[before]["all dropped"] >= 30
        assert found["accuracy"] - max(found[before]["random 11% kept, 3 seeds"]) >= 5
    text = (model.HERE / "README.md").read_text()
    for line in (
        f"| all | {found['accuracy']:.1f} % |",
        f"| {found['orders']['after']:.1f} % / {found['orders']['before']:.1f} % |",
        f"| {found['before block 2']['all dropped']:.1f} % / {found['before block 3']['all dropped']:.1f} % |",
        f"({found['kinds, before']['list']:.1f} %; after it {found['kinds, after']['list']:.1f} %)",
    ):
        assert line in text


def test_architecture(net):
    assert type(net).__name__ == "LlavaForConditionalGeneration"
    assert net.config.text_config.num_hidden_layers >= 8
    pixels = torch.zeros(1, 3, data.PIXELS, data.PIXELS)
    assert net.model.get_image_features(pixels).pooler_output[0].shape == (100, net.config.text_config.hidden_size)


def test_accuracy_on_held_out_questions(net):
    examples = data.examples("held-out", 64, seed=7)
    right = [answer == e.answer for answer, e in zip(generate(net, examples), examples, strict=True)]
    assert np.mean(right) > 0.8


def test_the_answer_needs_the_picture(net):
    examples = data.examples("held-out", 64, seed=7)
    others = [e._replace(pixels=examples[i - 1].pixels) for i, e in enumerate(examples)]
    right = [answer == e.answer for answer, e in zip(generate(net, others), examples, strict=True)]
    # One digit guessed of nine is right once in nine, and most answers have three.
    assert np.mean(right) < 0.25


def test_the_picture_is_needed_after_the_first_blocks(net):
    """An early model had all it needed in the text tokens after block 1: then no way to drop can be told from another."""
    batch = evaluate.batches(128, seed=3)[0]
    nothing = torch.zeros(64, data.TOKENS, dtype=torch.bool)
    whole = train.answers_right(net, batch).float().mean()
    dropped = train.answers_right(net, batch, evaluate.dropped_from(batch, 2, 8, nothing)).float().mean()
    some = train.answers_right(net, batch, evaluate.dropped_from(batch, 2, 8, evaluate.keep_random(64, 0.11, 0))).float().mean()
    assert dropped < whole - 0.3
    assert some < whole - 0.05


def test_splits_are_disjoint():
    train, held_out = (data.handwriting(split)[0].reshape(-1, 64) for split in data.SPLITS)
    assert len(train) > 1000
    assert len(held_out) > 300
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in held_out}


def test_data_is_deterministic():
    first, second, other = (data.examples("held-out", 28, seed=s) for s in (3, 3, 4))
    assert [e._replace(pixels=None) for e in first] == [e._replace(pixels=None) for e in second]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0].pixels, other[0].pixels)


@pytest.mark.parametrize("kind", data.KINDS)
def test_answers_follow_from_the_picture(kind):
    """Each answer is worked out again from the words, by other code than data.ask."""
    rng = np.random.default_rng(5)
    scenes = data.scenes("train", 40, rng)
    for digits, colours in zip(scenes.digits.reshape(-1, 3, 3), scenes.colours.reshape(-1, 3, 3), strict=True):
        question = data.ask(digits.ravel(), colours.ravel(), kind, rng)
        place = {data.NAMES[c]: at for at, c in np.ndenumerate(colours)}
        row, column = place[next(word for word in question.words if word in data.NAMES)]
        if kind == "list":
            expected = [digits[place[name]] for name in question.words[1:]]
        elif kind == "row":
            expected = digits[row]
        elif kind == "column":
            expected = digits[:, column]
        elif kind in ("step", "steps"):
            for move in question.words[1:]:
                row, column = {
                    "left": (row, column - 1),
                    "right": (row, column + 1),
                    "above": (row - 1, column),
                    "below": (row + 1, column),
                }[move]
            assert row >= 0 <= column
            expected = [digits[row, column]]
        else:
            found = [digits[row, column]]
            for _ in range(3):
                found.append(digits.ravel()[found[-1] - 1])
            expected = found[1:] if kind == "trail" else [found[2]]
        assert list(question.answer) == list(expected)


def test_a_digit_lies_in_the_patch_that_is_named():
    """Relevant patches are what the accuracy harness counts: ink must be there, and of the right colour."""
    scenes = data.scenes("held-out", 16, np.random.default_rng(0))
    patches = scenes.pixels.reshape(16, 3, 10, 10, 10, 10).transpose(0, 2, 4, 1, 3, 5).reshape(16, 100, 3, 100)
    inks = np.array(list(data.COLOURS.values()))
    background = np.median(patches, axis=(1, 3))
    for i in range(16):
        for patch, colour in zip(scenes.patches[i], scenes.colours[i], strict=True):
            ink = np.sort(patches[i, patch], axis=1)[:, -8:].mean(1) - background[i]
            nearest = ((inks / np.linalg.norm(inks, axis=1, keepdims=True)) @ ink).argsort()[-3:]
            assert ink.max() > 0.4
            assert colour in nearest


def test_bad_arguments():
    with pytest.raises(ValueError, match="split must be one of"):
        data.handwriting("test")
    with pytest.raises(ValueError, match="order must be"):
        data.prompt(("row", "red"), "between")
    with pytest.raises(ValueError, match="words must come from"):
        data.prompt(("row", "pink"))
    with pytest.raises(ValueError, match="kind must be one of"):
        data.ask(np.ones(9, int), np.arange(9), "sum", np.random.default_rng(0))
