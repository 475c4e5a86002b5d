"""Padding that no one side describes: holes, and a batch that is padded on both sides. Rankings by the last token must find it."""

from __future__ import annotations

import pytest
import torch
from support import tiny

from v2drop_kernels.models import TokenDropper
from v2drop_kernels.schedule import Schedule, Stage

LAST = ["fastv", "pdrop", "hidivdrop", "cross_modal_flash", "sparsevlm"]


def kept(model, inputs, policy, **options):
    schedule = Schedule((Stage(2, 8, policy=policy, options=options),))
    with torch.no_grad(), TokenDropper(schedule)(model) as dropping:
        model(**inputs)
        return [dropping.kept(i).stages[0] for i in range(len(inputs["input_ids"]))]


def padded(inputs, front, behind):
    """The same prompts with padding on both sides; ids count the tokens that are seen, as processors have it."""
    pad = lambda x, value: torch.nn.functional.pad(x, (front, behind), value=value)
    mask = pad(inputs["attention_mask"], 0)
    ids = (mask.cumsum(1) - 1).clamp(min=0)
    return {**inputs, "input_ids": pad(inputs["input_ids"], 0), "attention_mask": mask, "position_ids": ids}


@pytest.mark.parametrize("policy", LAST)
@pytest.mark.parametrize(("front", "behind"), [(0, 3), (3, 0), (2, 2)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_hole_beside_padding(policy, front, behind, attention):
    model, inputs, _ = tiny.batch("llava", [tiny.item(3, "image", 9, seed=1)], attention=attention)
    inputs["attention_mask"][0, 1] = 0
    assert kept(model, padded(inputs, front, behind), policy) == kept(model, padded(inputs, 0, 0), policy)


@pytest.mark.parametrize("policy", LAST)
def test_a_batch_that_is_padded_on_both_sides(policy):
    items = [tiny.item(3, "image", 9, seed=1), tiny.item(3, "image", 9, seed=2)]
    alone = [tiny.batch("llava", [item]) for item in items]
    model = alone[0][0]
    sides = [padded(inputs, *(2, 0) if i else (0, 2)) for i, (_, inputs, _) in enumerate(alone)]
    together = {name: torch.cat([side[name] for side in sides]) for name in sides[0]}
    wanted = [kept(model, padded(inputs, 0, 0), policy)[0] for _, inputs, _ in alone]
    assert kept(model, together, policy) == wanted


def test_all_text_tokens_of_an_item_without_text():
    """The query is the last row, as in the other modes; scores without a query would keep the first rows."""
    model, inputs, _ = tiny.batch("llava", [tiny.item("image", seed=3), tiny.item(2, "image", 4, seed=4)])
    assert kept(model, inputs, "hidivdrop", tokens="all")[0] == kept(model, inputs, "hidivdrop", tokens="last")[0]
