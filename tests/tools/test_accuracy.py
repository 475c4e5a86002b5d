"""The accuracy harness: budgets mean what they say, statistics are right, and reports follow from the runs."""

import csv
import importlib
import itertools
import json
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from v2drop_kernels.schedule import Schedule, Stage

ROOT = Path(__file__).resolve().parents[2]
OURS = ("tasks", "measure", "report", "harness")


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/accuracy, which is a program and no package."""
    before, path = {name: sys.modules.pop(name, None) for name in OURS}, list(sys.path)
    sys.path[:0] = [str(ROOT / "bench" / "accuracy"), str(ROOT / "bench"), str(ROOT)]
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in OURS})
    sys.path[:] = path
    for name, module in before.items():
        sys.modules.pop(name)
        if module:
            sys.modules[name] = module


@pytest.mark.parametrize(("depth", "n"), [(8, 100), (28, 1200), (32, 576)])
def test_a_budget_is_the_mean_share_from_the_first_drop_on(bench, depth, n):
    layers = bench.tasks.progressive_layers(depth)
    for method in bench.measure.methods():
        schedule = method.schedule(layers, n, depth)
        if method.shape == bench.measure.EXIT:  # all up to one block, and nothing from there on: within half a block
            wanted = (layers[0] + method.budget / 100 * (depth - layers[0])) / depth
            assert schedule.counts(n) == (0,)
            assert abs(schedule.average_tokens(n, depth) / n - wanted) <= 0.5 / depth
            continue
        left = schedule.tokens(n, depth)[layers[0] :]
        # solve() comes within half a token of the average over all blocks; the token that always stays can add one more.
        share = method.budget / 100
        if method.shape == bench.measure.ENTRY:  # as many in the mean over all blocks as the others
            share = (layers[0] + share * (depth - layers[0])) / depth
        assert abs(statistics.mean(left) - n * share) <= 1 + 0.5 * depth / (depth - layers[0])
        assert schedule.layers == {"one-time": layers[:1], bench.measure.ENTRY: (0,)}.get(method.shape, layers)
        assert (schedule.counts(n)[-1] == 1) or "exit" not in method.shape
        assert schedule.inject == (method.shape == bench.measure.LATE)
        stage = bench.measure.POLICIES.get(method.policy) or bench.measure.PAPERS[method.policy][2]
        assert {s.policy for s in schedule.stages} == {stage["policy"]}


def test_layers_are_v2drops_in_other_depths(bench):
    assert bench.tasks.progressive_layers(32) == (3, 17, 22)
    assert bench.tasks.progressive_layers(28) == (3, 15, 19)
    assert bench.tasks.progressive_layers(8) == (1, 4, 6)
    assert bench.tasks.progressive_layers(2) == (1,)


def test_methods_cover_the_comparison(bench):
    methods = list(bench.measure.methods())
    papers = len(bench.measure.PAPERS) + 2  # one of them is random, with three seeds
    assert len(set(map(str, methods))) == len(methods) == 7 * (3 * 2 * 4 + 1) + papers * 4 - 2  # ToMe has two budgets
    assert sum(m.policy == "random" for m in methods) == 3 * 25
    few = list(bench.measure.methods(["random"], ["one-time"], ["persistent"], [11.0], 2, []))
    assert [(m.budget, m.seed) for m in few] == [(11.0, 0), (11.0, 1), (50.0, 0), (50.0, 1)]


def _run(bench, right, answers=None, kept=None, method=None):
    return bench.measure.Run(method, Schedule((Stage(1, 2),)), answers or right, right, kept or [[[0, 1]]] * len(right))


def test_difference_is_paired(bench):
    a = [_run(bench, [True, True, False, True])]
    seeds = [_run(bench, [True, False, False, False]), _run(bench, [False, False, False, True])]
    # Per question 1 - 1/2, 1 - 0, 0 - 0, 1 - 1/2.
    points, error = bench.measure.difference(a, seeds)
    assert points == pytest.approx(50)
    assert error == pytest.approx(100 * statistics.stdev([0.5, 1, 0, 0.5]) / 2)
    assert bench.measure.difference(a, a) == (0, 0)
    assert [bench.report.verdict(*x) for x in [(5, 2), (-5, 2), (3.9, 2), (0, 0)]] == ["holds", "fails", "open", "open"]


def test_relevant_share(bench):
    items = [bench.tasks.Item({}, 0, relevant) for relevant in [(0, 5), (7,), None]]
    kept = [[[0, 1, 5], [1]], [[7, 8], [7]], [[1], [1]]]
    task = SimpleNamespace(items=items)
    assert bench.measure.relevant_share(task, kept, 0) == 1
    assert bench.measure.relevant_share(task, kept, -1) == 1 / 3
    assert bench.measure.relevant_share(SimpleNamespace(items=items[2:]), kept[2:], 0) is None


def test_answers_are_compared_as_in_vqa(bench):
    assert bench.tasks.normal(" A Cat, on the  mat.\n") == "cat on mat"


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "line 1: not JSON"), ('{"image": "a", "question": "b"}', "line 1: needs answer"), ("\n", "holds no question"),
     ('{"image": "a", "question": "b", "answer": "c"}\n[]', "line 2: needs image, question, answer")],
)  # fmt: skip
def test_wrong_questions(bench, tmp_path, text, message):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        bench.tasks.read_questions(path)


@pytest.fixture(scope="module")
def net():
    pytest.importorskip("transformers", minversion="5", reason="the harness runs Hugging Face models")
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=100, patch_size=10
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=2,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, image_seq_length=100, vision_feature_layer=-1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower with more: on two busy cores these tests took 100 s, not 7
    yield LlavaForConditionalGeneration(config).eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def make(bench, net):
    """Makes a task of 12 questions, of three lengths, to a model with random weights; the answers are its own, so all are right."""
    rng = np.random.default_rng(0)
    items = []
    decode = lambda ids: tuple(itertools.takewhile(lambda x: x != 2, ids.tolist()))

    def make(batch=4):
        for i in range(len(items), 12):
            ids = torch.tensor([[1, *[3] * 100, *rng.integers(4, 64, 2 + i % 3).tolist()]])
            inputs = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.from_numpy(rng.normal(size=(1, 3, 100, 100)).astype(np.float32)),
            }
            with torch.inference_mode():
                answer = decode(net.generate(**inputs, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :])
            items.append(bench.tasks.Item(inputs, answer, tuple(rng.permutation(100)[:3].tolist())))
        return bench.tasks.Task(
            name="random",
            about="random weights",
            model=net,
            items=items,
            decode=decode,
            right=lambda given, wanted: given == wanted,
            layers=(2, 4, 6),
            batch=batch,
            max_new_tokens=3,
        )

    return make


def test_batches_have_no_padding_and_every_question_once(make):
    task = make()
    batches = list(task.batches())
    assert sorted(i for chosen, _ in batches for i in chosen) == list(range(12))
    for chosen, inputs in batches:
        for row, i in enumerate(chosen):
            assert torch.equal(inputs["input_ids"][row], task.items[i].inputs["input_ids"][0])


def test_an_undropped_run_gives_the_models_own_answers(bench, make):
    done = bench.measure.run(make(), None)
    assert all(done.right)
    assert bench.measure.row(make(), done, done)["accuracy"] == 100


def test_answers_do_not_depend_on_the_batch(bench, make):
    for policy in bench.measure.POLICIES:
        method = bench.measure.Method(policy, "progressive", "compacted", 22.0, 1)
        together, alone = (bench.measure.run(make(batch), method) for batch in (4, 1))
        assert together.kept == alone.kept
        assert together.answers == alone.answers


def test_seeds_and_position_ids_reach_the_dropper(bench, make, monkeypatch):
    models = importlib.import_module("v2drop_kernels.models")
    real, seen = models.TokenDropper, []
    monkeypatch.setattr(models, "TokenDropper", lambda schedule, **given: seen.append(given) or real(schedule, **given))
    methods = [
        bench.measure.Method("random", "one-time", ids, 11.0, seed) for ids in ("persistent", "compacted") for seed in (0, 1)
    ]
    kept = [bench.measure.run(make(12), method).kept for method in methods]
    assert {(given["positions"], given["seed"]) for given in seen} == {(m.positions, m.seed) for m in methods}
    assert kept[0] == kept[2] != kept[1] == kept[3]


def test_a_drop_that_does_not_fire_is_an_error(bench, make, monkeypatch):
    models = importlib.import_module("v2drop_kernels.models")
    real = models.TokenDropper
    monkeypatch.setattr(models, "TokenDropper", lambda schedule, **given: real(Schedule((Stage(2, 99),)), **given))
    with pytest.raises(RuntimeError, match=r"question \d+: kept \[99\] of 100"):
        bench.measure.run(make(), bench.measure.Method("random", "one-time", "persistent", 11.0))


def test_report(bench, make, tmp_path):
    task = make()
    undropped = bench.measure.run(task, None)
    chosen = bench.measure.methods(
        ["variation L2", "random"], ["progressive", "one-time"], ["persistent"], [33.0, 5.0], 2, ["PDrop"]
    )
    runs = [bench.measure.run(task, method) for method in chosen]
    bench.report.write(tmp_path, task, undropped, runs, {"run": "dry"}, "the command")
    with (tmp_path / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 + len(runs) == 1 + 3 * 5 + 2
    assert rows[0]["policy"] == "none"
    for row, done in zip(rows[1:], runs, strict=True):
        assert float(row["accuracy"]) == pytest.approx(100 * statistics.mean(done.right), abs=1e-3)
        assert row["accuracy"] == row["agreement"]  # here the right answers are the undropped ones
        share = statistics.mean(float(row[f"tenth_{i}"]) for i in range(1, 11))
        assert share == pytest.approx(len(done.kept[0][0]), abs=0.01)
        had = [len(set(item.relevant) & set(stages[-1])) for item, stages in zip(task.items, done.kept, strict=True)]
        assert float(row["relevant_last"]) == pytest.approx(100 * sum(had) / 36, abs=1e-3)
    text = (tmp_path / "accuracy.md").read_text()
    of = lambda *key: [r for r in runs if (r.method.policy, r.method.shape, r.method.budget) == key]
    for policy, shape in itertools.product(("variation L2", "random"), ("progressive", "one-time")):
        (line,) = re.findall(rf"\| {shape}, persistent ids, {policy} \| ([\d.]+).*\[[\d.]+\] \| ([\d.]+).*\[[\d.]+\] \|", text)
        for cell, budget in zip(line, (33.0, 5.0), strict=True):
            each = [100 * statistics.mean(r.right) for r in of(policy, shape, budget)]
            assert float(cell) == pytest.approx(statistics.mean(each), abs=0.051)
    points, error = bench.measure.difference(of("variation L2", "progressive", 5.0), of("variation L2", "one-time", 5.0))
    assert f"| {points:+.1f} ± {error:.1f} " in text
    (line,) = re.findall(r"\| PDrop: progressive, compacted ids \| ([\d.]+) \[[\d.]+\] \| ([\d.]+) \[[\d.]+\] \|", text)
    assert [float(x) for x in line] == [
        pytest.approx(100 * statistics.mean(of("PDrop", "progressive", b)[0].right), abs=0.051) for b in (33.0, 5.0)
    ]
    for name in ("accuracy.png", "bias.png", "methods.png"):
        assert f"({name})" in text
        with Image.open(tmp_path / name) as image:
            assert len(image.getcolors(1 << 20)) > 20


def test_the_program_on_a_checkpoint(bench, net, tmp_path, capsys, monkeypatch):
    """Pictures and questions of one's own, to a model with random weights that is saved as users have theirs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", *(f"w{i}" for i in range(59))]
    words_of = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words_of.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_of, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }} "
        "{% endfor %}{% endfor %}"
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 100}, crop_size=100), tokenizer, patch_size=10,
        vision_feature_select_strategy="default", chat_template=template, num_additional_image_tokens=1,
    )  # fmt: skip
    net.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    asked = []
    for i in range(4):
        Image.effect_noise((120, 100), 90 + i).save(tmp_path / f"{i}.png")
        asked.append({"image": f"{i}.png", "question": f"w{i} w9", "answer": ["w1", "w2"]})
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, asked)))
    program = importlib.util.spec_from_file_location("accuracy", ROOT / "bench" / "accuracy" / "__main__.py")
    module = importlib.util.module_from_spec(program)
    program.loader.exec_module(module)
    given = ["--model", tmp_path / "model", "--images", tmp_path, "--questions", tmp_path / "q.jsonl", "--dtype", "float32",
             "--device", "cpu", "--out", tmp_path / "out", "--budgets", "25", "--shapes", "one-time", "--positions", "persistent",
             "--seeds", "1", "--max-new-tokens", "2", "--policies", "variation L2", "random", "--papers", "FastV",
             "FasterVLM"]  # fmt: skip
    assert module.main(list(map(str, given))) == 0
    printed = capsys.readouterr().out
    assert "written: " in printed
    with (tmp_path / "out" / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["policy"], row["kept"], row["of"], row["relevant_first"]) for row in rows] == [
        ("none", "", "100", ""), ("variation L2", "25", "100", ""), ("random", "25", "100", ""), ("variation L2", "50", "100", ""),
        ("random", "50", "100", ""), ("FastV", "25", "100", ""),
    ]  # fmt: skip
    assert "FasterVLM, before the decoder, compacted ids, 25 %: layer must be one of the 1 blocks" in printed
    assert "do not say which tokens are relevant" in (tmp_path / "out" / "accuracy.md").read_text()
