"""What people put around a model: PEFT, pipelines, data parallelism, FSDP2, replaced linear layers; and what is refused by name."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from support import tiny
from support.dropped import ITEMS, close
from support.tiny import IMAGE
from transformers import DynamicCache

from v2drop_kernels.models import TokenDropper
from v2drop_kernels.schedule import Schedule, Stage

HALF_THEN_3 = Schedule((Stage(2, 0.5), Stage(3, 3)))


class Adapted(torch.nn.Module):
    """What PEFT does: ``forward`` calls the base model's ``forward``, past its hooks; ``generate`` is the base model's."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model.forward(*args, **kwargs)

    def generate(self, **kwargs):
        return self.base_model.generate(**kwargs)


class Linear(torch.nn.Module):
    """A replacement as quantisation makes it: no parameter, another class."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("packed", linear.weight.data.clone())

    def forward(self, x):
        return torch.nn.functional.linear(x, self.packed)


def replaced(model):
    for layer in model.get_decoder().layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Linear(getattr(layer.self_attn, name)))
    return model


@pytest.fixture
def gloo(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(model):
    """The blocks only: ``generate`` calls the tower and the embedding past the model, and in a plain model too nothing would gather
    their shards."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.get_decoder().layers:
        torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
    return model


WRAPPED = {
    "peft": Adapted,
    "twice": lambda model: Adapted(Adapted(model)),
    "pipeline": lambda model: types.SimpleNamespace(model=model),
    "DataParallel": torch.nn.DataParallel,
    "DDP": torch.nn.parallel.DistributedDataParallel,
    "FSDP2": sharded,
    "quantised": replaced,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_models(name, gloo):
    """PEFT's generate failed with a sentence that blamed the caller; pipelines were refused."""
    model, inputs, _ = tiny.batch("llava", ITEMS)
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        want = model(**inputs, labels=labels)
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    wrapped = WRAPPED[name](copy.deepcopy(model))
    callable_ = wrapped.model if name == "pipeline" else wrapped
    with TokenDropper(HALF_THEN_3)(wrapped) as session:
        out = callable_(**inputs, labels=labels)
        assert session.kept(0).total == 16
        assert not session._calls.stack
        out.loss.backward()
        generate = getattr(callable_, "generate", None) or wrapped.module.generate
        with torch.no_grad():
            assert torch.equal(generate(**inputs, max_new_tokens=3, do_sample=False), tokens)
    close(out.logits.detach(), want.logits)
    close(out.loss.detach(), want.loss)


def test_prefixes():
    """Prefix tuning hands the first forward a cache of virtual tokens, which is no text: the prompt lies behind it."""
    model, inputs, _ = tiny.batch("llava", ITEMS)
    torch.manual_seed(0)
    virtual = torch.randn(5, 2, 3, 2, 4, 8)
    mask = torch.cat([torch.ones(3, 4, dtype=torch.int64), inputs["attention_mask"]], dim=1)

    def answer(schedule, given=model):
        cache = DynamicCache()
        for i, (keys, values) in enumerate(virtual):
            cache.update(keys, values, i)
        with torch.no_grad():
            out = given(**{**inputs, "attention_mask": mask}, past_key_values=cache).logits
            step = given(
                input_ids=torch.full((3, 1), 7), attention_mask=torch.cat([mask, mask[:, :1]], dim=1), past_key_values=cache
            )
        return out, step.logits

    with torch.no_grad():
        want = answer(None)
        with TokenDropper(Schedule((Stage(2, 1.0),)))(model):
            assert all(torch.equal(a, b) for a, b in zip(answer(None), want, strict=True))
        with TokenDropper(HALF_THEN_3)(model) as session:
            got = answer(None)
    assert [len(session.kept(i).stages[-1]) for i in range(3)] == [3, 0, 3]
    close(got[0][1, -9:], want[0][1, -9:])  # the item without an image
    assert (got[0][0, -1] - want[0][0, -1]).abs().max() > 0.01


def test_peft():
    peft = pytest.importorskip("peft")
    model, inputs, _ = tiny.batch("llava", ITEMS)
    for task in (None, "CAUSAL_LM"):
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type=task, init_lora_weights=False)
        tuned = peft.get_peft_model(copy.deepcopy(model), config).eval()
        merged = copy.deepcopy(tuned).merge_and_unload()
        with torch.no_grad():
            with TokenDropper(HALF_THEN_3)(merged):
                want, tokens = merged(**inputs).logits, merged.generate(**inputs, max_new_tokens=3, do_sample=False)
            with TokenDropper(HALF_THEN_3)(tuned):
                close(tuned(**inputs).logits, want)
                assert torch.equal(tuned.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)


def test_continuous_batching_is_refused():
    model, inputs, _ = tiny.batch("llava", ITEMS[:1])
    with TokenDropper(HALF_THEN_3)(model), pytest.raises(ValueError, match="generate_batch must not be called"):
        model.generate_batch([inputs["input_ids"][0].tolist()])
    assert "generate_batch" not in vars(model)
