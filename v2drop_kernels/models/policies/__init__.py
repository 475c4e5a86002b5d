"""The methods: every module here that has a :class:`Policy` is found by its name; nothing else has to be changed to add one."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from ...core.schedule import Schedule
from ..policy import Policy


def names() -> tuple[str, ...]:
    """The methods, in alphabetical order."""
    return _listed(tuple(__path__))


@functools.cache  # listing a folder takes as long as registering ten hooks
def _listed(folders: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(info.name for info in pkgutil.iter_modules(folders)))


def find(name: str) -> type[Policy]:
    """The policy of a module here.

    Raises
    ------
    ValueError
        Unknown name; the sentence lists all.
    """
    if name not in names():
        raise ValueError(f"policy must be one of {', '.join(names())}, got {name!r}")
    module = importlib.import_module(f".{name}", __name__)
    own = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, Policy) and x.__module__ == module.__name__]
    if len(own) != 1:
        raise TypeError(f"the module of the policy {name!r} must define one Policy, not {len(own)}")
    return own[0]


def known() -> dict[str, type[Policy]]:
    """Every policy by its name."""
    return {name: find(name) for name in names()}


def make(name: str, options: Mapping[str, Any]) -> Policy:
    """The policy of a stage."""
    policy = find(name)
    fields = [field.name for field in dataclasses.fields(policy)]  # type: ignore[arg-type]
    if odd := sorted(set(options) - set(fields)):
        raise ValueError(f"options of the policy {name!r} must be among {', '.join(fields) or 'none'}, got {odd[0]!r}")
    return policy(**options)


def presets() -> dict[str, Schedule]:
    """Every published schedule by its name, V2Drop's first."""
    found = [*find("variation").method.presets, *(preset for policy in known().values() for preset in policy.method.presets)]
    return {preset.name: preset for preset in found}


def preset(name: str) -> Schedule:
    """A published schedule by its name.

    Raises
    ------
    ValueError
        Unknown name; the message lists all.

    Examples
    --------
    >>> preset("pdrop").average_tokens(576, layers=32)
    270.0
    """
    found = presets()
    if name not in found:
        raise ValueError(f"name must be one of {', '.join(map(repr, found))}, got {name!r}")
    return found[name]
