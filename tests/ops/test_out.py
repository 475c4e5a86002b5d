"""``out=``: the tensors of an earlier result are written again, and nothing else is."""

import pytest
import torch
from support.cases import hidden_pair, same

import v2drop_kernels as vk


def _inputs(on, seed=0):
    prev, cur = hidden_pair((2, 12, 8), torch.bfloat16, seed, device=on.device)
    kv = [(torch.randn(2, 3, 12, 4, device=on.device), torch.randn(2, 3, 12, 4, device=on.device))]
    return prev, cur, {"kv": kv, "position_ids": torch.arange(12, device=on.device).expand(2, -1)}


def test_drop_tokens_writes_into_an_earlier_result(on):
    prev, cur, rest = _inputs(on)
    first = vk.drop_tokens(prev, cur, 4, droppable=(2, 10), backend=on.backend, **rest)
    prev, cur, rest = _inputs(on, seed=1)
    want = vk.drop_tokens(prev, cur, 4, droppable=(2, 10), backend=on.backend, **rest)
    got = vk.drop_tokens(prev, cur, 4, droppable=(2, 10), out=first, backend=on.backend, **rest)
    assert got.hidden.data_ptr() == first.hidden.data_ptr()
    assert got.kv[0][1].data_ptr() == first.kv[0][1].data_ptr()
    same(got[:4], want[:4])


def test_compact_writes_into_an_earlier_result(on):
    keep = torch.tensor([[0, 3, 5], [2, 4, -1]], device=on.device)
    _, cur, rest = _inputs(on)
    first = vk.compact(keep, cur, backend=on.backend, **rest)
    want = vk.compact(keep.flip(0), cur, backend=on.backend, **rest)
    got = vk.compact(keep.flip(0), cur, out=first, backend=on.backend, **rest)
    assert got.hidden.data_ptr() == first.hidden.data_ptr()
    same(got[:4], want[:4])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda first, cur: first._replace(hidden=first.hidden[:, 1:]), ValueError, "out.hidden"),
        (lambda first, cur: first._replace(hidden=first.hidden.float()), ValueError, "out.hidden"),
        (lambda first, cur: first._replace(hidden=None), ValueError, "out.hidden"),
        (lambda first, cur: first._replace(hidden=first.hidden.mT.contiguous().mT), ValueError, "out.hidden"),
        (lambda first, cur: first._replace(hidden=cur.view(-1)[:128].view(2, 8, 8)), ValueError, "share memory"),
        (lambda first, cur: first._replace(kv=first.kv[0]), ValueError, "out.kv"),
        (lambda first, cur: first.hidden, TypeError, "out"),
        (lambda first, cur: first._replace(hidden=torch._neg_view(first.hidden)), ValueError, "out.hidden .* negated"),
    ],
    ids=["rows", "dtype", "missing", "strides", "overlap", "structure", "type", "negated"],
)
def test_out_that_does_not_fit(on, change, error, text):
    prev, cur, rest = _inputs(on)
    first = vk.drop_tokens(prev, cur, 4, droppable=(2, 10), backend=on.backend, **rest)
    with pytest.raises(error, match=text):
        vk.drop_tokens(prev, cur, 4, droppable=(2, 10), out=change(first, cur), backend=on.backend, **rest)


def test_out_is_refused_where_a_gradient_is_recorded(on):
    prev, cur, _ = _inputs(on)
    first = vk.drop_tokens(prev, cur, 4, backend=on.backend)
    with pytest.raises(ValueError, match="out"):
        vk.drop_tokens(prev, cur.requires_grad_(), 4, out=first, backend=on.backend)
