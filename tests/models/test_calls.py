"""State per call: threads on one model, calls inside calls, replicas, and copies of a model inside a block."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from support import tiny
from support.dropped import ITEMS
from support.tiny import item

from v2drop_kernels.models import TokenDropper
from v2drop_kernels.schedule import Schedule, Stage

HALF_THEN_3 = Schedule((Stage(2, 0.5), Stage(3, 3)))
CLS = Schedule((Stage(0, 0.5, policy="fastervlm"), Stage(3, 3)))
OTHER = [item(2, "image", 7, seed=8)]


def logits_of(model, schedule, inputs):
    with torch.no_grad(), TokenDropper(schedule)(model):
        return model(**inputs).logits


@pytest.mark.parametrize("schedule", [HALF_THEN_3, CLS], ids=["variation", "tower"])
def test_threads_on_one_model(schedule):
    """Both forwards are held in the middle until the other one is there: one state for both would be the other's."""
    model, first, _ = tiny.batch("llava", ITEMS)
    _, second, _ = tiny.batch("llava", OTHER)
    want = [logits_of(model, schedule, inputs) for inputs in (first, second)]
    got, kept, barrier = [None, None], [None, None], threading.Barrier(2, timeout=60)
    handles = [
        module.register_forward_hook(lambda *_: (barrier.wait(), None)[1])
        for module in (model.model.vision_tower.encoder.layers[0], model.get_decoder().layers[2].mlp)
    ]

    def work(i, inputs):
        with torch.no_grad():
            got[i] = model(**inputs).logits
        kept[i] = session.kept(0)

    with TokenDropper(schedule)(model) as session:
        threads = [threading.Thread(target=work, args=pair) for pair in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.kept(0) in kept  # from a thread that called nothing: the last of all
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert kept[0].stages != kept[1].stages


def test_a_call_inside_a_call():
    """A policy's own scores call the model, which drops by them too: once, for the inner call."""
    model, inputs, _ = tiny.batch("llava", OTHER)
    _, inner, _ = tiny.batch("llava", ITEMS[:1])
    schedule = Schedule((Stage(2, 4, policy="given"), Stage(3, 2)))
    depth, found = [], []

    def scores(context):
        if not depth:
            depth.append(1)
            found.append(model(**inner).logits)
        return torch.arange(context.hidden.shape[1]).expand(context.hidden.shape[:2]).float()

    with torch.no_grad(), TokenDropper(schedule, scores=scores)(model):
        got = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, got)
        assert torch.equal(model(**inner).logits, found[0])


def test_steps_of_two_prompts_in_turns():
    model, first, _ = tiny.batch("llava", ITEMS[:1])
    _, second, _ = tiny.batch("llava", OTHER)
    step = {"input_ids": torch.tensor([[7]])}

    def steps(inputs):
        cache = model(**inputs).past_key_values
        for _ in range(3):
            yield model(**step, past_key_values=cache).logits

    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        alone = [list(steps(inputs)) for inputs in (first, second)]
        together = list(zip(steps(first), steps(second), strict=True))
    for i in range(2):
        assert all(torch.equal(a, pair[i]) for a, pair in zip(alone[i], together, strict=True))


def replica_of(model):
    """What DataParallel makes of a model for a device: shallow copies of all modules, parameters as plain attributes."""
    made = {id(module): module._replicate_for_data_parallel() for module in model.modules()}
    for module in model.modules():
        replica = made[id(module)]
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else made[id(child)])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() * 1.5 if "norm.weight" in name else parameter)
    return made[id(model)]


def test_a_replica_runs_with_its_own_modules():
    """The replica's rotary tables are twice as fast here, so that compacted positions show whose modules made them."""
    model, inputs, _ = tiny.batch("llava", ITEMS)
    other = copy.deepcopy(model)
    other.get_decoder().rotary_emb.inv_freq.mul_(2)
    dropper = TokenDropper(HALF_THEN_3, positions="compacted")
    with torch.no_grad():
        with dropper(other):
            want = other(**inputs).logits
        with dropper(model):
            replica = replica_of(model)
            rotary = replica.get_decoder().rotary_emb
            rotary._buffers["inv_freq"] = rotary.inv_freq * 2
            got = []
            thread = threading.Thread(target=lambda: got.append(torch.no_grad()(replica.__call__)(**inputs).logits))
            thread.start()
            thread.join()
    assert torch.equal(got[0], want)


def hooks_of(model):
    ours = lambda hook: "v2drop" in repr(hook)
    return [hook for module in model.modules() for name in ("_forward_pre_hooks", "_forward_hooks")
            for hook in getattr(module, name).values() if ours(hook)]  # fmt: skip


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(("schedule", "copied"), [(HALF_THEN_3, copy.deepcopy), (CLS, copy.deepcopy), (CLS, pickled)])
def test_copies_inside_a_block_have_no_hooks(schedule, copied):
    """The model is fresh: hooks that transformers installs in the first forward cannot be pickled."""
    _, inputs, _ = tiny.batch("llava", ITEMS)
    model = tiny._made.__wrapped__("llava", "sdpa", torch.float32)
    mine, before = model.get_decoder().layers[2].register_forward_hook(print_nothing), sorted(vars(model.get_decoder()))
    with TokenDropper(schedule)(model):
        assert hooks_of(model)
        twin, part = copied(model), copied(model.get_decoder())
    mine.remove()
    assert not hooks_of(model) + hooks_of(twin) + hooks_of(part)
    assert len(twin.get_decoder().layers[2]._forward_hooks) == 1  # of the user
    assert sorted(vars(part)) == sorted(vars(model.get_decoder())) == before
    with torch.no_grad():
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    assert torch.equal(logits_of(twin, schedule, inputs), logits_of(model, schedule, inputs))


def print_nothing(*_):
    return None


def test_a_failed_call_leaves_no_state():
    model, inputs, _ = tiny.batch("llava", ITEMS)
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model) as session:
        want = model(**inputs).logits
        handle = model.get_decoder().layers[3].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        handle.remove()
        assert not session._calls.stack
        assert torch.equal(model(**inputs).logits, want)
