"""v2drop_kernels.jax: the same bytes as the torch functions under jit, and the same gradients."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from support.arrays import SPANS, WRONG, to_numpy
from support.arrays import same as same_bytes
from support.cases import FLOATS, KS, METRICS, ORDERS, SCORES, companions, cross, hidden_pair, integers, normal, scores

jax = pytest.importorskip("jax", reason="jax is not installed")
pytest.importorskip("v2drop_kernels._xla", reason="the native library was built without its part for JAX")

import jax.numpy as jnp  # noqa: E402

import v2drop_kernels as vk  # noqa: E402
import v2drop_kernels.jax as vj  # noqa: E402

ARRAYS = ("position_ids", "kv", "attention_mask", "rope", "labels", "scores")
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp16", "bf16"])


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Only there are sums added in the same order."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def narrow(x):
    """JAX has no 64-bit numbers unless told so."""
    if isinstance(x, list | tuple):
        found = [narrow(y) for y in x]
        return type(x)(*found) if hasattr(x, "_fields") else type(x)(found)
    return x.to(torch.int32) if isinstance(x, torch.Tensor) and x.dtype == torch.int64 else x


def to_jax(x):
    return type(x)(map(to_jax, x)) if isinstance(x, list | tuple) else x if x is None else jnp.asarray(to_numpy(x))


def same(got, want):
    same_bytes(jax.tree.map(np.asarray, got), narrow(want._replace(layout=None) if isinstance(want, vk.Dropped) else want))


def same_as_torch(name, *args, k=(), **given):
    """Call both, JAX under jit, where everything but the arrays is static; compare everything."""
    given = narrow(given)
    arrays = {key: to_jax(x) for key, x in given.items() if key in ARRAYS}
    static = {key: x for key, x in given.items() if key not in ARRAYS}
    if isinstance(static.get("cu_seqlens"), torch.Tensor):
        static["cu_seqlens"] = static["cu_seqlens"].tolist()
    ks = () if k == () else (k.tolist() if isinstance(k, torch.Tensor) else k,)
    function = jax.jit(lambda h, more: getattr(vj, name)(*h, *ks, **more, **static))
    got = function([to_jax(x) for x in args], arrays)
    want = getattr(vk, name)(*args, *ks, **given, backend="cpu")
    same(got, want)
    return got


@dtypes
@pytest.mark.parametrize("metric", METRICS)
def test_variation_score(dtype, metric):
    prev, cur = (normal((3, 21, 40), dtype, i) for i in "pc")
    for rounded in (None, torch.float16, torch.bfloat16):
        want = vk.variation_score(prev, cur, metric=metric, score_dtype=rounded, backend="cpu")
        score_dtype = {None: None, torch.float16: jnp.float16, torch.bfloat16: jnp.bfloat16}[rounded]
        same(vj.variation_score(to_jax(prev), to_jax(cur), metric=metric, score_dtype=score_dtype), want)
    same_as_torch("variation_score", prev[1], cur[1], metric=metric)


@cross(dtype=FLOATS, kind=SCORES, k=KS, order=ORDERS)
def test_segmented_topk(dtype, kind, k, order):
    b = SPANS[6]
    same_as_torch("segmented_topk", scores(kind, b.lead, dtype), k=b.k(k), droppable=b.droppable, order=order)


@pytest.mark.parametrize("b", SPANS, ids=str)
@pytest.mark.parametrize("k", ["n/3", "list"])
def test_every_batch(b, k):
    prev, cur = hidden_pair((*b.lead, 6), torch.bfloat16)
    given = companions(b, "mrope" if k == "list" else "")
    same_as_torch("drop_tokens", prev, cur, k=b.k(k), **b.arguments(), **given)
    same_as_torch("variation_topk", prev, cur, k=b.k(k), **b.arguments(), metric="l1", order="score")
    same_as_torch("drop_tokens", None, cur, k=b.k(k), **b.arguments(), scores=cur[..., 0])


@dtypes
def test_drop_tokens_of_every_dtype(dtype):
    b = SPANS[2]
    prev, cur = hidden_pair((*b.lead, 48), dtype)
    given = {"position_ids": torch.arange(b.rows)[None], "rope": (torch.rand(b.rows, 4), torch.rand(1, b.rows, 4))}
    same_as_torch("drop_tokens", prev, cur, k=20, droppable=b.droppable, **given)
    same_as_torch("drop_tokens", prev, cur, k=20, kv=(torch.rand(2, b.rows, 2, 4),), kv_layout="BSHD")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compact(packed):
    b = next(x for x in SPANS if x.packed is packed and x.batch > 1 and x.rows > 5)
    keep = torch.tensor([1, 5, -1, 3, 2])
    given = companions(b) | ({"cu_seqlens": [0, 4, b.rows]} if packed else {})
    same_as_torch("compact", keep if packed else keep.expand(b.batch, -1), normal((*b.lead, 3), torch.float32), **given)


def test_compact_takes_a_topk():
    x = jnp.arange(12.0).reshape(2, 6)
    assert vj.compact(vj.segmented_topk(x, 2), x).hidden.tolist() == [[4, 5], [10, 11]]


def test_sixty_four_bits():
    """With 64-bit numbers turned on, they travel as they are; indices stay int32."""
    h = integers((1, 7, 4), torch.float32)
    ids = torch.arange(7)[None] + (1 << 40)
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        got = vj.drop_tokens(to_jax(h), to_jax(h), 3, position_ids=to_jax(ids), kv=jnp.ones((1, 1, 7, 2), jnp.float64))
        assert got.position_ids.tolist() == ids[:, got.keep[0].tolist()].tolist()
        assert (got.position_ids.dtype, got.kv.dtype, got.keep.dtype) == (jnp.int64, jnp.float64, jnp.int32)


def gradients_of(function, *arrays):
    """The gradients of a weighted sum of what a torch function gives."""
    leaves = [x.clone().requires_grad_() for x in arrays]
    function(*leaves).backward()
    return [x.grad for x in leaves]


@dtypes
@pytest.mark.parametrize("metric", METRICS)
def test_gradient_of_variation_score(dtype, metric):
    prev, cur = (normal((2, 9, 24), dtype, i) for i in "pc")
    prev[0, 3] = cur[0, 3]
    weights = normal((2, 9), torch.float32, "w")
    want = gradients_of(lambda a, b: (vk.variation_score(a, b, metric=metric, backend="cpu") * weights).sum(), prev, cur)
    loss = jax.jit(jax.grad(lambda a, b: (vj.variation_score(a, b, metric=metric) * to_jax(weights)).sum(), argnums=(0, 1)))
    same(list(loss(to_jax(prev), to_jax(cur))), want)


@pytest.mark.parametrize("b", [b for b in SPANS if b.rows > 1 and b.batch], ids=str)
def test_gradient_of_drop_tokens(b):
    prev, cur = hidden_pair((*b.lead, 6), torch.float32)
    lead = b.lead
    kv = normal((2, *lead, 4) if b.packed else (lead[0], 2, lead[1], 4), torch.float32, "kv")
    rope = normal((*lead, 4), torch.float32, "rope")
    ids = integers(lead, torch.int32, "ids")
    ks = b.k("list")
    shape = vk.drop_tokens(prev, cur, ks, **b.arguments(), kv=kv, backend="cpu")
    w_hidden, w_kv = normal(shape.hidden.shape, torch.float32, 1), normal(shape.kv.shape, torch.float32, 2)
    arguments = {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in b.arguments().items()}

    def loss(backend, weights, prev, cur, kv, rope):
        got = backend(
            prev, cur, ks, kv=kv, rope=(rope,), position_ids=ids if backend is not vj.drop_tokens else to_jax(ids), **arguments
        )
        return (got.hidden * weights[0]).sum() + (got.kv * weights[1]).sum() + (got.rope[0] * 3).sum()

    torch_ = functools.partial(loss, functools.partial(vk.drop_tokens, backend="cpu"), (w_hidden, w_kv), prev)
    want = gradients_of(torch_, cur, kv, rope)
    grad = jax.jit(jax.grad(functools.partial(loss, vj.drop_tokens, to_jax((w_hidden, w_kv))), argnums=(0, 1, 2, 3)))
    none, *got = grad(*map(to_jax, (prev, cur, kv, rope)))
    same(got, want)
    assert not none.any(), "no gradient flows through the choice"


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradient_of_compact(packed):
    keep = torch.tensor([4, -1, 0, 2])
    hidden, weights = normal((6, 3), torch.float32, "h"), normal((4, 3), torch.float32, "w")
    given = {"cu_seqlens": [0, 6]} if packed else {}
    if not packed:
        keep, hidden, weights = keep[None], hidden[None], weights[None]
    want = gradients_of(lambda h: (vk.compact(keep, h, backend="cpu", **given).hidden * weights).sum(), hidden)
    got = jax.grad(lambda h: (vj.compact(to_jax(keep), h, **given).hidden * to_jax(weights)).sum())(to_jax(hidden))
    same([got], want)


@pytest.mark.parametrize("b", [SPANS[5], SPANS[6], next(x for x in SPANS if x.packed)], ids=str)
def test_gradient_of_the_values_of_a_topk(b):
    prev, cur = (normal((*b.lead, 8), torch.float32, i) for i in "pc")
    ks, given = b.k("list"), {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in b.arguments().items()}
    real = vk.variation_topk(prev, cur, ks, **given, backend="cpu").indices >= 0

    def values(topk, where, *h):
        found = topk(*h, ks, **given).values
        return where(found)

    want = gradients_of(functools.partial(values, vk.variation_topk, lambda v: v[real].sum()), prev, cur)
    mask = to_jax(real)
    pick = lambda v: jnp.where(mask, v, 0).sum()
    got = jax.grad(functools.partial(values, vj.variation_topk, pick), argnums=(0, 1))(to_jax(prev), to_jax(cur))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(g), w.numpy())
    x = cur[..., 0].contiguous()
    (want,) = gradients_of(functools.partial(values, vk.segmented_topk, lambda v: v[real].sum()), x)
    got = jax.grad(functools.partial(values, vj.segmented_topk, pick))(to_jax(x))
    np.testing.assert_array_equal(np.asarray(got), want.numpy())


def test_vmap_is_a_loop():
    prev, cur = (to_jax(normal((3, 2, 9, 4), torch.float32, i)) for i in "pc")
    got = jax.vmap(lambda a, b: vj.drop_tokens(a, b, 4).hidden)(prev, cur)
    want = jnp.stack([vj.drop_tokens(a, b, 4).hidden for a, b in zip(prev, cur, strict=True)])
    assert (got == want).all()
    grads = jax.vmap(jax.grad(lambda b: vj.drop_tokens(prev[0], b, 4).hidden.sum()))(cur)
    assert grads.shape == cur.shape


def test_compiles_once_per_shape():
    traced = []

    @jax.jit
    def step(a, b):
        traced.append(a.shape)
        return vj.drop_tokens(a, b, 3, droppable=(1, 6)).hidden

    for _ in range(3):
        step(jnp.zeros((2, 8, 4)), jnp.ones((2, 8, 4)))
    assert traced == [(2, 8, 4)]


def as_jax(x):
    if isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.dtype.isnative and x.dtype.itemsize < 8:
        return jnp.asarray(x)
    return x


# Without what JAX converts by itself, has no argument for, or finds out when the call runs.
ERRORS = [w for w in WRONG if not any(word in w[4] for word in ("float64", "threads", "plain dtype")) and w[4] != "keep"]


@pytest.mark.parametrize(("name", "args", "given", "kind", "message"), ERRORS, ids=[f"{w[0]}-{i}" for i, w in enumerate(ERRORS)])
def test_errors_name_the_argument(name, args, given, kind, message):
    with pytest.raises(kind, match=message):
        getattr(vj, name)(*map(as_jax, args), **{key: as_jax(x) for key, x in given.items()})


def test_traced_counts_are_refused():
    with pytest.raises(TypeError, match="k must be ints that are known on the host"):
        jax.jit(vj.segmented_topk)(jnp.zeros((1, 4)), 2)


def test_errors_of_the_library_arrive():
    with pytest.raises(Exception, match="keep"):
        jax.block_until_ready(vj.compact(jnp.array([[7]]), jnp.zeros((1, 3, 2))))


GPUS = [d for d in jax.devices() if d.platform == "gpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="jax sees no GPU")
@pytest.mark.parametrize("b", SPANS, ids=str)
def test_on_a_gpu(b):
    """Scores are exact in any order here, so every byte is what the CPU gives."""
    with jax.default_device(GPUS[0]):
        prev, cur = hidden_pair((*b.lead, 6), torch.bfloat16)
        same_as_torch("drop_tokens", prev, cur, k=b.k("list"), **b.arguments(), **companions(b))
        same_as_torch("variation_topk", prev, cur, k=b.k("list"), **b.arguments(), order="score")
        same_as_torch("variation_score", prev, cur, metric="l1")
        loss = jax.jit(jax.grad(lambda a, c: vj.drop_tokens(a, c, 3).hidden.astype(jnp.float32).sum(), argnums=1))
        if not b.packed:
            want = gradients_of(lambda c: vk.drop_tokens(prev, c, 3, backend="cpu").hidden.float().sum(), cur)
            same([loss(to_jax(prev), to_jax(cur))], want)


@pytest.mark.parametrize("row", [5, 2**31, 2**32, 2**62])
def test_compact_refuses_rows_beyond_the_last_with_x64(row):
    """2**32 wrapped to row 0."""
    with jax.enable_x64(True):
        with pytest.raises(Exception, match="keep"):
            jax.block_until_ready(vj.compact(jnp.array([[0, row]], jnp.int64), jnp.zeros((1, 5, 2), jnp.float32)).hidden)
        got = vj.compact(jnp.array([[4, -1, -(2**40)]], jnp.int64), jnp.ones((1, 5, 2), jnp.float32)).hidden
        assert got[0, :, 0].tolist() == [1, 0, 0]
