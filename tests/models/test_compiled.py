"""Compiled models: prefills drop between compiled blocks, steps are one graph that is not compiled again."""

from __future__ import annotations

import copy

import pytest
import torch
from support import tiny
from support.dropped import ITEMS, close
from transformers import CompileConfig, StaticCache

from v2drop_kernels.models import TokenDropper
from v2drop_kernels.schedule import Schedule, Stage

HALF_THEN_3 = Schedule((Stage(2, 0.5), Stage(3, 3)))


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A compiler that changes nothing and counts the graphs that it receives."""

    count = 0

    def __call__(self, module, inputs):
        self.count += 1
        return module

    def __deepcopy__(self, memo):  # transformers copies the options of generate
        return self


def compile_model(model, how, backend):
    if how == "wrapped":
        return torch.compile(model, backend=backend)
    for module in {"model": [model], "decoder": [model.get_decoder()], "layers": model.get_decoder().layers}[how]:
        module.compile(backend=backend)
    return model


def answered(model, inputs, graphs, steps=3):
    """Logits of a prompt and of steps with the masks that ``generate`` makes, and the graphs that each call compiled."""
    cache, logits, counts = StaticCache(config=model.config.text_config, max_cache_len=60), [], []
    mask, given = inputs["attention_mask"], inputs
    for i in range(steps):
        before = graphs.count
        logits.append(model(**given, past_key_values=cache, logits_to_keep=1).logits)
        counts.append(graphs.count - before)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        step = {"input_ids": torch.full((len(mask), 1), 7 + i), "attention_mask": mask, "past_key_values": cache}
        given = model.prepare_inputs_for_generation(**step)
        cache = given.pop("past_key_values")
    return torch.cat(logits, dim=1), counts


def test_steps_are_one_graph():
    """The blocks of the prefill are compiled too; the second step compiles nothing."""
    plain, inputs, _ = tiny.batch("llava", ITEMS)
    dropper, graphs = TokenDropper(HALF_THEN_3, positions="compacted"), Graphs()
    with torch.no_grad(), dropper(plain):
        want, _ = answered(plain, inputs, graphs)
    assert not graphs.count
    model = compile_model(copy.deepcopy(plain), "model", graphs)
    with torch.no_grad(), dropper(model) as session:
        got, counts = answered(model, inputs, graphs)
        assert len(session.kept(0).stages[-1]) == 3
    close(got, want)
    assert counts[0] >= 3  # blocks of three widths
    assert counts[1:] == [1, 0]


@pytest.mark.parametrize("how", ["wrapped", "decoder"])
def test_prefills_drop_between_compiled_blocks(how):
    plain, inputs, _ = tiny.batch("llava", ITEMS[:1])
    graphs = Graphs()
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(plain):
        want = plain(**inputs, use_cache=False).logits
    model = compile_model(copy.deepcopy(plain), how, graphs)
    before = [dict(module.__dict__) for module in model.modules()]
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model) as session:
        twin = copy.deepcopy(model.get_decoder())
        got = model(**inputs, use_cache=False).logits
        assert len(session.kept(0).stages[-1]) == 3
    close(got, want)
    assert 1 <= graphs.count <= 3  # blocks of three widths, of which later ones may share a graph
    assert [module.__dict__.keys() for module in model.modules()] == [module.keys() for module in before]
    assert "forward" not in vars(twin.layers[0])


def test_compiled_layers_stay_compiled():
    plain, inputs, _ = tiny.batch("llava", ITEMS)
    graphs = Graphs()
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(plain):
        want, _ = answered(plain, inputs, graphs)
    model = compile_model(copy.deepcopy(plain), "layers", graphs)
    calls = [layer._compiled_call_impl for layer in model.get_decoder().layers]
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        got, counts = answered(model, inputs, graphs)
    close(got, want)
    assert counts[0] >= 3
    assert counts[2] == 0
    assert [layer._compiled_call_impl for layer in model.get_decoder().layers] == calls


def test_generate_with_its_own_compilation():
    """A static cache: ``generate`` compiles its steps, here for the CPU and without graph breaks."""
    model, inputs, _ = tiny.batch("llava", ITEMS)
    model = copy.deepcopy(model)
    graphs = Graphs()
    given = {**inputs, "max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "return_dict_in_generate": True}
    config = CompileConfig(backend=graphs, mode=None, fullgraph=True, dynamic=False)
    config._compile_all_devices = True
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model):
        want = model.generate(**given, disable_compile=True, output_logits=True)
        got = model.generate(**given, compile_config=config, output_logits=True)
        assert graphs.count == 1
        assert torch.equal(model.generate(**given, compile_config=config).sequences, want.sequences)
    assert graphs.count == 1
    close(torch.stack(got.logits), torch.stack(want.logits))


def test_a_prefill_inside_another_graph_is_refused():
    """The model was compiled by the caller, who gives TokenDropper the one inside."""
    model, inputs, _ = tiny.batch("llava", ITEMS[:1])
    with torch.no_grad(), TokenDropper(HALF_THEN_3)(model), pytest.raises(Exception, match="prefills must run eagerly") as found:
        torch.compile(copy.copy(model), backend="eager")(**inputs)
    assert found.type.__module__ != "builtins" or "\n" not in str(found.value)
