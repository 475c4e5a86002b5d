"""Packed results go into varlen attention without a copy: into kernels of flash-attn and torch where there is a GPU, and into what
stands for them on a CPU. ``varlen_attn`` of torch has no CPU kernel (torch 2.13); jagged tensors have one, without a causal mask.
"""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.cases import hidden_pair, normal, same

import v2drop_kernels as vk
from examples import varlen_attention as example
from v2drop_kernels.core import calls

LENGTHS, IMAGES, KEPT = [30, 62, 9, 0], [(2, 27), [(1, 26), (30, 55)], [], []], [8, 8, 9]
OFFSETS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
ROOT = Path(vk.__file__).resolve().parents[1]
T, D, HEADS, KV_HEADS = OFFSETS[-1], 64, 4, 2
AFTER = [30 - 25 + 8, 62 - 50 + 17, 9, 0]  # rows per item after the drop


def dropped(on, dtype=torch.bfloat16, **given):
    prev, cur = (x.to(on.device) for x in hidden_pair((T, D), dtype))
    kv = [normal((T, KV_HEADS, D // HEADS), dtype, f"kv{i}").to(on.device) for i in range(2)]
    layout = vk.TokenLayout.packed(IMAGES, OFFSETS)
    return vk.drop_tokens(prev, cur, KEPT, droppable=layout, kv=kv, kv_layout="BSHD", backend=on.backend, **given)


def plain(q, k, v, cu, causal):
    """Softmax attention in float64, row by row."""
    q, k, v = q.double(), k.double().repeat_interleave(HEADS // KV_HEADS, 1), v.double().repeat_interleave(HEADS // KV_HEADS, 1)
    out = torch.zeros_like(q)
    for lo, hi in zip(cu[:-1], cu[1:], strict=True):
        for i in range(lo, hi):
            stop = i + 1 if causal else hi
            weights = torch.einsum("hd,nhd->hn", q[i], k[lo:stop]).div(q.shape[-1] ** 0.5).softmax(-1)
            out[i] = torch.einsum("hn,nhd->hd", weights, v[lo:stop])
    return out


def close(got, want):
    torch.testing.assert_close(got.double().cpu(), want.cpu(), rtol=2.0**-7, atol=2.0**-7)  # three roundings to bfloat16


def test_what_a_varlen_kernel_asks_of_its_arguments(on):
    out = dropped(on)
    assert type(out.max_seqlen) is int
    assert out.max_seqlen == max(AFTER)
    assert (out.cu_seqlens.dtype, out.cu_seqlens.device.type) == (torch.int32, on.device)
    assert out.cu_seqlens.is_contiguous()
    assert out.cu_seqlens.diff().tolist() == AFTER
    for x in out.kv:
        assert x.shape == (sum(AFTER), KV_HEADS, D // HEADS)
        assert x.is_contiguous()
    assert out.hidden.is_contiguous()
    assert out.hidden.view(-1, HEADS, D // HEADS).data_ptr() == out.hidden.data_ptr()


def test_the_next_stage_goes_on_from_the_result(on):
    first = dropped(on)
    again = vk.drop_tokens(first.hidden, first.hidden, 3, droppable=first.layout, backend=on.backend)
    assert again.max_seqlen == max(AFTER[0] - 5, AFTER[1] - 5 - 6, AFTER[2])
    assert first.layout.max_seqlen == first.max_seqlen


def test_padded_results_have_no_longest_item(on):
    h = normal((2, 9, 4), torch.float32).to(on.device)
    assert vk.drop_tokens(h, h, 3, backend=on.backend).max_seqlen is None
    assert vk.compact(torch.zeros(2, 1, dtype=torch.int64, device=on.device), h, backend=on.backend).max_seqlen is None


def test_compact(on):
    """Exact where counts are given; else the most that the rows and the host's offsets allow, on every device alike."""
    h, layout = normal((T, D), torch.float32).to(on.device), vk.TokenLayout.packed(IMAGES, OFFSETS)
    chosen = vk.segmented_topk(h[:, 0].contiguous(), KEPT, droppable=layout, backend=on.backend)
    given = vk.compact(chosen, h, droppable=layout, k=KEPT, backend=on.backend)
    same([given.max_seqlen, given.cu_seqlens.diff().tolist()], [max(AFTER), AFTER])
    few = torch.tensor([0, 3, 31, 40, 50], device=on.device)
    for cu, longest in ((OFFSETS, 5), ([0, 2, 4, T], 5), ([*range(0, T, 2), T], 2)):
        got = vk.compact(few, h, cu_seqlens=cu, backend=on.backend)
        assert got.max_seqlen == longest >= int(got.cu_seqlens.diff().max())
        assert got.max_seqlen == vk.reference.compact(few.cpu(), h.cpu(), cu_seqlens=cu).max_seqlen


def test_lengths_that_only_the_device_has_give_an_upper_bound():
    cu = torch.tensor(OFFSETS, dtype=torch.int32)
    for ks, longest in (([5, 70, 4, 9], 70), ([200, 1, 1, 1], T), ([0, 0, 0, 0], 0)):
        found = calls.resolve("drop", torch.empty(T, D), ks, None, cu, traced=True)
        assert found.max_seqlen == longest
        assert found.cu_seqlens is cu


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_compiled(on_device):
    """A traced call returns the integer too: exact for offsets of the host, a bound for those in a tensor."""
    cu = torch.tensor(OFFSETS, dtype=torch.int32) if on_device else OFFSETS
    prev, cur = hidden_pair((T, D), torch.float32)
    step = torch.compile(lambda a, b, cu: vk.drop_tokens(a, b, [8, 70, 3, 2], cu_seqlens=cu), fullgraph=True, backend="eager")
    out = step(prev, cur, cu)
    assert type(out.max_seqlen) is int
    assert out.max_seqlen == (70 if on_device else 62)
    assert int(out.cu_seqlens.diff().max()) == 62


def test_flash_attn_gets_the_tensors_themselves(monkeypatch):
    """A module of that name checks what flash-attn checks (read in flash_attn 2.8, csrc/flash_attn/flash_api.cpp)."""
    seen = {}

    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        for x in (q, k, v):
            assert x.dim() == 3
            assert x.stride(-1) == 1
            assert x.dtype in (torch.float16, torch.bfloat16)
        for cu in (cu_seqlens_q, cu_seqlens_k):
            assert cu.dtype == torch.int32
            assert cu.is_contiguous()
        assert type(max_seqlen_q) is type(max_seqlen_k) is int
        assert q.shape[1] % k.shape[1] == 0
        assert causal
        seen.update(q=q, k=k, v=v, cu=cu_seqlens_k, longest=max_seqlen_k)
        return plain(q, k, v, cu_seqlens_q.tolist(), causal).to(q.dtype)

    for name in ("flash_attn_interface", "flash_attn"):
        module = types.ModuleType(name)
        module.flash_attn_varlen_func = flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, name, module)
        prev, cur = hidden_pair((T, D), torch.bfloat16)
        kv = [normal((T, KV_HEADS, D // HEADS), torch.bfloat16, f"kv{i}") for i in range(2)]
        out = vk.drop_tokens(prev, cur, KEPT, droppable=vk.TokenLayout.packed(IMAGES, OFFSETS), kv=kv, kv_layout="BSHD")
        q = out.hidden.view(-1, HEADS, D // HEADS)
        got = example.attend(q, *out.kv, out.cu_seqlens, out.max_seqlen, name)
        assert seen["q"].data_ptr() == out.hidden.data_ptr()
        assert [seen["k"].data_ptr(), seen["v"].data_ptr()] == [x.data_ptr() for x in out.kv]
        assert seen["cu"] is out.cu_seqlens
        assert seen["longest"] == max(AFTER)
        close(got, plain(q, *out.kv, [0, *torch.tensor(AFTER).cumsum(0).tolist()], causal=True))


def test_torch_takes_the_arguments():
    """torch's own function on tensors without data: shapes and types are checked, nothing is computed."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    q, k = (torch.empty(sum(AFTER), h, D // HEADS, dtype=torch.bfloat16, device="meta") for h in (HEADS, KV_HEADS))
    options = example.torch_options(varlen.varlen_attn)
    if "enable_gqa" not in options:
        k = k.repeat_interleave(HEADS // KV_HEADS, 1)
    cu = torch.empty(5, dtype=torch.int32, device="meta")
    assert varlen.varlen_attn(q, k, k, cu, cu, max(AFTER), max(AFTER), **options).shape == q.shape


def test_against_the_jagged_tensors_of_torch():
    """torch's varlen attention on a CPU: the packed rows and the offsets make a jagged tensor without a copy."""
    prev, cur = hidden_pair((T, D), torch.float32)
    kv = [normal((T, HEADS, D // HEADS), torch.float32, f"kv{i}") for i in range(2)]
    out = vk.drop_tokens(prev[:101], cur[:101], KEPT, droppable=vk.TokenLayout.packed(IMAGES[:3], OFFSETS[:4]),
                         kv=kv, kv_layout="BSHD")  # fmt: skip
    q, (k, v) = out.hidden.view(-1, HEADS, D // HEADS), out.kv
    jagged = [
        torch.nested.nested_tensor_from_jagged(x, out.cu_seqlens.long(), min_seqlen=min(AFTER[:3]), max_seqlen=out.max_seqlen)
        for x in (q, k, v)
    ]
    assert [x.values().data_ptr() for x in jagged] == [out.hidden.data_ptr(), k.data_ptr(), v.data_ptr()]
    got = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in jagged)).transpose(1, 2).values()
    each = [
        F.scaled_dot_product_attention(*(x[lo:hi].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
        for lo, hi in zip(out.cu_seqlens[:-1].tolist(), out.cu_seqlens[1:].tolist(), strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(each), rtol=1e-5, atol=1e-5)


def test_item_by_item_on_a_cpu():
    out = dropped(types.SimpleNamespace(device="cpu", backend="cpu"), torch.float32)
    q = out.hidden.view(-1, HEADS, D // HEADS)
    got = example.attend(q, *out.kv, out.cu_seqlens, out.max_seqlen)
    close(got, plain(q, *out.kv, out.cu_seqlens.tolist(), causal=True))


@pytest.mark.gpu
@pytest.mark.parametrize("using", example.IMPLEMENTATIONS[:-1])
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_on_a_gpu(using, on_device):
    """The kernels themselves; offsets of the device leave rows behind the last item, which the kernels do not touch."""
    on = types.SimpleNamespace(device="cuda", backend=None)
    if not example.can_run(using, torch.empty(1, dtype=torch.bfloat16, device="cuda")):
        pytest.skip(f"{using} is not installed")
    if on_device:
        prev, cur = (x.cuda() for x in hidden_pair((T, D), torch.bfloat16))
        kv = [normal((T, KV_HEADS, D // HEADS), torch.bfloat16, f"kv{i}").cuda() for i in range(2)]
        cu = torch.tensor(OFFSETS, dtype=torch.int32, device="cuda")
        out = vk.drop_tokens(prev, cur, [8, 20, 90, 3], cu_seqlens=cu, kv=kv, kv_layout="BSHD")
    else:
        out = dropped(on)
    used = int(out.cu_seqlens[-1])
    q = out.hidden.view(-1, HEADS, D // HEADS)
    got = example.attend(q, *out.kv, out.cu_seqlens, out.max_seqlen, using)
    close(got[:used], plain(q.cpu(), *(x.cpu() for x in out.kv), out.cu_seqlens.tolist(), causal=True)[:used])


def test_example():
    ended = subprocess.run(
        [sys.executable, "-m", "examples.varlen_attention"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "[129, 278, 90] after, at most 278" in ended.stdout
