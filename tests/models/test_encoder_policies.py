"""Policies before the decoder against slow restatements: loops over single patches, from what plain hooks saw of the tower.

Which patch became which row is found by comparing embeddings, so that ``adapters/tower.py`` is not trusted either.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers as tf
from support import slow, tiny
from support.dropped import close, rows_of
from support.tiny import IMAGE, item
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from v2drop_kernels.models import TokenDropper, policies
from v2drop_kernels.schedule import Schedule, Stage

PATCHES = 16
ITEMS = {
    "llava": [item(4, "image", 6, seed=1), item(9, seed=2), item(3, "image", 2, "image", 5, seed=3)],
    # Unpadded above and below, at the sides, and not at all.
    "llava_next": [
        item(4, ("image", 40, 56), 6, seed=1),
        item(9, seed=2),
        item(3, ("image", 56, 20), 2, ("image", 56, 56), 5, seed=3),
    ],
}
ENCODERS = {
    "fastervlm": {}, "hired": {"alpha": 0.4}, "visionzip": {"contextual": 3}, "prumerge": {"neighbours": 4},
    "prumerge-plus": {"neighbours": 4, "uniform": 0.6}, "tome": {"tokens": 7},
}  # fmt: skip
HALF = 0.45  # of counts that no number of tiles divides


@pytest.fixture(autouse=True)
def deeper_tower(monkeypatch):
    """Four blocks, so that the first, the second-last and the last one differ."""
    monkeypatch.setattr(tiny, "_made", _deep)


@functools.cache
def _deep(family, attention, dtype, made=tiny._made.__wrapped__):
    with mock.patch.dict(tiny.TOWER, num_hidden_layers=4):
        return made(family, attention, dtype)


def stage(name, keep=HALF, **options):
    return Schedule((Stage(0, keep, name.partition("-")[0], options=ENCODERS.get(name, {}) | options),))


def facts(model, inputs):
    """What the tower made of every tile, by loops: attention, keys, features, and where in the prompts its patches lie."""
    body, kept = model.model, {}
    blocks = body.vision_tower.encoder.layers
    save = lambda name: lambda module, args, out: kept.__setitem__(name, out)
    handles = [body.multi_modal_projector.register_forward_hook(lambda m, args, out: kept.update(features=args[0], projected=out))]
    for i, block in enumerate(blocks):
        handles += [getattr(block.self_attn, p).register_forward_hook(save((p, i))) for p in ("q_proj", "k_proj")]
    embeds, ids = slow.captured(model, inputs)
    for handle in handles:
        handle.remove()
    heads = blocks[0].self_attn.num_heads
    tiles = len(kept["features"])
    first = kept["features"].shape[1] - PATCHES

    def attention(layer, tile, heads=heads):
        q, k = (kept[p, layer % len(blocks)][tile].double() for p in ("q_proj", "k_proj"))
        found = []
        for qh, kh in zip(q[0].chunk(heads), k.chunk(heads, dim=-1), strict=True):
            found.append((kh @ qh / len(qh) ** 0.5).softmax(0)[1:])
        return torch.stack(found)

    vectors = kept["projected"].to(embeds)
    places = []
    for i in range(len(embeds)):
        at = (inputs["input_ids"][i] == IMAGE).nonzero().flatten().tolist()
        found = {}
        for row in at:
            same = (vectors == embeds[i, row]).all(-1).nonzero().tolist()
            assert len(same) <= 1
            if same and same[0][1] >= first:
                found[row] = same[0][0], same[0][1] - first
        places.append((at, found))
    sizes = inputs.get("image_sizes", [None] * tiles)
    grid = lambda size: get_anyres_image_grid_shape(size, tiny.PINPOINTS, 28) if size is not None else (0, 0)
    return SimpleNamespace(
        model=model, embeds=embeds, ids=ids, heads=heads, attention=attention, places=places, grids=[grid(x) for x in sizes],
        features=kept["features"][:, first:], keys=lambda layer, tile: kept["k_proj", layer % len(blocks)][tile, 1:].float(),
    )  # fmt: skip


def ranking(scores, patches):
    """``{patch: rank}`` by (score descending, patch ascending)."""
    return {p: r for r, p in enumerate(sorted(patches, key=lambda p: (-scores[p], p)))}


def tiles_of(seen, i):
    """``{tile: {patch: row}}`` of an item, tiles ascending, and the droppable rows that are no patches."""
    rows, found = seen.places[i]
    tiles = {}
    for row, (tile, patch) in found.items():
        tiles.setdefault(tile, {})[patch] = row
    return dict(sorted(tiles.items())), [row for row in rows if row not in found]


def even(k, n):
    return [k // n + (j < k % n) for j in range(n)] if n else []


def chosen(tiles, tiers, ranks, k, extra, extras_first=True):
    """The k rows of the highest (tier, -rank), earlier rows first among equals."""
    order = sorted(
        (row for patches in tiles.values() for row in patches.values()), key=lambda row: (-tiers.get(row, 0), ranks[row], row)
    )
    return sorted((extra + order if extras_first else order + extra)[:k])


def slow_fastervlm(seen, i, k, how=lambda x: x.mean(0), layer=-2):
    tiles, extra = tiles_of(seen, i)
    tiers, ranks = {}, {}
    for (tile, patches), budget in zip(tiles.items(), even(max(k - len(extra), 0), len(tiles)), strict=True):
        for patch, rank in ranking(how(seen.attention(layer, tile)), patches).items():
            ranks[patches[patch]] = rank
            tiers[patches[patch]] = int(rank < budget)
    return chosen(tiles, tiers, ranks, k, extra), {}


def slow_hired(seen, i, k, alpha):
    tiles, extra = tiles_of(seen, i)
    images, start = [], 0
    for rows, columns in seen.grids:
        images.append((start, rows, columns))
        start += 1 + rows * columns
    mine = [image for image in images if image[0] in tiles]
    total = sum(1 + rows * columns for _, rows, columns in mine)
    tiers, ranks = {}, {}
    for whole, rows, columns in mine:
        share = k * (1 + rows * columns) // total
        budgets = {whole: share if rows == 0 else math.floor(alpha * share)}
        top = int((1 - alpha) * PATCHES)
        looked = [p for p, r in ranking(seen.attention(0, whole).sum(0), range(PATCHES)).items() if r < top]
        cells = [(p // 4 * rows // 4) * columns + p % 4 * columns // 4 for p in looked]
        for cell in range(rows * columns):
            budgets[whole + 1 + cell] = (share - budgets[whole]) * cells.count(cell) // top
        for tile, budget in budgets.items():
            for patch, rank in ranking(seen.attention(-2, tile).sum(0), tiles[tile]).items():
                ranks[tiles[tile][patch]] = rank
                tiers[tiles[tile][patch]] = int(rank < budget)
    return chosen(tiles, tiers, ranks, k, extra, extras_first=False), {}


def slow_visionzip(seen, i, k, contextual):
    tiles, extra = tiles_of(seen, i)
    tiers, ranks, merged = {}, {}, {}
    for (tile, patches), budget in zip(tiles.items(), even(max(k - len(extra), 0), len(tiles)), strict=True):
        c = min(contextual, budget)
        rank = ranking(seen.attention(-2, tile).sum(0), patches)
        dominant = [p for p in patches if rank[p] < budget - c]
        rest = sorted(p for p in patches if p not in dominant)
        targets = rest[:: max(1, len(rest) // max(c, 1))][:c]
        keys = torch.nn.functional.normalize(seen.keys(-2, tile).detach().unflatten(-1, (seen.heads, -1)).mean(1), dim=-1)
        came = {t: [] for t in targets}
        for p in rest:
            if p not in targets and targets:
                came[max(targets, key=lambda t, p=p: (float(keys[p] @ keys[t]), -t))].append(p)
        for t, sources in came.items():
            own = seen.features[tile, t].float()
            mean = sum(seen.features[tile, p].float() for p in sources) / len(sources) if sources else 0
            merged[patches[t]] = own + mean
        for p, row in patches.items():
            ranks[row], tiers[row] = rank[p], 2 * (p in dominant) + (p in targets)
    return chosen(tiles, tiers, ranks, k, extra), merged


def outliers(seen, tile):
    """How many patches lie above the third quartile by 1.5 interquartile ranges (linear between neighbours)."""
    weight = sorted(seen.attention(-1, tile, heads=1)[0].tolist())
    at = lambda share: weight[int(share * 15)] + (share * 15 % 1) * (weight[min(int(share * 15) + 1, 15)] - weight[int(share * 15)])
    return sum(x > at(0.75) + 1.5 * (at(0.75) - at(0.25)) for x in weight)


def sampled_beside(n, uniform):
    """PruMerge+ adds to ``n`` outliers what makes the samples that share of both."""
    return round(n * (uniform / (1 - uniform)))


def slow_prumerge(seen, i, k, neighbours, uniform=0.0, extra_token=True, adaptive=False):
    tiles, extra = tiles_of(seen, i)
    tiers, ranks, merged = {}, {}, {}
    budgets = [outliers(seen, t) + 1 for t in tiles] if adaptive else even(max(k - len(extra), 0), len(tiles))
    for (tile, patches), budget in zip(tiles.items(), budgets, strict=True):
        weight = seen.attention(-1, tile, heads=1)[0].float().detach()  # rankings carry no gradient
        rank = ranking(weight, patches)
        n = max(budget - extra_token, 0)
        u = sampled_beside(n, uniform) if adaptive else math.floor(n * uniform)
        n += u * adaptive
        top = [p for p in patches if rank[p] < n - u]
        rest = sorted(p for p in patches if p not in top)
        kept = top + rest[:: max(1, len(rest) // max(u, 1))][:u]
        left = [p for p in patches if p not in kept]
        last = [min(left, key=rank.get)] if left and extra_token else []
        keys = torch.nn.functional.normalize(seen.keys(-1, tile).detach(), dim=-1)
        for p in kept:
            near = sorted((q for q in patches if q != p), key=lambda q, p=p: (-float(keys[p] @ keys[q]), q))[:neighbours]
            merged[patches[p]] = seen.features[tile, p].float() + sum(weight[q] * seen.features[tile, q].float() for q in near)
        for p in last:
            merged[patches[p]] = sum(weight[q] * seen.features[tile, q].float() for q in left)
        for p, row in patches.items():
            ranks[row], tiers[row] = rank[p], 2 * (p in kept) + (p in last)
    return chosen(tiles, tiers, ranks, k, extra), merged


def slow_tower(model, pixels, lose):
    """ToMe in CLIP, a token at a time: the groups of patches behind the second-last block, and their features."""
    clip = model.model.vision_tower
    blocks = clip.encoder.layers[: len(clip.encoder.layers) - 1]
    x = clip.pre_layrnorm(clip.embeddings(pixels[None]))[0]
    groups = [[j - 1] for j in range(len(x))]  # CLS is patch -1
    for index, block in enumerate(blocks):
        attn, h = block.self_attn, block.layer_norm1(x)
        q, k, v = (p(h) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        bias = torch.tensor([float(len(g)) for g in groups]).log()
        split = lambda t, n=attn.num_heads: t.chunk(n, dim=-1)
        weights = [(a @ b.T / a.shape[1] ** 0.5 + bias).softmax(-1) for a, b in zip(split(q), split(k), strict=True)]
        x = x + attn.out_proj(torch.cat([w @ a for w, a in zip(weights, split(v), strict=True)], -1))
        metric = torch.nn.functional.normalize(sum(split(k)).detach() / attn.num_heads, dim=-1)
        r = lose * (index + 1) // len(blocks) - lose * index // len(blocks)
        edges = []
        for a in range(2, len(x), 2):  # 0 is CLS
            near = [float(metric[a] @ metric[b]) for b in range(1, len(x), 2)]
            best = max(range(len(near)), key=lambda j, near=near: (near[j], -j))
            edges.append((-near[best], a, 2 * best + 1))
        into = {a: b for _, a, b in sorted(edges)[:r]}
        rows, new = [], []
        for j in (*range(0, len(x), 2), *range(1, len(x), 2)):  # the released order: even rows first
            if j not in into:
                parts = [j, *(a for a, b in into.items() if b == j)]
                total = sum(len(groups[p]) for p in parts)
                rows.append(sum(x[p] * len(groups[p]) for p in parts) / total)
                new.append([patch for p in parts for patch in groups[p]])
        x, groups = torch.stack(rows), new
        x = x + block.mlp(block.layer_norm2(x))
    return x[1:], groups[1:]


def slow_tome(seen, i, k, tokens, pixels):
    tiles, extra = tiles_of(seen, i)
    tiers, ranks, merged = {}, {}, {}
    for tile, patches in tiles.items():
        features, groups = slow_tower(seen.model, pixels[tile], PATCHES - tokens)
        present = [[p for p in sorted(group) if p in patches] for group in groups]
        size = {p: len(group) for group in present for p in group}
        rank = ranking(size, patches)
        for feature, group in zip(features, present, strict=True):
            for p in group:
                ranks[patches[p]], tiers[patches[p]] = rank[p], int(p == group[0])
                merged[patches[p]] = feature
    return chosen(tiles, tiers, ranks, k, extra), merged


def slowly(name, seen, inputs, i, k):
    """The rows that an item keeps, and the embeddings of all its real rows after merging."""
    options = ENCODERS.get(name, {})
    if name == "tome":
        pixels = inputs["pixel_values"]
        if pixels.dim() == 5:
            pixels = torch.cat([x[: 1 + rows * columns] for x, (rows, columns) in zip(pixels, seen.grids, strict=True)])
        options = {**options, "pixels": pixels}
    kept, merged = globals()[f"slow_{name.partition('-')[0]}"](seen, i, k, **options)
    embeds = seen.embeds[i].clone()
    for row, feature in merged.items():
        embeds[row] = seen.model.model.multi_modal_projector(feature.to(seen.features.dtype)).to(embeds)
    return kept, embeds


def entering(model, into):
    """A hook that keeps what enters block 0; behind those of a TokenDropper."""
    return (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda m, args, kwargs: into.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ITEMS)
@pytest.mark.parametrize("name", ENCODERS)
def test_prefill_equals_the_slow_restatement(name, family, attention, side):
    """Kept tokens, embeddings after merging, and logits: one batch with an image, none, and two."""
    model, inputs, spans = tiny.batch(family, ITEMS[family], side, attention)
    with torch.no_grad():
        seen = facts(model, inputs)
        schedule = stage(name)
        with TokenDropper(schedule)(model) as dropping:
            logits = model(**inputs).logits
        for i in range(len(spans)):
            real, vision = rows_of(inputs, spans, i)
            k = schedule.stages[0].count(len(vision))
            kept, embeds = slowly(name, seen, inputs, i, k)
            kept = [r - int(real[0]) for r in kept]
            assert [vision[j] for j in dropping.kept(i).stages[0]] == kept
            want, rows, _ = slow.run(model, embeds[real], seen.ids[:, i, real], schedule, vision, forced=[kept])
            close(logits[i, real][rows], want)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("family", ITEMS)
def test_forward_equals_feeding_the_pruned_embeddings(family, name):
    """Straight into the unhooked language model, with the ids that the rows had."""
    model, inputs, spans = tiny.batch(family, ITEMS[family][:1])
    with torch.no_grad():
        with TokenDropper(stage(name))(model) as dropping:
            logits, into = model(**inputs).logits, []
            handle = entering(model, into)
            model(**inputs)
            handle.remove()
        (start, stop), kept = spans[0][0], dropping.kept(0).stages[0]
        rows = [*range(start), *(start + j for j in kept), *range(stop, inputs["input_ids"].shape[1])]
        pruned = model.model.language_model(inputs_embeds=into[0], position_ids=torch.tensor([rows])).last_hidden_state
        close(logits[:, rows], model.lm_head(pruned))


@pytest.mark.parametrize("positions", ["persistent", "compacted"])
@pytest.mark.parametrize("family", ITEMS)
@pytest.mark.parametrize("name", ENCODERS)
def test_generation_equals_recomputing_from_scratch(name, family, positions):
    """A padded batch: every step from the cache, where ``generate`` has run the tower before the model's forward."""
    model, inputs, spans = tiny.batch(family, ITEMS[family])
    with torch.no_grad():
        seen, schedule = facts(model, inputs), stage(name)
        with TokenDropper(schedule, positions=positions)(model) as dropping:
            out = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
            )  # fmt: skip
        for i, sequence in enumerate(out.sequences):
            real, vision = rows_of(inputs, spans, i)
            kept, embeds = slowly(name, seen, inputs, i, schedule.stages[0].count(len(vision)))
            kept = [r - int(real[0]) for r in kept]
            assert [vision[j] for j in dropping.kept(i).stages[0]] == kept
            fresh = sequence[inputs["input_ids"].shape[1] : -1]
            h = torch.cat([embeds[real], model.get_input_embeddings()(fresh)])
            later = seen.ids[:, i, real[-1:]] + torch.arange(1, len(fresh) + 1)
            at = torch.cat([seen.ids[:, i, real], later], dim=1)
            want, _, _ = slow.run(model, h, at, schedule, vision, positions=positions, prompt=len(real), forced=[kept])
            close(torch.stack(out.logits)[:, i], want[-len(fresh) - 1 :])


@pytest.mark.parametrize("family", ITEMS)
@pytest.mark.parametrize("name", ENCODERS)
def test_beams_share_what_the_tower_saw(name, family):
    """``generate`` copies prompts for beams behind the tower, which saw every picture once."""
    model, inputs, _ = tiny.batch(family, ITEMS[family])
    dropper = TokenDropper(stage(name))
    with torch.no_grad(), dropper(model) as dropping:
        model(**inputs)
        want, into = [dropping.kept(i).stages for i in range(3)], []
        handle = entering(model, into)
        model(**inputs)
        model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=2)
        handle.remove()
        assert [dropping.kept(i).stages for i in range(6)] == [x for x in want for _ in range(2)]
        assert torch.equal(into[1], into[0].repeat_interleave(2, 0))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("uniform", [0.0, 0.6, 0.82])  # with 0.82 a picture is full, and another is not
def test_adaptive_prumerge(uniform, beams):
    """Every picture keeps as many patches as are outliers, samples beside them, and the extra token, whatever the stage says."""
    model, inputs, spans = tiny.batch("llava", ITEMS["llava"])
    options = {"neighbours": 4, "adaptive": True, "uniform": uniform}
    with torch.no_grad():
        seen, into = facts(model, inputs), []
        most = [[outliers(seen, tile) for tile in tiles_of(seen, i)[0]] for i in range(3)]
        found = [sum(min(n + sampled_beside(n, uniform) + 1, PATCHES) for n in ns) for ns in most]
        assert len(set(found)) == 3  # or the test would tell nothing
        with TokenDropper(Schedule((Stage(0, 0.5, "prumerge", options=options),)))(model) as dropping:
            handle = entering(model, into)
            model.generate(**inputs, max_new_tokens=1, num_beams=beams, do_sample=False)
            handle.remove()
        for j in range(3 * beams):
            real, vision = rows_of(inputs, spans, j // beams)
            kept, merged = slow_prumerge(seen, j // beams, found[j // beams], **options)
            assert [vision[x] + int(real[0]) for x in dropping.kept(j).stages[0]] == kept
            behind = [
                [r for r in range(row, inputs["input_ids"].shape[1]) if r in kept or r - int(real[0]) not in vision] for row in kept
            ]
            for row, rows in zip(kept, behind, strict=True):  # padded on the left
                close(into[0][j, -len(rows)], model.model.multi_modal_projector(merged[row]))


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "tome"])
def test_merging_in_bfloat16(name):
    """Embeddings: what stayed is copied exactly; what was merged was summed in float32 and rounded once, so that the features
    differ by at most one unit of bfloat16 (2**-8 of themselves), which the projector's three roundings and weights of order
    one carry to 8 units of the largest embedding at most where it was tried; a wrong neighbour changes it by its own size."""
    model, inputs, spans = tiny.batch("llava", ITEMS["llava"][:1], dtype=torch.bfloat16)
    with torch.no_grad():
        seen, into = facts(model, inputs), []
        with TokenDropper(stage(name, 7))(model) as dropping:
            handle = entering(model, into)
            model(**inputs)
            handle.remove()
        if name == "tome":  # rounding in every block decides about its pairs, so only: one row of every group, and they differ
            assert len(into[0][0, spans[0][0][0] :][:7].unique(dim=0)) == 7
            return
        kept, embeds = slowly(name, seen, inputs, 0, 7)
        (start, stop), got = spans[0][0], into[0][0]
        assert [start + j for j in dropping.kept(0).stages[0]] == kept
        rows = [*range(start), *kept, *range(stop, len(embeds))]
        want = embeds[rows].float()
        assert (got.float() - want).abs().max() <= 8 * 2**-8 * want.abs().max()
        untouched = [j for j, row in enumerate(rows) if torch.equal(embeds[row], seen.embeds[0, row])]
        assert torch.equal(got[untouched], embeds[rows][untouched])


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "tome"])
def test_gradients_reach_the_tower_through_merged_tokens(name):
    """Those of the projector and of the tower equal those of the slow path, which merges the same rows by autograd."""
    model, inputs, spans = tiny.batch("llava", ITEMS["llava"][:1])
    model = copy.deepcopy(model)
    weights = [model.model.multi_modal_projector.linear_1.weight, model.model.vision_tower.encoder.layers[1].mlp.fc1.weight]
    schedule = stage(name, 7)
    with TokenDropper(schedule)(model):
        logits = model(**inputs).logits
    factor = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((logits[:, -1] @ factor).sum(), weights)
    vision = list(range(*spans[0][0]))
    with mock.patch("torch.no_grad", torch.enable_grad):  # the helpers look, here for gradients too
        seen = facts(model, inputs)
        kept, embeds = slowly(name, seen, inputs, 0, 7)
        logits, _, _ = slow.run(model, embeds, seen.ids[:, 0], schedule, vision, forced=[kept])
    for a, b in zip(got, torch.autograd.grad(logits[-1] @ factor, weights), strict=True):
        assert a.abs().max() > 0
        close(a, b)


def test_a_cls_row_is_kept():
    """``vision_feature_select_strategy="full"`` gives CLS a row, which is no patch."""
    model, inputs, _ = tiny.batch("llava", [item(4, seed=1)])
    model = copy.deepcopy(model)
    model.config.vision_feature_select_strategy = "full"
    inputs["input_ids"] = torch.tensor([[5, 6, *[IMAGE] * 17, 7, 8]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["pixel_values"] = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        seen = facts(model, inputs)
        assert seen.places[0][1] == {3 + p: (0, p) for p in range(PATCHES)}
        for name in ("fastervlm", "visionzip"):
            with TokenDropper(stage(name, 6))(model) as dropping:
                model(**inputs)
            kept, _ = slowly(name, seen, inputs, 0, 6)
            assert [2 + j for j in dropping.kept(0).stages[0]] == kept
            assert kept[0] == 2


class NoReading(TorchDispatchMode):
    """Refuses what a host waits for on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")), func
        if "aten.index" in str(func) and len(args) > 1 and isinstance(args[1], list | tuple):
            assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1]), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*ENCODERS, "dycoke"])
def test_the_host_reads_nothing(name, monkeypatch):
    family = "llava_onevision" if name == "dycoke" else "llava_next"
    items = [item(4, ("video", 6), 6, seed=1)] if name == "dycoke" else ITEMS[family]
    model, inputs, _ = tiny.batch(family, items)
    kind, calls = policies.known()[name.partition("-")[0]], []

    def watched(plain, self, *args):
        calls.append(plain)
        with NoReading():
            return plain(self, *args)

    # On CPU tensors, and on these only, weighted_merge reads its lists of edges to check them.
    monkeypatch.setattr(importlib.import_module("v2drop_kernels.ops.weighted_merge"), "edges_exist", lambda *arguments: None)
    for method in ("score", "merge"):
        monkeypatch.setattr(kind, method, functools.partialmethod(functools.partial(watched, getattr(kind, method))))
    with torch.no_grad(), TokenDropper(stage(name, **({"per_frame": 4} if name == "dycoke" else {})))(model):
        model(**inputs)
    assert len(calls) == 2


def hooks(model):
    return [list(x) for m in model.modules() for x in (m._forward_hooks, m._forward_pre_hooks)]


def test_leaves_no_trace():
    for family in ITEMS:
        model, inputs, _ = tiny.batch(family, ITEMS[family])
        with torch.no_grad():
            want, before = model(**inputs).logits, hooks(model)
            for name in ENCODERS:
                with TokenDropper(stage(name))(model):
                    model(**inputs)
                assert hooks(model) == before
                assert "pack_image_features" not in vars(model.model)
                assert torch.equal(model(**inputs).logits, want)


FRAMES = 4  # tokens of a frame of the tiny OneVision


def slow_dycoke(embeds, span, per_frame, k):
    start, stop = span
    frames = (stop - start) // per_frame
    pruned = [f for f in range(frames) if f % 4]
    each = (k - (frames - len(pruned)) * per_frame - (stop - start) % per_frame) // max(len(pruned), 1)
    kept = list(range(start + frames * per_frame, stop))
    for f in range(frames):
        rows = range(start + f * per_frame, start + (f + 1) * per_frame)
        back = per_frame * (1 if f % 2 else 2)
        if f % 4:
            rows = sorted(rows, key=lambda r, back=back: (float(torch.cosine_similarity(embeds[r], embeds[r - back], dim=0)), r))[
                :each
            ]
        kept += rows
    return sorted(kept)


@pytest.mark.parametrize("frames", [1, 2, 4, 7, 9])
def test_dycoke(frames):
    model, inputs, spans = tiny.batch(
        "llava_onevision", [item(4, ("video", frames), 6, seed=1), item(9, seed=2), item(5, ("video", frames), seed=3)]
    )
    per_frame = FRAMES
    policy = policies.make("dycoke", {"per_frame": per_frame})
    schedule = stage("dycoke", 0.6, per_frame=per_frame)
    with torch.no_grad():
        embeds, ids = slow.captured(model, inputs)
        with TokenDropper(schedule)(model) as dropping:
            logits = model(**inputs).logits
        for i in range(3):
            real, vision = rows_of(inputs, spans, i)
            n = len(vision)
            k = policy.count(n, schedule.stages[0].count(n)) if n else 0
            kept = slow_dycoke(embeds[i], spans[i][0], per_frame, k) if n else []
            kept = [r - int(real[0]) for r in kept]
            assert len(kept) == k
            assert [vision[j] for j in dropping.kept(i).stages[0]] == kept
            exact = Schedule((Stage(0, k, "dycoke"),))
            want, rows, _ = slow.run(model, embeds[i, real], ids[:, i, real], exact, vision, forced=[kept])
            close(logits[i, real][rows], want)


def test_dycoke_keeps_the_published_numbers():
    policy = policies.make("dycoke", {})
    for frames in (4, 8, 16, 32, 64):
        n = frames * 196 + 1
        assert policy.count(n, policies.preset("dycoke").stages[0].count(n)) == frames // 4 * (196 + 3 * 58) + 1
    assert policy.count(5 * 196 + 1, 0) == 2 * 196 + 1  # the frames that are compared with stay
    assert policy.count(196 + 1, 50) == 197


@pytest.mark.parametrize("n", [192, 128, 64])
@pytest.mark.parametrize("name", ["fastervlm", "hired", "visionzip", "prumerge", "tome"])
def test_presets(name, n):
    """As many of LLaVA-1.5's 576 tokens as the name says, of two pictures twice as many."""
    schedule = policies.preset(f"{name}-{n}")
    assert (schedule.counts(576), schedule.counts(1152)) == ((n,), (2 * n,))
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert schedule.stages[0].options.get("tokens", n) == n


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "llama"])
def test_needs_a_clip_tower(family, name):
    model = tiny.made(family)
    spans = {"spans": (1, 9)} if family == "llama" else {}
    with pytest.raises(ValueError, match=r"^policy must rank by a CLS token, which .*; the model is '"):
        TokenDropper(stage(name), **spans)(model).__enter__()


@pytest.mark.parametrize(
    ("name", "option", "value", "error"),
    [
        ("hired", "alpha", 1.5, ValueError),
        ("prumerge", "uniform", 2, ValueError),
        ("prumerge", "neighbours", -1, ValueError),
        ("visionzip", "contextual", 2.0, TypeError),
        ("tome", "tokens", -1, ValueError),
        ("dycoke", "per_frame", 0, ValueError),
    ],
)
def test_wrong_options(name, option, value, error):
    """Told when the dropper is made."""
    with pytest.raises(error, match=f"^{option} must "):
        TokenDropper(stage(name, **{option: value}))


def test_adaptive_prumerge_errors():
    """Where outliers cannot be counted picture by picture, a sentence says so."""
    with pytest.raises(ValueError, match=r"^uniform must be below 1 with adaptive"):
        TokenDropper(stage("prumerge", adaptive=True, uniform=1))
    model, inputs, spans = tiny.batch("llava", ITEMS["llava"])
    a, b = spans[2]
    # A part of a picture; one picture of two; halves; none of an item, or none of another.
    for wrong in (
        [[(spans[0][0][0], spans[0][0][0] + 8)], [], [a, b]], [spans[0], [], [a]],
        [spans[0], [], [(a[0] + 8, a[1]), (b[0], b[0] + 8)]], [[], [], [a, b]], [spans[0], [], []],
    ):  # fmt: skip
        dropper = TokenDropper(stage("prumerge", adaptive=True), spans=wrong)
        with pytest.raises(ValueError, match=r"^spans must cover every picture whole"), torch.no_grad(), dropper(model):
            model(**inputs)
    with torch.no_grad(), TokenDropper(stage("prumerge", adaptive=True), spans=spans)(model):
        model(**inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match=r"^pixel_values must go through"):
            model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    # The same where the tower never ran.
    dropper = TokenDropper(stage("prumerge", adaptive=True), spans=spans)
    with pytest.raises(ValueError, match=r"^pixel_values must go through"), torch.no_grad(), dropper(model):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    model, inputs, _ = tiny.batch("llava", ITEMS["llava"][:1])
    dropper = TokenDropper(stage("prumerge", adaptive=True), spans=(3, 11))
    with pytest.raises(ValueError, match=r"^spans must cover .* 1 pictures of 16 tokens .* \(8,\) left$"), dropper(model):
        model(**inputs)


def test_errors():
    model, inputs, spans = tiny.batch("llava", ITEMS["llava"])
    enter, before = lambda *args, **options: TokenDropper(stage(*args, **options))(model).__enter__(), hooks(model)
    with pytest.raises(ValueError, match=r"^layer must be one of the 4 blocks of the vision tower, got 4"):
        enter("fastervlm", layer=4)
    with pytest.raises(ValueError, match=r"^tokens must leave"):
        enter("tome", tokens=1)
    with pytest.raises(ValueError, match=r"^adaptive must be False for 'llava_next'"):
        TokenDropper(stage("prumerge", adaptive=True))(tiny.made("llava_next")).__enter__()
    assert hooks(model) == before
    several = copy.deepcopy(model)
    several.config.vision_feature_layer = [-2, -1]
    with pytest.raises(ValueError, match=r"^model must take its features from one block of the tower, got .* \[-2, -1\]"):
        TokenDropper(stage("tome"))(several).__enter__()
    for name in ("visionzip", "prumerge", "tome"):
        late = Schedule((Stage(2, 0.5, name, options=ENCODERS[name]),))
        with pytest.raises(ValueError, match=rf"^layer must be 0 for the policy '{name}'"), TokenDropper(late)(model):
            model(**inputs)
    features = model.get_image_features(inputs["pixel_values"])
    rest = {name: x for name, x in inputs.items() if name != "pixel_values"}
    with TokenDropper(stage("fastervlm"))(model):
        model(**inputs)  # what the tower saw then is forgotten
        with pytest.raises(ValueError, match=r"^pixel_values must go through"):
            model(**rest, mm_encoder_outputs={"image": features})
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match=r"^input_ids must be given"), TokenDropper(stage("fastervlm"), spans=spans)(model):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], attention_mask=inputs["attention_mask"])
    model, inputs, _ = tiny.batch("llava_onevision", [item(4, "video", 2, "video", 6, seed=1)])
    dropper = TokenDropper(stage("dycoke", per_frame=FRAMES))
    with pytest.raises(ValueError, match=r"^the policy 'dycoke' takes items of one video"), dropper(model):
        model(**inputs)


def test_a_later_stage_may_rank_by_the_tower():
    """Rows that a stage before it dropped are not counted as present."""
    model, inputs, _ = tiny.batch("llava", ITEMS["llava"][:1])
    schedule = Schedule((Stage(0, 9, "visionzip", options={"contextual": 2}), Stage(2, 4, "fastervlm")))
    with torch.no_grad():
        seen = facts(model, inputs)
        with TokenDropper(schedule)(model) as dropping:
            model(**inputs)
    first, second = dropping.kept(0).stages
    rank = ranking(seen.attention(-2, 0).mean(0), first)
    assert list(second) == sorted(p for p in first if rank[p] < 4)


def test_spans_of_the_user():
    """Only some of an image's tokens may go: the others are not counted, and stay."""
    model, inputs, spans = tiny.batch("llava", ITEMS["llava"][:1])
    start = spans[0][0][0]
    with torch.no_grad():
        seen = facts(model, inputs)
        with TokenDropper(stage("fastervlm", 3), spans=[[(start + 2, start + 9)]])(model) as dropping:
            model(**inputs)
    rank = ranking(seen.attention(-2, 0).mean(0), range(2, 9))
    assert [2 + j for j in dropping.kept(0).stages[0]] == [p for p in range(2, 9) if rank[p] < 3]


def test_transformers_classes():
    """The names that hooks rely on."""
    clip = tf.CLIPVisionModel(tf.CLIPVisionConfig(**tiny.TOWER))
    block = getattr(clip, "vision_model", clip).encoder.layers[0]
    assert [hasattr(block, x) for x in ("self_attn", "layer_norm2", "mlp")] == [True] * 3
