"""compact: rows of ``keep`` that cannot be are refused where they can be read, and bring no other row back where they cannot."""

from __future__ import annotations

import pytest
import torch
from support.cases import same

import v2drop_kernels as vk
from v2drop_kernels.core.layout import TokenLayout
from v2drop_kernels.ops.compact import keep as rules


def hidden(device, *lead):
    """Every row holds its own number."""
    rows = torch.arange(lead[0] * (lead[1] if len(lead) > 1 else 1), device=device)
    return rows.float().view(*lead, 1).expand(*lead, 2).contiguous()


WRONG = {
    "row of another item": ([[9], [1]], {"droppable": (1, 4)}, r"got row 9 for segment 0"),
    "text row": ([[0], [3]], {"droppable": (2, 4)}, r"got row 0 for segment 0"),
    "row behind the span": ([[2], [4]], {"droppable": (2, 4)}, r"got row 4 for segment 1"),
    "duplicate": ([[2, 2], [2, 3]], {"droppable": (1, 4)}, r"list each row once, got row 2 twice for segment 0"),
    "k above what is listed": ([[1, -1], [2, 3]], {"droppable": (1, 4), "k": 2}, r"k must be .* got 2 for segment 0 of 1"),
    "k below what is listed": ([[1, 2], [2, 3]], {"droppable": (1, 4), "k": [2, 1]}, r"k must be .* got 1 for segment 1 of 2"),
    "padding": ([[4], [1]], {"droppable": TokenLayout.padded([(1, 3), (1, 4)], 6, lengths=[3, 6])}, r"got row 4"),
}


@pytest.mark.parametrize("case", WRONG)
def test_compact_refuses_rows_that_cannot_be(on, case):
    """Dropped rows came back, even of another item, and with a ``k`` above what is listed."""
    keep, given, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        vk.compact(torch.tensor(keep, device=on.device), hidden(on.device, 2, 6), backend=on.backend, **given)
    if on.backend == "reference":
        with pytest.raises(ValueError, match=message):
            vk.reference.compact(torch.tensor(keep), hidden("cpu", 2, 6), **given)


def test_compact_refuses_rows_outside_a_mask(on):
    mask = torch.tensor([[False, True, False, True, True, False]] * 2, device=on.device)
    with pytest.raises(ValueError, match="got row 2 for segment 1"):
        vk.compact(torch.tensor([[1], [2]], device=on.device), hidden(on.device, 2, 6), droppable=mask, backend=on.backend)


def test_compact_refuses_rows_of_another_packed_item(on):
    with pytest.raises(ValueError, match="got row 4 for segment 0"):
        vk.compact(torch.tensor([[4], [5]], device=on.device), hidden(on.device, 7), cu_seqlens=[0, 3, 7], backend=on.backend)


def rows_unread(keep, layout, k):
    """The surviving rows where ``keep`` cannot be read, as on a GPU."""
    return rules._with_all_others(torch.tensor(keep), k, layout, readable=False)[0]


@pytest.mark.parametrize(
    ("keep", "k", "want"),
    [
        ([[9], [1]], 1, [[0, 4, 5, -1], [0, 1, 4, 5]]),
        ([[0], [2]], 1, [[0, 4, 5, -1], [0, 2, 4, 5]]),
        ([[2, 2], [2, 3]], 2, [[0, 2, 4, 5, -1], [0, 2, 3, 4, 5]]),
        ([[1, -1], [2, 3]], 2, [[0, 1, 4, 5, -1], [0, 2, 3, 4, 5]]),
        ([[3, 1, 2], [2, 3, 1]], 2, [[0, 1, 3, 4, 5], [0, 2, 3, 4, 5]]),
    ],
    ids=["elsewhere", "text", "duplicate", "k-above", "k-below"],
)
def test_what_cannot_be_read_brings_no_other_row_back(keep, k, want):
    same(rows_unread(keep, TokenLayout.padded((1, 4), 6, batch=2), k), torch.tensor(want))


def test_what_cannot_be_read_in_padded_and_packed_batches():
    left = TokenLayout.padded([(3, 5), (1, 4)], 6, lengths=[3, 6], padding_side="left")
    same(rows_unread([[0], [3]], left, 1), torch.tensor([[-1, -1, 5, -1], [0, 3, 4, 5]]))
    same(rows_unread([[4], [5]], TokenLayout.packed([(0, 3), (0, 4)], [0, 3, 7]), 1), torch.tensor([5, -1]))
