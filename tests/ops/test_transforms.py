"""torch.func, forward-mode AD and second derivatives: every differentiable op, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from support.cases import fewer, normal
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import v2drop_kernels as vk
from v2drop_kernels.ops.autograd import transformed

KEEP = torch.tensor([[0, 3, 5], [2, 4, -1]])


def keys(x, y):
    return x[:, None], y[:, None, -1:]


def gathered(x, keep):
    rows = x.gather(1, keep.clamp(min=0)[..., None].expand(*keep.shape, x.shape[2]))
    return torch.where((keep >= 0)[..., None], rows, torch.zeros_like(rows))


def dropped(x, y):
    change = (x.detach() - y.detach()).norm(dim=-1)
    return gathered(x, change.topk(3).indices.sort().values)


def best(scores, k):
    return scores.gather(1, scores.detach().topk(k).indices.sort().values)


def attention(x, y):
    k, q = keys(x, y)
    return (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1).mean(1)[:, 0]


def cosine(x, y, dim=-1):
    return 1 - (x * y).sum(dim) / (x.norm(dim=dim) * y.norm(dim=dim))


def merged(x, weights):
    return torch.stack([weights[:, :1] * x[:, 0], weights[:, 1:2] * x[:, 3] + weights[:, 2:] * x[:, 5]], 1)


def merge(x, y, b):
    offsets, rows = torch.tensor([[0, 1, 3]], device=x.device).expand(len(x), 3), torch.tensor([[0, 3, 5]], device=x.device)
    return vk.weighted_merge(x, offsets, rows.expand(len(x), 3), y[:, 0, :3], backend=b)


# Each op in x and y [2, 7, 8], and the same in plain PyTorch.
OPS = {
    "variation_score-l2": (lambda x, y, b: vk.variation_score(y, x, backend=b), lambda x, y: (x - y).norm(dim=-1)),
    "variation_score-l1": (
        lambda x, y, b: vk.variation_score(y, x, metric="l1", backend=b),
        lambda x, y: (x - y).abs().sum(-1),
    ),
    "variation_score-cosine": (lambda x, y, b: vk.variation_score(y, x, metric="cosine", backend=b), cosine),
    "variation_topk": (lambda x, y, b: vk.variation_topk(y, x, 3, backend=b).values, lambda x, y: best((x - y).norm(dim=-1), 3)),
    "segmented_topk": (lambda x, y, b: vk.segmented_topk(x[..., 0], 3, backend=b).values, lambda x, y: best(x[..., 0], 3)),
    "segmented_topk-spans": (
        lambda x, y, b: vk.segmented_topk(x[..., 0], 2, droppable=[(0, 5)] * len(x), backend=b).values,
        lambda x, y: best(x[:, :5, 0], 2),
    ),
    "compact": (
        lambda x, y, b: vk.compact(KEEP.to(x.device)[: len(x)], x, labels=torch.zeros_like(x[..., 0]).long(), backend=b).hidden,
        lambda x, y: gathered(x, KEEP.to(x.device)[: len(x)]),
    ),
    "drop_tokens": (lambda x, y, b: vk.drop_tokens(y, x, 3, backend=b).hidden, dropped),
    "drop_tokens-kv": (
        lambda x, y, b: vk.drop_tokens(y, x, 3, kv=[(x[:, None] * 2, y[:, None])], backend=b).kv[0][0][:, 0],
        lambda x, y: 2 * dropped(x, y),
    ),
    "attention_score": (lambda x, y, b: vk.attention_score(*keys(x, y)[::-1], backend=b), attention),
    "key_norm_score": (lambda x, y, b: vk.key_norm_score(x[:, None], norm="l2", backend=b), lambda x, y: x.norm(dim=-1)),
    "cosine_to_pivots": (
        lambda x, y, b: vk.cosine_to_pivots(x, KEEP[: len(x), 1:2].to(x.device), backend=b)[:, 0],
        lambda x, y: 1 - cosine(x, x.gather(1, KEEP[: len(x), 1:2, None].to(x.device).expand(-1, 1, 8))),
    ),
    "frame_similarity": (
        lambda x, y, b: vk.frame_similarity(x, backend=b)[1:],
        lambda x, y: cosine(x[1:], x[:-1]),
    ),
    "weighted_merge": (merge, lambda x, y: merged(x, y[:, 0, :3])),
}  # fmt: skip
SMALL = {
    name: OPS[name]
    for name in fewer(list(OPS), ["variation_score-l2", "segmented_topk", "compact", "drop_tokens", "weighted_merge"])
}
ops = pytest.mark.parametrize("op", SMALL)


def inputs(on, op):
    x, y = (normal((2, 7, 8), torch.float32, op, name).to(on.device) for name in "xy")
    ours, plain = OPS[op]
    return x, y, (lambda x, y: ours(x, y, on.backend)), plain


def close(got, want):
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def loss(function):
    return lambda x, y: function(x, y).square().sum()


@ops
def test_grad_vjp_and_jacrev(on, op):
    """functorch tensors have no storage, and the refusal said so."""
    x, y, ours, plain = inputs(on, op)
    close(grad(loss(ours), (0, 1))(x, y), grad(loss(plain), (0, 1))(x, y))
    out, pull = vjp(ours, x, y)
    close(out, ours(x, y))
    close(pull(torch.ones_like(out)), vjp(plain, x, y)[1](torch.ones_like(out)))
    close(jacrev(ours)(x, y), jacrev(plain)(x, y))


# In the interpreter a Jacobian is a hundred launches: of an op without a gather, and of the one that is all ops.
@pytest.mark.parametrize("op", fewer(list(OPS), ["variation_score-l2", "drop_tokens"]))
def test_jvp_jacfwd_and_dual_numbers(on, op):
    """Tangents were None, or zeros."""
    x, y, ours, plain = inputs(on, op)
    dx, dy = torch.ones_like(x), torch.linspace(-1, 1, 8, device=on.device).expand_as(y).clone()
    close(jvp(ours, (x, y), (dx, dy))[1], jvp(plain, (x, y), (dx, dy))[1])
    close(jacfwd(ours)(x, y), jacfwd(plain)(x, y))
    tangent = jvp(lambda x: plain(x, y), (x,), (dx,))[1]
    with forward_ad.dual_level():
        got = ours(forward_ad.make_dual(x, dx), y)
        close(forward_ad.unpack_dual(got).tangent, tangent)
        assert forward_ad.unpack_dual(ours(x, y)).tangent is None or not forward_ad.unpack_dual(ours(x, y)).tangent.any()
    assert not transformed()


@ops
def test_vmap(on, op):
    x, y, ours, plain = inputs(on, op)
    many = torch.stack([x, x + 1, x * 2, x.flip(2)], 1)
    close(vmap(ours, (1, None))(many, y), torch.stack([ours(many[:, i], y) for i in range(4)]))
    close(vmap(grad(loss(ours)), (1, None))(many, y), torch.stack([grad(loss(plain))(many[:, i], y) for i in range(4)]))


@ops
def test_second_derivatives(on, op):
    """A penalty on the gradient was dropped from the loss."""
    x, y, ours, plain = inputs(on, op)
    if op == "weighted_merge" and on.backend == "reference":  # plain PyTorch, whose embedding_bag has none, and says so
        with pytest.raises(NotImplementedError, match="embedding_bag"):
            torch.autograd.grad(loss(ours)(x.requires_grad_(), y), x, create_graph=True)[0].sum().backward()
        return
    found = []
    for function in (ours, plain):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(function)(a, b), a, create_graph=True)
        total = function(a, b).sum() + 10 * g.square().sum()
        found.append(torch.autograd.grad(total, (a, b), allow_unused=True, materialize_grads=True))
    close(*found)
    small = x[:1, :, :3] if op.endswith("l2") else x
    if op.endswith("l2"):
        close(hessian(loss(ours))(small, y[:1, :, :3]), hessian(loss(plain))(small, y[:1, :, :3]))


@ops
def test_batched_gradients(on, op):
    x, y, ours, _ = inputs(on, op)
    x.requires_grad_()
    out = ours(x, y)
    grads = torch.stack([torch.ones_like(out), torch.linspace(0, 1, out.numel(), device=on.device).view_as(out)])
    (got,) = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)
    close(got, torch.stack([torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in grads]))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("op", ["variation_score-cosine", "compact"])
def test_transforms_inside_a_compiled_function(on, op):
    """A tangent was lost without a word, and a gradient failed in a fake tensor."""
    torch._dynamo.reset()
    x, y, ours, plain = inputs(on, op)

    def every(ours):
        return lambda x, y: (
            grad(loss(ours))(x, y),
            jvp(lambda x: ours(x, y), (x,), (y,))[1],
            vmap(ours)(torch.stack([x, y]), torch.stack([y, x])),
        )

    close(torch.compile(every(ours), backend="eager", fullgraph=True)(x, y), every(plain)(x, y))
    torch._dynamo.reset()


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("name", [x for x in dir(torch.ops.v2drop) if x.endswith("_backward")])
def test_a_traced_gradient_is_differentiable_once(on, name):
    """Without a gradient of its own it had none, and that term of a loss was dropped with a warning."""
    op = getattr(torch.ops.v2drop, name).default
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "Autograd")


@pytest.mark.backends("cpu")
def test_a_second_derivative_of_a_compiled_call_is_refused(on):
    torch._dynamo.reset()
    prev, cur = normal((1, 3, 4), torch.float32, "p"), normal((1, 3, 4), torch.float32, "c").requires_grad_()
    score = torch.compile(lambda cur: vk.variation_score(prev, cur, backend=on.backend), backend="eager")
    (g,) = torch.autograd.grad(score(cur).sum(), cur, create_graph=True)
    with pytest.raises(RuntimeError, match="variation_score is differentiable once"):
        g.square().sum().backward()
    torch._dynamo.reset()


@pytest.mark.backends("reference")
@pytest.mark.parametrize("op", [op for op in OPS if op != "weighted_merge"])
def test_gradgradcheck(on, op):
    a, b = (normal((2, 7, 8), torch.float64, op, name)[..., :8].requires_grad_() for name in "xy")
    function = lambda a, b: OPS[op][0](a, b, on.backend)
    assert torch.autograd.gradcheck(function, (a, b), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (a, b), fast_mode=True)


def test_soft_topk_under_transforms(on):
    x, a = normal((2, 9), torch.float32, "s").to(on.device), torch.tensor([0.3, 0.6], device=on.device)
    soft = lambda x, a: vk.soft_topk(x, a, temperature=3.0, hard=False, backend=on.backend)
    leaves = x.clone().requires_grad_(), a.clone().requires_grad_()
    rows = [torch.autograd.grad(soft(*leaves)[i, j], leaves) for i in range(2) for j in range(9)]
    jacobian = [torch.stack([row[k] for row in rows]).view(2, 9, *leaves[k].shape) for k in (0, 1)]
    close(jacrev(soft, (0, 1))(x, a), tuple(jacobian))
    close(jacfwd(soft, (0, 1))(x, a), tuple(jacobian))
    close(vmap(soft, (0, None))(torch.stack([x, -x]), a), torch.stack([soft(x, a), soft(-x, a)]))
    (g,) = torch.autograd.grad(soft(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="soft_topk is differentiable once"):
        g.square().sum().backward()


def test_compact_inplace_refuses_transforms(on):
    cache = torch.zeros(1, 1, 8, 1, device=on.device)
    rows = torch.tensor([[1, 3]], device=on.device)
    with pytest.raises(RuntimeError, match="compact_ changes memory in place"):
        vmap(lambda c: vk.compact_(rows, c, backend=on.backend))(cache[None])


def test_out_is_refused_under_transforms(on):
    h = torch.randn(1, 6, 2, device=on.device)
    rows = torch.tensor([[1, 3]], device=on.device)
    step = vk.compact(rows, h, backend=on.backend)
    with pytest.raises(ValueError, match="out cannot be given"):
        jvp(lambda h: vk.compact(rows, h, out=step, backend=on.backend).hidden, (h,), (h,))
