"""Schedules: the figures that the papers print, the round trip through JSON, and budgets turned into shares."""

import dataclasses
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from v2drop_kernels.models import policies
from v2drop_kernels.schedule import (
    METRICS,
    Schedule,
    Stage,
    layer_of,
    model_sizes,
    prefill_flops,
    preset,
    presets,
    pyramid,
    solve,
)

LLAVA = {"layers": 32, "hidden": 4096, "intermediate": 11008}  # Vicuna-7B
MOBILE = {"layers": 32, "hidden": 2560, "intermediate": 6912}  # MobileLLaMA-2.7B
UNDROPPED = Schedule(())
quiet = settings(deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    ("name", "layers", "counts", "depth", "average"),
    [
        ("v2drop-192", (3, 17, 22), (288, 86, 1), 32, 193.75),
        ("v2drop-128", (3, 17, 22), (161, 40, 1), 32, 131.0),
        ("v2drop-64", (3, 17, 22), (28, 1, 1), 32, 66.71875),
        ("v2drop-released", (3, 17, 22), (288, 144, 1), 32, 202.8125),
        ("v2drop-qwen2-vl", (3, 16, 22), (144, 7, 1), 28, 130.28571428571428),
        ("one-time-192", (3,), (154,), 32, 193.5625),
        ("one-time-128", (3,), (85,), 32, 131.03125),
        ("one-time-64", (3,), (14,), 32, 66.6875),
        ("fastv", (3,), (288,), 32, 315.0),
        ("pdrop", (8, 16, 24), (288, 144, 72), 32, 270.0),
        ("hidivdrop-64", (10, 14, 16, 18, 24), (215, 10, 5, 1, 0), 32, 64.0),
        ("hidivdrop-48", (10, 14, 16, 18, 24), (87, 10, 5, 1, 0), 32, 48.0),
        ("hidivdrop-80", (10, 13, 16, 19, 24), (453, 10, 5, 1, 0), 32, 80.03125),
    ],
)
def test_presets(name, layers, counts, depth, average):
    schedule = policies.preset(name)
    assert schedule.name == name
    assert schedule.source
    assert schedule.layers == layers
    assert schedule.counts(576) == counts
    assert schedule.average_tokens(576, depth) == average


def test_presets_are_all_listed_above():
    (mark,) = test_presets.pytestmark
    own = ("variation", "random", "given", "fastv", "pdrop", "hidivdrop")
    assert presets() == tuple(row[0] for row in mark.args[1][:-5])
    assert [x.name for name in own for x in policies.find(name).method.presets] == [row[0] for row in mark.args[1]]
    for name, policy in policies.known().items():
        for schedule in policy.method.presets:
            assert policies.preset(schedule.name) is schedule
            assert schedule.source
            assert Schedule.from_json(schedule.to_json()) == schedule
            for stage in schedule.stages:
                policies.make(stage.policy, stage.options)
            assert name in {stage.policy for stage in schedule.stages} or name == "variation"


def test_qwen2_vl_keeps_the_share_of_its_ratios():
    # 1/4 and 1/80 of the tokens: (3 + 13/4 + 6/80) / 28 is 22.6 %, but for whole tokens and the one that stays.
    assert preset("v2drop-qwen2-vl").average_tokens(4000, 28) / 4000 == pytest.approx(0.226, abs=5e-4)


@pytest.mark.parametrize(
    ("schedule", "sizes", "printed"),
    [  # HiDivDrop, table 2, in tera
        (UNDROPPED, LLAVA, 3.82),
        (policies.preset("pdrop"), LLAVA, 1.78),
        (UNDROPPED, MOBILE, 1.52),
        (policies.preset("pdrop"), MOBILE, 0.70),
        (policies.preset("hidivdrop-64"), LLAVA, 0.42),
    ],
)
def test_flops_that_hidivdrop_prints(schedule, sizes, printed):
    assert round(schedule.flops(576, **sizes) / 1e12, 2) == printed


def test_flops_of_hidivdrop_itself():
    """0.42 T, and 89.0 % less than without: injected before block 8, filtered before 10, 14, 16, 18, gone before 24."""
    assert [layer_of("hidivdrop-filter", x) for x in (10, 14, 16, 18)] == [10, 14, 16, 18]
    assert layer_of("hidivdrop-exit", 25) == 24
    tokens = [0] * 8 + [576] * 2 + [215] * 4 + [10] * 2 + [5] * 2 + [1] * 6 + [0] * 8
    flops = prefill_flops(tokens, 4096, 11008)
    assert round(flops / 1e12, 2) == 0.42
    assert round(1 - flops / UNDROPPED.flops(576, **LLAVA), 3) == 0.89


def test_flops_of_dropping_all_at_half_depth():
    """VTW's 50 % in the cross-modal paper's table."""
    assert Schedule((Stage(16, 0.0),)).flops_share(576, **LLAVA) == 0.5


def test_flops_shares_that_are_not_reproduced():
    """The cross-modal paper prints 42.9, 33.7 and 23.2 % for averages of 192, 128 and 64 tokens.

    On vision tokens alone its formula cannot: a block that sees fewer tokens costs less per token, so the share is at most
    the average over 576 (9.6, 11.5 and 12.1 points less than printed), and 10.1, 11.9 and 12.3 points less when every block
    sees the average. A hundred text tokens counted on both sides come within a point, so the shares seem to include them.
    """
    printed = {192: 42.9, 128: 33.7, 64: 23.2}
    assert {n: round(share - 100 * n / 576, 1) for n, share in printed.items()} == {192: 9.6, 128: 11.5, 64: 12.1}
    constant = {n: Schedule((Stage(0, n, policy="random"),)) for n in printed}
    missing = {n: printed[n] - 100 * s.flops_share(576, **LLAVA) for n, s in constant.items()}
    assert {n: round(points, 1) for n, points in missing.items()} == {192: 10.1, 128: 11.9, 64: 12.3}
    assert all(abs(printed[n] - 100 * s.flops_share(576, **LLAVA, text=100)) < 1 for n, s in constant.items())


def test_score_cost_that_v2drop_prints():
    """3 M D' is said to be 0.022 % of an attention layer and 0.002 % of the forward pass.

    The first is 3 n d^2 + 2 n^2 d, an attention without its output projection (0.0171 % with it); the second is ten times
    what 32 blocks give.
    """
    n, d = 576, 4096
    score = 3 * n * d
    assert round(100 * score / (3 * n * d * d + 2 * n * n * d), 3) == 0.022
    assert round(100 * score / (4 * n * d * d + 2 * n * n * d), 4) == 0.0171
    assert round(100 * score / UNDROPPED.flops(n, **LLAVA), 4) == 0.0002


def test_flops_against_the_formula():
    schedule = Schedule((Stage(1, 2), Stage(2, 0.5)))
    assert schedule.tokens(5, 4) == (5, 2, 1, 1)
    d, m = 3, 7
    for text in (0, 4):
        wanted = sum(4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m for n in (5 + text, 2 + text, 1 + text, 1 + text))
        assert schedule.flops(5, 4, d, m, text=text) == wanted
    assert UNDROPPED.flops_share(5, 4, d, m) == 1


def test_sizes_of_a_config():
    decoder = SimpleNamespace(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008)
    assert model_sizes(decoder) == model_sizes(SimpleNamespace(text_config=decoder, hidden_size=1)) == (32, 4096, 11008)
    with pytest.raises(ValueError, match=r"config must have .* lacks num_hidden_layers"):
        model_sizes(SimpleNamespace(hidden_size=1, intermediate_size=1))


def test_an_int_is_a_count_and_a_float_a_share():
    assert [Stage(1, 1).count(n) for n in (0, 1, 9)] == [0, 1, 1]
    assert [Stage(1, 1.0).count(n) for n in (0, 1, 9)] == [0, 1, 9]
    assert Stage(1, 1) != Stage(1, 1.0)
    assert len({Stage(1, 1), Stage(1, 1.0), Stage(1, 1)}) == 2
    assert [Stage(1, 0.5, rounding=r).count(5) for r in ("floor", "round", "ceil")] == [2, 2, 3]
    assert Stage(1, 0.0, at_least=2).count(5) == Stage(1, 0, at_least=2).count(5) == 2
    assert Stage(1, 0.0, at_least=2).count(1) == 1


def test_layers_as_the_papers_number_them():
    assert Schedule.from_paper("sparsevlm", {2: 48, 6: 33}).layers == (3, 7)
    # Not 1 - 95 / 100, which is 0.050000000000000044.
    assert [s.keep for s in Schedule.from_paper("v2drop", {3: 72, 17: 95, 22: 100}).stages] == [0.28, 0.05, 0.0]
    assert Schedule.from_paper("fastv", {3: 50}, policy="fastv").stages == policies.preset("fastv").stages
    with pytest.raises(ValueError, match="number must be >= 0"):
        layer_of("hidivdrop-exit", 0)
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'mine'"):
        layer_of("mine", 3)


STAGE = {"layer": 3, "keep": 0.5}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Stage(-1, 0.5), ValueError, "layer must be >= 0"),
        (lambda: Stage(2.0, 0.5), TypeError, "layer must be an int"),
        (lambda: Stage(0, 0.5), ValueError, "layer must be at least 1 for the policy 'variation'"),
        (lambda: Stage(3, -1), ValueError, "keep must be >= 0"),
        (lambda: Stage(3, 1.5), ValueError, r"keep as a share must lie in \[0, 1\], got 1.5"),
        (lambda: Stage(3, float("nan")), ValueError, "keep as a share"),
        (lambda: Stage(3, True), TypeError, "keep must be an int"),
        (lambda: Stage(3, "half"), TypeError, "keep must be an int"),
        (lambda: Stage(3, 0.5, policy=""), ValueError, "policy must be the name of one, such as 'variation', got ''"),
        (lambda: Stage(3, 0.5, policy=3), ValueError, "policy must be the name of one"),
        (lambda: Stage(3, 0.5, options=3), TypeError, "options must be a mapping by name, got 3"),
        (lambda: Stage(3, 0.5, options={3: 1}), TypeError, "options must be a mapping by name"),
        (lambda: Stage(3, 0.5, options={"a": {1, 2}}), TypeError, "options must hold what JSON can, but "),
        (lambda: Schedule((), inject=-1), ValueError, "inject must be >= 0"),
        (lambda: Schedule((Stage(3, 0.5),), inject=4), ValueError, "stages must not lie before the injection at 4, got layer 3"),
        (lambda: Schedule((Stage(4, 0.5),), inject=4), ValueError, "stages must not rank by variation at layer 4, where"),
        (lambda: Schedule((), inject=4).tokens(9, 4), ValueError, "inject must lie inside the model: layer 4, but it has 4 blocks"),
        (lambda: pyramid(9, 1, 0, layers=(3,)), ValueError, "p must be greater than 0, got 0"),
        (lambda: pyramid(9, 10, 1, layers=(3,)), ValueError, "stop must lie between 0 and start = 9, got 10"),
        (lambda: pyramid(9, 1, 1, layers=()), ValueError, "layers must name at least one layer"),
        (lambda: Stage(3, 0.5, metric="l3"), ValueError, "metric must be one of"),
        (lambda: Stage(3, 0.5, rounding="up"), ValueError, "rounding must be"),
        (lambda: Stage(3, 0.5, at_least=-1), ValueError, "at_least must be"),
        (lambda: Stage(3, 0.5).count(-1), ValueError, "n must be >= 0"),
        (lambda: Schedule(((3, 0.5),)), TypeError, "stages must hold Stage, got tuple"),
        (lambda: Schedule((), name=3), TypeError, "name must be a str"),
        (lambda: Schedule((Stage(5, 0.5), Stage(5, 0.5))), ValueError, "stages must ascend by layer, got layer 5 after 5"),
        (lambda: Schedule((Stage(2, 9), Stage(3, 0.5), Stage(4, 10))), ValueError, "layer 4 keeps 10 tokens after 9 at layer 2"),
        (lambda: preset("v2drop-64").validate(22), ValueError, "layer 22, but it has 22 blocks"),
        (lambda: preset("v2drop-64").tokens(576, 20), ValueError, "stages must lie inside the model"),
        (lambda: UNDROPPED.average_tokens(576, 0), ValueError, "layers must be at least 1"),
        (lambda: UNDROPPED.flops(576, 2, 0, 1), ValueError, "hidden must be at least 1"),
        (lambda: UNDROPPED.flops(576, 2, 1, 0), ValueError, "intermediate must be at least 1"),
        (lambda: UNDROPPED.flops(576, 2, 1, 1, text=-1), ValueError, "text must be >= 0"),
        (lambda: UNDROPPED.flops_share(0, 2, 1, 1), ValueError, "n must be at least 1"),
        (lambda: preset("192"), ValueError, "name must be one of 'v2drop-192', "),
        (lambda: Schedule.from_paper("v2drop", {3: 101}), ValueError, r"dropped must give percentages in \[0, 100\]"),
        (lambda: Schedule.from_json("{"), ValueError, "text must be JSON"),
        (lambda: Schedule.from_json("[]"), ValueError, "a schedule must be a JSON object"),
        (lambda: Schedule.from_json("{}"), ValueError, "a schedule needs the field 'stages'"),
        (lambda: Schedule.from_json('{"stages": 3}'), ValueError, "stages must be a list"),
        (lambda: Schedule.from_json('{"stages": [{"layer": 3}]}'), ValueError, "a stage needs the field 'keep'"),
        (lambda: Schedule.from_json(json.dumps({"stages": [{**STAGE, "kep": 1}]})), ValueError, "a stage has no field 'kep'"),
        (lambda: Schedule.from_json(json.dumps({"stages": [], "depth": 1})), ValueError, "a schedule has no field 'depth'"),
        (lambda: solve(average=53, layers=(3,), n=576, depth=32), ValueError, "average must lie between 54 and 576 .*, got 53"),
        (lambda: solve(average=577, layers=(3,), n=576, depth=32), ValueError, "average must lie between 54 and 576"),
        (lambda: solve(average="64", layers=(3,), n=576, depth=32), TypeError, "average must be a number"),
        (lambda: solve(average=64, layers=(), n=576, depth=32), ValueError, "layers must name at least one"),
        (lambda: solve(average=64, layers=(3,), n=576, depth=32, last=0.0), ValueError, "last must leave a stage"),
        (lambda: solve(average=64, layers=(3, 40), n=576, depth=32), ValueError, "stages must lie inside the model"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


stages = st.builds(
    Stage,
    layer=st.integers(1, 40),
    keep=st.one_of(st.integers(0, 5000), st.floats(0, 1)),
    policy=st.sampled_from(("variation", "random", "mine")),
    metric=st.sampled_from(METRICS),
    rounding=st.sampled_from(("floor", "round", "ceil")),
    at_least=st.integers(0, 3),
    options=st.dictionaries(st.text(), st.one_of(st.integers(), st.floats(allow_nan=False), st.text(), st.lists(st.booleans()))),
)


@st.composite
def schedules(draw):
    drawn = sorted(draw(st.lists(stages, max_size=5, unique_by=lambda s: s.layer)), key=lambda s: s.layer)
    least = 5000
    for i, stage in enumerate(drawn):
        if isinstance(stage.keep, int):
            least = min(least, stage.keep)
            drawn[i] = dataclasses.replace(stage, keep=least)
    most = max(0, drawn[0].layer - 1) if drawn else 40
    return Schedule(tuple(drawn), draw(st.text()), draw(st.text()), draw(st.integers(0, most)))


@quiet
@given(schedules())
def test_json_round_trip(schedule):
    text = schedule.to_json()
    assert "\n" not in text
    again = Schedule.from_json(text)
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert [type(s.keep) for s in again.stages] == [type(s.keep) for s in schedule.stages]


@quiet
@given(schedules(), st.integers(0, 5000))
def test_counts_never_grow(schedule, n):
    tokens = schedule.tokens(n, 41)
    assert len(tokens) == 41
    assert tokens[: schedule.inject] == (0,) * schedule.inject
    assert list(tokens[schedule.inject :]) == sorted(tokens[schedule.inject :], reverse=True)
    counts = schedule.counts(n)
    assert [tokens[layer] for layer in schedule.layers] == list(counts)
    assert [tokens[layer - 1] for layer in schedule.layers if layer > schedule.inject] == [n, *counts][: len(counts)]


def test_options_are_a_copy_that_looks_as_json_does():
    given = {"b": (1, 2), "a": 0.5}
    stage = Stage(3, 0.5, options=given)
    given["b"] = 4
    assert stage.options == {"a": 0.5, "b": [1, 2]}
    assert stage == Stage(3, 0.5, options={"a": 0.5, "b": [1, 2]}) != Stage(3, 0.5)
    assert len({stage, Stage(3, 0.5, options={"a": 0.5, "b": [1, 2]}), Stage(3, 0.5)}) == 2


@pytest.mark.parametrize(("p", "counts"), [(1.0, (432, 288, 145, 1)), (0.5, (324, 145, 37, 1)), (0.15, (85, 7, 1, 1))])
def test_pyramid(p, counts):
    """Straight for p = 1; the smaller p, the steeper at first: drops shrink from stage to stage."""
    schedule = pyramid(576, 1, p, layers=(10, 14, 16, 18), leave=24, inject=8, policy="hidivdrop")
    assert schedule.counts(576) == (*counts, 0)
    assert (schedule.inject, schedule.layers) == (8, (10, 14, 16, 18, 24))
    steps = [a - b for a, b in zip((576, *counts), counts, strict=False)]
    assert all(a >= b - 1 for a, b in zip(steps, steps[1:], strict=False))  # but for rounding
    # By hand: between stages the share of the way that is left is (1 - i / 4) ** (1 / p).
    assert counts == tuple(round(1 + 575 * (1 - i / 4) ** (1 / p)) for i in (1, 2, 3, 4))


def test_json_defaults_may_be_left_out():
    assert Schedule.from_json('{"stages": [{"layer": 3, "keep": 0.5}]}') == Schedule((Stage(3, 0.5),))


@st.composite
def budgets(draw):
    depth = draw(st.integers(2, 40))
    layers = sorted(draw(st.sets(st.integers(1, depth - 1), min_size=1, max_size=4)))
    n = draw(st.integers(1, 3000))
    last = draw(st.sampled_from([None, 0.0, 0.25, 1.0])) if len(layers) > 1 else None
    wanted = draw(st.floats(n * layers[0] / depth, n))
    rounding = draw(st.sampled_from(("floor", "round", "ceil")))
    return {"average": wanted, "layers": layers, "n": n, "depth": depth, "last": last, "rounding": rounding}


@quiet
@given(budgets())
@example({"average": 53.85, "layers": [3, 6, 13, 17], "n": 55, "depth": 23, "last": None, "rounding": "floor"})  # see below
def test_solve_comes_within_a_token(budget):
    try:
        found = solve(**budget)
    except ValueError as error:  # `last` may cap the average below what was asked; then the sentence is right
        reachable = re.search(r"between ([\d.e+]+) and ([\d.e+]+) ", str(error))
        least, most = map(float, reachable.groups())
        assert not least <= budget["average"] <= most
        return
    average = found.average_tokens(budget["n"], budget["depth"])
    assert abs(average - budget["average"]) <= 0.5
    keeps = [stage.keep for stage in found.stages]
    if budget["last"] is not None:
        assert keeps.pop() == budget["last"]
    # One unknown; but from 0.99... to 1.0 four floors jump by 1, 2, 3 and 4 tokens, and the average of the example by 2.3.
    assert max(keeps) - min(keeps) <= 1e-11


def test_solve_takes_the_shortest_share():
    assert solve(average=288, layers=(1,), n=576, depth=2).stages[0].keep == 0.0
    assert [s.keep for s in solve(average=270, layers=(8, 16, 24), n=576, depth=32).stages] == [0.5] * 3
    random = solve(average=200, layers=(3,), n=576, depth=32, policy="random", name="mine")
    assert (random.name, random.stages[0].policy) == ("mine", "random")


def test_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from v2drop_kernels.schedule import preset; print(preset('v2drop-64').layers)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout == "(3, 17, 22)\n", found.stderr


def test_percentages_of_a_paper_are_the_decimals_they_are_written_as():
    """1000 tokens and every percentage with one decimal: the count is exact, whatever floats make of the share."""
    for tenths in range(1001):
        assert Schedule.from_paper("v2drop", {3: tenths / 10}).counts(1000) == (1000 - tenths,)
