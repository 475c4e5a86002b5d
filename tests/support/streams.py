"""What a GPU's driver forbids, checked without one: copies from host memory, and captured launches that read memory of others.

``NoHostCopies`` runs calls on tensors of the ``meta`` device, which stands for a GPU: reading one on the host raises by itself, and
what would copy host memory to it is reported. ``Capture`` records the launches of a call on CPU tensors as a CUDA graph would, by
address, and checks who owns that memory.
"""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# These read a number in host memory as an argument of their kernel.
_TAKES_SCALARS = {"fill_", "add", "add_", "sub", "mul", "div", "where", "masked_fill", "masked_fill_", "scalar_tensor", "full_like"}


def take_for_eager(patch: pytest.MonkeyPatch) -> None:
    """Let calls run as eager ones do, though a mode of torch looks on or the tensors have no memory."""
    for name, module in list(sys.modules.items()):
        if name.startswith("v2drop_kernels") and hasattr(module, "is_traced"):
            patch.setattr(module, "is_traced", lambda x: False)


class HostCopy(AssertionError):
    """A copy from host memory, which synchronises where that memory is pageable."""


def _where() -> str:
    frames = [frame for frame in traceback.extract_stack() if "v2drop_kernels" in frame.filename]
    return "".join(traceback.format_list(frames[-3:]))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        touched = given + [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if any(x.is_meta for x in touched):
            for x in given:
                if not x.is_meta and (x.dim() or func.overloadpacket.__name__ not in _TAKES_SCALARS):
                    raise HostCopy(f"{func} reads {list(x.shape)} from host memory:\n{_where()}")
        return out


class _Function(TorchFunctionMode):
    """What CUDA tensors do otherwise than meta tensors: assignments of numbers copy them, unless they fill a slice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__setitem__ and args[0].is_meta and not isinstance(args[2], torch.Tensor):
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(key, torch.Tensor | list) for key in keys):
                raise HostCopy(f"an assignment of a number through indices copies it:\n{_where()}")
            if args[0][args[1]].dim() == 0:
                raise HostCopy(f"an assignment of a number to one element copies it:\n{_where()}")
        if func is torch.Tensor.__getitem__ and args[0].is_meta:
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(key, list) for key in keys):
                raise HostCopy(f"an index that is a list is copied:\n{_where()}")
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and out.is_meta:
            raise HostCopy(f"{func.__name__} makes a tensor on the host and copies it:\n{_where()}")
        return out


class NoHostCopies:
    """Raise HostCopy where a call on meta tensors would copy from host memory to a GPU."""

    def __init__(self) -> None:
        self.modes = _Function(), _Dispatch()

    def __enter__(self) -> None:
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


# Allocations and views; what else a captured call does must be a launch of ours.
_NO_KERNEL = {
    "empty", "new_empty", "empty_strided", "empty_like", "view", "slice", "split", "split_with_sizes", "unsafe_split_with_sizes",
    "squeeze", "unsqueeze", "detach", "alias", "expand", "select", "as_strided", "_unsafe_view", "unbind", "permute",
    "lift_fresh",  # of host memory
}  # fmt: skip


class Pool(TorchDispatchMode):
    """The memory that a graph owns: what is allocated inside this block, for as long as the pool lives."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ in _NO_KERNEL, f"{func} would be captured as well, but is not recorded:\n{_where()}"
        out = func(*args, **(kwargs or {}))
        self.tensors += [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


class Dangling(AssertionError):
    """A captured launch uses memory that has been given back."""


class Address:
    """A tensor as a launch has it: an address, which keeps nothing alive."""

    def __init__(self, x: torch.Tensor) -> None:
        self.owner, self.nbytes, self.dtype = StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes(), x.dtype
        self.start, self.at = x.untyped_storage().data_ptr(), (x.shape, x.stride(), x.storage_offset())

    def read(self) -> torch.Tensor:
        """The memory at the address, if its owner still has it."""
        if self.owner.expired():
            raise Dangling(f"a tensor of shape {list(self.at[0])} is gone")
        if not self.nbytes:
            return torch.empty(self.at[0], dtype=self.dtype)
        flat = torch.frombuffer((ctypes.c_char * self.nbytes).from_address(self.start), dtype=torch.uint8)
        return flat.view(self.dtype).as_strided(*self.at)


class TritonGraph:
    """The launches of Triton inside :meth:`capture`, to be made again; they are not made while they are captured.

    Tables go through the upload kernel, as on a GPU. With ``skipping``, launches outside the capture are not made.
    """

    skipping = False

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from v2drop_kernels.backends import launch, tables
        from v2drop_kernels.ops import host_ints

        self.launch, self.pool, self.capturing, self.start = launch, Pool(), False, launch.start
        self.launches: list[tuple[Any, int, list[Any], dict[str, Any]]] = []
        take_for_eager(patch)
        patch.setattr(launch, "start", self._start)
        patch.setattr(launch, "tables_of", lambda plan, device: tables.tables_of(plan, device, launch.upload))
        patch.setattr(host_ints, "_upload_for", lambda kind: launch.upload)
        patch.setattr(tables, "is_capturing", lambda device: self.capturing)

    def _start(self, kernel: Any, programs: int, device: torch.device, *args: Any, **meta: Any) -> None:
        if self.capturing and programs:
            self.launches.append((kernel, programs, [Address(x) if isinstance(x, torch.Tensor) else x for x in args], meta))
        elif not self.capturing and not self.skipping:
            self.start(kernel, programs, device, *args, **meta)

    def capture(self, call: Callable[[], Any]) -> Any:
        """The result of the call, which :meth:`replay` writes."""
        self.capturing = True
        with self.pool:
            result = call()
        self.capturing = False
        return result

    def replay(self) -> None:
        """Make the launches again."""
        for kernel, programs, args, meta in self.launches:
            given = [x.read() if isinstance(x, Address) else x for x in args]
            kernel[(programs,)](*given, **self.launch.options(meta))
