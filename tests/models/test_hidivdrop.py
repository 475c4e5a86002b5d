"""HiDivDrop whole: rankings by several tokens, learnable budgets, ILVAS, and a policy of one's own in one file."""

from __future__ import annotations

import dataclasses
import functools
import sys
import textwrap

import pytest
import torch
import transformers as tf
from support import slow, tiny
from support.dropped import ITEMS, check_decode, close, rows_of
from support.tiny import item

from v2drop_kernels.models import Ilvas, TokenDropper, ilvas, policies
from v2drop_kernels.schedule import Schedule, Stage

ROUNDS = [item(4, "image", 9, seed=1), item(9, seed=2), item(3, "image", 2, "image", 12, seed=3)]


def schedule(**options):
    stage = {"policy": "hidivdrop", "options": options}
    return Schedule((Stage(2, 7, **stage), Stage(3, 2, **stage), Stage(4, 0, **stage)), inject=1)


def labelled(inputs):
    """Answers behind the images: one in the first item, two in the third; and the second token of the first is learnt, too."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for i, spans in enumerate([[(-6, -3)], [], [(-9, -8), (-4, -1)]]):
        real = inputs["attention_mask"][i].nonzero()
        first, end = int(real.min()), int(real.max()) + 1
        for a, b in [(first + 1, first + 2)] * (i == 0) + [(end + a, end + b) for a, b in spans]:
            labels[i, a:b] = inputs["input_ids"][i, a:b]
    return labels


def scored(tokens, queries, vision, asks):
    """``score`` of the slow reference: softmax by softmax; ``asks`` are the rows before the answers."""

    def score(layer, h, cos, sin, rows):
        asking = {
            "last": [len(rows) - 1],
            "rounds": [rows.index(r) for r in asks] or [len(rows) - 1],
            "all": [i for i, r in enumerate(rows) if r not in vision],
        }
        each = torch.stack([
            torch.nn.functional.pad(found := slow.attention_scores(layer, h, cos, sin, i), (0, len(rows) - len(found)))
            for i in asking[tokens]
        ])  # fmt: skip
        return each.mean(0) if queries == "mean" else each.norm(dim=0)

    return score


def asking(labels):
    return [r for r in range(len(labels) - 1) if labels[r] == -100 and labels[r + 1] != -100]


@pytest.mark.parametrize("queries", ["mean", "l2"])
@pytest.mark.parametrize("tokens", ["rounds", "last", "all"])
@pytest.mark.parametrize(("family", "side"), [("llava", "left"), ("llava", "right"), ("llama", "right"), ("qwen2_5_vl", "right")])
def test_rankings_by_several_tokens(family, side, tokens, queries):
    items = [*ROUNDS, item(2, "image", 5, seed=4)]  # the last one without an answer
    model, inputs, spans = tiny.batch(family, items, side)
    embeds, ids = slow.captured(model, inputs)
    labels = labelled(inputs)
    found, given = schedule(tokens=tokens, queries=queries), {"spans": spans} if family == "llama" else {}
    with torch.no_grad(), TokenDropper(found, **given)(model) as dropping:
        logits = model(**inputs, labels=labels).logits
        for i in range(len(items)):
            real, vision = rows_of(inputs, spans, i)
            score = scored(tokens, queries, vision, asking(labels[i, real]))
            want, rows, stages = slow.run(model, embeds[i, real], ids[:, i, real], found, vision, score=score)
            close(logits[i, real][rows], want)
            assert [[vision[j] for j in kept] for kept in dropping.kept(i).stages] == stages


def test_rounds_are_of_the_training():
    """Without labels the last token asks; and it is another one than those before the answers, or nothing was tested."""
    model, inputs, _ = tiny.batch("llava", ROUNDS, "right")
    kept = []
    with torch.no_grad():
        for tokens, labels in (("rounds", None), ("last", labelled(inputs)), ("rounds", labelled(inputs))):
            with TokenDropper(schedule(tokens=tokens))(model) as dropping:
                model(**inputs, labels=labels)
                kept.append([dropping.kept(i).stages for i in range(3)])
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_pdrop_in_training_ranks_by_the_tokens_before_the_answers(side):
    """As its released code; without labels, and where an item has no answer, by the last row."""
    items = [*ROUNDS, item(2, "image", 5, seed=4)]
    model, inputs, spans = tiny.batch("llava", items, side)
    embeds, ids = slow.captured(model, inputs)
    labels = labelled(inputs)
    sets, stages_of = {}, lambda policy: Schedule((Stage(2, 7, policy=policy), Stage(4, 3, policy=policy)))
    with torch.no_grad(), TokenDropper(stages_of("pdrop"))(model) as session:
        for given in (labels, None):
            logits = model(**inputs, labels=given).logits
            for i in range(len(items)):
                real, vision = rows_of(inputs, spans, i)
                score = scored("last" if given is None else "rounds", "mean", vision, asking(labels[i, real]))
                found = stages_of("hidivdrop")  # for which the slow forward ranks by `score`
                want, rows, stages = slow.run(model, embeds[i, real], ids[:, i, real], found, vision, score=score)
                close(logits[i, real][rows], want)
                sets[i, given is None] = [[vision[j] for j in kept] for kept in session.kept(i).stages]
                assert sets[i, given is None] == stages
    assert sets[0, True] != sets[0, False]


def test_decoding_through_late_injection_pyramid_and_exit(monkeypatch):
    run = slow.run

    def with_score(model, embeds, ids, schedule, vision, **given):
        prompt = given["prompt"]

        def score(layer, h, cos, sin, rows):
            return slow.attention_scores(layer, h, cos, sin, rows.index(prompt - 1)).tolist() + [0.0] * (len(rows) - prompt)

        return run(model, embeds, ids, schedule, vision, score=lambda *x: torch.tensor(score(*x)), **given)

    monkeypatch.setattr(slow, "run", with_score)
    for attention in ("sdpa", "eager"):
        for positions in ("persistent", "compacted", "group"):
            check_decode("llava", ITEMS, schedule(), attention, positions=positions)


@pytest.mark.parametrize("policy", ["hidivdrop", "fastv", "variation"])
def test_learnable_budgets_equal_the_slow_reference(policy):
    """The loss, and the gradients of the ratios and of every weight: by the mask to the scores, and by them to the projections.

    In float64, but that scores are handed on in float32. What follows is all but blind to the length of a row, which is normalised:
    a mask's gradient is a small rest of a scalar product, with errors that in float32 come close to it.
    """
    stage = {"policy": policy}
    found = Schedule((Stage(1, 9, **stage), Stage(2, 0.4, **stage), Stage(4, 0, **stage)), inject=1 if policy == "hidivdrop" else 0)
    model, inputs, spans = tiny.batch("llava", ROUNDS[:1], dtype=torch.float64)
    embeds, ids = slow.captured(model, inputs)
    labels = labelled({k: v.repeat(3, 1) if v.dim() == 2 else v for k, v in inputs.items()})[:1]
    real, vision = rows_of(inputs, spans, 0)
    model.zero_grad()
    with TokenDropper(found, soft=True, backend="reference")(model) as dropping:
        assert [16 * (1 - dropping.ratios[0].item()), dropping.ratios[1].item()] == [9, pytest.approx(0.6)]
        with torch.no_grad():  # other budgets than the schedule's
            dropping.ratios[0].fill_(5 / 16)
        logits = model(**inputs, labels=labels).logits[0, real]
        here = labels[0, real][1:] != -100
        loss = torch.nn.functional.cross_entropy(logits[:-1][here], labels[0, real][1:][here])
        loss.backward()
        assert [len(x) for x in dropping.kept(0).stages] == [11, round(0.4 * 11), 0]
    decoder = dict(model.get_decoder().named_parameters())
    got = {name: p.grad.clone() for name, p in decoder.items() if p.grad is not None}
    ratios = {layer: p.detach().clone().requires_grad_() for layer, p in zip((1, 2), dropping.ratios, strict=True)}

    model.zero_grad()

    def score(layer, h, cos, sin, rows):
        return slow.attention_scores(layer, h, cos, sin, len(rows) - 1)

    if policy == "hidivdrop":
        score = scored("rounds", "mean", vision, asking(labels[0, real]))
    logits, rows, stages = slow.run(model, embeds[0, real], ids[:, 0, real], found, vision, score=score, ratios=ratios)
    assert [len(x) for x in stages] == [11, 4, 0]
    wanted = labels[0, real][rows]
    here = wanted[1:] != -100
    want = torch.nn.functional.cross_entropy(logits[:-1][here], wanted[1:][here])
    want.backward()
    agree = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
    agree(loss, want)
    for p, ratio in zip(dropping.ratios, ratios.values(), strict=True):
        assert ratio.grad.abs() > 1e-6
        agree(p.grad, ratio.grad)
    for name, p in decoder.items():
        if p.grad is not None and "embed" not in name:
            agree(got[name], p.grad)


def test_a_few_steps_train_it():
    """Ratios, and the projections that rank, by the loss of a batch and a price on tokens: cheaper, and not worse."""
    model, inputs, _ = tiny.batch("llava", ROUNDS, "right")
    labels = labelled(inputs)
    stage = {"policy": "hidivdrop"}
    found = Schedule((Stage(1, 14, **stage), Stage(3, 8, **stage)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    blocks = [model.get_decoder().layers[x].self_attn for x in (1, 3)]
    ranking = [p.weight for block in blocks for p in (block.q_proj, block.k_proj)]
    losses, kept = [], []
    try:
        with TokenDropper(found, soft=True)(model) as dropping:
            optimiser = torch.optim.Adam([{"params": list(dropping.ratios), "lr": 0.03}, {"params": ranking, "lr": 0.01}])
            for _ in range(8):
                optimiser.zero_grad()
                loss = model(**inputs, labels=labels).loss
                (loss - sum(dropping.ratios)).backward()
                assert all(p.grad.abs().max() > 0 for p in [*dropping.ratios, *ranking])
                optimiser.step()
                losses.append(loss.item())
                kept.append([len(x) for x in dropping.kept(0).stages])
    finally:
        model.load_state_dict(before, strict=False)
    assert losses[-1] < 0.8 * losses[0]
    assert kept[0] == [14, 8]
    assert kept[-1][0] < 12
    learnt = dropping.learned_schedule()
    assert [stage.keep for stage in learnt.stages] == [1 - ratio.item() for ratio in dropping.ratios]
    assert learnt.counts(16)[1] < learnt.counts(16)[0] <= kept[-1][0]  # the last step came after


@pytest.mark.parametrize(("name", "average"), [("hidivdrop-48", 48.0), ("hidivdrop-64", 64.0), ("hidivdrop-80", 80.03125)])
def test_presets_run(name, average):
    """A decoder of 32 blocks and 576 tokens: what it reports is what the preset says, and so is what its caches hold."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**tiny.TEXT, "num_hidden_layers": 32, "max_position_embeddings": 1024})).eval()
    ids = torch.randint(3, 90, (2, 600))
    with torch.no_grad(), TokenDropper(name, spans=(5, 581))(model) as dropping:
        cache = model(ids, use_cache=True).past_key_values
    report, found = dropping.report(), policies.preset(name)
    assert report.average_tokens(1) == found.average_tokens(576, 32) == average
    assert (
        [layer.keys.shape[2] - 24 for layer in cache.layers] == [x.vision[0] for x in report.layers] == list(found.tokens(576, 32))
    )


def test_soft_needs_to_know_what_a_count_is_a_share_of():
    model = tiny.made("llava_next")
    counts, shares = Schedule((Stage(1, 9), Stage(2, 3), Stage(3, 0))), Schedule((Stage(1, 0.5), Stage(3, 0)))
    with pytest.raises(ValueError, match="soft must be the number of vision"), TokenDropper(counts, soft=True)(model):
        pass
    for found, soft, want in ((counts, 12, [0.25, 2 / 3]), (shares, True, [0.5])):
        with TokenDropper(found, soft=soft)(model) as dropping:
            assert [x.item() for x in dropping.ratios] == pytest.approx(want)
    for soft in (-1, 0.5, None):
        with pytest.raises(ValueError, match="soft must be True, False or a number of vision tokens"):
            TokenDropper(shares, soft=soft)
    dart = Schedule((Stage(1, 9, policy="sevens"),))
    with pytest.raises(ValueError, match=r"policy must be one of .*hidivdrop"):
        TokenDropper(dart)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ilvas(side):
    """From the attention weights that the eager model hands out, item by item; with late injection only behind it."""
    model, inputs, spans = tiny.batch("llava", ROUNDS, side, "eager")
    for inject, (n, top) in ((0, (1, 5)), (0, (2, 100)), (1, (1, 5)), (2, (2, 1))):
        late = Schedule((), inject=inject)
        with torch.no_grad(), TokenDropper(late)(model):
            attentions = model(**inputs, output_attentions=True).attentions
        found = ilvas(model, [inputs, inputs], n=n, top=top, schedule=late)
        assert len(found.values) == tiny.LAYERS
        for x, value in enumerate(found.values):
            if x < inject or x + n >= tiny.LAYERS:
                assert value != value
                continue
            each = []
            for i in (0, 2):
                last = int(inputs["attention_mask"][i].nonzero().max())
                rows = [r for a, b in spans[i] for r in range(a, b)]
                a, b = (attentions[y][i, :, last, rows] for y in (x, x + n))
                best = slow.best(a.mean(0).tolist(), top)
                each.append(sum(torch.dot(a[:, j], b[:, j]) / a[:, j].norm() / b[:, j].norm() for j in best) / len(best))
            # Ten float32 roundings or so of numbers that are at most 1.
            assert value == pytest.approx(float(sum(each) / 2), abs=1e-5)


def test_ilvas_suggests_local_maxima():
    nan = float("nan")
    found = Ilvas((nan, 0.9, 0.2, 0.5, 0.4, 0.4, 0.7, 0.7, 0.1, 0.2, nan), n=1, top=1)
    assert found.filters() == (3, 6)
    assert found.filters(1) == (6,)
    model, inputs, _ = tiny.batch("llava", [item(9, seed=2)])
    with pytest.raises(ValueError, match="inputs must have an item with images"):
        ilvas(model, inputs)
    with pytest.raises(ValueError, match="n must be an int of at least 1, got 0"):
        ilvas(model, inputs, n=0)


KEYNORM = '''
"""Keys of small norm stay: they tend to be the attended ones (kvpress, Knorm), by block L's projections on its own input."""

from dataclasses import dataclass

import v2drop_kernels as vk
from v2drop_kernels.models import DropContext, Method, Policy


@dataclass(frozen=True)
class KeyNorm(Policy):
    norm: str = "l2"

    method = Method(paper="kvpress, Knorm", where="decoder", score="negative norm of the token's keys", needs_weights=False)

    def score(self, at: DropContext):
        _, keys = at.project(at.layer, at.hidden, at.last)
        return -vk.key_norm_score(keys, norm=self.norm)
'''


def test_a_method_is_one_file(tmp_path, monkeypatch):
    """The example of CONTRIBUTING: a file among the policies, or in a folder that is added to them, is all that it takes."""
    (tmp_path / "keynorm.py").write_text(textwrap.dedent(KEYNORM))
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    model, inputs, spans = tiny.batch("llava", ROUNDS)
    embeds, ids = slow.captured(model, inputs)
    found = Schedule((Stage(2, 5, policy="keynorm", options={"norm": "l1"}),))

    def score(layer, h, cos, sin, rows):
        attn = layer.self_attn
        k = attn.k_proj(layer.input_layernorm(h)).view(len(h), -1, attn.head_dim).transpose(0, 1)
        return -slow.rotated(k, cos, sin).abs().sum((0, 2))

    try:
        assert "keynorm" in policies.names()
        with torch.no_grad(), TokenDropper(found)(model) as dropping:
            logits = model(**inputs).logits
            for i in range(3):
                real, vision = rows_of(inputs, spans, i)
                want, rows, stages = slow.run(model, embeds[i, real], ids[:, i, real], found, vision, score=score)
                close(logits[i, real][rows], want)
                assert [[vision[j] for j in kept] for kept in dropping.kept(i).stages] == stages
        with pytest.raises(ValueError, match="options of the policy 'keynorm' must be among norm, got 'nrom'"):
            TokenDropper(Schedule((Stage(2, 5, policy="keynorm", options={"nrom": "l1"}),)))
    finally:
        sys.modules.pop("v2drop_kernels.models.policies.keynorm", None)


def test_scores_from_outside():
    """The callable gets the context and ranks; a stage that keeps nothing does not call it."""
    found = Schedule((Stage(0, 6, policy="given"), Stage(2, 3, policy="given"), Stage(3, 0, policy="given")))
    model, inputs, _ = tiny.batch("llava", ROUNDS)
    asked = []

    def first_and_last(at):
        asked.append((at.layer, at.counts, at.keep, at.prev_hidden is None, tuple(at.embeds.shape)))
        rows = torch.arange(at.hidden.shape[1], device=at.hidden.device, dtype=torch.float32).expand(at.hidden.shape[:2])
        return rows if at.layer else -rows

    with torch.no_grad(), TokenDropper(found, scores=first_and_last)(model) as dropping:
        model(**inputs)
        assert dropping.kept(0).stages == (tuple(range(6)), (3, 4, 5), ())
    n = inputs["input_ids"].shape[1]
    assert asked == [(0, (16, 0, 32), (6, 0, 6), True, (3, n, 32)), (2, (6, 0, 6), (3, 0, 3), False, (3, n, 32))]
    with pytest.raises(ValueError, match="scores must be given to TokenDropper for the policy 'given'"), TokenDropper(found)(model):
        model(**inputs)


def test_what_a_tower_shows_is_of_this_forward():
    """``watch`` comes and goes with the context, its notes with the forward, and stages that say the same watch once."""
    model, inputs, _ = tiny.batch("llava", ROUNDS)
    tower, calls = model.model.vision_tower, []

    @dataclasses.dataclass(frozen=True)
    class Watching(policies.Policy):
        def register_hooks(self, family, seen):
            yield tower.register_forward_hook(lambda *_: seen.setdefault("calls", []).append(1))

        def score(self, at):
            calls.append((at.layer, tuple(at.tower_cache["calls"])))
            if len(calls) == 1:
                raise InterruptedError
            return torch.zeros(at.hidden.shape[:2])

    hooks = len(tower._forward_hooks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "find", lambda name: Watching)
        found = Schedule((Stage(0, 9, policy="watching"), Stage(2, 3, policy="watching")))
        with torch.no_grad(), TokenDropper(found)(model):
            assert len(tower._forward_hooks) == hooks + 1
            with pytest.raises(InterruptedError):
                model(**inputs)
            model(**inputs)
            model(**inputs)
    assert calls == [(0, (1,))] + [(0, (1,)), (2, (1,))] * 2
    assert len(tower._forward_hooks) == hooks
