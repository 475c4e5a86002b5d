"""voco_mask against its rule, token by token; in a model: models/test_policies.py."""

from __future__ import annotations

import pytest
import torch

from v2drop_kernels.models.voco import voco_mask


def tables(kinds, side="left"):
    """Strings of t(ext), v(ision) and c(ompressed), padded: which are vision, which VoCo, which real."""
    width = max(map(len, kinds))
    kinds = [x.rjust(width) if side == "left" else x.ljust(width) for x in kinds]
    return tuple(torch.tensor([[c in which for c in x] for x in kinds], dtype=torch.bool) for which in ("v", "c", "tvc"))


def sees(kinds, side="left"):
    vision, voco, real = tables(kinds, side)
    batch, n = vision.shape
    seen = torch.zeros(batch, 1, n, n, dtype=torch.bool)
    for b in range(batch):
        for i in range(n):
            for j in range(i + 1):
                text = not vision[b, i] and not voco[b, i]
                seen[b, 0, i, j] = real[b, j] and not (text and vision[b, j])
    return seen


KINDS = [["ttvvvvccttt"], ["tvvvcttvvct", "vvct", "ttttt"], ["vvv", "c"], [""]]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_voco_mask(kinds, side, dtype):
    vision, voco, real = tables(kinds, side)
    mask = voco_mask(vision, voco, attention_mask=real.long(), dtype=dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask, torch.zeros_like(mask).masked_fill(~sees(kinds, side), torch.finfo(dtype).min))
    for queries in range(vision.shape[1] + 1):
        last = voco_mask(vision, voco, attention_mask=real, dtype=dtype, queries=queries)
        assert torch.equal(last, mask[:, :, mask.shape[2] - queries :])


def test_without_padding():
    vision, voco, _ = tables(KINDS[0])
    assert torch.equal(voco_mask(vision, voco) == 0, sees(KINDS[0]))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"vision": torch.zeros(2, 3)}, ValueError, r"vision must be bool \[B, N\], got torch.float32 \[2, 3\]"),
    ({"vision": [True]}, TypeError, "vision must be a tensor, got list"),
    ({"voco": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, r"voco must have shape \[2, 3\], got \[2, 4\]"),
    ({"voco": torch.zeros(2, 3)}, TypeError, "voco must be torch.bool, got torch.float32"),
    ({"attention_mask": torch.ones(2, 2)}, ValueError, r"attention_mask must be \[B, N\] = \[2, 3\], got \[2, 2\]"),
    ({"dtype": torch.int64}, TypeError, "dtype must be floating point, got torch.int64"),
    ({"queries": 4}, ValueError, "queries must be an int from 0 to N = 3, got 4"),
])  # fmt: skip
def test_bad_input(change, error, message):
    given = {"vision": torch.zeros(2, 3, dtype=torch.bool), "voco": torch.zeros(2, 3, dtype=torch.bool), **change}
    with pytest.raises(error, match=message):
        voco_mask(given.pop("vision"), given.pop("voco"), **given)
