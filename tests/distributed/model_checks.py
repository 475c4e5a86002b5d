"""Checks of TokenDropper over the ranks of a group that every rank runs; see support/ranks.py."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from support import tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import v2drop_kernels as vk
from v2drop_kernels import distributed as vd
from v2drop_kernels.models import stage as stages

FAMILIES = ("llama", "llava", "qwen2_5_vl")
ATTENTION = {  # policies that read projections, with options that change the reduction
    "fastv": {}, "pdrop": {}, "hidivdrop": {}, "hidivdrop all l2": {"tokens": "all", "queries": "l2"}, "sparsevlm": {},
    "sparsevlm version 2": {"version": 2, "heads": 2}, "dart": {}, "cross_modal_flash": {},
}  # fmt: skip
OTHERS = {"variation": {}, "topv": {}, "random": {}}
PLAN = {"self_attn.q_proj": ColwiseParallel, "self_attn.k_proj": ColwiseParallel, "self_attn.v_proj": ColwiseParallel,
        "self_attn.o_proj": RowwiseParallel, "mlp.gate_proj": ColwiseParallel, "mlp.up_proj": ColwiseParallel,
        "mlp.down_proj": RowwiseParallel}  # fmt: skip


def model_and_inputs(family):
    tiny._made.cache_clear()  # checks shard their model
    model, inputs, spans = tiny.batch(family, [tiny.item(5, "image", 9, seed=1), tiny.item(3, "image", 4, seed=2)])
    return model, inputs, {"spans": spans} if family == "llama" else {}


def sharded(model):
    """The heads and the MLP of every decoder block over all ranks, as ``tp_plan="auto"`` does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_decoder().layers:
        parallelize_module(layer, mesh, {name: style() for name, style in PLAN.items()})
    return model


def run(model, inputs, policy, options, **given):
    """Kept tokens of both stages, the collectives of the second forward, and the scores of the first stage."""
    scores = []
    original = stages._scores
    schedule = vk.Schedule(tuple(vk.Stage(layer, 0.5, policy=policy, options=options) for layer in (2, 3)))
    stages._scores = lambda *args: scores.append(original(*args)) or scores[-1]
    try:
        with vk.models.TokenDropper(schedule, seed=3, **given)(model) as session, torch.no_grad(), vd.record() as calls:
            model(**inputs)
            kept = [session.kept(i).stages for i in range(len(inputs["input_ids"]))]
    finally:
        stages._scores = original
    return kept, list(calls), scores


def check_tensor_parallel():
    """Kept sets bit-equal on all ranks, and those of one process unless the scores of what changed are equal up to rounding."""
    for family in FAMILIES:
        model, inputs, given = model_and_inputs(family)
        policies = {name: (name.split()[0], options) for name, options in {**ATTENTION, **OTHERS}.items()}
        single = {name: run(model, inputs, *what, **given) for name, what in policies.items()}
        sharded(model)
        for name, what in policies.items():
            kept, calls, scores = run(model, inputs, *what, **given)
            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, (kept, [None if s is None else s.tolist() for s in scores]))
            assert all(repr(x) == repr(everywhere[0]) for x in everywhere), (family, name, "ranks disagree")
            assert [c.kind for c in calls] == ["all_gather"] * (2 if name in ATTENTION else 0), (family, name, calls)
            expected, _, reference = single[name]
            if kept != expected:
                for a, b in zip(scores, reference, strict=True):
                    assert a is not None, (family, name)
                    near = (a - b).abs().nan_to_num(0).max() / b.abs().nan_to_num(0).max()
                    assert near < 1e-5, (family, name, kept, expected)
                    cut = b.sort(dim=1).values.diff(dim=1)
                    assert (cut[cut > 0].min() / b.abs().max()) < 1e-5, (family, name, "no near-tie")


def check_group_is_found():
    """By the weights; ``group=`` overrides; a wrong group is refused; equal kept sets are checked on request."""
    model, inputs, given = model_and_inputs("llama")
    own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    expected = run(model, inputs, "fastv", {}, **given)[0]
    assert run(model, inputs, "fastv", {}, group=own, **given)[0] == expected  # a group of one: nothing to reduce
    sharded(model)
    os.environ["V2DROP_CHECK_RANKS"] = "1"
    kept, calls, _ = run(model, inputs, "fastv", {}, **given)
    assert kept == expected
    assert len(calls) == 4  # a reduction and a comparison for each stage
    draw = lambda context: torch.rand(context.hidden.shape[:2], generator=torch.Generator().manual_seed(dist.get_rank()))
    dropper = vk.models.TokenDropper(vk.Schedule((vk.Stage(2, 0.5, policy="given"),)), scores=draw, **given)
    with (
        dropper(model),
        torch.no_grad(),
        pytest.raises(RuntimeError, match="the tokens kept before layer 2 must be equal on all ranks"),
    ):
        model(**inputs)
    del os.environ["V2DROP_CHECK_RANKS"]


def check_tensor_parallel_soft():
    """Soft training: losses and gradients of ratios and of a replicated weight are those of one process."""
    found = []
    for cut in (False, True):
        model, inputs, given = model_and_inputs("llama")
        if cut:
            sharded(model)
        schedule = vk.Schedule((vk.Stage(2, 0.6, policy="hidivdrop"), vk.Stage(4, 0.3, policy="hidivdrop")))
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model.zero_grad()
        with vk.models.TokenDropper(schedule, soft=12, **given)(model) as session:
            loss = model(**inputs, labels=labels).loss
            loss.backward()
        norm = model.get_decoder().layers[1].input_layernorm.weight.grad
        found.append((loss.detach(), session.ratios[0].grad.clone(), norm.clone()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def check_ilvas():
    model, inputs, _ = model_and_inputs("llava")
    single = vk.models.ilvas(model, inputs, n=1, top=5).values
    sharded(model)
    for a, b in zip(single, vk.models.ilvas(model, inputs, n=1, top=5).values, strict=True):
        assert a == b or abs(a - b) < 1e-4 or (a != a and b != b)


def check_data_parallel():
    """DDP and FSDP2: the loss and the gradients of a dropped step are those of one process on the whole batch."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank()
    for policy in ("variation", "hidivdrop"):
        schedule = vk.Schedule((vk.Stage(2, 0.5, policy=policy), vk.Stage(3, 0.5, policy=policy)))
        model, inputs, _ = model_and_inputs("llava")
        weight = lambda model: model.get_decoder().layers[1].mlp.up_proj.weight
        losses, gradients = [], []
        for item in range(2):
            part = {name: value[item : item + 1] for name, value in inputs.items()}
            model.zero_grad()
            with vk.models.TokenDropper(schedule)(model):
                loss = model(**part, labels=part["input_ids"]).loss
                loss.backward()
            losses.append(loss.detach())
            gradients.append(weight(model).grad.clone())
        mine = {name: value[rank % 2 : rank % 2 + 1] for name, value in inputs.items()}
        for wrap in ("ddp", "fsdp"):
            model, _, _ = model_and_inputs("llava")
            whole = model
            if wrap == "ddp":
                whole = DistributedDataParallel(model, find_unused_parameters=True)  # of the tower, whose last layer is unused
            else:
                for layer in model.get_decoder().layers:
                    fully_shard(layer)
                fully_shard(model)
            with vk.models.TokenDropper(schedule)(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = whole(**mine, labels=mine["input_ids"]).loss
                loss.backward()
            grad = weight(model).grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            torch.testing.assert_close(loss.detach(), losses[rank % 2], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad, sum(gradients) / 2, rtol=1e-4, atol=1e-6)


def check_average_gradients():
    """A rank whose batch has no image has no gradient for the ratios: it counts as zero, and nothing waits."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parameters = [torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(2))]
    if rank == 0:
        parameters[0].grad = torch.tensor(4.0)
    parameters[1].grad = torch.tensor([1.0, float(rank)])
    vd.average_gradients(parameters)
    assert parameters[0].grad.item() == 4.0 / world
    assert parameters[1].grad.tolist() == [1.0, sum(range(world)) / world]
