"""The specification of a dropped forward: one item, no padding, no cache, layer by layer, every row by its number."""

from __future__ import annotations

import torch

from v2drop_kernels.core.counts import n_keep
from v2drop_kernels.ops.soft_topk import soft_topk


def captured(model, inputs):
    """What an undropped run gives the decoder: embeddings ``[B, N, D]`` and position ids ``[1 or 3, B, N]``."""
    found, decoder = {}, model.get_decoder()
    handles = [
        decoder.layers[0].register_forward_pre_hook(lambda m, args, kw: found.update(embeds=args[0]), with_kwargs=True),
        decoder.rotary_emb.register_forward_pre_hook(
            lambda m, args, kw: found.update(ids=kw.get("position_ids", args[-1])), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    ids = found["ids"] if found["ids"].dim() == 3 else found["ids"][None]
    return found["embeds"], ids.expand(-1, found["embeds"].shape[0], -1)


def rotated(x, cos, sin):
    """Rotate the two halves of every head: ``x [H, n, d]``, tables ``[n, d]``."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def block(layer, h, cos, sin, seen):
    """One decoder layer on ``h [n, D]``; row i sees the rows where ``seen[i]`` is True."""
    attn, d = layer.self_attn, layer.self_attn.head_dim
    x = layer.input_layernorm(h)
    q, k, v = (p(x).view(len(h), -1, d).transpose(0, 1) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    out = []
    for head in range(q.shape[0]):
        group = head // (q.shape[0] // k.shape[0])
        weights = (q[head] @ k[group].T * attn.scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(weights @ v[group])
    h = h + attn.o_proj(torch.cat(out, dim=-1))
    return h + layer.mlp(layer.post_attention_layernorm(h))


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def best(scores, k):
    """Indices of the ``k`` highest, ascending; equal scores keep the earlier one."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def variation(old, new, metric):
    if metric == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(old, new, dim=-1)
    return (new - old).norm(p={"l2": 2, "l1": 1}[metric], dim=-1)


def attention_scores(layer, h, cos, sin, last):
    attn, d = layer.self_attn, layer.self_attn.head_dim
    x = layer.input_layernorm(h)
    q, k = (p(x).view(len(h), -1, d).transpose(0, 1) for p in (attn.q_proj, attn.k_proj))
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    weights = []
    for head in range(q.shape[0]):
        scores = wide(q[head, last]) @ wide(k[head // (q.shape[0] // k.shape[0])]).T * attn.scaling
        weights.append(scores[: last + 1].softmax(-1))
    return torch.stack(weights).mean(0)


def count(stage, n):
    if isinstance(stage.keep, int):
        return min(n, max(stage.keep, stage.at_least))
    return n_keep(n, stage.keep, stage.rounding, stage.at_least)


def run(
    model, embeds, ids, schedule, vision, *,
    positions="persistent", prompt=None, hide=(), chance=None, forced=None, score=None, ratios=None,
):  # fmt: skip
    """Run ``embeds [N, D]`` with ids ``[1 or 3, N]``; return logits ``[rows, V]``, the rows at the end, and each stage's rows.

    ``vision`` are the droppable rows; ``prompt`` is where the prompt ends (later rows were generated); ``hide`` are rows that
    generated tokens see nowhere; ``chance(stage, n)`` gives the random scores of the ``n`` droppable rows that are left; ``forced``
    are the rows to keep at every stage, whatever their scores; ``score(layer, h, cos, sin, rows)`` gives the scores ``[n]`` of all
    the rows that are left to stages of other policies; ``ratios`` are the learnable shares that stages drop, by layer, for which
    the kept rows are multiplied by the mask of ``soft_topk``.
    """
    decoder = model.get_decoder()
    prompt = len(embeds) if prompt is None else prompt
    stages = {stage.layer: stage for stage in schedule.stages}
    rows, h, before, stage_rows = list(range(len(embeds))), embeds, None, []
    if positions == "group":
        text = [r for r in range(prompt) if r not in vision]
        number = {r: i for i, r in enumerate(list(vision) + text)}
        ids = torch.tensor([[number.get(r, r) for r in rows]])
    at = ids
    if schedule.inject:  # the text alone, under its own ids
        rows = [r for r in rows if r not in vision]
        h, at = embeds[rows], ids[:, rows]
    for index, layer in enumerate(decoder.layers):
        if index == schedule.inject > 0:
            text, h, at = dict(zip(rows, h, strict=True)), embeds, ids
            rows = list(range(len(embeds)))
            h = torch.stack([text.get(r, embeds[r]) for r in rows])
        left = [i for i, r in enumerate(rows) if r in vision]
        ratio = (ratios or {}).get(index)
        k = count(stages[index], len(left)) if index in stages else len(left)
        if index in stages and (k < len(left) or (left and ratio is not None)):
            stage = stages[index]
            if forced is not None:
                scores = [float(rows[i] in forced[len(stage_rows)]) for i in left]
            elif stage.policy == "variation":
                scores = variation(wide(before[left]), wide(h[left]), stage.metric)
            elif stage.policy == "fastv":
                cos, sin = tables(decoder, before, at)
                scores = attention_scores(decoder.layers[index - 1], before, cos, sin, rows.index(prompt - 1))[left]
            elif stage.policy == "pdrop" or (stage.policy == "hidivdrop" and score is None):
                cos, sin = tables(decoder, h, at)
                scores = attention_scores(layer, h, cos, sin, rows.index(prompt - 1))[left]
            elif stage.policy == "random":
                scores = chance(stage, len(left))
            else:
                scores = score(layer, h, *tables(decoder, h, at), rows)[left]
            if ratio is not None:
                mask = soft_topk(scores[None], ratio)[0]
                h = h.index_copy(0, torch.tensor(left), h[left] * mask[:, None])
                k = int(mask.sum())
            scores = scores.tolist() if isinstance(scores, torch.Tensor) else scores
            chosen = {left[i] for i in best(scores, k)}
            keep = [i for i in range(len(rows)) if i not in left or i in chosen]
            rows, h = [rows[i] for i in keep], h[keep]
            at = torch.arange(len(rows))[None].expand(ids.shape[0], -1) if positions == "compacted" else at[:, keep]
        if index in stages:
            stage_rows.append([r for r in rows if r in vision])
        before = h
        a, b = torch.tensor(rows)[:, None], torch.tensor(rows)
        seen = (b <= a) & ~((a >= prompt) & torch.isin(b, torch.tensor(sorted(hide), dtype=torch.int64)))
        cos, sin = tables(decoder, h, at)
        h = block(layer, h, cos, sin, seen)
    return model.get_output_embeddings()(decoder.norm(h)), rows, stage_rows


def tables(decoder, h, ids):
    """Rotary tables ``[n, d]`` for ids ``[1 or 3, n]``."""
    cos, sin = decoder.rotary_emb(h[None], ids[:, None] if ids.shape[0] == 3 else ids)
    return cos[0], sin[0]
