"""Every type of model that is served, as a tiny random model, against its own undropped forward with hidden rows."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from support import families
from support.dropped import close
from support.families import IMAGE
from support.hidden_rows import AbsentRows, HiddenRows

from v2drop_kernels.core.presets import fitted
from v2drop_kernels.models import TokenDropper, preset, support
from v2drop_kernels.models.adapters.capabilities import placeholder_ids, text_decoder
from v2drop_kernels.schedule import Schedule, Stage

ROOT = Path(__file__).resolve().parents[2]
SCHEDULE = Schedule((Stage(1, 0.6), Stage(3, 2)))
GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def prompts(rows):
    """A batch padded on the left, and which of its rows are vision tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}, ids == IMAGE


def runs(row):
    edges = torch.nn.functional.pad(row.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def check(model, inputs, vision, spans=None, schedule=SCHEDULE):
    """Kept rows, logits of every step and tokens of a generation."""
    with torch.no_grad():
        with HiddenRows(model, text_decoder(model), vision, schedule) as want:
            expected = model.generate(**inputs, **GREEDY)
        with TokenDropper(schedule, spans=spans)(model) as session:
            got = model.generate(**inputs, **GREEDY)
    for i, row in enumerate(vision):
        mine = row.nonzero().flatten()
        assert [mine[list(kept)].tolist() for kept in session.kept(i).stages] == [kept[i] for kept in want.kept]
    close(torch.stack(got.logits), torch.stack(expected.logits))
    assert torch.equal(got.sequences, expected.sequences)
    return session


@pytest.mark.parametrize("kind", families.known(families.SERVED))
def test_drops_equal_hidden_rows_and_keeping_all_changes_no_bit(kind):
    """One image between text, and an image in two runs; no pixels, so that the vision tokens have the placeholder's embedding."""
    model = families.made(kind)
    inputs, vision = prompts([[5, 9, 7, 11, *[IMAGE] * 9, 13, 21, 17], [33, *[IMAGE] * 4, 44, *[IMAGE] * 4, 12, 19]])
    spans = None if placeholder_ids(model.config, model.base_model) else [runs(row) for row in vision]
    check(model, inputs, vision, spans)
    with torch.no_grad():
        want = model(**inputs).logits
        with TokenDropper(Schedule((Stage(1, 1.0),)), spans=spans)(model):
            assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("kind", families.known(families.STATEFUL))
def test_drops_equal_absent_rows_where_blocks_keep_a_state(kind):
    """Linear attention and convolutions: what was dropped is absent from the state of its block and of all that follow."""
    model = families.made(kind)
    inputs, vision = prompts([[5, 9, 7, 11, *[IMAGE] * 9, 13, 21, 17], [33, *[IMAGE] * 4, 44, *[IMAGE] * 4, 12, 19]])
    spans = None if placeholder_ids(model.config, model.base_model) else [runs(row) for row in vision]
    with torch.no_grad():
        with TokenDropper(SCHEDULE, spans=spans)(model) as session:
            got = model.generate(**inputs, **GREEDY)
        ids, new = got.sequences[:, :-1], GREEDY["max_new_tokens"] - 1
        real = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
        wide = torch.nn.functional.pad(vision, (0, new))
        with AbsentRows(model, text_decoder(model), wide, SCHEDULE, real.bool()) as want:
            expected = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, -new - 1 :]
        untouched = model(**inputs).logits
        with TokenDropper(Schedule((Stage(1, 1.0),)), spans=spans)(model):
            assert torch.equal(model(**inputs).logits, untouched)
    for i, row in enumerate(vision):
        mine = row.nonzero().flatten()
        assert [mine[list(kept)].tolist() for kept in session.kept(i).stages] == [kept[i] for kept in want.kept]
    close(torch.stack(got.logits, 1), expected)
    assert torch.equal(expected.argmax(-1), got.sequences[:, -new - 1 :])


# With transformers 5.17 the tower of MiniMax-M3-VL has other sizes, and the grid of Video-LLaVA is not known.
NEWER_PICTURES = ("minimax_m3_vl", "video_llava")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.newest) if kind in NEWER_PICTURES else kind
        for kind in families.known(families.WITH_PICTURES)
    ],
)
def test_pictures(kind):
    """The same with pixels, which DeepStack and ids of time, row and column need; the grid is known after generate()."""
    model = families.made(kind)
    pixels, (n, _) = families.pictures(kind, 2)
    inputs, vision = prompts([[5, 9, 7, 93, *[IMAGE] * n, 13, 21, 17], [33, 93, *[IMAGE] * n, 44, 12, 19, 20, 29, 51]])
    names = inspect.signature(type(model).forward).parameters
    inputs |= {name: vision.long() for name in ("mm_token_type_ids", "token_type_ids") if name in names}
    session = check(model, inputs | pixels, vision)
    if "image_grid_thw" in pixels:
        assert session.kept(0).grid == (2, 3)
    elif kind not in families.RESAMPLED:
        assert session.kept(1).grid == (math.isqrt(n), math.isqrt(n))


def test_deepstack_is_excluded_from_the_change_of_a_block():
    """A drop before block 3, behind which nothing is added, ranks by what block 2 changed, not by what was added behind it."""
    model = families.made("qwen3_vl")
    pixels, (n,) = families.pictures("qwen3_vl", 1)
    inputs, vision = prompts([[5, 9, 7, 93, *[IMAGE] * n, 13, 21, 17]])
    inputs |= {"mm_token_type_ids": vision.long()} | pixels
    schedule = Schedule((Stage(3, 2),))
    with torch.no_grad():
        for scale in (1.0, 50.0):  # what is added decides nothing
            with HiddenRows(model, text_decoder(model), vision, schedule) as want, scaled_features(model, scale):
                model(**inputs)
            with TokenDropper(schedule)(model) as session, scaled_features(model, scale):
                model(**inputs)
            first = int(vision[0].nonzero()[0])
            assert [first + i for i in session.kept(0).stages[0]] == want.kept[0][0]


@contextlib.contextmanager
def scaled_features(model, scale):
    """Make the features behind the first blocks larger."""
    before = lambda m, args, kw: (args, {**kw, "deepstack_visual_embeds": [x * scale for x in kw["deepstack_visual_embeds"]]})
    handle = model.get_decoder().register_forward_pre_hook(before, with_kwargs=True)
    yield
    handle.remove()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mllama", "in its sequence of tokens; MllamaTextModel reads them by Mllama"),
        ("florence2", "Florence2ForConditionalGeneration is an encoder-decoder"),
        ("instructblip", "a query former makes a few of its own"),
        ("gemma3n", "one hidden state per token; Gemma3nTextModel has 4"),
        ("blip", "with layers, a list of blocks; BlipTextLMHeadModel lacks it"),
        pytest.param("dots3_note", "'indexed_attention', in block 0", marks=pytest.mark.newest),  # older ones lack the type
    ],
)
def test_what_lacks_a_capability_is_refused_by_it(kind, words):
    answer, why = support.judge(kind)
    assert answer == "no"
    assert words in why
    assert not why.rstrip(".").count(". ")


@pytest.mark.newest
def test_the_table_of_the_documentation_is_current():
    """All types stand in it, and a sample is judged as it says; docs/generate.py --models writes it anew."""
    page = (ROOT / "docs" / "models.md").read_text().split("<!-- models:begin -->")[1].split("<!-- models:end -->")[0]
    table = [
        tuple(cell.strip(" `") for cell in line.strip("| ").split(" | ")) for line in page.splitlines() if line.startswith("| `")
    ]
    assert [row[0] for row in table] == list(support.types())
    assert {*families.SERVED, *families.STATEFUL} == {*families.known(families.SERVED), *families.known(families.STATEFUL)}
    sample = sorted(row[0] for row in table)[::16]
    for name, answer, why in support.rows(sample):
        assert next(row for row in table if row[0] == name)[1:] == tuple(filter(None, (answer, why.replace("`", ""))))
    served = [row[0] for row in table if row[1] == "yes"]
    tested = {*families.SERVED, *families.STATEFUL}
    assert set(served) - tested <= set(families.UNTESTED)
    readme = (ROOT / "README.md").read_text().split("<!-- models:begin -->")[1].split("<!-- models:end -->")[0]
    assert re.findall(r"`([\w.-]+)`", readme.split("Served:")[1]) == served


def test_the_table_judges_as_the_tests_do():
    """A sample of the types that are tested here, and the words of the command."""
    sample = ("llava", "gemma3", "qwen3_vl", "mistral4")
    assert [row[1] for row in support.rows(sample)] == ["yes", "yes", "yes", "with spans="]
    assert support.markdown(["llava"]).startswith(
        f"transformers {transformers.__version__}: 1 types, 1 served, 0 with `spans=`, 0 refused"
    )
    with pytest.raises(ValueError, match="types must be among those that take images and return text, got 'llama'"):
        support.markdown(["llama"])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        *((kind, "") for kind in ("glm4", "paddleocr_vl", "qwen3_moe", "qwen3_vl")),
        pytest.param("granite_docling", "", marks=pytest.mark.newest),
        ("gemma3", "the policy 'fastv' needs attention weights, which a model with windows"),
        ("qwen3_5", "the policy 'fastv' needs attention weights, which a model with windows or linear attention"),
        ("hunyuan_vl", "whose attention has query_layernorm"),
        ("olmo2", "whose attention has no norm of the block's input"),
        ("phi3", "whose attention has no q_proj"),
    ],
)
def test_policies_that_need_attention_rank_by_the_weights_of_the_block_or_are_refused(kind, words):
    model = families.made(kind)
    inputs, vision = prompts([[5, 9, 7, 11, *[IMAGE] * 9, 13, 21, 17]])
    spans = None if placeholder_ids(model.config, model.base_model) else [runs(row) for row in vision]
    dropper = TokenDropper(Schedule((Stage(2, 3, "fastv"),)), spans=spans)
    if words:
        with torch.no_grad(), dropper(model), pytest.raises(ValueError, match=words):
            model(**inputs)
        return
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[1].mean(1)[0, -1, 4:13]
        model.set_attn_implementation("sdpa")
        with dropper(model) as session:
            model(**inputs)
    assert list(session.kept(0).stages[0]) == sorted(weights.topk(3).indices.tolist())


def test_an_older_transformers_is_refused(monkeypatch):
    model = families.made("llava")
    current = importlib.import_module("transformers")  # another object than the one imported above, which it may replace lazily
    monkeypatch.setattr(current, "__version__", "5.8.1")
    words = r"TokenDropper needs transformers >= 5\.\d+, but 5\.8\.1 is installed"
    with pytest.raises(RuntimeError, match=words), TokenDropper(SCHEDULE)(model):
        pass


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "gemma3"])
def test_budgets_per_image(kind):
    """Every image keeps its own share, at both stages; the batch has items of one, two and three images, and of none."""
    rows = [
        [5, *[IMAGE] * 9, 13, *[IMAGE] * 4, 7],
        [33, *[IMAGE] * 6, 4, *[IMAGE] * 2, 44, *[IMAGE] * 5, 12],
        [8, 9],
        [4, *[IMAGE] * 3, 6],
    ]
    inputs, vision = prompts(rows)
    model = families.made(kind)
    schedule = Schedule((Stage(1, 0.6), Stage(3, 1)), per="image")
    session = check(model, inputs, vision, schedule=schedule)
    assert [len(session.kept(i).stages[0]) for i in range(4)] == [5 + 2, 3 + 1 + 3, 0, 1]
    assert [len(session.kept(i).stages[1]) for i in range(4)] == [2, 3, 0, 1]
    assert Schedule.from_json(schedule.to_json()) == schedule
    with pytest.raises(ValueError, match="per must be one of"):
        Schedule((), per="batch")
    dycoke = Schedule((Stage(0, 0.5, "dycoke"),), per="image")
    with pytest.raises(ValueError, match="per='image' with the policy 'dycoke', which counts by itself"):
        TokenDropper(dycoke)(families.made("llava")).__enter__()


@pytest.mark.parametrize("policy", ["variation", "fastv", "random"])
def test_a_prompt_that_ends_in_its_image_keeps_its_last_row(policy):
    """The first token of the answer comes from that row. It is one of those that the budget counts, or the only one."""
    model = families.made("llava")
    inputs, _ = prompts([[5, 9, *[IMAGE] * 9], [33, *[IMAGE] * 6, 44, 51]])
    for keep, counts in ((0.5, (4, 3)), (0, (1, 0))):
        with torch.no_grad(), TokenDropper(Schedule((Stage(1, 0.5, policy), Stage(2, keep and 1.0, policy))))(model) as session:
            model(**inputs)
        assert tuple(len(session.kept(i).stages[1]) for i in range(2)) == counts
        assert session.kept(0).stages[1][-1] == 8
        assert session.kept(0).total == 9


@pytest.mark.parametrize(("depth", "layers"), [(32, (3, 17, 22)), (28, (3, 16, 22)), (16, (2, 9, 11)), (4, (1, 2, 3))])
def test_presets_go_to_the_layers_of_the_depth(depth, layers):
    assert fitted(preset("v2drop-64"), depth).layers == layers


def test_a_preset_says_where_it_drops(capsys):
    model = families.made("llava")
    inputs, _ = prompts([[5, 9, *[IMAGE] * 9, 4]])
    with torch.no_grad(), TokenDropper("v2drop-64")(model) as session:
        model(**inputs)
    assert capsys.readouterr().err == "v2drop_kernels: v2drop-64 on 4 blocks drops before layers 1, 2, 3\n"
    assert [layer.vision for layer in session.report().layers] == [(9,), (1,), (1,), (1,)]
    assert 0 < session.report().seconds < 60
    assert "ms in the decoder" in str(session.report())
