"""TokenDropper against the slow reference: every family and attention, prefill, decoding, positions, caches, training."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Mapping

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import slow, tiny
from support.dropped import ITEMS, chance, check_decode, check_prefill, close, options, rows_of
from support.tiny import FAMILIES, IMAGE, LAYERS, item
from transformers import DynamicCache, StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer

from v2drop_kernels.models import TokenDropper
from v2drop_kernels.schedule import Schedule, Stage

HALF_THEN_3 = Schedule((Stage(2, 0.5), Stage(3, 3)))
VISION = FAMILIES[1:]
EQUAL = [item(4, "image", 6, seed=1), item(26, seed=2), item(2, "image", 8, seed=3)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_equals_the_slow_reference(family, attention, side):
    """One batch: an image, no image, two images; so items keep different numbers of rows."""
    check_prefill(family, ITEMS, HALF_THEN_3, side, attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_from_the_cache_equals_recomputing_from_scratch(family, attention):
    check_decode(family, ITEMS, HALF_THEN_3, attention)


@pytest.mark.parametrize("compact_earlier_kv", [False, True])
@pytest.mark.parametrize("positions", ["persistent", "compacted", "group"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_positions_and_earlier_caches(attention, positions, compact_earlier_kv):
    check_decode("llava", ITEMS, HALF_THEN_3, attention, positions=positions, compact_earlier_kv=compact_earlier_kv)


@pytest.mark.parametrize("compact_earlier_kv", [False, True])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_with_mrope(family, compact_earlier_kv):
    """Also a prompt without padding or ragged rows, where sdpa is given no mask at all."""
    check_decode(family, ITEMS, HALF_THEN_3, positions="compacted", compact_earlier_kv=compact_earlier_kv)
    check_decode(family, ITEMS[:1], HALF_THEN_3, positions="compacted", compact_earlier_kv=compact_earlier_kv)
    with pytest.raises(ValueError, match="positions='group' needs models with one id per token"):
        check_prefill(family, ITEMS, HALF_THEN_3, positions="group")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_both_sides_and_in_between(attention):
    """Left padding already; then item 0 gets a hole, and item 1 an end, that no query sees."""
    schedule = Schedule((Stage(2, 0.5), Stage(3, 3, policy="fastv")))
    for unseen in ([(0, -3)], [(1, slice(-2, None))], [(0, -3), (1, slice(-2, None))]):
        check_prefill("llava", ITEMS, HALF_THEN_3, "left", attention, unseen)
    check_prefill("llava", ITEMS, schedule, "left", attention, [(0, -3)])


@pytest.mark.parametrize("given", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_items_of_one_length_with_and_without_an_image(family, attention, given):
    """Nothing is padded, so sdpa is given no mask; after a drop the items differ in length and it needs one."""
    items = EQUAL if family == "llava" else EQUAL[:2]
    check_prefill(family, items, HALF_THEN_3, attention=attention)
    check_decode(family, items, HALF_THEN_3, attention, given)
    if not given:
        check_decode(family, items, HALF_THEN_3, attention, compact_earlier_kv=True)


def test_sdpa_keeps_its_fast_kernel():
    """Where the model needs no mask, because nothing is padded, layers behind a drop need none either: torch's flash kernel
    takes no mask."""
    model, inputs, _ = tiny.batch("llava", [ITEMS[0], item(4, "image", 6, seed=9)])
    masks = []
    watch = lambda m, args, kw: masks.append((args[0].shape[1], kw["attention_mask"]))
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        handle = model.get_decoder().layers[4].register_forward_pre_hook(watch, with_kwargs=True)
        model.generate(**inputs, max_new_tokens=2)
        handle.remove()
    assert masks == [(13, None), (1, None)]


def test_positions_matter():
    """The tests above could not fail if rotary tables made no difference."""
    model, inputs, _ = tiny.batch("llava", ITEMS[:1])
    logits = []
    for positions in ("persistent", "compacted", "group"):
        with torch.no_grad(), TokenDropper(HALF_THEN_3, positions=positions)(model):
            logits.append(model(**inputs).logits[:, -1])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (logits[a] - logits[b]).abs().max() > 0.01


FIRST = Schedule((Stage(0, 0.5, policy="random"), Stage(3, 3)))
LATE = Schedule((Stage(3, 0.4), Stage(4, 0)), inject=2)
AT_ONCE = Schedule((Stage(1, 5, policy="random"), Stage(3, 2, policy="pdrop")), inject=1)
EARLY = {"first": FIRST, "late": LATE, "at-once": AT_ONCE, "all-late": Schedule((), inject=4)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("schedule", EARLY.values(), ids=EARLY)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_the_first_layers_do_not_hold(family, schedule, attention):
    """Dropped before block 0, or injected late: the first layer's cache is shorter than the text that the model counts."""
    for side in ("left", "right"):
        check_prefill(family, ITEMS, schedule, side, attention)
    check_decode(family, ITEMS, schedule, attention)


@pytest.mark.parametrize("compact_earlier_kv", [False, True])
@pytest.mark.parametrize("positions", ["persistent", "compacted", "group"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("schedule", EARLY.values(), ids=EARLY)
def test_positions_of_rows_that_the_first_layers_do_not_hold(schedule, attention, positions, compact_earlier_kv):
    given = {"positions": positions, "compact_earlier_kv": compact_earlier_kv and bool(schedule.stages)}
    check_decode("llava", ITEMS, schedule, attention, **given)
    check_decode("llava", ITEMS[:1], schedule, attention, **given)
    if positions != "group":
        check_decode("qwen2_vl", ITEMS, schedule, attention, **given)
        check_decode("qwen2_vl", ITEMS[:1], schedule, attention, **given)


@pytest.mark.parametrize(
    "given", [{"cache_implementation": "static"}, {"num_beams": 3, "output_scores": True}], ids=["static", "beams"]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("schedule", EARLY.values(), ids=EARLY)
def test_caches_of_rows_that_the_first_layers_do_not_hold(schedule, family, attention, given):
    check_decode(family, EQUAL[:2], schedule, attention, given)
    if family == "llava":
        check_decode(family, ITEMS, schedule, attention, given)
        if schedule is not EARLY["all-late"]:
            check_decode(family, ITEMS[:1], schedule, attention, given, compact_earlier_kv=True)


@st.composite
def runs(draw):
    """Any schedule that is one, over any batch that has text in every item."""
    inject = draw(st.integers(0, LAYERS - 1))
    layers = sorted(draw(st.sets(st.integers(inject, LAYERS - 1), max_size=3)))
    stages, most = [], 99
    for layer in layers:
        entered = layer == inject
        policy = draw(st.sampled_from(["random", "pdrop", "hidivdrop"] + ["variation", "fastv"] * (not entered)))
        keep = draw(st.one_of(st.integers(0, 9), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])))
        if isinstance(keep, int):
            keep = most = min(most, keep)
        stages.append(Stage(layer, keep, policy, rounding=draw(st.sampled_from(["floor", "ceil"]))))
    texts = st.integers(1, 9)
    parts = st.one_of(texts.map(lambda a: [a]), st.tuples(texts, st.just("image"), texts).map(list),
                      st.tuples(st.just("image"), texts).map(list),
                      st.tuples(texts, st.just("image"), texts, st.just("image"), texts).map(list))  # fmt: skip
    items = [item(*x, seed=i + 1) for i, x in enumerate(draw(st.lists(parts, min_size=1, max_size=3)))]
    positions = draw(st.sampled_from(["persistent", "compacted", "group"]))
    return Schedule(tuple(stages), inject=inject), items, positions


@hypothesis.settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(
    runs(), st.sampled_from(["llama", "llava"]), st.sampled_from(["left", "right"]), st.sampled_from(["sdpa", "eager"])
)
def test_any_schedule_over_any_batch(run, family, side, attention):
    schedule, items, positions = run
    if family == "llava" and not any("image" in (part for part, _ in parts) for parts in items):
        family = "llama"  # which takes no pixels
    check_prefill(family, items, schedule, side, attention, positions=positions)
    out, dropping = check_decode(family, items, schedule, attention, {"max_new_tokens": 2}, positions=positions)
    report = dropping.report()
    width = lambda layer: layer.keys.shape[2] - 1  # the first new token is in the caches, the second not yet
    assert [x.kv_bytes for x in report.layers] == [len(items) * 2 * 2 * 8 * 4 * width(x) for x in out.past_key_values.layers]
    for i in range(len(items)):
        n = dropping.kept(i).total
        assert tuple(x.vision[i] for x in report.layers) == schedule.tokens(n, LAYERS)
        assert [len(x) for x in dropping.kept(i).stages] == list(schedule.counts(n))


@pytest.mark.parametrize("schedule", EARLY.values(), ids=EARLY)
def test_batches_of_which_the_first_layers_hold_all(schedule):
    """No image at all: nothing is dropped, nothing comes late."""
    model, inputs, _ = tiny.batch("llava", [item(9, seed=2), item(5, seed=3)])
    with torch.no_grad():
        want = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
        with TokenDropper(schedule)(model):
            got = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))


def tensors_of(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, Mapping):
        yield from tensors_of(list(x.values()))
    elif dataclasses.is_dataclass(x):
        yield from tensors_of(list(vars(x).values()))
    elif isinstance(x, list | tuple):
        for y in x:
            yield from tensors_of(y)


@pytest.mark.parametrize("given", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("schedule", [*EARLY.values(), HALF_THEN_3], ids=[*EARLY, "drops"])
def test_what_is_remembered_is_row_numbers(schedule, given):
    """A record that held a hidden state or a mask, itself or by a view of it, would cost its memory while text is generated."""
    model, inputs, _ = tiny.batch("llava", ITEMS)
    with torch.no_grad(), TokenDropper(schedule)(model) as dropping:
        cache = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, **given).past_key_values
        for x in tensors_of([dropping._last, dropping._setup.tower_caches, cache._v2drop_rows]):
            assert x.dtype in (torch.int64, torch.bool)
            assert x.untyped_storage().nbytes() <= 3 * 42 * 8  # a number for every row of the batch


def test_late_injection_is_reported():
    out, dropping = check_decode("llava", ITEMS, LATE, generate={"max_new_tokens": 1})
    report, layers = dropping.report(), out.past_key_values.layers
    assert [x.vision for x in report.layers] == [(0, 0, 0)] * 2 + [(16, 0, 32), (6, 0, 12), (0, 0, 0)]
    assert [x.rows for x in report.layers] == [10, 10, 42, 22, 10]
    assert [x.kv_bytes for x in report.layers] == [layer.keys.nbytes + layer.values.nbytes for layer in layers]
    assert report.average_tokens(0) == LATE.average_tokens(16, LAYERS)
    assert report.full_kv_bytes == 5 * 3 * 42 * 2 * 2 * 8 * 4
    assert [len(stage) for stage in dropping.kept(2).stages] == [12, 0]


@pytest.mark.parametrize(
    "stage",
    [{"metric": "l1"}, {"metric": "cosine"}, {"policy": "fastv"}, {"policy": "pdrop"}, {"policy": "random"}],
    ids=["l1", "cosine", "fastv", "pdrop", "random"],
)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_rankings(family, stage):
    schedule = Schedule((Stage(2, 0.5, **stage), Stage(3, 3, **stage)))
    for side in ("left", "right"):
        check_prefill(family, ITEMS, schedule, side, seed=3)


def test_random_seeds_differ():
    schedule = Schedule((Stage(1, 5, policy="random"),))
    kept = {check_prefill("llava", ITEMS[:1], schedule, seed=seed).kept(0).stages for seed in range(4)}
    assert len(kept) == 4


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl"])
def test_images_of_different_sizes(family):
    sizes = (("image", 56, 28), ("image", 40, 52)) if family.startswith("llava") else (("image", 8, 12), ("image", 16, 8))
    items = [item(2, sizes[0], 3, seed=4), item(5, sizes[1], 1, sizes[0], 2, seed=5)]
    dropping = check_prefill(family, items, HALF_THEN_3)
    if family.startswith("qwen"):
        assert dropping.kept(0).grid == (4, 6)
    check_decode(family, items, HALF_THEN_3)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl"])
def test_videos(family):
    items = [item(2, "video", 3, seed=6), item(4, "image", 2, "video", 5, seed=7), item(6, seed=8)]
    dropping = check_prefill(family, items, HALF_THEN_3)
    assert dropping.kept(0).grid == ((2, 2, 4) if family.startswith("qwen") else None)
    check_decode(family, items, HALF_THEN_3)


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_all_is_a_true_exit(family):
    schedule = Schedule((Stage(1, 0.4), Stage(3, 0)))
    dropping = check_prefill(family, ITEMS, schedule)
    assert dropping.report().layers[3].vision == (0, 0, 0)
    assert dropping.kept(2).stages[1] == ()
    check_decode(family, ITEMS, schedule)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_is_the_untouched_model_exactly(family, attention):
    model, inputs, spans = tiny.batch(family, ITEMS, "left", attention)
    with torch.no_grad():
        want = model(**inputs)
        for schedule in (Schedule(()), Schedule((Stage(1, 1.0), Stage(3, 1000)))):
            with TokenDropper(schedule, **options(family, spans))(model) as dropping:
                got = model(**inputs)
            assert torch.equal(got.logits, want.logits)
            for a, b in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
                assert torch.equal(a.keys, b.keys)
                assert torch.equal(a.values, b.values)
            report = dropping.report()
            assert report.flops == report.full_flops


def test_a_long_prompt_without_images_is_untouched():
    """V2Drop's released code prunes any prompt longer than 576 tokens, text or not."""
    model, inputs, _ = tiny.batch("llava", [item(500, seed=1), item(420, seed=2)])
    with torch.no_grad():
        want = model(**inputs)
        with TokenDropper("v2drop-64" if LAYERS > 22 else HALF_THEN_3)(model):
            got = model(**inputs)
    assert torch.equal(got.logits, want.logits)
    assert {layer.keys.shape[2] for layer in got.past_key_values.layers} == {500}


@pytest.mark.parametrize("policy", ["variation", "fastv", "pdrop", "random"])
def test_batched_equals_one_by_one(policy):
    schedule = Schedule((Stage(1, 0.5, policy=policy), Stage(3, 4, policy=policy)))
    model, inputs, _ = tiny.batch("llava", ITEMS)
    with torch.no_grad(), TokenDropper(schedule)(model) as dropping:
        together, kept = model(**inputs).logits[:, -1], [dropping.kept(i) for i in range(3)]
        for i, parts in enumerate(ITEMS):
            _, alone, _ = tiny.batch("llava", [parts])
            close(model(**alone).logits[0, -1], together[i])
            assert dropping.kept(0).stages == kept[i].stages


def state(model):
    hooks = [
        (name, kind, len(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_forward_pre_hooks_with_kwargs")
    ]
    return hooks, sorted(vars(model)), sorted(vars(model.get_decoder()))


def test_nothing_is_left_behind():
    model, inputs, _ = tiny.batch("llava", ITEMS)
    with torch.no_grad():
        want = model(**inputs).logits  # the first forward lets transformers install hooks of its own
        before, weights = state(model), copy.deepcopy(model.state_dict())
        with TokenDropper(HALF_THEN_3)(model):
            model.generate(**inputs, max_new_tokens=2)
            assert state(model) != before
        assert state(model) == before
        assert torch.equal(model(**inputs).logits, want)

        class Stop(Exception):
            pass

        def stop(*_):
            raise Stop

        handle = model.get_decoder().layers[3].mlp.register_forward_hook(stop)
        with pytest.raises(Stop), TokenDropper(HALF_THEN_3)(model):  # in the middle of a forward
            model(**inputs)
        handle.remove()
        assert state(model) == before
        assert torch.equal(model(**inputs).logits, want)
        with pytest.raises(Stop), TokenDropper(HALF_THEN_3)(model):
            raise Stop
        assert state(model) == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_forward_after_a_failed_one_is_right():
    model, inputs, _ = tiny.batch("llava", ITEMS)
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        want = model(**inputs).logits
        with pytest.raises(ValueError, match="do not match"):
            model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
        assert torch.equal(model(**inputs).logits, want)


def test_nested_over_two_models():
    a, of_a, _ = tiny.batch("llava", ITEMS)
    b, of_b, _ = tiny.batch("qwen2_vl", ITEMS)
    dropper, other = TokenDropper(HALF_THEN_3), TokenDropper(Schedule((Stage(1, 2),)))
    with torch.no_grad():
        with dropper(a):
            alone = a(**of_a).logits
        with other(b):
            alone_b = b(**of_b).logits
        with dropper(a) as first, other(b) as second:
            assert torch.equal(a(**of_a).logits, alone)
            assert torch.equal(b(**of_b).logits, alone_b)
            assert first.kept(0).total == second.kept(0).total == 16
            assert len(second.kept(0).stages) == 1
            with pytest.raises(ValueError, match="already drops tokens"), dropper(a):
                pass
            assert torch.equal(a(**of_a).logits, alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl"])
def test_beam_search(family, attention):
    items = [ITEMS[0], ITEMS[2]] if family != "qwen2_vl" else ITEMS[:1]
    check_decode(family, items, HALF_THEN_3, attention, {"num_beams": 3, "num_return_sequences": 2, "output_scores": True,
                                                        "length_penalty": 1.0})  # fmt: skip


def test_several_sequences_of_one_prompt():
    torch.manual_seed(0)
    out, _ = check_decode("llava", ITEMS, HALF_THEN_3, generate={"do_sample": True, "num_return_sequences": 3, "top_k": 0})
    assert len({tuple(s.tolist()) for s in out.sequences}) > 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_static_cache(family, attention):
    given = {"cache_implementation": "static"}
    out, _ = check_decode(family, ITEMS, HALF_THEN_3, attention, given)
    assert isinstance(out.past_key_values, StaticCache)
    check_decode(family, ITEMS, HALF_THEN_3, attention, given, positions="compacted")
    check_decode(family, ITEMS[:1], HALF_THEN_3, attention, given, compact_earlier_kv=True)
    with pytest.raises(ValueError, match="static cache needs items of one length without padding"):
        check_decode(family, ITEMS, HALF_THEN_3, attention, given, compact_earlier_kv=True)


@pytest.mark.parametrize("given", [{"use_cache": False}, {"prompt_lookup_num_tokens": 2}], ids=["no-cache", "lookup"])
@pytest.mark.parametrize("schedule", [HALF_THEN_3, LATE], ids=["drops", "late"])
def test_other_ways_of_generating_say_the_same(schedule, given):
    """Without a cache every step is a prefill of its own; prompt lookup checks several tokens in one step and takes some back."""
    model, inputs, _ = tiny.batch("llava", ITEMS[:1])
    with torch.no_grad(), TokenDropper(schedule)(model):
        want = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, **given), want)


@pytest.mark.parametrize("schedule", EARLY.values(), ids=EARLY)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl"])
def test_chunks_and_steps_behind_short_first_layers(family, attention, masked, schedule):
    """Several new tokens at once, with and without the caller's mask."""
    model, inputs, spans = tiny.batch(family, ITEMS[:1], attention=attention)
    embeds, at = slow.captured(model, inputs)
    ids, mask, n = inputs.pop("input_ids"), inputs.pop("attention_mask"), inputs.pop("mm_token_type_ids", None)
    a = spans[0][0][1] + 1
    types = {} if n is None else {"mm_token_type_ids": n[:, :a]}
    prompt, chance_ids = a, {"input_ids": ids[:, :a], "attention_mask": mask[:, :a]}
    with torch.no_grad(), TokenDropper(schedule, **options(family, [[spans[0][0]]]))(model):
        cache, logits = DynamicCache(config=model.get_decoder().config), []
        for lo, hi in ((0, a), (a, a + 3), (a + 3, a + 4), (a + 4, ids.shape[1])):
            given = {**inputs, **types} if lo == 0 else {}
            here = {"attention_mask": mask[:, :hi]} if masked else {}
            if masked and lo and family == "qwen2_vl":  # which makes ids of the mask's length, not the chunk's
                here["position_ids"] = at[..., lo:hi]
            logits.append(model(input_ids=ids[:, lo:hi], past_key_values=cache, **given, **here).logits[0])
            cache = copy.deepcopy(cache)
        vision = list(range(*spans[0][0]))
        want, rows, _ = slow.run(model, embeds[0], at[:, 0], schedule, vision, prompt=prompt, chance=chance(chance_ids, 0))
    close(torch.cat(logits)[rows], want)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("schedule", EARLY.values(), ids=EARLY)
def test_steps_with_a_mask_of_the_caller_behind_short_first_layers(schedule, attention):
    """``[B, 1, new, prompt + new]``, in the places of the prompt as the caller knows it: the new tokens miss the first two."""
    model, inputs, spans = tiny.batch("llava", ITEMS[:1], attention=attention)
    embeds, at = slow.captured(model, inputs)
    ids, n = inputs["input_ids"], inputs["input_ids"].shape[1]
    seen = torch.ones(2, n, dtype=torch.bool).tril(n - 2)
    seen[:, :2] = False
    mask = seen[None, None] if attention == "sdpa" else torch.zeros(1, 1, 2, n).masked_fill(~seen, torch.finfo(torch.float32).min)
    first = {**inputs, "input_ids": ids[:, :-2], "attention_mask": None}
    with torch.no_grad(), TokenDropper(schedule)(model):
        cache = model(**first).past_key_values
        got = model(input_ids=ids[:, -2:], attention_mask=mask, past_key_values=cache).logits[0]
        cut = {"input_ids": ids[:, :-2], "attention_mask": torch.ones(1, n - 2)}
        vision = list(range(*spans[0][0]))
        want, _, _ = slow.run(model, embeds[0], at[:, 0], schedule, vision, prompt=n - 2, hide={0, 1}, chance=chance(cut, 0))
    close(got, want[-2:])


@pytest.mark.parametrize("compact_earlier_kv", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_prompt_in_chunks_and_steps_by_hand(compact_earlier_kv, masked):
    """The image in the first chunk, text in later ones and step by step, without position ids: as in one piece."""
    model, inputs, spans = tiny.batch("llava", ITEMS[:1])
    embeds, at = slow.captured(model, inputs)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    with torch.no_grad(), TokenDropper(HALF_THEN_3, compact_earlier_kv=compact_earlier_kv)(model):
        cache = DynamicCache(config=model.config.text_config)
        logits = []
        for a, b in ((0, 21), (21, 24), (24, 25), (25, 26)):
            given = inputs if a == 0 else {}
            here = {"attention_mask": mask[:, :b]} if masked else {}
            logits.append(model(input_ids=ids[:, a:b], past_key_values=cache, **given, **here).logits[0])
            cache = copy.deepcopy(cache)  # what a shared prefix does
        vision = list(range(*spans[0][0]))
        want, rows, stages = slow.run(model, embeds[0], at[:, 0], HALF_THEN_3, vision)
        if compact_earlier_kv:
            gone = set(vision) - set(stages[-1])
            want, rows, _ = slow.run(model, embeds[0], at[:, 0], HALF_THEN_3, vision, prompt=21, hide=gone)
            assert {layer.keys.shape[2] for layer in cache.layers} == {26 - 16 + 3}
    close(torch.cat(logits)[rows], want)


def test_rows_of_dropped_tokens_repeat_the_last_kept_one_before():
    """Also where the prompt begins with an image, so that there is none: the head of no state at all is 0."""
    for side in ("left", "right"):
        model, inputs, spans = tiny.batch("llava", [item("image", 3, seed=1), item(2, "image", 5, seed=2)], side)
        with torch.no_grad(), TokenDropper(HALF_THEN_3)(model) as dropping:
            logits = model(**inputs).logits
        for i in range(2):
            start, stop = spans[i][0]
            kept = {start + j for j in dropping.kept(i).stages[-1]}
            assert min(kept) > start  # or nothing is seen of what comes before it
            last = logits[i, start - 1] if i else torch.zeros(tiny.VOCAB)
            for row in range(start, stop):
                assert (row in kept) != torch.equal(logits[i, row], last)
                last = logits[i, row]


def test_inputs_embeds_and_spans():
    """A decoder that never sees ids; and a vision model that is told where the image is."""
    model, inputs, spans = tiny.batch("llama", ITEMS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    with torch.no_grad(), TokenDropper(HALF_THEN_3, spans=spans)(model):
        want = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, -3:]
        assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=3, do_sample=False), want)
        # Not through the language-model head, and by position.
        assert model.model(inputs["input_ids"], mask).last_hidden_state.shape == embeds.shape
    model, inputs, spans = tiny.batch("llava", ITEMS)
    embeds, _ = slow.captured(model, inputs)
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        want = model(**inputs).logits
    with torch.no_grad(), TokenDropper(HALF_THEN_3, spans=spans)(model):
        close(model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits, want)
        # generate() repeats every prompt for its beams, and so are the spans.
        model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=2, num_beams=2)


def test_four_dimensional_mask_of_the_caller():
    """A mask that no 2-D mask could say: the last two tokens see nothing of the first text. It is cut by rows and columns."""
    model, inputs, _ = tiny.batch("llava", ITEMS[:1])
    n = inputs["input_ids"].shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    seen[-2:, :4] = False
    inputs["attention_mask"] = seen[None, None]
    embeds, ids = slow.captured(model, inputs)
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        got = model(**inputs).logits[0]
        want, rows, _ = slow.run(model, embeds[0], ids[:, 0], HALF_THEN_3, list(range(4, 20)), prompt=n - 2, hide=set(range(4)))
    close(got[rows], want)


def varlen(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """What flash attention does with a mask ``[B, K]``: each item without its padding, queries are the last rows."""
    if (ids := kwargs.get("position_ids")) is not None and query.shape[2] > 1:  # a jump would begin another sequence
        assert ids.shape[-1] == query.shape[2]
        assert len(query) > 1 or (ids.diff() == 1).all()
    group = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    for i in range(query.shape[0]):
        there = torch.ones(key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask[i].bool()
        assert len(there) == key.shape[2]
        k, v = (x[i][:, there].repeat_interleave(group, 0) for x in (key, value))
        asked = there[-query.shape[2] :]
        q = query[i][:, asked]
        late = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] >= torch.arange(k.shape[1])
        out[i, :, asked] = (q @ k.transpose(1, 2) * scaling).masked_fill(~late, -torch.inf).softmax(-1) @ v
    return out.transpose(1, 2), None


@contextlib.contextmanager
def flash():
    """Flash attention is no CPU kernel; its masks and its way with them are tried with a stand-in of the same name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ALL_ATTENTION_FUNCTIONS._global_mapping
    before = known["flash_attention_2"]
    known["flash_attention_2"] = varlen
    try:
        yield
    finally:
        known["flash_attention_2"] = before


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl"])
def test_flash_attention_masks(family, monkeypatch):
    batch = tiny.batch

    def with_flash(*args, **kwargs):
        model, *rest = batch(*args, **kwargs)
        model.get_decoder().config._attn_implementation = "flash_attention_2"
        return model, *rest

    with flash():
        monkeypatch.setattr(tiny, "batch", with_flash)
        try:
            crossed = [item(20, seed=4), item(2, "image", 6, seed=5)]  # the longest item becomes the shortest
            for items in (ITEMS, ITEMS[:1], crossed):
                for side in ("left", "right"):
                    check_prefill(family, items, HALF_THEN_3, side, "eager")
                for earlier in (False, True):
                    check_decode(family, items, HALF_THEN_3, "eager", compact_earlier_kv=earlier)
                for schedule in EARLY.values():
                    check_prefill(family, items, schedule, "right", "eager")
                    check_decode(family, items, schedule, "eager")
        finally:
            tiny.made(family, "eager").get_decoder().config._attn_implementation = "eager"


@pytest.mark.parametrize("schedule", [HALF_THEN_3, LATE], ids=["drops", "late"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16(attention, schedule):
    """Close calls fall otherwise in bfloat16, so the reference is told which rows were kept; it runs in float32. The error may
    be twice that of the undropped bfloat16 model, which rounds at the same places."""
    coarse, inputs, spans = tiny.batch("llava", ITEMS, "left", attention, torch.bfloat16)
    fine, exact, _ = tiny.batch("llava", ITEMS, "left", attention)
    embeds, ids = slow.captured(fine, exact)
    with torch.no_grad():
        undropped = (coarse(**inputs).logits.float() - fine(**exact).logits)[inputs["attention_mask"].bool()].abs().max()
        with TokenDropper(schedule)(coarse) as dropping:
            out = coarse(**inputs)
            assert out.logits.dtype == torch.bfloat16
            kept = [dropping.kept(i).stages for i in range(3)]
            coarse.generate(**inputs, max_new_tokens=2)
    for i in range(3):
        real, vision = rows_of(inputs, spans, i)
        forced = [{vision[j] for j in stage} for stage in kept[i]]
        with torch.no_grad():
            want, rows, _ = slow.run(fine, embeds[i, real], ids[:, i, real], schedule, vision, forced=forced)
        assert (out.logits[i, real][rows].float() - want).abs().max() <= 2 * undropped


def test_report_counts_what_the_cache_holds():
    for given in ({}, {"compact_earlier_kv": True}):
        out, dropping = check_decode("llava", ITEMS, HALF_THEN_3, generate={"max_new_tokens": 1}, **given)
        report = dropping.report()
        layers = out.past_key_values.layers
        assert [x.kv_bytes for x in report.layers] == [layer.keys.nbytes + layer.values.nbytes for layer in layers]
        assert [x.vision for x in report.layers] == [(16, 0, 32)] * 2 + [(8, 0, 16)] + [(3, 0, 3)] * 2
        assert [x.tokens for x in report.layers] == [(26, 9, 42)] * 2 + [(18, 9, 26)] + [(13, 9, 13)] * 2
        assert [x.rows for x in report.layers] == [42, 42, 26, 13, 13]
        d, m = 32, 48
        assert report.layers[3].flops == sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in (13, 9, 13))
        assert report.average_tokens(0) == HALF_THEN_3.average_tokens(16, LAYERS)
        assert report.full_kv_bytes == 5 * 3 * 42 * 2 * 2 * 8 * 4
        assert "of the undropped prompt's" in str(report)


def test_hidden_states_are_the_rows_of_each_layer():
    model, inputs, _ = tiny.batch("llava", ITEMS, "left", "eager")
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [h.shape[1] for h in out.hidden_states] == [42, 42, 42, 26, 13, 42]  # the last one is spread, as logits are
    assert [a.shape[2:] for a in out.attentions] == [(n, n) for n in (42, 42, 26, 13, 13)]


def test_a_stage_that_drops_nothing_is_reported_all_the_same():
    dropping = check_prefill("llava", ITEMS[:1], Schedule((Stage(1, 1.0), Stage(2, 4), Stage(4, 1.0))))
    stages = dropping.kept(0).stages
    assert [len(stage) for stage in stages] == [16, 4, 4]
    assert dropping.kept(0).grid == (4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_score_dtype_keeps_the_released_set_up_to_ties(dtype):
    """V2Drop's code: ``torch.norm`` of the difference in the model's dtype, then ``torch.topk``, which keeps any of equals."""
    model, inputs, _ = tiny.batch("llava", [item(4, "image", 9, seed=seed) for seed in range(6)], dtype=dtype)
    entering = {}

    def note(layer, module, args, kwargs):
        entering[layer] = args[0] if args else kwargs["hidden_states"]

    layers = model.get_decoder().layers
    handles = [layers[i].register_forward_pre_hook(functools.partial(note, i), with_kwargs=True) for i in (1, 2)]
    with torch.no_grad(), TokenDropper(Schedule((Stage(2, 7),)), score_dtype=dtype)(model) as session:
        model(**inputs)
    for handle in handles:
        handle.remove()
    for i in range(6):
        vision = (inputs["input_ids"][i] == model.config.image_token_id).nonzero()[:, 0]
        assert len(vision) > 7
        scores = torch.norm((entering[2] - entering[1])[i, vision], p=2, dim=-1)
        best, kept = scores.topk(7), session.kept(i).stages[0]
        cut = best.values[-1]
        assert set(kept) >= set((scores > cut).nonzero()[:, 0].tolist()), "a token above the cut was dropped"
        assert all(scores[j] == cut for j in {*best.indices.tolist()} ^ {*kept}), "a token differs that is no tie at the cut"


def trained(model, inputs, labels):
    model.zero_grad()
    found = model(**inputs, labels=labels)
    found.loss.backward()
    return found.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("positions", ["persistent", "compacted"])
@pytest.mark.parametrize("schedule", [HALF_THEN_3, LATE], ids=["drops", "late"])
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl"])
def test_loss_and_gradients_equal_the_slow_reference(family, schedule, positions):
    model, inputs, spans = tiny.batch(family, ITEMS, "right")
    embeds, ids = slow.captured(model, inputs)
    labels = inputs["input_ids"].clone()
    labels[inputs["attention_mask"] == 0] = -100
    for i, places in enumerate(spans):
        labels[i, :2] = -100
        for a, b in places:
            labels[i, a:b] = -100
    total, count = 0, 0
    model.zero_grad()
    for i in range(3):
        real, vision = rows_of(inputs, spans, i)
        logits, rows, _ = slow.run(model, embeds[i, real], ids[:, i, real], schedule, vision, positions=positions)
        wanted = labels[i, real][rows]  # what compaction leaves of the labels, each predicted by the row before it
        here = wanted[1:] != -100
        total = total + torch.nn.functional.cross_entropy(logits[:-1][here], wanted[1:][here], reduction="sum")
        count += int(here.sum())
    (total / count).backward()
    decoder = dict(model.get_decoder().named_parameters())
    want = {name: p.grad.clone() for name, p in decoder.items() if p.grad is not None and "embed" not in name}
    assert len(want) > 9 * LAYERS
    with TokenDropper(schedule, positions=positions, **options(family, spans))(model):
        loss, grads = trained(model, inputs, labels)
    close(loss, (total / count).detach())
    for name, p in decoder.items():
        if name in want:
            close(p.grad, want[name])
    if family == "llava":  # through the kept rows to the vision tower
        assert any("vision_tower" in name and g.abs().max() > 0 for name, g in grads.items())


@pytest.mark.parametrize("given", [{"schedule": HALF_THEN_3}, {"schedule": LATE, "soft": True}], ids=["drops", "late, soft"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, given):
    model, inputs, _ = tiny.batch("llava", ITEMS, "right")
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    with TokenDropper(**given)(model) as dropping:
        model.train()
        try:
            loss, grads = trained(model, inputs, labels)
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if "__call__" in vars(GradientCheckpointingLayer):  # up to some version between 5.20 and 5.23
                with pytest.raises(RuntimeError, match="gradient checkpointing needs a transformers that"):
                    trained(model, inputs, labels)
                return
            priced = [ratio.grad.clone() for ratio in dropping.ratios]
            dropping.ratios.zero_grad()
            again, regrads = trained(model, inputs, labels)
        finally:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
            model.eval()
    assert torch.equal(loss, again)
    assert len(priced) == ("soft" in given)
    assert all(torch.equal(a, ratio.grad) for a, ratio in zip(priced, dropping.ratios, strict=True))
    shared = [name for name in grads if "language_model.layers" in name]
    assert len(shared) == 9 * LAYERS
    for name in shared:
        assert torch.equal(grads[name], regrads[name]), name


def refused(match, model, schedule=HALF_THEN_3, inputs=None, kind=ValueError, **given):
    """One sentence, raised where the mistake is, and nothing left behind."""
    before = state(model) if hasattr(model, "get_decoder") else None
    with pytest.raises(kind, match=match) as found, torch.no_grad(), TokenDropper(schedule, **given)(model):
        model(**inputs)  # without inputs nothing may come this far
    assert "\n" not in str(found.value)
    if before:
        assert state(model) == before


def test_bad_input():
    import transformers as tf

    model = tiny.made("llava")
    refused(r"layer 7, but it has 5 blocks", model, Schedule((Stage(7, 1),)))
    refused("must be a Schedule or the name of a preset", model, 5, kind=TypeError)
    refused("must be one of 'v2drop-192'", model, "v2drop-1")
    refused("positions must be one of persistent", model, positions="new")
    bert = tf.BertModel(tf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9))
    refused("a decoder with layers, a list of blocks; BertModel lacks it", bert)
    refused("model of transformers, got Linear", torch.nn.Linear(2, 2))
    refused("spans must be given for 'llama'", tiny.made("llama"))
    refused("spans must be given where inputs_embeds", model, inputs={"inputs_embeds": torch.zeros(1, 5, 32)})
    llama, ids = tiny.made("llama"), {"input_ids": torch.ones(1, 10, dtype=torch.int64)}
    refused(r"spans do not fit a first forward of 1 x 10 rows.* outside", llama, inputs=ids, spans=(3, 15))
    refused(r"spans do not fit", llama, inputs=ids, spans=[[(3, 5)], [(3, 5)]])
    model.get_decoder().config._attn_implementation, before = "flex_attention", "sdpa"
    refused("attn_implementation, got 'flex_attention'", model)
    model.get_decoder().config._attn_implementation = before
    sliding, spans = tf.MistralForCausalLM(tf.MistralConfig(**tiny.TEXT, sliding_window=8)), {"spans": (3, 6)}
    refused("compact_earlier_kv must be False for a model with windows", sliding, compact_earlier_kv=True, **spans)
    refused("positions must be 'persistent' for a model with windows", sliding, positions="compacted", **spans)
    first = Schedule((Stage(0, 1, policy="random"),))
    refused("schedule must begin behind block 0 in a model with windows", sliding, first, **spans)
    refused("schedule must begin behind block 0 in a model with windows", sliding, Schedule((), inject=1), **spans)
    sliding.get_decoder().config._attn_implementation = "flash_attention_2"
    refused("its kernel counts them in rows", sliding, **spans)


def test_images_that_lie_apart():
    """Text inside an image, such as separators between its rows: all its runs share one budget."""
    for family in VISION:
        model, inputs, _ = tiny.batch(family, [item(4, "image", 6, seed=1)])
        ids = inputs["input_ids"]
        first = int((ids[0] == IMAGE).nonzero()[0])
        n = int((ids == IMAGE).sum())
        ids[0, first + n], ids[0, first + n - 3] = IMAGE, 7
        with torch.no_grad(), TokenDropper(HALF_THEN_3)(model) as dropping:
            model(**inputs)
        assert dropping.vision_token_counts() == (n,)
        assert len(dropping.kept(0).stages[0]) == n // 2


def test_caches_that_cannot_be_ragged():
    from transformers.cache_utils import Cache, DynamicLayer

    class Clever(DynamicLayer):
        """Quantised, sliding, offloaded: what only looks like a plain cache."""

    model, inputs, _ = tiny.batch("llava", ITEMS)
    refused("Clever cannot be ragged", model, inputs={**inputs, "past_key_values": Cache(layers=[Clever() for _ in range(LAYERS)])})
    # A cache of another life: dropped, but its record is gone.
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        cache = model(**inputs).past_key_values
    del cache._v2drop_rows
    step = {"input_ids": torch.ones(3, 1, dtype=torch.int64), "past_key_values": cache}
    refused("must be of a prefill under a TokenDropper", model, inputs=step)


def test_a_cache_that_is_used_again():
    """After reset() a cache begins anew, with or without drops; and an undropped cache goes on undropped."""
    model, inputs, _ = tiny.batch("llava", ITEMS)
    text = {"input_ids": torch.full((3, 7), 5)}
    with torch.no_grad():
        want = model(**text, use_cache=True)
        with TokenDropper(HALF_THEN_3)(model):
            cache = model(**inputs).past_key_values
            cache.reset()
            got = model(**text, past_key_values=cache)
            assert torch.equal(got.logits, want.logits)
            step = {"input_ids": torch.full((3, 1), 6)}
            after = model(**step, past_key_values=want.past_key_values).logits
            assert torch.equal(model(**step, past_key_values=cache).logits, after)


def test_calling_the_decoder_past_the_model_is_refused():
    model = tiny.made("llava")
    with pytest.raises(RuntimeError, match="call the model that TokenDropper was given"), TokenDropper(HALF_THEN_3)(model):
        model.get_decoder()(inputs_embeds=torch.zeros(1, 4, 32))


def test_before_any_forward_there_is_nothing_to_tell():
    with TokenDropper(HALF_THEN_3)(tiny.made("llava")) as dropping:
        for ask in (dropping.report, dropping.kept):
            with pytest.raises(RuntimeError, match="call the model first"):
                ask()
