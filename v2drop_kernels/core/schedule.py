"""Where a model drops tokens and how many it keeps: frozen and checked classes with a JSON form. Host integers only, no torch.

One layer convention: ``layer`` is 0-based and means "before decoder block ``layer`` runs". A stage's variation score compares
the input of block ``layer`` with the input of block ``layer - 1``, as V2Drop's released code does. ``layer_of`` converts the
numbers that other papers print. "Average tokens" is the mean, over all blocks, of the droppable tokens that enter the block.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from .arguments import METRICS, one_of, require_int
from .counts import n_keep

# From the number that a paper prints to "before 0-based block L"; read in the released code of each.
LAYER_OFFSETS = {
    "v2drop": 0,
    "fastv": 0,  # K = 3: before block 3, scored with the attention of block 2
    "vtw": 0,
    "pdrop": 0,  # after the 8th block, which is before 0-based block 8
    "hidivdrop-filter": 0,  # the same code
    "hidivdrop-exit": -1,  # "25" is one less in the code: 24
    "sparsevlm": 1,  # on the output of 0-based block 2
}


@dataclass(frozen=True, eq=False)
class Stage:
    """One drop of a schedule.

    Attributes
    ----------
    layer : int
        The drop happens before this 0-based decoder block.
    keep : int | float
        An int is the number of tokens kept of each item (``1`` is one token), a float in [0, 1] the share kept of the
        droppable tokens that are still there (``1.0`` is all of them).
    policy : str
        The method that ranks the tokens, by the name of its module in ``models/policies``: "variation" (change by the previous
        block), "random" (seeded random numbers), "fastv" (attention of the last prompt token) and so on. It is looked up when a
        TokenDropper is created.
    metric : {"l2", "l1", "cosine"}
        The metric of the policy "variation".
    rounding, at_least
        How a share becomes a count, as in :func:`n_keep`. The released V2Drop code keeps one token at "drop 100 %".
    options : mapping
        Options of the policy, by the names of its fields; values that JSON can hold: strings, numbers, lists.
    """

    layer: int
    keep: int | float
    policy: str = "variation"
    metric: str = "l2"
    rounding: str = "floor"
    at_least: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_int("layer", self.layer)
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float):
            raise TypeError(f"keep must be an int (tokens) or a float (share), got {self.keep!r}")
        if isinstance(self.keep, int):
            require_int("keep", self.keep)
        elif not 0 <= self.keep <= 1:
            raise ValueError(f"keep as a share must lie in [0, 1], got {self.keep!r}")
        if not isinstance(self.policy, str) or not self.policy.isidentifier():
            raise ValueError(f"policy must be the name of one, such as 'variation', got {self.policy!r}")
        one_of("metric", self.metric, METRICS)
        if self.policy == "variation" and self.layer < 1:
            raise ValueError("layer must be at least 1 for the policy 'variation': no block has changed a token before block 0")
        n_keep(0, 0.0, self.rounding, self.at_least)  # its checks name `rounding` and `at_least`
        object.__setattr__(self, "options", _plain("options", self.options))

    # 1 == 1.0 in Python, but one token is not all of them.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stage) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def count(self, n: int) -> int:
        """How many of ``n`` tokens survive this stage."""
        require_int("n", n)
        if isinstance(self.keep, float):
            return n_keep(n, self.keep, self.rounding, self.at_least)
        return min(n, max(self.keep, self.at_least))


@dataclass(frozen=True)
class Schedule:
    """The drops of a model, in the order of its blocks.

    Attributes
    ----------
    stages : tuple of Stage
        Layers ascend; counts given as ints do not grow.
    name, source : str
        Its name, and where it was published, for display.
    inject : int
        Late injection (HiDivDrop, section 3.1): the droppable tokens enter before this 0-based block, under the position ids that
        they have in the prompt; the blocks before it process the text alone. No stage lies before it.
    per : {"item", "image"}
        What a stage's count or share applies to: all droppable tokens of a batch item together, or each run of them, which is an
        image, or a frame where time stamps lie between frames. :meth:`counts` and the like then speak of one image.

    Examples
    --------
    >>> schedule = Schedule((Stage(3, 0.5), Stage(17, 0.3), Stage(22, 0.0, at_least=1)))
    >>> schedule.counts(576), schedule.average_tokens(576, layers=32)
    ((288, 86, 1), 193.75)
    """

    stages: tuple[Stage, ...]
    name: str = ""
    source: str = ""
    inject: int = 0
    per: str = "item"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        require_int("inject", self.inject)
        one_of("per", self.per, ("item", "image"))
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise TypeError(f"stages must hold Stage, got {type(stage).__name__}")
        for name in ("name", "source"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a str, got {getattr(self, name)!r}")
        for a, b in zip(self.stages[:-1], self.stages[1:], strict=True):
            if b.layer <= a.layer:
                raise ValueError(f"stages must ascend by layer, got layer {b.layer} after {a.layer}")
        if self.stages and self.stages[0].layer < self.inject:
            raise ValueError(f"stages must not lie before the injection at {self.inject}, got layer {self.stages[0].layer}")
        if self.inject and any(stage.layer == self.inject and stage.policy == "variation" for stage in self.stages):
            raise ValueError(f"stages must not rank by variation at layer {self.inject}, where the tokens enter")
        fixed = [stage for stage in self.stages if isinstance(stage.keep, int)]
        for a, b in zip(fixed[:-1], fixed[1:], strict=True):
            if b.keep > a.keep:
                raise ValueError(f"stages must not grow: layer {b.layer} keeps {b.keep} tokens after {a.keep} at layer {a.layer}")

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers before which tokens are dropped."""
        return tuple(stage.layer for stage in self.stages)

    def validate(self, layers: int) -> None:
        """Raise ValueError unless every stage lies inside a model of ``layers`` blocks."""
        require_int("layers", layers)
        if self.inject and self.inject >= layers:
            raise ValueError(f"inject must lie inside the model: layer {self.inject}, but it has {layers} blocks")
        for stage in self.stages:
            if stage.layer >= layers:
                raise ValueError(f"stages must lie inside the model: layer {stage.layer}, but it has {layers} blocks")

    def scaled(self, layers: int, *, of: int = 32) -> Schedule:
        """The schedule of a model of ``of`` blocks for one of ``layers``: at the same share of the depth, one block apart at least.

        Raises
        ------
        ValueError
            Fewer blocks than the stages need.
        """
        require_int("layers", layers)
        require_int("of", of)
        stages: list[Stage] = []
        for stage in self.stages:
            least = stages[-1].layer + 1 if stages else min(stage.layer, 1)
            layer = max(least, (2 * stage.layer * layers + of) // (2 * of))
            stages.append(dataclasses.replace(stage, layer=layer))
        made = dataclasses.replace(self, stages=tuple(stages), inject=(2 * self.inject * layers + of) // (2 * of))
        made.validate(layers)
        return made

    def counts(self, n: int) -> tuple[int, ...]:
        """Droppable tokens after each stage, when there are ``n`` at first."""
        kept = []
        for stage in self.stages:
            n = stage.count(n)
            kept.append(n)
        require_int("n", n)
        return tuple(kept)

    def tokens(self, n: int, layers: int) -> tuple[int, ...]:
        """Droppable tokens that enter each of ``layers`` blocks, when there are ``n`` at first."""
        self.validate(layers)
        after = dict(zip(self.layers, self.counts(n), strict=True))
        entering = []
        for layer in range(layers):
            n = after.get(layer, n)
            entering.append(n if layer >= self.inject else 0)
        return tuple(entering)

    def average_tokens(self, n: int, layers: int) -> float:
        """The mean of :meth:`tokens`; also the share of the KV cache that the droppable tokens use, times ``n``."""
        positive("layers", layers)
        return sum(self.tokens(n, layers)) / layers

    def flops(self, n: int, layers: int, hidden: int, intermediate: int, *, text: int = 0) -> int:
        """Multiply-adds of a prefill by the papers' formula, :func:`prefill_flops`; ``text`` tokens are never dropped.

        ``schedule.flops(576, *model_sizes(model.config))`` takes the sizes from a model.
        """
        require_int("text", text)
        return prefill_flops([x + text for x in self.tokens(n, layers)], hidden, intermediate)

    def flops_share(self, n: int, layers: int, hidden: int, intermediate: int, *, text: int = 0) -> float:
        """:meth:`flops` over those of the same prompt without dropping; its inverse is the largest speed-up that the saved FLOPs
        allow."""
        positive("layers", layers)
        positive("n", n)
        full = Schedule(()).flops(n, layers, hidden, intermediate, text=text)
        return self.flops(n, layers, hidden, intermediate, text=text) / full

    def to_json(self) -> str:
        """One line of JSON that :meth:`from_json` reads back to an equal schedule."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what :meth:`to_json` wrote; an unknown or missing field raises a ``ValueError`` that names it."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"text must be JSON, but {error}") from None
        fields = _fields(cls, "a schedule", fields)
        if not isinstance(fields["stages"], list):
            raise ValueError(f"stages must be a list, got {fields['stages']!r}")
        return cls(**{**fields, "stages": tuple(Stage(**_fields(Stage, "a stage", stage)) for stage in fields["stages"])})

    @classmethod
    def from_paper(cls, method: str, dropped: Mapping[int, float], *, at_least: int = 0, **stage: Any) -> Schedule:
        """A schedule from the numbers that a paper prints:
        ``{layer: percent of the tokens still present that are dropped before it}``.

        >>> Schedule.from_paper("sparsevlm", {2: 50}).stages[0].layer
        3
        """
        for percent in dropped.values():
            if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
                raise ValueError(f"dropped must give percentages in [0, 100], got {percent!r}")
        # By the decimals that were written: (100 - 6.4) / 100 is a hair below 0.936, and a floor would take a token for it.
        kept = {x: float(1 - Fraction(str(p)) / 100) for x, p in dropped.items()}
        return cls(tuple(Stage(layer_of(method, x), share, at_least=at_least, **stage) for x, share in kept.items()))


def layer_of(method: str, number: int) -> int:
    """The 0-based "before block L" of a layer number as the papers print it.

    Parameters
    ----------
    method : {"v2drop", "fastv", "vtw", "pdrop", "hidivdrop-filter", "hidivdrop-exit", "sparsevlm"}
        The paper or code whose numbering is used.
    number : int

    Examples
    --------
    >>> layer_of("hidivdrop-exit", 25), layer_of("sparsevlm", 2), layer_of("v2drop", 3)
    (24, 3, 3)
    """
    one_of("method", method, tuple(LAYER_OFFSETS))
    require_int("number", number)
    layer = number + LAYER_OFFSETS[method]
    require_int("number", layer)
    return layer


def prefill_flops(tokens: Iterable[int], hidden: int, intermediate: int) -> int:
    """``sum_l 4 n d^2 + 2 n^2 d + 3 n d m`` over the tokens that enter each block (PDrop's formula, used by all the papers).

    It counts multiply-adds of full multi-head attention and a gated MLP; grouped keys and values cost less than it says.
    """
    positive("hidden", hidden)
    positive("intermediate", intermediate)
    d, m = hidden, intermediate
    return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in tokens)


def model_sizes(config: Any) -> tuple[int, int, int]:
    """``(layers, hidden, intermediate)`` of a transformers config; of a vision-language model, those of its decoder."""
    config = getattr(config, "text_config", None) or config
    names = ("num_hidden_layers", "hidden_size", "intermediate_size")
    missing = [name for name in names if not isinstance(getattr(config, name, None), int)]
    if missing:
        raise ValueError(f"config must have the ints {', '.join(names)}; {type(config).__name__} lacks {', '.join(missing)}")
    layers, hidden, intermediate = (getattr(config, name) for name in names)
    return layers, hidden, intermediate


def _fields(kind: type, what: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{what} must be a JSON object, got {given!r}")
    known = {f.name: f.default is f.default_factory is dataclasses.MISSING for f in dataclasses.fields(kind)}
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"{what} has no field {unknown[0]!r}; its fields are {', '.join(known)}")
    if missing := [name for name, needed in known.items() if needed and name not in given]:
        raise ValueError(f"{what} needs the field {missing[0]!r}")
    return given


def _plain(name: str, value: Any) -> dict[str, Any]:
    """A copy of a mapping, as JSON would give it back, in the order of its names: equal ones then look equal."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be a mapping by name, got {value!r}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), sort_keys=True))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must hold what JSON can, but {error}") from None
    return plain


def positive(name: str, value: int) -> None:
    require_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
