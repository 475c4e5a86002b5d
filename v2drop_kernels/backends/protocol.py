"""What a backend is, and how an op describes its implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

Run = Callable[[Any], Any]  # a request of backends.requests to what that request documents


class Placement(NamedTuple):
    """The part of a request that decides which backend serves it, so that the choice is made once for all alike."""

    device_type: str
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Op:
    """Where an op has its implementations.

    Attributes
    ----------
    package : str
        The folder of the op, ``__package__`` of its ``__init__``.
    name : str
        The function of ``triton.py`` and ``native.py`` that runs a request.
    reference : callable, optional
        Runs a request in plain PyTorch, seen by autograd; a backward pass has none.
    traced : callable, optional
        Runs ``(backend name, request)`` as a node of a traced graph, whose gradient is registered.
    kernels : tuple of str
        The backends that have kernels; the others run the reference.
    """

    package: str
    name: str
    reference: Run | None = None
    traced: Callable[[str, Any], Any] | None = None
    kernels: tuple[str, ...] = ("triton", "cuda", "cpu")


class Backend(Protocol):
    """One way to run requests; the reference is one as well."""

    name: str

    def supports(self, request: Placement) -> str | None:
        """Why this backend cannot serve such a request, or None when it can."""

    def load(self, op: Op) -> Run:
        """The function that runs the requests of an op; imported at the first call."""


class Runner(NamedTuple):
    """A backend chosen for one call of an op.

    Attributes
    ----------
    name : str
        The backend.
    run : callable
        A request to its result.
    differentiable : bool
        Whether autograd differentiates ``run`` without further help: plain PyTorch, and traced ops.
    traced : bool
        Whether the call is a node of the dispatcher, where sizes may be symbolic and tensors cannot be read.
    """

    name: str
    run: Run
    differentiable: bool
    traced: bool = False
