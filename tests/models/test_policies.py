"""Every policy of the decoder against a slow restatement of its description: one item at a time, no padding, loops."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import math

import pytest
import torch
import transformers as tf
from support import slow, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from v2drop_kernels.core.layout import TokenLayout
from v2drop_kernels.models import Ranking, TokenDropper, policies
from v2drop_kernels.models.adapters import adapter_of
from v2drop_kernels.models.context import DropContext
from v2drop_kernels.models.policies import sparsevlm as sparsevlm_module
from v2drop_kernels.models.policies.twigvlm import twig_schedule
from v2drop_kernels.models.voco import voco_mask
from v2drop_kernels.schedule import Schedule, Stage

D = tiny.TEXT["hidden_size"]
# Per item its runs: text, vision, text, ...
ONE_IMAGE = ((5, 40, 7), (2, 33, 9), (6,), (1, 36, 6))
SEVERAL = ((3, 20, 4, 16, 5), (0, 30, 6), (9,), (2, 12, 1, 12, 2, 9, 8))
NOTHING_BEHIND = ((4, 35), (3, 35, 2))


@functools.cache
def model_of(kv_heads):
    torch.manual_seed(kv_heads)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**tiny.TEXT, "num_key_value_heads": kv_heads})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.normal_(0, 2.0 / weight[0].numel() ** 0.5)
            elif weight.dim() == 1:
                weight.uniform_(0.5, 1.5)  # a norm that is left out shows
    return model


class Item:
    """One item without its padding."""

    def __init__(self, runs, seed):
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        self.n = sum(runs)
        self.vision, at = [], 0
        for i, run in enumerate(runs):
            self.vision += range(at, at + run) if i % 2 else ()
            at += run
        self.spans = [(sum(runs[:i]), sum(runs[: i + 1])) for i in range(1, len(runs), 2)]
        self.hidden, self.before, self.embeds = draw(self.n, D), draw(self.n, D), draw(self.n, D)
        self.ids, self.raters = torch.arange(self.n)[None], None
        self.text = text_behind(self.n, self.vision)


def text_behind(n, vision):
    """The text that can see a vision token; where there is none, the last row."""
    return [r for r in range(n) if r > min(vision, default=n) and r not in vision] or [n - 1]


def batch_of(model, shapes, side, layer, *, mask=False, grids=None, seed=0):
    """A DropContext for the items, padded on one side with what must not matter, and the items."""
    items = [Item(runs, 100 * seed + i) for i, runs in enumerate(shapes)]
    rows = max(item.n for item in items)
    pads = [rows - item.n if side == "left" else 0 for item in items]

    def padded(name):
        found = torch.full((len(items), rows, D), 1e3)  # finite: a model's padding is
        for i, item in enumerate(items):
            found[i, pads[i] : pads[i] + item.n] = getattr(item, name)
        return found

    ids = torch.zeros(len(items), rows, dtype=torch.int64)
    droppable = torch.zeros(len(items), rows, dtype=torch.bool)
    for i, item in enumerate(items):
        ids[i, pads[i] : pads[i] + item.n] = torch.arange(item.n)
        droppable[i, [pads[i] + r for r in item.vision]] = True
    lengths, counts = [item.n for item in items], tuple(len(item.vision) for item in items)
    if mask:
        layout = TokenLayout.from_mask(droppable, counts, lengths=lengths, padding_side=side)
    else:
        spans = [[(a + pad, b + pad) for a, b in item.spans] for item, pad in zip(items, pads, strict=True)]
        layout = TokenLayout.padded(spans, rows, lengths=lengths, padding_side=side)
    decoder = model.get_decoder()
    stop = DropContext(
        layer=layer, stage=Stage(layer, 0.5), adapter=adapter_of(model), hidden=padded("hidden"), prev_hidden=padded("before"),
        rope=decoder.rotary_emb(padded("hidden"), ids), mask=None, layout=layout, counts=counts, keep=(), origin=None,
        embeds=padded("embeds"), grids=grids or (None,) * len(items), seeds=[0] * len(items), tower_cache={},
    )  # fmt: skip
    return stop, items, pads


def alike(items, stop, pads):
    """Make the tokens of an item resemble a few, as a picture's do: were all unlike, a transport would leave each in place."""
    for item, hidden, pad in zip(items, stop.hidden, pads, strict=True):
        kinds = item.hidden[:4].abs() + 0.5
        item.hidden = kinds[torch.arange(item.n) * 7 % 11 % 4] + 0.5 * item.hidden
        hidden[pad : pad + item.n] = item.hidden


def scores_of(policy, stop):
    """Scores ``[B, N]`` as numbers: tiers lie apart by more than the scores inside them differ."""
    ranking = policy.score(stop)
    return ranking.shifted(stop.droppable) if isinstance(ranking, Ranking) else ranking


def kept_by(policy, stop, pads):
    """Per item the rows that stay, as numbers in the item, and the scores."""
    with torch.no_grad():
        scores = policy.score(stop)
    if isinstance(scores, Ranking):
        scores = scores.ordinals(stop.droppable)
    assert scores.dtype == torch.float32
    assert scores.shape == stop.hidden.shape[:2]
    kept = []
    for i, k in enumerate(stop.keep):
        rows = stop.droppable[i].nonzero().flatten().tolist()
        kept.append([rows[j] - pads[i] for j in slow.best(scores[i, rows].tolist(), k)])
    return kept


def weights_of(model, layer, x, ids, row):
    """Softmax attention ``[H, n]`` of one row in a block, and all queries and keys."""
    block = model.get_decoder().layers[layer]
    attn, d = block.self_attn, block.self_attn.head_dim
    cos, sin = slow.tables(model.get_decoder(), x, ids)
    normed = block.input_layernorm(x)
    q, k = (p(normed).view(len(x), -1, d).transpose(0, 1) for p in (attn.q_proj, attn.k_proj))
    q, k = slow.rotated(q, cos, sin), slow.rotated(k, cos, sin)
    found = torch.zeros(len(q), len(x))
    for h in range(len(q)):
        logits = q[h, row] @ k[h // (len(q) // len(k)), : row + 1].T * d**-0.5
        found[h, : row + 1] = logits.softmax(-1)
    return found, q, k


def raters_of(item):
    if item.raters is not None:
        return item.raters
    shares = sum((item.embeds[item.text] @ item.embeds[v]).softmax(0) for v in item.vision) / len(item.vision)
    return [t for t, share in zip(item.text, shares, strict=True) if share > shares.mean()] or item.text


def sparsevlm(model, layer, item, k):
    """Version 1: the ``k`` best tokens, the clusters of the next 30 % as ``{centre: members}``."""
    weights = [weights_of(model, layer - 1, item.before, item.ids, r)[0].mean(0) for r in raters_of(item)]
    scores = dict(zip(item.vision, (sum(weights) / len(weights))[item.vision].tolist(), strict=True))
    order = sorted(item.vision, key=lambda r: (-scores[r], r))
    again = sorted(order[k:][: int(0.3 * (len(order) - k)) + 1])
    return sorted(order[:k]), clusters_of(item.hidden, again)


def clusters_of(x, rows):
    if not rows:
        return {}
    m = len(rows) // 10 + 1
    far = torch.tensor([[float((x[a] - x[b]).norm()) / x.shape[1] ** 0.5 for b in rows] for a in rows])
    density = [math.exp(-(far[i].sort().values[:m] ** 2).mean()) for i in range(len(rows))]
    merit = []
    for i in range(len(rows)):
        denser = [far[i, j] for j in range(len(rows)) if (density[j], -j) > (density[i], -i)]
        merit.append(density[i] * float(min(denser) if denser else far.max()))
    centres = slow.best(merit, m)
    found = {rows[c]: [rows[c]] for c in centres}
    for i in range(len(rows)):
        if i not in centres:
            found[rows[min(centres, key=lambda c: (far[i, c], c))]].append(rows[i])
    return found


def sparsevlm2(model, layer, item, k, heads):
    cos, sin = slow.tables(model.get_decoder(), item.before, item.ids)
    ones = slow.rotated(torch.ones(item.n, cos.shape[1]), cos, sin)
    per_head = 0
    for r in raters_of(item):
        pull = torch.stack([ones[r] @ ones[v] for v in item.vision]) * cos.shape[1] ** -0.5
        per_head = per_head + weights_of(model, layer - 1, item.before, item.ids, r)[0][:, item.vision] / pull
    best = slow.best(per_head.sum(1).tolist(), heads)
    return [item.vision[i] for i in slow.best(per_head[best].mean(0).tolist(), k)]


def dart(model, layer, item, k, pivots, text_pivots):
    """The pivots, then what each takes; of a budget below the pivots the first pivots."""
    keys = weights_of(model, layer - 1, item.before, item.ids, 0)[2]
    norms = [float(keys[:, r].abs().sum()) for r in range(item.n)]
    top = lambda rows, n: sorted(sorted(rows, key=lambda r: (-norms[r], r))[:n])
    x = model.get_decoder().norm(item.hidden)
    chosen_vision, chosen_text = top(item.vision, pivots), top(item.text, text_pivots)
    if k <= len(chosen_vision):
        return chosen_vision[:k]
    kept, pool = set(chosen_vision), [r for r in item.vision if r not in chosen_vision]
    each = -(-(k - len(chosen_vision)) // (len(chosen_vision) + len(chosen_text)))
    for pivot in chosen_vision + chosen_text:
        alike = {r: float(torch.nn.functional.cosine_similarity(x[pivot], x[r], dim=0)) for r in pool}
        taken = sorted(pool, key=lambda r: (alike[r], r))[: min(each, k - len(kept))]
        kept |= set(taken)
        pool = [r for r in pool if r not in taken]
    return sorted(kept)


def topv(item, k, grid, spatial=0.5, central=0.5, epsilon=0.1, relax=0.1, iterations=20):
    n = len(item.vision)
    sizes = grid or (n,)
    places = [tuple(float(i) - (size - 1) / 2 for i, size in zip(torch.unravel_index(torch.tensor(j), sizes), sizes, strict=True))
              for j in range(n)]  # fmt: skip
    corner = math.dist(places[0], (0,) * len(sizes))
    x, cost = item.hidden[item.vision].double(), torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            cost[i, j] = 1 - torch.nn.functional.cosine_similarity(x[i], x[j], dim=0)
            cost[i, j] += spatial * math.dist(places[i], places[j]) / corner / 2 + central * math.hypot(*places[i]) / corner
    kernel, u, v = (-cost / epsilon).exp(), torch.ones(n).double(), torch.ones(n).double()
    for _ in range(iterations):
        u = (1 / (kernel @ v)) ** (relax / (relax + epsilon))
        v = 1 / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    assert torch.allclose(plan.sum(0), torch.ones(n).double())  # demand is met
    return [item.vision[i] for i in slow.best(plan.sum(1).tolist(), k)], plan.sum(1)


def dots(model, layer, item, k):
    _, q, keys = weights_of(model, layer, item.hidden, item.ids, item.n - 1)
    found = [sum(float(q[h, -1] @ keys[h // (len(q) // len(keys)), v]) for h in range(len(q))) for v in item.vision]
    return [item.vision[i] for i in slow.best(found, k)]


def drawn(model, layer, item):
    """Attention of the text, mean over heads and text tokens, by vision token."""
    return torch.stack([weights_of(model, layer - 1, item.before, item.ids, t)[0].mean(0) for t in item.text]).mean(0)[item.vision]


CASES = [
    pytest.param(shapes, side, mask, kv, id=f"{name}-{side}-{'mask' if mask else 'spans'}-{kv}kv")
    for name, shapes, side, mask, kv in (
        ("one-image", ONE_IMAGE, "left", False, 2),
        ("one-image", ONE_IMAGE, "right", False, 1),
        ("one-image", ONE_IMAGE[:1], "right", False, 4),
        ("several", SEVERAL, "left", True, 4),
        ("several", SEVERAL, "right", True, 2),
        ("nothing-behind", NOTHING_BEHIND, "left", False, 2),
    )
]


@pytest.mark.parametrize(("shapes", "side", "mask", "kv"), CASES)
@pytest.mark.parametrize("asked", [20, 4, 30])
def test_sparsevlm_recycles(shapes, side, mask, kv, asked):
    model, layer, policy = model_of(kv), 3, policies.make("sparsevlm", {})
    stop, items, pads = batch_of(model, shapes, side, layer, mask=mask)
    with torch.no_grad():
        want = [sparsevlm(model, layer, item, asked) if item.vision else ([], {}) for item in items]
    stop.keep = tuple(len(tokens) + len(clusters) for tokens, clusters in want)
    kept = kept_by(policy, stop, pads)
    assert kept == [sorted([*tokens, *clusters]) for tokens, clusters in want]
    width = max(map(len, kept))
    table = torch.tensor([[r + pad for r in rows] + [-1] * (width - len(rows)) for rows, pad in zip(kept, pads, strict=True)])
    merged = policy.merge(stop, table, stop.hidden.gather(1, table.clamp(min=0)[..., None].expand(-1, -1, D)))
    for i, (item, (_, clusters)) in enumerate(zip(items, want, strict=True)):
        for j, row in enumerate(kept[i]):
            members = clusters.get(row, [row])
            mean = item.hidden[members].mean(0)
            # Sums of at most 12 numbers of size 1 in another order, then one division: a few roundings of 2**-24 each.
            assert (merged[i, j] - mean).abs().max() <= 2**-20, (row, members)
            assert len(members) > 1 or torch.equal(merged[i, j], item.hidden[row])


@pytest.mark.parametrize(("shapes", "side", "mask", "kv"), CASES)
@pytest.mark.parametrize("heads", [1, 3, 14])
def test_sparsevlm_version_2(shapes, side, mask, kv, heads):
    model, layer, policy = model_of(kv), 3, policies.make("sparsevlm", {"version": 2, "heads": heads})
    stop, items, pads = batch_of(model, shapes, side, layer, mask=mask)
    stop.keep = tuple(min(n, 13) for n in stop.counts)
    with torch.no_grad():
        want = [sparsevlm2(model, layer, item, k, heads) if k else [] for item, k in zip(items, stop.keep, strict=True)]
    assert kept_by(policy, stop, pads) == want


@pytest.mark.parametrize(("shapes", "side", "mask", "kv"), CASES)
@pytest.mark.parametrize(("pivots", "text_pivots", "k"), [(4, 4, 20), (4, 4, 12), (2, 3, 22), (3, 0, 9), (0, 2, 6), (4, 4, 3)])
def test_dart(shapes, side, mask, kv, pivots, text_pivots, k):
    model, layer = model_of(kv), 2
    policy = policies.make("dart", {"pivots": pivots, "text_pivots": text_pivots})
    stop, items, pads = batch_of(model, shapes, side, layer, mask=mask)
    stop.keep = tuple(policy.count(n, min(n, k)) for n in stop.counts)
    with torch.no_grad():
        want = [dart(model, layer, item, k, pivots, text_pivots) for item, k in zip(items, stop.keep, strict=True)]
    assert kept_by(policy, stop, pads) == want


def test_dart_counts():
    policy = policies.make("dart", {})
    assert [policy.count(576, k) for k in (192, 128, 64, 12, 11, 4, 3, 576)] == [188, 124, 60, 12, 4, 4, 3, 576]
    # The released count, 4 + 8 int(n (1 - r) / 8) at 66.7, 77.8 and 88.9 %.
    assert [4 + 8 * int(576 * (1 - r) / 8) for r in (0.667, 0.778, 0.889)] == [188, 124, 60]


@pytest.mark.parametrize(("shapes", "side", "mask", "kv"), CASES)
@pytest.mark.parametrize(
    "options", [{}, {"spatial": 1.0, "central": 0.2, "epsilon": 0.4, "relax": 0.0}, {"epsilon": 0.5, "relax": 3.0, "iterations": 1}]
)
def test_topv(shapes, side, mask, kv, options):
    model, policy = model_of(kv), policies.make("topv", options)
    grids = [None if len(runs) != 3 or runs[1] != 40 else (5, 8) for runs in shapes]
    stop, items, pads = batch_of(model, shapes, side, 2, mask=mask, grids=grids)
    alike(items, stop, pads)
    stop.keep = tuple(min(n, 11) for n in stop.counts)
    want = [topv(item, k, grid, **options) if k else ([], None) for item, k, grid in zip(items, stop.keep, grids, strict=True)]
    assert kept_by(policy, stop, pads) == [rows for rows, _ in want]
    for i, (_, supply) in enumerate(want):
        if supply is not None:
            # Against float64: an error of 2**-22 in a cost below 4 is one of 2**-22 / epsilon in K, and of some more in u and v.
            torch.testing.assert_close(policy.score(stop)[i, stop.droppable[i]].double(), supply, rtol=2**-14, atol=0)


def test_topv_of_a_video():
    policy = policies.make("topv", {})
    stop, items, pads = batch_of(model_of(2), ((3, 24, 4),), "left", 2, grids=[(2, 3, 4)])
    alike(items, stop, pads)
    stop.keep = (9,)
    assert kept_by(policy, stop, pads) == [topv(items[0], 9, (2, 3, 4))[0]]


@pytest.mark.parametrize(("shapes", "side", "mask", "kv"), CASES)
def test_cross_modal_flash(shapes, side, mask, kv):
    model, layer, policy = model_of(kv), 2, policies.make("cross_modal_flash", {})
    stop, items, pads = batch_of(model, shapes, side, layer, mask=mask)
    stop.keep = tuple(min(n, 13) for n in stop.counts)
    with torch.no_grad():
        want = [dots(model, layer, item, k) for item, k in zip(items, stop.keep, strict=True)]
    assert kept_by(policy, stop, pads) == want


@pytest.mark.parametrize(("shapes", "side", "mask", "kv"), CASES)
def test_cross_modal_at_later_layers(shapes, side, mask, kv):
    model, layer, policy = model_of(kv), 3, policies.make("cross_modal", {})
    stop, items, pads = batch_of(model, shapes, side, layer, mask=mask)
    stop.keep = tuple(min(n, 13) for n in stop.counts)
    want = []
    for item, k in zip(items, stop.keep, strict=True):
        with torch.no_grad():
            scores = drawn(model, layer, item).tolist()
        want.append([item.vision[i] for i in slow.best(scores, k)])
    assert kept_by(policy, stop, pads) == want


@pytest.mark.parametrize("name", ["sparsevlm", "dart", "cross_modal", "cross_modal_flash"])
@pytest.mark.parametrize("additive", [False, True])
def test_padding_that_only_the_mask_knows(name, additive):
    """A layout without lengths takes padding for rows of the item; the model's mask hides them, and nothing else may change."""
    stop, _, pads = batch_of(model_of(2), ONE_IMAGE, "left", 2)
    stop.keep = tuple(min(n, 13) for n in stop.counts)
    policy = policies.make(name, {})
    want = kept_by(policy, stop, pads)
    rows = torch.arange(stop.hidden.shape[1])
    seen = ((rows <= rows[:, None]) & stop.real[:, None])[:, None]
    stop.mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen
    stop.layout, stop.tower_cache = TokenLayout.padded(list(stop.layout.spans), stop.layout.rows), {}
    assert kept_by(policy, stop, pads) == want


@pytest.mark.parametrize(("name", "options"), [("sparsevlm", {}), ("sparsevlm", {"version": 2}), ("dart", {}), ("cross_modal", {})])
def test_rows_that_the_mask_hides(name, options):
    """Hidden rows among the text neither rate, nor ask, nor count: the scores are those without them."""
    stop, _, _ = batch_of(model_of(2), ((5, 40, 9),), "left", 2)
    hidden, policy = [46, 49, 50], policies.make(name, options)
    stop.keep = (13,)
    rows = torch.arange(stop.hidden.shape[1])
    stop.mask = ((rows <= rows[:, None]) & ~torch.isin(rows, torch.tensor(hidden)))[None, None]
    left = rows[~torch.isin(rows, torch.tensor(hidden))]
    cut = lambda x: x[:, left]
    without = dataclasses.replace(
        stop, hidden=cut(stop.hidden), prev_hidden=cut(stop.prev_hidden), embeds=cut(stop.embeds),
        rope=tuple(map(cut, stop.rope)), mask=None, layout=TokenLayout.padded([stop.layout.spans[0]], len(left)), tower_cache={},
    )  # fmt: skip
    later = dataclasses.replace(
        without, embeds=stop.embeds, origin=left[None], tower_cache={}
    )  # hidden because an earlier stage dropped them
    with torch.no_grad():
        got, want, same = (scores_of(policy, x)[:, 5:45] for x in (stop, without, later))
    assert torch.equal(same, want)
    # The same sums in another order: rounding of logits up to some 30 by 2**-24, a few times; a row too many costs per cents.
    torch.testing.assert_close(got, want, rtol=2**-16, atol=2**-20)


class Rest:
    """What is left of a prompt before a block of the slow model: an :class:`Item` on its way."""

    def __init__(self, hidden, before, embeds, vision, ids, raters):
        self.n, self.vision, self.ids, self.raters = len(hidden), vision, ids, raters
        self.hidden, self.before, self.embeds = hidden, before, embeds
        self.text = text_behind(self.n, vision)


def restated(model, embeds, ids, vision, prompt, stages):
    """``embeds [n, D]`` through the decoder, ``stages[layer](rest) -> (kept tokens, {row: rows it becomes the mean of})``."""
    decoder, rows, h, before, stage_rows = model.get_decoder(), list(range(len(embeds))), embeds, None, []
    first = Rest(embeds[:prompt], None, embeds[:prompt], vision, ids[:, :prompt], None)
    raters = raters_of(first) if vision else []
    for index, layer in enumerate(decoder.layers):
        if index in stages and vision:
            there = [r for r in rows if r < prompt]
            at = {r: i for i, r in enumerate(there)}
            rest = Rest(h[: len(there)], before[: len(there)], embeds[there], [at[v] for v in vision if v in at], ids[:, there],
                        [at[r] for r in raters])  # fmt: skip
            with torch.no_grad():
                kept, means = stages[index](rest)
            new = h.clone()
            for row, members in means.items():
                new[row] = h[members].mean(0)
            keep = [i for i, r in enumerate(rows) if r >= prompt or r not in vision or i in kept or i in means]
            rows, h = [rows[i] for i in keep], new[keep]
            stage_rows.append([vision.index(r) for r in rows if r in vision])
        before = h
        cos, sin = slow.tables(decoder, h, ids[:, rows])
        h = slow.block(layer, h, cos, sin, torch.tensor(rows)[:, None] >= torch.tensor(rows))
    return model.get_output_embeddings()(decoder.norm(h)), rows, stage_rows


def close(got, want):
    """As in test_models: five layers of some ten roundings each, on weights that double every error; a wrong row changes logits
    by their own size, a million units."""
    unit = torch.finfo(torch.float32).eps * want.abs().max()
    assert (got - want).abs().max() <= 512 * unit, f"{(got - want).abs().max() / unit:.0f} units"


def cls_of(inputs):
    """[CLS] attention ``[images, patches]`` of the tower's last block but one, mean over heads, from the tower's own weights."""
    tower = tiny.made("llava", "eager").model.vision_tower
    with torch.no_grad():
        return tower(inputs["pixel_values"], output_attentions=True).attentions[-2].mean(1)[:, 0, 1:]


def calibrated(model, layer, rest, k, cls, alignment, scale):
    if alignment == "cosine":
        means = rest.embeds[rest.vision].mean(0), rest.embeds[rest.text].mean(0)
        alignment = max(0.0, float(torch.nn.functional.cosine_similarity(*means, dim=0)))
    scores = scale * alignment * drawn(model, layer, rest) + cls
    return [rest.vision[i] for i in slow.best(scores.tolist(), k)]


def twig(stop):
    """Scores of one's own: the first channel."""
    return stop.hidden[..., 0].float()


def beside_means(n, rows):
    """Tokens that stay as they are, when ``rows`` are left with the means of the recycled ones."""
    recycled = lambda m: min(int(0.3 * m) + 1, m)
    return max(k for k in range(rows + 1) if k + (recycled(n - k) // 10 + 1 if n > k else 0) == rows)


RUNS = {
    "sparsevlm": ({2: 11, 3: 6}, {}, lambda m, i, n, x, k: sparsevlm(m, i, x, beside_means(n, k))),
    "sparsevlm2": ({2: 11, 3: 6}, {"version": 2, "heads": 2}, lambda m, i, n, x, k: (sparsevlm2(m, i, x, k, 2), {})),
    "dart": (
        {2: 11, 3: 6},
        {"pivots": 2, "text_pivots": 2},
        lambda m, i, n, x, k: (dart(m, i, x, 2 + 4 * ((k - 2) // 4), 2, 2), {}),
    ),
    "topv": ({2: 9}, {}, lambda m, i, n, x, k: (topv(x, k, (4, 4) if len(x.vision) == 16 else None)[0], {})),
    "cross_modal_flash": ({1: 12, 4: 6}, {}, lambda m, i, n, x, k: (dots(m, i, x, k), {})),
    "twigvlm": ({2: 9, 4: 0}, {}, lambda m, i, n, x, k: ([x.vision[j] for j in slow.best(x.hidden[x.vision, 0].tolist(), k)], {})),
    "vtw": ({2: 0}, {}, lambda m, i, n, x, k: ([], {})),
}


def restatements(name, model):
    """By layer, for :func:`restated`."""

    def run(at, k, rest):
        return (rest.vision, {}) if k >= len(rest.vision) else RUNS[name][2](model, at, len(rest.vision), rest, k)

    return {at: functools.partial(run, at, k) for at, k in RUNS[name][0].items()}


ITEMS = [tiny.item(4, "image", 6, seed=1), tiny.item(9, seed=2), tiny.item(3, "image", 2, "image", 5, seed=3)]


def check_run(schedule, stages_of, family="llava", side="left", new=3):
    """Kept tokens, logits of a prefill and greedy decoding of a batch against :func:`restated`."""
    model, inputs, spans = tiny.batch(family, ITEMS, side)
    embeds, ids = slow.captured(model, inputs)
    given = {"spans": spans} if family == "llama" else {}
    with TokenDropper(schedule, scores=twig, **given)(model) as dropping, torch.no_grad():
        logits = model(**inputs).logits
        kept = [dropping.kept(i) for i in range(len(ITEMS))]
        tokens = model.generate(**inputs, max_new_tokens=new, do_sample=False)[:, inputs["input_ids"].shape[1] :] if new else None
    for i in range(len(ITEMS)):
        real = inputs["attention_mask"][i].bool().nonzero().flatten()
        first, n = int(real[0]), len(real)
        vision = [r - first for a, b in spans[i] for r in range(a, b)]
        with torch.no_grad():
            want, rows, stage_rows = restated(model, embeds[i, real], ids[:, i, real], vision, n, stages_of(model, inputs, i))
        assert [list(x) for x in kept[i].stages if vision] == stage_rows
        close(logits[i, real[rows]], want)
        if not new:
            continue
        tail = model.get_input_embeddings()(tokens[i]).detach()
        more = ids[:, i, real[-1:]] + torch.arange(1, new + 1)
        both = torch.cat([embeds[i, real], tail]), torch.cat([ids[:, i, real], more], dim=1)
        with torch.no_grad():
            want, _, _ = restated(model, *both, vision, n, stages_of(model, inputs, i))
        assert want[-new - 1 : -1].argmax(-1).tolist() == tokens[i].tolist()


@pytest.mark.parametrize("family", ["llava", "llama", "llava_next"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", RUNS)
def test_in_a_model(name, side, family):
    layers, options, _ = RUNS[name]
    schedule = Schedule(tuple(Stage(at, k, policy=name.rstrip("2"), options=options) for at, k in layers.items()))
    check_run(schedule, lambda model, inputs, i: restatements(name, model), family, side, new=3 if side == "left" else 0)


def raters_among(embeds, text, left):
    """:func:`raters_of` by rows of the prompt, for the tokens that are left."""
    text = [r for r in text if r > min(left)] or [max(left)]
    shares = sum((embeds[text] @ embeds[v]).softmax(0) for v in left) / len(left)
    return [t for t, share in zip(text, shares, strict=True) if share > shares.mean()] or text


SEVERAL_IMAGES = [
    tiny.item(3, "image", 5, "image", 6, seed=4),  # text between the images rates, and some behind
    tiny.item(3, "image", 5, "image", 1, seed=6),
    tiny.item(4, "image", 6, seed=1),
    tiny.item(3, "image", 5, "image", seed=5),  # what is behind image 2 alone is its last token
]


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("version", [1, 2])
def test_sparsevlm_remembers_its_raters(version, side, several, monkeypatch):
    """They are tokens of the prompt, whichever image goes; only when none sees what is left are others chosen."""
    items = SEVERAL_IMAGES if several else [tiny.item(4, "image", 6, seed=1), tiny.item(2, "image", seed=2)]
    model, inputs, spans = tiny.batch("llava", items, side)
    found = []

    def recorded(at, raters=sparsevlm_module._raters):
        rows, n = raters(at), at.hidden.shape[1]
        origin = torch.arange(n).expand(len(rows), n) if at.origin is None else at.origin
        found.append([origin[i, x[x >= 0]].tolist() for i, x in enumerate(rows)])
        return rows

    def last_image(at):
        """Drops images but the last, and the last token of an item that ends with one."""
        starts = torch.tensor([pairs[-1][0] for pairs in spans])[:, None]
        return (at.origin >= starts).float() - 2 * (at.origin == at.origin.amax(1, keepdim=True)).float()

    monkeypatch.setattr(sparsevlm_module, "_raters", recorded)
    policy = {"policy": "sparsevlm", "options": {"version": version, "heads": 2}}
    schedule = Schedule((Stage(1, 0.9, **policy), Stage(2, 8, policy="given"), Stage(3, 6, **policy), Stage(4, 4, **policy)))
    embeds, _ = slow.captured(model, inputs)
    with torch.no_grad(), TokenDropper(schedule, scores=last_image)(model) as dropping:
        model(**inputs)
        kept = [dropping.kept(i).stages for i in range(len(items))]
    (first, *later), anew = found, 0
    for i, pairs in enumerate(spans):
        real = inputs["attention_mask"][i].bool().nonzero().flatten().tolist()
        vision = [r for a, b in pairs for r in range(a, b)]

        slowly = functools.partial(raters_among, embeds[i], [r for r in real if r not in vision])
        assert first[i] == slowly(vision)
        for stage, rows in enumerate(later, 1):
            left = [vision[j] for j in kept[i][stage]]
            same = [r for r in first[i] if r not in vision or r in left]
            same = same or [real[-1] if real[-1] not in vision else max(left)]
            anew += same[-1] < min(left)
            assert rows[i] == (same if same[-1] >= min(left) else slowly(left))
    assert anew == (4 if several else 0)  # items 1 and 3, at both stops
    if several:
        assert first[0] == later[0][0] == later[1][0]


@pytest.mark.parametrize("options", [{}, {"alignment": 0.0}, {"alignment": 0.7, "scale": 3.0}])
def test_cross_modal_in_a_model(options):
    schedule = Schedule((Stage(1, 12, policy="cross_modal", options=options), Stage(3, 5, policy="cross_modal", options=options)))

    def stages_of(model, inputs, i):
        cls = cls_of(inputs)
        mine = torch.cat([cls[0]] if i == 0 else [cls[1], cls[2]]) if i != 1 else None

        def first(rest):
            return calibrated(model, 1, rest, 12, mine, options.get("alignment", "cosine"), options.get("scale", 1.0)), {}

        def later(rest):
            return [rest.vision[j] for j in slow.best(drawn(model, 3, rest).tolist(), 5)], {}

        return {1: first, 3: later}

    check_run(schedule, stages_of)


def test_cross_modal_without_a_cls_token():
    """SigLIP has none: one sentence says so, and the form without it serves, as it does newline tokens of LLaVA-NeXT."""
    policy = {"policy": "cross_modal"}
    model, inputs, _ = tiny.batch("llava_onevision", ITEMS)
    with pytest.raises(ValueError, match="CLS token"), TokenDropper(Schedule((Stage(1, 5, **policy),)))(model):
        model(**inputs)
    text = Schedule((Stage(1, 12, **policy, options={"calibrated": 0}), Stage(3, 5, **policy, options={"calibrated": 0})))

    def stages_of(model, inputs, i):
        by = lambda layer, k, rest: ([rest.vision[j] for j in slow.best(drawn(model, layer, rest).tolist(), k)], {})
        return {layer: functools.partial(by, layer, k) for layer, k in ((1, 12), (3, 5))}

    for family in ("llava_onevision", "llava_next"):
        check_run(text, stages_of, family)
    model, inputs, _ = tiny.batch("llava_next", ITEMS)
    with TokenDropper(Schedule((Stage(1, 5, **policy),)))(model) as dropping, torch.no_grad():
        model(**inputs)
    assert [len(dropping.kept(i).stages[0]) for i in range(3)] == [5, 0, 5]


def test_twig_schedules():
    for average, k in ((192, 227), (128, 134), (64, 41)):
        schedule = policies.preset(f"twigvlm-{average}")
        assert schedule.counts(576) == (k, 0)
        # The count is rounded up: at most one token more in each of the 22 blocks.
        assert 0 <= schedule.average_tokens(576, 32) - average < 22 / 32
    assert twig_schedule(288, 576, 40, twig=3, wipe=30).counts(576)[0] == math.ceil((40 * 288 - 3 * 576) / 27)
    with pytest.raises(ValueError, match="average must lie between 36 and 432"):
        twig_schedule(500)
    with pytest.raises(ValueError, match="0 < twig < wipe < depth"):
        twig_schedule(64, wipe=32)


# What enters a block on average; the second accounting of SparseVLM, what leaves it, is what its papers' names count.
AVERAGES = {
    "sparsevlm-192": 206.5, "sparsevlm-128": 145.41, "sparsevlm-64": 82.25, "sparsevlm2-192": 206.75, "sparsevlm2-128": 144.12,
    "sparsevlm2-64": 81.81, "dart-192": 212.25, "dart-128": 152.25, "dart-64": 92.25, "vtw": 270.0, "twigvlm-192": 192.06,
    "twigvlm-128": 128.12, "twigvlm-64": 64.19, "topv": 283.5, "cross-modal-192": 192.28, "cross-modal-128": 127.91,
    "cross-modal-64": 63.78, "cross-modal-288": 288.02, "cross-modal-144": 144.38, "cross-modal-58": 57.58,
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGES)
def test_presets(name):
    schedule = policies.preset(name)
    depth = 40 if name.rpartition("-")[2] in ("288", "144", "58") else 32
    # A policy that cannot keep any number has the last word on the counts.
    counts = [policies.make(x.policy, x.options).count(576, k) for x, k in zip(schedule.stages, schedule.counts(576), strict=True)]
    found = Schedule(tuple(Stage(layer, k) for layer, k in zip(schedule.layers, counts, strict=True)))
    assert found.average_tokens(576, depth) == pytest.approx(AVERAGES[name], abs=0.006)  # two decimals
    if name.startswith("cross-modal"):
        assert abs(found.average_tokens(576, depth) - float(name.rpartition("-")[2])) <= 0.5
        flash = policies.preset(name.replace("modal", "modal-flash"))
        assert (flash.layers, flash.counts(576)) == (schedule.layers, schedule.counts(576))
    if name.startswith("sparsevlm"):
        leaves = found.average_tokens(576, 32) - (576 - counts[-1]) / 32
        assert abs(leaves - float(name.rpartition("-")[2])) < 1
    if name == "topv":
        assert found.flops_share(576, 32, 4096, 11008) == pytest.approx(0.49, abs=0.005)
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_recycling_leaves_the_released_rows():
    from v2drop_kernels.models.policies.sparsevlm import _tokens

    asked = {"192": (300, 200, 110), "128": (303, 110, 36), "64": (66, 30, 17)}
    for name, tokens in asked.items():
        rows = policies.preset(f"sparsevlm-{name}").counts(576)
        assert tuple(_tokens(n, k) for n, k in zip((576, *rows), rows, strict=False)) == tokens
    assert [_tokens(16, k) for k in (0, 1, 15, 16)] == [0, 0, 14, 16]  # even one dropped token leaves a mean


@pytest.mark.parametrize(("name", "options", "message"), [
    ("sparsevlm", {"version": 3}, "version must be 1 or 2, got 3"),
    ("sparsevlm", {"heads": 0}, "heads must be at least 1, got 0"),
    ("dart", {"pivots": 0, "text_pivots": 0}, "pivots must be at least one"),
    ("topv", {"epsilon": 0.001}, "epsilon must be positive and at least central / 80"),
    ("topv", {"relax": -1.0}, "relax must not be negative"),
    ("cross_modal", {"alignment": "dot"}, "alignment must be a number or 'cosine', got 'dot'"),
])  # fmt: skip
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        TokenDropper(Schedule((Stage(2, 0.5, policy=name, options=options),)))


def test_vtw_keeps_nothing():
    model, inputs, _ = tiny.batch("llava", ITEMS)
    with (
        pytest.raises(ValueError, match="keep must be 0 for the policy 'vtw'"),
        TokenDropper(Schedule((Stage(2, 3, policy="vtw"),)))(model),
    ):
        model(**inputs)


@pytest.mark.parametrize("name", ["sparsevlm", "dart", "cross_modal"])
def test_no_block_before(name):
    stop, _, _ = batch_of(model_of(2), ONE_IMAGE, "left", 2)
    stop.prev_hidden, stop.stage = None, Stage(2, 0.5, policy=name)
    with pytest.raises(ValueError, match=f"'{name}' needs the .* of a block before it"):
        policies.make(name, {}).score(stop)


ALONE = [
    ("sparsevlm", {}),
    ("sparsevlm", {"version": 2}),
    ("dart", {}),
    ("topv", {}),
    ("cross_modal", {}),
    ("cross_modal_flash", {}),
]


class NoHost(TorchDispatchMode):
    """Refuses what waits for a GPU: reading a value, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal", "is_nonzero"), name
        if name in ("index", "index_put", "index_put_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "options"), ALONE)
def test_no_host_synchronisation(name, options, monkeypatch):
    # On CPU tensors, and on these only, weighted_merge reads its lists of edges to check them.
    monkeypatch.setattr(importlib.import_module("v2drop_kernels.ops.weighted_merge"), "edges_exist", lambda *arguments: None)
    stop, _, _ = batch_of(model_of(2), SEVERAL, "left", 2, mask=True)
    stop.keep, stop.backend = tuple(min(n, 13) for n in stop.counts), "reference"
    policy = policies.make(name, options)
    with torch.no_grad(), NoHost():
        policy.score(stop)
        again = policy.score(stop)  # with what it remembers
        if isinstance(again, Ranking):
            again.ordinals(stop.droppable)
        table = torch.arange(4).expand(len(SEVERAL), -1)
        policy.merge(stop, table, stop.hidden[:, :4])


def test_no_host_sees_what_it_forbids():
    for wait in (lambda x: x.item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool(x)):
        with pytest.raises(AssertionError), NoHost():
            wait(torch.ones(1))


@pytest.mark.parametrize(("name", "options"), ALONE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, options, dtype):
    """In a model of that dtype; scores stay float32 and, but for rounding, those of the float32 model with the same weights."""
    policy, scores = policies.make(name, options), []
    for wide in (False, True):
        model = copy.deepcopy(model_of(2)).to(dtype)
        model = model.float() if wide else model
        stop, items, _ = batch_of(model, ONE_IMAGE, "left", 2)
        stop.keep = tuple(min(n, 13) for n in stop.counts)
        cast = lambda x, wide=wide: x.to(dtype).float() if wide else x.to(dtype)
        stop.hidden, stop.prev_hidden, stop.embeds = map(cast, (stop.hidden, stop.prev_hidden, stop.embeds))
        stop.rope = tuple(map(cast, stop.rope))
        with torch.no_grad():
            scores.append([scores_of(policy, stop)[i, stop.droppable[i]] for i, item in enumerate(items) if item.vision])
    for half, full in zip(*scores, strict=True):
        assert half.dtype == torch.float32
        a, b = (set(slow.best(x.tolist(), 13)) for x in (half, full))
        # Projections round to 8 or 11 bits, some 1 % of a score in bfloat16, where neighbours in a ranking of 40 lie 2.5 % apart:
        # a few swaps at the cut. A wrong ranking would have 13 * 13 / 40 = 4 in common.
        assert len(a & b) >= 9


@pytest.mark.parametrize("name", ["sparsevlm", "dart"])
def test_gradients_in_a_model(name):
    """What is kept and what is recycled gets the gradient that the restatement has, through the mean and without the ranking."""
    layers, options, _ = RUNS[name]
    schedule = Schedule(tuple(Stage(at, k, policy=name, options=options) for at, k in layers.items()))
    model, inputs, spans = tiny.batch("llama", ITEMS[:1])
    embeds, ids = slow.captured(model, inputs)
    ours, slowly = (embeds.detach().clone().requires_grad_() for _ in range(2))
    with TokenDropper(schedule, spans=spans)(model):
        got = model(inputs_embeds=ours, attention_mask=inputs["attention_mask"]).logits[0]
    vision = list(range(*spans[0][0]))
    want, *_ = restated(model, slowly[0], ids[:, 0], vision, len(got), restatements(name, model))
    weight = torch.randn(got.shape[1], generator=torch.Generator().manual_seed(0))
    close(*(torch.autograd.grad((y[-6:] @ weight).sum(), x)[0] for y, x in ((got, ours), (want, slowly))))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_voco_in_a_model(attention):
    """Text sees vision through the VoCo tokens only: where they have told it nothing yet, in one block, it is blind to it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=64, **sizes)).eval()
    model.set_attn_implementation(attention)
    kinds = ["ttvvvvcct", "tvvvvvctt"]
    marks = lambda kinds, kind: torch.tensor([[c == kind for c in x] for x in kinds])
    vision, voco = marks(kinds, "v"), marks(kinds, "c")
    embeds, other = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    changed = torch.where(vision[..., None], other, embeds)

    def run(x, mask):
        with torch.no_grad():
            return model(inputs_embeds=x, attention_mask=mask, use_cache=True)

    mask = voco_mask(vision, voco)
    text = ~vision & ~voco
    causal = torch.where(torch.ones(9, 9).tril().bool(), 0.0, torch.finfo(torch.float32).min).expand(2, 1, 9, 9)
    # In one block a text token's state is a sum over what it sees: not a bit of it may come from vision.
    assert torch.equal(run(embeds, mask).logits[text], run(changed, mask).logits[text])
    behind = text & (vision.cumsum(1) > 0)
    assert not torch.allclose(run(embeds, causal).logits[behind], run(changed, causal).logits[behind])
    assert not torch.allclose(run(embeds, mask).logits[voco], run(changed, mask).logits[voco])

    more = [x + "t" for x in kinds]
    both = marks(more, "v"), marks(more, "c")
    token, whole = torch.randn(2, 1, 32), run(embeds, mask)
    with torch.no_grad():
        step = model(inputs_embeds=token, attention_mask=voco_mask(*both, queries=1), past_key_values=whole.past_key_values)
    want = run(torch.cat([embeds, token], 1), voco_mask(*both)).logits[:, -1]
    # One block's sums in another order: some ten roundings of 2**-24 on logits below 1.
    assert (step.logits[:, -1] - want).abs().max() <= 2**-20
