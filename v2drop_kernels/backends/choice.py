"""Which backend serves a call, and why the others do not.

Order per device: ``cpu`` tensors go to the C++ library, small calls on GPU tensors to CUDA C++ and then to Triton, large and
traced ones to Triton and then to CUDA C++; plain PyTorch (``reference``) serves what is left. Small is what takes the host
longer to launch than the GPU to run: the library launches with less Python, and a drop in one launch. ``with backend(...)``,
``backend=`` and ``V2DROP_BACKEND`` force one; a forced backend that cannot serve raises with its reason, the automatic choice
falls through.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from . import implementations
from .protocol import Op, Placement, Runner

BACKENDS = tuple(implementations.BACKENDS)
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)  # other types are subclasses, whose calls the dispatcher must see

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("v2drop_backend", default=None)


def _bytes_from_environment() -> int:
    given = os.environ.get("V2DROP_CUDA_BELOW", "")
    if given and not given.isdecimal():
        raise ValueError(f"V2DROP_CUDA_BELOW must be a number of bytes, got {given!r}")
    return int(given) if given else 250_000_000


# Calls on a GPU whose tensors have fewer bytes go to ``cuda`` first. A prediction, to be replaced by a measurement: at 4.3 TB/s,
# 250 MB take 60 us, which is about the host time of a drop by Triton whose launches are not remembered.
_DEFAULT_BELOW = _bytes_from_environment()
_cuda_below: contextvars.ContextVar[int] = contextvars.ContextVar("v2drop_cuda_below", default=_DEFAULT_BELOW)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found.

    Attributes
    ----------
    chosen : str
        The backend that runs.
    rejected : dict
        The reason of every one that does not.
    """

    chosen: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        return "\n".join([f"{self.chosen}: runs", *(f"{b}: {why}" for b, why in self.rejected.items())])


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block.

    Parameters
    ----------
    name : {"triton", "cuda", "cpu", "reference"}

    Returns
    -------
    context manager

    Raises
    ------
    ValueError
        Unknown name. A known backend that cannot serve a call raises (RuntimeError) when that call is made.

    Examples
    --------
    >>> import v2drop_kernels as vk
    >>> with vk.backend("reference"):
    ...     scores = vk.variation_score(torch.zeros(1, 4, 8), torch.ones(1, 4, 8))
    """
    token = _forced.set(_known(name, "name"))
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def cuda_below(nbytes: int) -> Iterator[None]:
    """Prefer ``cuda`` to ``triton`` below this size inside a ``with`` block; ``V2DROP_CUDA_BELOW`` does so for a process.

    Parameters
    ----------
    nbytes : int
        Bytes of the two tensors of hidden states (for other ops: twice the bytes of the tensor that is read). 0: ``triton`` always
        comes first.

    Returns
    -------
    context manager

    Raises
    ------
    ValueError
        ``nbytes`` is not an int >= 0.

    Examples
    --------
    >>> with cuda_below(0):
    ...     chosen = explain(torch.zeros(1, 4, 8)).chosen
    """
    if type(nbytes) is not int or nbytes < 0:
        raise ValueError(f"nbytes must be an int >= 0, got {nbytes!r}")
    token = _cuda_below.set(nbytes)
    try:
        yield
    finally:
        _cuda_below.reset(token)


def explain(tensor: torch.Tensor | None = None, *, device: Any = None, dtype: torch.dtype | None = None) -> Explanation:
    """Tell which backend would serve a call on this tensor (or device and dtype), and why not the others.

    Parameters
    ----------
    tensor : Tensor, optional
        For instance ``h_cur``.
    device, dtype
        Instead of a tensor; default the CPU and float32. The call is taken to be a small one.

    Returns
    -------
    Explanation
        ``chosen`` (name), ``rejected`` (name to reason); prints as lines.

    Raises
    ------
    RuntimeError
        A forced backend cannot serve; the message has its reason.

    Examples
    --------
    >>> print(explain(torch.zeros(1, 4, 8, dtype=torch.float64)).chosen)
    reference
    """
    small = tensor is None or is_small(tensor)
    if tensor is not None:
        device, dtype = tensor.device, tensor.dtype
    kind = torch.device(device or "cpu").type
    dtype = dtype or torch.float32
    forced = forced_name(None)
    chosen = choose_name(kind, dtype, forced, small)
    first = f"{chosen!r} comes first for {kind} tensors"
    if kind == "cuda" and chosen in ("cuda", "triton"):
        first += f" {'below' if small else 'of'} {_cuda_below.get()} bytes{'' if small else ' and more'}"
    rejected = {}
    for name in BACKENDS:
        if name != chosen:
            why = why_not(name, kind, dtype)
            rejected[name] = why or (f"{forced!r} is forced" if forced else first)
    return Explanation(chosen, rejected)


def forced_name(argument: str | None) -> str | None:
    """The forced backend: ``backend=``, else the ``with`` block, else ``V2DROP_BACKEND``, else None."""
    if argument is not None:
        return _known(argument, "backend")
    name = _forced.get()
    if name is not None:
        return name
    name = os.environ.get("V2DROP_BACKEND")
    return _known(name, "V2DROP_BACKEND") if name else None


def traced_choice(kind: str, dtype: torch.dtype, argument: str | None) -> str:
    """The choice as a constant of a compiled graph; on meta tensors, where no backend runs, any that has kernels for the dtype."""
    if kind == "meta" and implementations.unserved_dtype(dtype) is None:
        return forced_name(argument) or "cpu"
    return choose_name(kind, dtype, forced_name(argument))


# What torch.compiler.assume_constant_result sets; calling it here would import all of dynamo (2 s) with the package.
traced_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def choose_name(kind: str, dtype: torch.dtype, forced: str | None, small: bool = False) -> str:
    """The backend for tensors of this device kind and dtype, in a call that is small, or large or traced."""
    if forced is not None:
        why = why_not(forced, kind, dtype)
        if why:
            raise RuntimeError(f"backend {forced!r} cannot serve {kind} tensors of {dtype}: {why}")
        return forced
    on_gpu = ("cuda", "triton", "reference") if small else ("triton", "cuda", "reference")
    for name in ("cpu", "reference") if kind == "cpu" else on_gpu:
        if why_not(name, kind, dtype) is None:
            return name
    raise AssertionError("the reference serves everything")


@functools.lru_cache(maxsize=256)
def why_not(name: str, kind: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot serve, or None when it can."""
    return implementations.BACKENDS[name].supports(Placement(kind, dtype))


def is_small(tensor: torch.Tensor) -> bool:
    """Whether an eager call on this tensor, of which there are two or which is also written, takes the host longer than a GPU."""
    return 2 * tensor.nbytes < _cuda_below.get()


def small_limit() -> int:
    """The bytes below which ``cuda`` comes before ``triton``."""
    return _cuda_below.get()


def is_traced(x: torch.Tensor) -> bool:
    """Whether a call on ``x`` must be a node of the dispatcher: it is being traced, or ``x`` is a tensor subclass."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("torch.jit.trace cannot record the ops of v2drop_kernels, whose plans are Python: use torch.export")
    return type(x) not in _PLAIN_TENSORS or x.is_meta or (torch._C._len_torch_dispatch_stack() > 0 and _recorded())


def _recorded() -> bool:
    """Whether a graph is being made, as by make_fx, or tensors stand for others. Modes of the user see no op."""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FAKE, keys.FUNCTIONAL))


def _transformed_in_graph() -> bool:
    """Whether a transform is traced, as a constant of the graph, which torch.compile guards."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


_transformed_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD follows the call; torch.compile follows those by itself."""
    return (forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()) and not torch.compiler.is_compiling()


def resolve_name(tensor: torch.Tensor, argument: str | None, dtype: torch.dtype | None = None) -> str:
    """The name of the backend for a call on this tensor; ``dtype`` stands for the tensor's where an op only moves bytes."""
    kind, dtype = tensor.device.type, dtype or tensor.dtype
    if is_traced(tensor):
        return traced_choice(kind, dtype, argument)
    return choose_name(kind, dtype, forced_name(argument), kind == "cuda" and is_small(tensor))


def resolve_backend(op: Op, tensor: torch.Tensor, argument: str | None, dtype: torch.dtype | None = None) -> Runner:
    """What runs a call of ``op`` on this tensor: the implementation of the chosen backend, or the traced op.

    An eager call reaches the implementation directly, which saves the microseconds of the dispatcher.
    """
    if not is_traced(tensor):
        small = tensor.device.type == "cuda" and "cuda" in op.kernels and is_small(tensor)
        return _chosen_runner(op, tensor.device, dtype or tensor.dtype, forced_name(argument), small)
    name = traced_choice(tensor.device.type, dtype or tensor.dtype, argument)
    if torch.compiler.is_compiling() and _transformed_in_graph():
        # Plain PyTorch, which torch.compile can transform: a node of its graph would have no tangent, and lose it without a word.
        return Runner("reference", op.reference or runner_of(op, "reference").run, True, True)
    if op.traced is not None and name in op.kernels:
        return Runner(name, functools.partial(op.traced, name), True, True)
    plain = runner_of(op, name)
    return Runner(plain.name, plain.run, plain.differentiable, True)


def runner_on(op: Op, device: torch.device, forced: str | None) -> Runner:
    """What runs an eager call of ``op`` that has no tensor, on this device, in float32."""
    return _chosen_runner(op, device, torch.float32, forced, device.type == "cuda")


@functools.lru_cache(maxsize=1024)
def _chosen_runner(op: Op, device: torch.device, dtype: torch.dtype, forced: str | None, small: bool) -> Runner:
    return runner_of(op, choose_name(device.type, dtype, forced, small))


@functools.lru_cache(maxsize=256)
def runner_of(op: Op, name: str) -> Runner:
    """The implementation of an op in a backend."""
    plain = name not in op.kernels
    return Runner(name, implementations.BACKENDS["reference" if plain else name].load(op), plain)


def _known(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name
