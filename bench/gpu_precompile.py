"""A second process that compiles the Triton kernels of later steps while earlier ones are measured.

It calls the ops with uninitialised tensors of the true shapes and has Triton compile without launching, so that it fills Triton's
cache on disk and leaves the GPU's multiprocessors alone. ``python bench/gpu_precompile.py`` is that process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Precompiler:
    """The process, from the side of the check that starts it."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "logs" / "precompile.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, folder: Path) -> None:
        """Start it, once."""
        if self._process is None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, str(HERE / "gpu_precompile.py")], stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip

    def pause(self) -> None:
        """Let it rest while the host is timed."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def _signal(self, which: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, which)  # this group is the process that was started above


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Inside, Triton compiles what is called and launches nothing."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool = False, **options: Any) -> Any:
        return run(self, *args, warmup=True, **options)

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


def calls(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """By name, a call for each kind of problem of the registry, in the order of the steps."""
    import gpu_inputs as inputs
    import torch
    from registry import Case

    import v2drop_kernels as vk

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def drop(case: Any, **given: Any) -> Any:
        h = empty(case.batch, case.n, case.d, dtype=case.dtype)
        return vk.drop_tokens(h, h, case.k, backend="triton", **given)

    def attention(batch: int, n: int, heads: int, kv_heads: int) -> Any:
        rows = torch.empty(batch, 1, dtype=torch.int64, device=device)
        return vk.attention_score(empty(batch, heads, 1, 128), empty(batch, kv_heads, n, 128), query_rows=rows, backend="triton")

    def with_extras(case: Any, layers: int) -> None:
        b, n = case.batch, case.n
        ids, mask = torch.empty(3, b, n, dtype=torch.int64, device=device), torch.empty(b, n, dtype=torch.bool, device=device)
        drop(case, position_ids=ids, attention_mask=mask)
        drop(case, kv=[empty(b, 4, n, 128) for _ in range(2 * layers)])

    def gathered(heads: int, layers: int) -> Any:
        keep = torch.empty(1, 4096, dtype=torch.int64, device=device)
        if not heads:
            return vk.compact(keep, empty(1, 16384, 4096), backend="triton")
        return vk.compact(keep, empty(1, 16384, 1), kv=[empty(1, heads, 16384, 128) for _ in range(2 * layers)], backend="triton")

    def backward(n: int) -> Any:
        h = empty(1, n, 4096).requires_grad_()
        keep = torch.empty(1, n // 4, dtype=torch.int64, device=device)
        out = vk.compact(keep, h, backend="triton").hidden
        return torch.autograd.grad(out, h, torch.empty_like(out))

    for case in (inputs.VIDEO, inputs.VIDEOS, inputs.LONG):
        yield f"drop {case}", lambda case=case: drop(case)
    for n in (6272, 65536, 576):
        for b in (1, 8, 32):
            yield (
                f"select B={b} N={n}",
                lambda b=b, n=n: vk.segmented_topk(empty(b, n, dtype=torch.float32), n // 4, backend="triton"),
            )
    for layers in (4, 32, 1):
        yield f"{layers} layers of K and V", lambda layers=layers: with_extras(inputs.VIDEO, layers)
    yield "gather of K and V", lambda: gathered(8, 4)
    yield "gather", lambda: gathered(0, 0)
    for n in (16384, 65536):
        yield f"backward N={n}", lambda n=n: backward(n)
    for d in (4096, 2560, 3584, 5120, 8192):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            case = Case(1, -(-256_000_000 // (2 * d * dtype.itemsize)), d, inputs.QUARTER, dtype)
            yield (
                f"score {case}",
                lambda c=case: vk.variation_score(
                    empty(1, c.n, c.d, dtype=c.dtype), empty(1, c.n, c.d, dtype=c.dtype), backend="triton"
                ),
            )
    for heads, kv_heads in ((28, 4), (32, 32)):
        for b, n in ((1, 65536), (1, 576), (1, 6272), (8, 6272)):
            yield f"attention {heads}/{kv_heads} B={b} N={n}", lambda a=(b, n, heads, kv_heads): attention(*a)
    for case in (
        Case(32, 576, 4096, inputs.QUARTER),
        *(Case(1, 6272, d, inputs.QUARTER) for d in (2560, 5120, 8192)),
    ):
        yield f"drop {case}", lambda case=case: drop(case)


def main(device: str = "cuda") -> int:
    """Compile everything; what cannot be compiled here is a line of the log, and the measurement says what is wrong with it."""
    import time

    import torch

    with without_launches():
        for name, call in calls(device):
            start = time.monotonic()
            try:
                call()
                print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
