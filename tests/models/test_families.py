"""Every type of model that is served, as a tiny random model, against its own undropped forward with hidden rows."""

from __future__ import annotations

import pytest
import torch
from support import families
from support.dropped import close
from support.families import IMAGE
from support.hidden_rows import HiddenRows

from v2drop_kernels.models import TokenDropper
from v2drop_kernels.models.adapters.capabilities import text_decoder
from v2drop_kernels.schedule import Schedule, Stage

SCHEDULE = Schedule((Stage(1, 0.6), Stage(3, 2)))
TYPES = tuple(families.SERVED)


def prompts(kind):
    """Two items, padded on the left: one image between text, and an image in two runs; and which rows are vision tokens."""
    rows = [[5, 9, 7, 11, *[IMAGE] * 9, 13, 21, 17], [33, *[IMAGE] * 4, 44, *[IMAGE] * 4, 12, 19]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}, ids == IMAGE


@pytest.mark.parametrize("kind", TYPES)
def test_prefill_and_decoding_equal_the_model_with_hidden_rows(kind):
    model = families.made(kind)
    inputs, vision = prompts(kind)
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    spans = None if kind in families.WITH_IMAGES else [runs(row) for row in vision]
    with torch.no_grad():
        with HiddenRows(model, text_decoder(model), vision, SCHEDULE) as want:
            expected = model.generate(**inputs, **settings)
        with TokenDropper(SCHEDULE, spans=spans)(model) as session:
            got = model.generate(**inputs, **settings)
    for i, row in enumerate(vision):
        mine = row.nonzero().flatten()
        assert [mine[list(kept)].tolist() for kept in session.kept(i).stages] == [kept[i] for kept in want.kept]
    close(torch.stack(got.logits), torch.stack(expected.logits))
    assert torch.equal(got.sequences, expected.sequences)


def runs(row):
    edges = torch.nn.functional.pad(row.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("kind", TYPES)
def test_keeping_all_changes_no_bit(kind):
    model = families.made(kind)
    inputs, vision = prompts(kind)
    spans = None if kind in families.WITH_IMAGES else [runs(row) for row in vision]
    with torch.no_grad():
        want = model(**inputs).logits
        with TokenDropper(Schedule((Stage(1, 1.0),)), spans=spans)(model):
            assert torch.equal(model(**inputs).logits, want)
