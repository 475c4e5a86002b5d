"""Launches of an earlier call, made again with other addresses.

Most of the host time of a Triton launch is Python that finds the compiled kernel for its arguments. A call like an earlier one
(:mod:`.repeated`: equal shapes, strides, dtypes, alignments, options) launches the same compiled kernels with the same integers on
the same number of programs; only the addresses of tensors differ. Its second call is recorded, and those after it are allocations
and launches alone. What could change a launch is checked before each: see :func:`_as_recorded`.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

from .. import native as library
from . import configs, tables
from . import repeated as known

_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("v2drop_recording", default=None)

_ADDRESSES = "addresses"  # the parameter of kernels that holds pairs of encoded addresses
_ENCODED = 1 << 62


class Launch(NamedTuple):
    """One launch, without the addresses.

    Attributes
    ----------
    kernel, source : JITFunction, str
        What was compiled, and from which text.
    compiled : CompiledKernel
        The result.
    programs : int
        How many programs run.
    arguments : tuple
        All arguments; None at the tensors, at ``addresses``, and at constants of the compilation, which the launcher leaves out.
    tensors : tuple
        ``(argument, slot)`` of every tensor.
    addresses : int
        The argument that holds addresses, -1 for none.
    pairs : tuple
        The addresses as ``(slot, offset, slot, offset)`` of source and destination.
    """

    kernel: Any
    source: str
    compiled: Any
    programs: int
    arguments: tuple[Any, ...]
    tensors: tuple[tuple[int, int], ...]
    addresses: int
    pairs: tuple[tuple[int, int, int, int], ...]


class Call(NamedTuple):
    """The launches of a call.

    Slots are the tensors that were given and then those that were made, in order; ``made`` has the shapes, strides, dtypes and
    devices of the latter, and ``results`` says which of them the call returns. ``held`` are the tables of a plan that the launches
    read, on ``stream``; ``knobs`` is what Triton's settings were.
    """

    launches: tuple[Launch, ...]
    made: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device], ...]
    results: tuple[int, ...]
    device: torch.device
    stream: int | None
    held: tuple[torch.Tensor, ...]
    knobs: tuple[Any, ...]


class _Unrepeatable(Exception):
    """A launch with an argument that is neither constant nor one of the tensors of the call."""


class Recording:
    """The launches of one call, while it runs."""

    def __init__(self, given: Sequence[torch.Tensor], held: Sequence[torch.Tensor]) -> None:
        self.given, self.held = list(given), list(held)
        self.made: list[torch.Tensor] = []
        self.launches: list[tuple[Any, Any, int, tuple[Any, ...]]] = []

    def add(self, kernel: Any, compiled: Any, programs: int, arguments: tuple[Any, ...]) -> None:
        """Note one launch."""
        self.launches.append((kernel, compiled, programs, arguments))

    def finish(self, results: Sequence[torch.Tensor]) -> Call:
        """What was recorded, for calls like it."""
        slots = [*self.given, *self.made]
        found = tuple(self._launch(slots, *launch) for launch in self.launches)
        device = slots[0].device
        made = tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in self.made)
        places = tuple(next((i for i, x in enumerate(self.made) if x is result), -1) for result in results)
        if -1 in places:
            raise _Unrepeatable
        stream = tables.stream_of(device) if self.held else None
        return Call(found, made, places, device, stream, tuple(self.held), _knobs())

    def _launch(self, slots: list[torch.Tensor], kernel: Any, compiled: Any, programs: int, given: tuple[Any, ...]) -> Launch:
        if not _launches_as_expected(kernel, compiled):
            raise _Unrepeatable
        arguments: list[Any] = [*given, *[None] * (len(kernel.arg_names) - len(given))]
        held, tensors, pairs, where = {x.data_ptr() for x in self.held}, [], [], -1
        for i, x in enumerate(given):
            if kernel.arg_names[i] == _ADDRESSES:
                where, arguments[i] = i, None
                pairs = [(*_place(slots, a), *_place(slots, b)) for a, b in x]
            elif isinstance(x, torch.Tensor):
                if x.data_ptr() in held:
                    arguments[i] = x.data_ptr()
                    continue
                slot, offset = _place(slots, _encode(x.data_ptr()))
                if offset:
                    raise _Unrepeatable
                arguments[i] = None
                tensors.append((i, slot))
        return Launch(kernel, kernel.src, compiled, programs, tuple(arguments), tuple(tensors), where, tuple(pairs))


def _encode(address: int) -> int:
    return _ENCODED | address << 1 | 1


@functools.cache
def _encoder() -> Callable[[bytes, Any], tuple[tuple[int, int], ...]]:
    return library.lib().encoded_addresses if library.reads(torch.Tensor) else _encoded


def _encoded(starts: bytes, pairs: Any) -> tuple[tuple[int, int], ...]:
    at = memoryview(starts).cast("q")
    return tuple([(_encode(at[a] + x), _encode(at[b] + y)) for a, x, b, y in pairs])


def _place(slots: Sequence[torch.Tensor], encoded: int) -> tuple[int, int]:
    """The one slot that an encoded address lies in, and where in it."""
    address = (encoded & (_ENCODED - 1)) >> 1
    found = []
    for i, x in enumerate(slots):
        start = x.data_ptr()
        stop = start + x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)))
        if x.numel() and start <= address < stop:
            found.append((i, address - start))
    if len(found) != 1:  # tensors that share memory in this call need not do so in the next
        raise _Unrepeatable
    return found[0]


def recording() -> Recording | None:
    """What the launches of this call are noted in, if they are."""
    return _recording.get()


def repeated(
    memo: dict[str, Any] | None,
    device: torch.device,
    given: Callable[[], Sequence[torch.Tensor]],
    held: Sequence[torch.Tensor | None],
    run: Callable[[], Any],
    places: bytes | None = None,
) -> Any:
    """``run()``, or its launches alone where a call like it was recorded.

    Parameters
    ----------
    memo : dict | None
        What is kept for calls like this one (``Known.memo``); None: nothing is.
    device : device
        Of the tensors.
    given : callable
        Returns every tensor that ``run`` reads or writes and does not make by ``launch.empty``.
    held : sequence of Tensor | None
        Tables of the plan, which outlive the call where ``tables.may_keep`` says so.
    run : callable
        Launches, and returns a tuple of tensors that it made.
    places : bytes, optional
        The addresses of the given tensors, eight bytes each, where they are known.
    """
    if memo is None or _recording.get() is not None:
        return run()
    call = memo.get("launches")
    if call is not None:
        return _again(call, known.addresses(given()) if places is None else places) if _as_recorded(call) else run()
    read = [x for x in held if x is not None]
    if "launches" in memo or not _plain_now(device) or (read and not tables.may_keep(device)):
        return run()
    noted = Recording(given(), read)
    token = _recording.set(noted)
    try:
        results = run()
    finally:
        _recording.reset(token)
    try:
        memo["launches"] = noted.finish(results)
    except _Unrepeatable:
        memo["launches"] = None
    return results


# What the launcher of a compiled kernel is called with, in Triton 3.6 to 3.9, before the arguments of the kernel.
_LAUNCHER = (
    "gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"
)  # fmt: skip


def _launches_as_expected(kernel: Any, compiled: Any) -> bool:
    """Whether this Triton launches a kernel as :func:`_again` does. Another one, and the interpreter, launch in their own way."""
    try:
        compiled.packed_metadata, compiled.function, kernel.src, kernel.pre_run_hooks, _knobs(), driver.active
        parameters = inspect.signature(compiled.run).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return False
    named = tuple(x.name for x in parameters if x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_more = any(x.kind is inspect.Parameter.VAR_POSITIONAL for x in parameters)
    return takes_more and named in (_LAUNCHER[:5], _LAUNCHER)


def _knobs() -> tuple[Any, ...]:
    """Settings that a kernel is compiled with anew where they change."""
    knobs = triton.knobs
    return knobs.runtime.debug, knobs.compilation.instrumentation_mode


def _plain_now(device: torch.device) -> bool:
    """Whether a launch does now what it always does: no other sizes are forced, nobody looks on, its device is the current one."""
    runtime = triton.knobs.runtime
    if configs.overridden() or getattr(runtime, "add_stages_inspection_hook", None) is not None:
        return False
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(runtime, name, None)
        if hook is not None and getattr(hook, "calls", True):
            return False
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def _as_recorded(call: Call) -> bool:
    """Whether the launches would be those that were recorded."""
    if not _plain_now(call.device) or any(x.kernel.src is not x.source or x.kernel.pre_run_hooks for x in call.launches):
        return False
    if call.knobs != _knobs():
        return False
    return call.stream is None or (call.stream == tables.stream_of(call.device) and tables.may_keep(call.device))


def _again(call: Call, places: bytes) -> tuple[torch.Tensor, ...]:
    made = [torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype, device in call.made]
    results = tuple([made[i] for i in call.results])
    if not call.launches:  # nothing to move, and where kernels are interpreted there is no driver
        return results
    places += known.addresses(made)
    starts = memoryview(places).cast("q")
    active = driver.active
    stream = active.get_current_stream(active.get_current_device())
    for _, _, compiled, programs, constants, tensors, where, pairs in call.launches:
        arguments = [*constants]
        for i, slot in tensors:
            arguments[i] = starts[slot]
        if where >= 0:
            arguments[where] = _encoder()(places, pairs)
        compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    return results
