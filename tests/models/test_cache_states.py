"""Caches of dropped prompts later on: behind the block, under other schedules, cut, selected, copied, and with new images."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from support import tiny
from support.dropped import ITEMS, close
from support.tiny import IMAGE, LAYERS, item
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from v2drop_kernels.models import TokenDropper
from v2drop_kernels.schedule import Schedule, Stage

HALF_THEN_3 = Schedule((Stage(2, 0.5), Stage(3, 3)))
FIRST = Schedule((Stage(0, 0.5, policy="random"), Stage(3, 3)))
LATE = Schedule((Stage(3, 0.4), Stage(4, 0)), inject=2)
OTHERS = {"later": Schedule((Stage(4, 2),)), "nothing": Schedule(()), "earlier": FIRST, "late": LATE}
REFUSED = "lacks dropped vision tokens: use it in a block of TokenDropper"


def prompt(items=ITEMS[:1], static=False, schedule=HALF_THEN_3, **options):
    """A model, the cache of a prompt that it dropped tokens of, and the length of the text."""
    model, inputs, _ = tiny.batch("llava", items)
    cache = StaticCache(config=model.config.text_config, max_cache_len=80) if static else DynamicCache()
    with torch.no_grad(), TokenDropper(schedule, **options)(model):
        cache = model(**inputs, past_key_values=cache).past_key_values
    return model, inputs, cache


def later(model, cache, n=1, rows=1, schedule=None, mask=None):
    """Logits of ``n`` more tokens; in a block of ``schedule`` if one is given."""
    ids = torch.arange(7, 7 + n).repeat(rows, 1)
    block = contextlib.nullcontext() if schedule is None else TokenDropper(schedule)(model)
    if mask is not None:
        mask = torch.cat([mask, torch.ones(rows, n, dtype=mask.dtype)], dim=1)
    with torch.no_grad(), block:
        return model(input_ids=ids, past_key_values=cache, attention_mask=mask).logits


@pytest.mark.parametrize("schedule", [HALF_THEN_3, FIRST, LATE], ids=["drops", "first", "late"])
def test_behind_the_block_a_token_is_right_where_no_mask_is_needed(schedule):
    model, _, cache = prompt(schedule=schedule)
    want = later(model, copy.deepcopy(cache), schedule=schedule)
    assert torch.equal(later(model, cache), want)


@pytest.mark.parametrize(
    ("how", "n"),
    [({}, 3), ({"static": True}, 1), ({"static": True}, 3), ({"positions": "compacted"}, 1), ({"positions": "group"}, 2),
     ({"compact_earlier_kv": True}, 3), ({"items": ITEMS}, 1), ({"static": True, "compact_earlier_kv": True}, 1)],
)  # fmt: skip
def test_behind_the_block_all_else_is_refused(how, n):
    """It failed in sdpa, or was silently wrong: static caches, compacted positions. A refused call leaves no trace."""
    model, inputs, cache = prompt(**how)
    rows, before = len(inputs["input_ids"]), [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match=REFUSED) as found:
        later(model, cache, n, rows)
    assert "\n" not in str(found.value)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    model.generate(**inputs, max_new_tokens=2)  # which a cache of its own


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_schedule_goes_on_with_the_cache(other, static):
    """Hooks were where the new schedule needs them: a cache that lacks rows earlier crashed, or was silently wrong."""
    for schedule in (HALF_THEN_3, FIRST):
        model, inputs, cache = prompt(ITEMS, static, schedule)
        twin, mask = copy.deepcopy(cache), inputs["attention_mask"]
        want = later(model, twin, 3, 3, schedule, mask)
        assert torch.equal(later(model, cache, 3, 3, other, mask), want)


COPIES = {
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "select by mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])),
}
ROWS = {"select": [2, 0], "select by mask": [0, 2], "repeat": [0, 0, 1, 1, 2, 2], "reorder": [1, 2, 0]}


@pytest.mark.parametrize("positions", ["persistent", "compacted"])
@pytest.mark.parametrize("name", COPIES)
def test_other_items_of_the_batch(name, positions):
    model, inputs, cache = prompt(ITEMS, positions=positions)
    twin, mask = copy.deepcopy(cache), inputs["attention_mask"]
    want = later(model, twin, 2, 3, HALF_THEN_3, mask)[ROWS[name]]
    COPIES[name](cache)
    close(later(model, cache, 2, len(want), HALF_THEN_3, mask[ROWS[name]]), want)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies(copied):
    model, inputs, cache = prompt(ITEMS)
    twin = copied(cache)
    mask = inputs["attention_mask"]
    want = later(model, copy.deepcopy(cache), 2, 3, HALF_THEN_3, mask)
    assert type(twin) is type(cache)
    assert isinstance(twin, DynamicCache)
    assert torch.equal(later(model, twin, 2, 3, HALF_THEN_3, mask), want)


def test_crop():
    """Behind the image it takes back what came last, also of the prompt; into dropped tokens it is refused."""
    model, inputs, cache = prompt()
    n = inputs["input_ids"].shape[1]
    shorter = {**inputs, "input_ids": inputs["input_ids"][:, : n - 3], "attention_mask": inputs["attention_mask"][:, : n - 3]}
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        want = model(**shorter).past_key_values
    later(model, cache, 4, 1, HALF_THEN_3)
    assert cache.get_seq_length() == n + 4
    cache.crop(-7)
    assert cache.get_seq_length() == n - 3
    close(later(model, cache, 2, 1, HALF_THEN_3), later(model, want, 2, 1, HALF_THEN_3))
    with pytest.raises(ValueError, match="tokens_to_remove must end behind the vision tokens"):
        cache.crop(-12)


def seen_by(model, pixels, ids, gone, inject):
    """The oracle: the undropped model over the whole chat, in which the rows ``gone[layer]`` are hidden as keys of that layer,
    and the images enter layer ``inject`` as they entered the first one."""
    n, entering = ids.shape[1], []

    def hide(index):
        def hook(module, args, kwargs):
            if index == inject > 0:
                args = (torch.where((ids == IMAGE)[..., None], entering[0], args[0]), *args[1:])
            entering.append(args[0])
            mask = torch.ones(n, n, dtype=torch.bool).tril()
            mask[:, sorted(gone[index])] = False
            mask |= torch.eye(n, dtype=torch.bool)  # a row that is gone itself would see nothing
            return args, {**kwargs, "attention_mask": mask[None, None]}

        return hook

    handles = [layer.register_forward_pre_hook(hide(i), with_kwargs=True) for i, layer in enumerate(model.get_decoder().layers)]
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits[0]
    for handle in handles:
        handle.remove()
    return logits, entering


def gone_of(schedule, chats):
    """Per layer the rows that are gone: ``chats`` are the rows of the images and the tokens kept of them, for every turn."""
    gone = [set() for _ in range(LAYERS)]
    for rows, stages in chats:
        for number, stage in enumerate(schedule.stages):
            for layer in range(stage.layer, LAYERS):
                gone[layer] |= set(rows) - {rows[i] for i in stages[number]}
        for layer in range(schedule.inject):
            gone[layer] |= set(rows)
    return gone


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("schedule", [HALF_THEN_3, FIRST, LATE, Schedule(())], ids=["drops", "first", "late", "nothing"])
def test_a_second_picture_on_the_cache(schedule, static):
    """Each turn's tokens get drops of their own; a turn without an image between, and tokens behind."""
    model, inputs, _ = tiny.batch("llava", [item(4, "image", 6, seed=1)])
    _, more, _ = tiny.batch("llava", [item(2, "image", 5, seed=4)])
    turns = [inputs["input_ids"], torch.arange(5, 9)[None], more["input_ids"], torch.arange(9, 12)[None], torch.tensor([[4]])]
    pixels = [inputs["pixel_values"], None, more["pixel_values"], None, None]
    cache = StaticCache(config=model.config.text_config, max_cache_len=80) if static else DynamicCache()
    got, chats, first = [], [], 0
    with torch.no_grad(), TokenDropper(schedule)(model) as session:
        for ids, pixel in zip(turns, pixels, strict=True):
            got.append(model(input_ids=ids, pixel_values=pixel, past_key_values=cache).logits[0])
            if pixel is not None:
                rows = (first + (ids[0] == IMAGE).nonzero()[:, 0]).tolist()
                chats.append((rows, session.kept(0).stages))
                report = session.report()
                assert [len(x) for x in session.kept(0).stages] == list(schedule.counts(16))
                if not static:
                    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
                    assert [layer.kv_bytes for layer in report.layers] == held
            first += ids.shape[1]
    ids = torch.cat(turns, dim=1)
    both = torch.cat([inputs["pixel_values"], more["pixel_values"]])
    want, entering = seen_by(model, both, ids, gone_of(schedule, chats), schedule.inject)
    text = ids[0] != IMAGE
    close(torch.cat(got)[text], want[text])
    for rows, stages in chats:
        left = list(range(16))
        for number, stage in enumerate(schedule.stages):
            if stage.policy == "variation" and stage.keep > 0 and stage.layer > schedule.inject:
                at = [rows[i] for i in left]
                change = (entering[stage.layer][0, at] - entering[stage.layer - 1][0, at]).norm(dim=-1)
                assert sorted(left[i] for i in change.topk(len(stages[number])).indices) == list(stages[number])
            left = list(stages[number])


def test_a_second_picture_in_a_batch():
    """Items of other lengths: the first turn is padded and ragged, the second one brings an image to one item only."""
    model, inputs, _ = tiny.batch("llava", ITEMS)
    _, more, _ = tiny.batch("llava", [item(2, "image", 4, seed=5), item(22, seed=6), item(22, seed=7)])
    mask = torch.cat([inputs["attention_mask"], more["attention_mask"]], dim=1)
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model) as session:
        cache = model(**inputs).past_key_values
        got = model(**{**more, "attention_mask": mask}, past_key_values=cache).logits
        step = later(model, cache, 1, 3, None, mask)
        assert [session.kept(i).total for i in range(3)] == [16, 0, 0]
        for i, parts in enumerate(ITEMS):
            _, alone, _ = tiny.batch("llava", [parts])
            pixels = {"pixel_values": more["pixel_values"]} if i == 0 else {}
            given = {name: x for name, x in alone.items() if name != "pixel_values" or i != 1}
            cache = model(**given).past_key_values
            close(got[i, -4:], model(input_ids=more["input_ids"][i : i + 1], **pixels, past_key_values=cache).logits[0, -4:])
            close(step[i], later(model, cache)[0])


def test_what_a_later_image_excludes():
    model, inputs, _ = tiny.batch("llava", ITEMS[:1])
    for options in ({"positions": "compacted"}, {"compact_earlier_kv": True}):
        with torch.no_grad(), TokenDropper(HALF_THEN_3, **options)(model):
            cache = model(**inputs).past_key_values
            with pytest.raises(ValueError, match="must not bring images behind a filled cache with positions"):
                model(**{**inputs, "attention_mask": None}, past_key_values=cache)


@pytest.mark.parametrize("size", [21, 23])
def test_a_chat_of_generate_in_chunks(size):
    """Two images, which lie in chunks of their own; ``generate`` encodes them before it cuts the prompt."""
    model, inputs, _ = tiny.batch("llava", [item(4, "image", 5, "image", 9, seed=1)])
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        out = model.generate(
            **inputs, prefill_chunk_size=size, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        cache, first = DynamicCache(), 0
        for i, ids in enumerate(inputs["input_ids"].split(size, dim=1)):
            pixels = inputs["pixel_values"][i : i + 1] if bool((ids == IMAGE).any()) else None
            logits = model(input_ids=ids, pixel_values=pixels, past_key_values=cache).logits[:, -1]
            first += ids.shape[1]
        close(out.logits[0], logits)
    assert out.past_key_values.layers[4].keys.shape[2] == first - 32 + 6 + 2


def test_a_chunk_that_cuts_an_image():
    model, inputs, _ = tiny.batch("llava", ITEMS[:1])
    with (
        torch.no_grad(),
        TokenDropper(Schedule((Stage(2, 2),)))(model),
        pytest.raises(ValueError, match="must hold whole images"),
    ):
        model.generate(**inputs, prefill_chunk_size=11, max_new_tokens=2)


def test_quantised_caches(monkeypatch):
    """A layer that quantises to float32 is one in all but its rounding, so that the result can be compared."""
    layer = pytest.importorskip("transformers.cache_utils").__dict__.get("Fp8QuantizedLayer")
    if layer is None:
        pytest.skip("this transformers has no cache of float8 numbers")
    monkeypatch.setattr(layer, "fp8_dtype", torch.float32)
    model, inputs, _ = tiny.batch("llava", ITEMS)
    mask = inputs["attention_mask"]
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        quantised, exact = Cache(layer_class_to_replicate=layer), DynamicCache()
        for cache in (quantised, exact):
            model(**inputs, past_key_values=cache)
    assert [x.get_seq_length() for x in quantised.layers] == [42, 42, 26, 13, 13]
    close(later(model, quantised, 2, 3, HALF_THEN_3, mask), later(model, exact, 2, 3, HALF_THEN_3, mask))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="neither quantised nor offloaded"),
        TokenDropper(HALF_THEN_3, compact_earlier_kv=True)(model),
    ):
        model(**inputs, past_key_values=Cache(layer_class_to_replicate=layer))
