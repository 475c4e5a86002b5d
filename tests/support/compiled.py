"""The Triton kernels, compiled for real targets without a GPU, exactly as their launchers would.

A test calls a public function of the backend on CPU tensors with ``launch.start`` replaced by a recorder: nothing runs, and what
was to be launched (arguments, constants, warps) is then compiled for the target. So shapes, alignment and specialisation are those
of production. Runs in a process of its own without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from .sass import accesses_before_wait

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("compiles for real targets: run without TRITON_INTERPRET", allow_module_level=True)

from v2drop_kernels.backends import launch  # noqa: E402

SM80, SM90, SM100, SM120 = (GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120))
GFX942 = GPUTarget("hip", "gfx942", 64)
TARGETS = {"sm80": SM80, "sm90": SM90, "sm100": SM100, "sm120": SM120, "gfx942": GFX942}
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


class Launch(NamedTuple):
    kernel: Any
    programs: int
    args: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removeprefix("_").removesuffix("_kernel")


class Compiled(NamedTuple):
    """What the target's assembler made: for CUDA the registers, bytes of stack and SASS as well."""

    asm: dict[str, Any]
    registers: int = 0
    stack: int = 0
    sass: str = ""

    def accesses(self, *kinds: str) -> list[str]:
        """Widths of the global or local accesses, e.g. ``accesses("LDG")`` -> ``["128", "32"]``."""
        found = re.findall(rf"\b(?:{'|'.join(kinds)})\.(\S+)", self.sass)
        return [(re.findall(r"\b(?:U8|S8|U16|S16|64|128)\b", x) or ["32"])[-1].lstrip("US") for x in found]


@contextlib.contextmanager
def recorded(target: GPUTarget):
    """The launches that the backend would make on ``target``."""
    launches: list[Launch] = []

    def record(kernel, programs, device, *args, **meta):
        if programs:
            launches.append(Launch(kernel, programs, args, meta))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "start", record)
        patch.setattr(launch, "is_nvidia", lambda device: target.backend == "cuda")
        patch.setattr(launch, "has_pdl", lambda device: target.backend == "cuda" and target.arch >= 90)
        yield launches


def specialize(target: GPUTarget, item: Launch) -> tuple[ASTSource, Any]:
    """What the launch would compile, and with which options, as Triton's own launcher derives them from the arguments."""
    meta = launch.options(item.meta)
    backend = make_backend(target)
    binder = create_function_from_signature(item.kernel.signature, item.kernel.params, backend)
    bound, specialization, rest = binder(*item.args, **meta, debug=False)
    options, signature, constants, attributes = item.kernel._pack_args(backend, meta, bound, specialization, rest)
    return ASTSource(item.kernel, signature, constants, attributes), options


def compile_for(target: GPUTarget, item: Launch) -> Compiled:
    """Compile, and check what holds for every kernel: no spills, no local memory, and no access to memory before it waits."""
    source, options = specialize(target, item)
    asm = triton.compile(source, target=target, options=options.__dict__).asm
    if target.backend != "cuda":
        # The AMD back end states it in the kernel's metadata.
        assert re.search(r"\.vgpr_spill_count: +0\b", asm["amdgcn"])
        return Compiled(asm)
    sass = _disassemble(asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", sass).groups())
    assert stack == 0, (registers, stack, len(re.findall(r"\b(?:LDL|STL)\b", sass)))
    assert not re.search(r"\b(LDL|STL)\b", sass)
    # A launch that may start early waits for its predecessor, before it touches what that may have written; no other waits.
    waits = bool(launch.options(item.meta).get("launch_pdl"))
    assert accesses_before_wait(sass) == ([] if waits else None), item.name
    return Compiled(asm, registers, stack, sass)


def _disassemble(cubin: bytes) -> str:
    """What the kernel uses, and its instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", path]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def hidden(n: int, d: int = 4096, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(1, n, d, dtype=dtype)
