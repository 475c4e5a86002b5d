"""A model with a TokenDropper against the slow specification, item by item."""

from __future__ import annotations

import zlib

import torch

from support import slow, tiny
from support.tiny import item
from v2drop_kernels.models import TokenDropper
from v2drop_kernels.ops.random_score import random_score

ITEMS = [item(4, "image", 6, seed=1), item(9, seed=2), item(3, "image", 2, "image", 5, seed=3)]
NEW = 4


def close(got, want):
    """Float32 forwards whose sums are ordered differently: five layers of about ten roundings each, on weights that double
    every error, come to some 40 units in the last place of the largest logit where it was tried; a wrong row changes logits
    by their own size, a million units. 512 units lie well between."""
    unit = torch.finfo(torch.float32).eps * want.abs().max()
    assert (got - want).abs().max() <= 512 * unit, f"{(got - want).abs().max() / unit:.0f} units"


def options(family, spans):
    return {"spans": spans} if family == "llama" else {}


def rows_of(inputs, spans, i):
    """The real rows of an item, and which of them are droppable, counted without padding."""
    real = inputs["attention_mask"][i].bool().nonzero().flatten()
    return real, [r - int(real[0]) for a, b in spans[i] for r in range(a, b)]


def chance(inputs, i, seed=0):
    ids = inputs["input_ids"][i][inputs["attention_mask"][i].bool()].tolist()

    def scores(stage, n):
        drawn = random_score((1, n), item_seeds=[zlib.crc32(repr((seed, stage.layer, ids)).encode())])
        return drawn[0].tolist()

    return scores


def check_prefill(family, items, schedule, side="left", attention="sdpa", unseen=(), **given):
    """Logits and kept tokens of a batch equal those of the slow reference, item by item; ``unseen`` are more padding rows."""
    model, inputs, spans = tiny.batch(family, items, side, attention)
    for place in unseen:
        inputs["attention_mask"][place] = 0
    embeds, ids = slow.captured(model, inputs)
    with torch.no_grad(), TokenDropper(schedule, **options(family, spans), **given)(model) as dropping:
        logits = model(**inputs).logits
    for i in range(len(items)):
        real, vision = rows_of(inputs, spans, i)
        with torch.no_grad():
            want, rows, stages = slow.run(
                model, embeds[i, real], ids[:, i, real], schedule, vision, positions=given.get("positions", "persistent"),
                chance=chance(inputs, i, given.get("seed", 0)),
            )  # fmt: skip
        close(logits[i, real][rows], want)
        assert [[vision[j] for j in kept] for kept in dropping.kept(i).stages] == stages
    return dropping


def check_decode(family, items, schedule, attention="sdpa", generate=None, compact_earlier_kv=False, **given):
    """Every step of generation from the cache equals running prompt and new tokens again, slowly, from scratch."""
    model, inputs, spans = tiny.batch(family, items, "left", attention)
    embeds, ids = slow.captured(model, inputs)
    dropper = TokenDropper(schedule, compact_earlier_kv=compact_earlier_kv, **options(family, spans), **given)
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), dropper(model) as dropping:
        out = model.generate(**inputs, **(settings | (generate or {})))
    per_item = len(out.sequences) // len(items)
    for j, sequence in enumerate(out.sequences):
        i = j // per_item
        real, vision = rows_of(inputs, spans, i)
        fresh = sequence[inputs["input_ids"].shape[1] : -1]
        h = torch.cat([embeds[i, real], model.get_input_embeddings()(fresh)])
        later = ids[:, i, real[-1:]] + torch.arange(1, len(fresh) + 1)
        at = torch.cat([ids[:, i, real], later], dim=1)
        again = {"positions": given.get("positions", "persistent"), "prompt": len(real), "chance": chance(inputs, i)}
        with torch.no_grad():
            want, _, stages = slow.run(model, h, at, schedule, vision, **again)
            if compact_earlier_kv:
                gone = set(vision) - set(stages[-1])
                want, _, _ = slow.run(model, h, at, schedule, vision, **again, hide=gone)
        if out.get("beam_indices") is None:
            close(torch.stack(out.logits)[:, j], want[-len(fresh) - 1 :])
        else:
            chosen = want[-len(fresh) - 1 :].log_softmax(-1).gather(1, sequence[-len(fresh) - 1 :, None])
            close(out.sequences_scores[j] * (len(fresh) + 1), chosen.sum())
    return out, dropping
