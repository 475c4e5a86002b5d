"""Count what the compiled kernels consist of: ``python bench/gpu_counts.py`` writes gpu_counts.json for the performance model.

For every problem of the GPU check, the launches that the Triton backend makes on sm_90, compiled as its launcher would, and every
kernel of the CUDA library that a drop starts, as nvcc compiles it for sm_90: registers, shared memory, and instructions of every
loop by pipe. No GPU is needed. ``--check`` compares with the file instead and exits with 1 where a kernel has changed.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parent / "tools")]

import gpu_sass  # noqa: E402
import sass_count  # noqa: E402
import torch  # noqa: E402
from gpu_problems import ragged_lengths  # noqa: E402
from gpu_registry import Group, steps  # noqa: E402
from registry import Case  # noqa: E402

COUNTS = HERE / "gpu_counts.json"
CORE = HERE.parent / "csrc" / "core"
SOURCES = ("score_cuda.cu", "select_cuda.cu", "select_segments_cuda.cu", "compact_cuda.cu", "drop_cuda.cu")
CUDA_KERNELS = ("score_kernel", "select", "gather_kernel", "drop_kernel", "invert_kernel")
# Metadata of a launch that says how much one program does.
META = (
    "ROWS", "BLOCK", "BLOCK_D", "STEPS", "KEYS", "DEPTH", "CHUNK", "CHUNKED", "SAMPLES", "LANES", "SELECT", "num_warps", "WAITS",
    "TRIGGERS", "TILE",
)  # fmt: skip


def problems() -> Iterator[tuple[str, Callable[[], Any]]]:
    """By key (op, shape and what is added), a call of the Triton backend on tensors that nobody fills."""
    seen = set()
    for step in steps().values():
        for group in step:
            if isinstance(group, Group):
                for key, call in _of(group):
                    if key not in seen:
                        seen.add(key)
                        yield key, call


def _of(group: Group) -> Iterator[tuple[str, Callable[[], Any]]]:
    case, build = group.case, group.build
    kind = getattr(build, "func", build).__name__
    options = getattr(build, "keywords", {})
    if kind in ("drop", "compiled_drop"):
        yield f"drop {case}", functools.partial(_drop, case)
    elif kind == "extras":
        layers = options["layers"]
        yield f"drop {case}", functools.partial(_drop, case)
        yield f"drop {case} @ids", functools.partial(_drop, case, ids=True)
        yield f"drop {case} @kv{layers}", functools.partial(_drop, case, layers=layers)
    elif kind == "ragged":
        yield "ragged @dense", functools.partial(_drop, case._replace(n=sum(ragged_lengths(case)) // case.batch))
        yield "ragged @ragged", functools.partial(_ragged, case)
    elif kind == "select":
        yield f"select {case}", functools.partial(_select, case)
    elif kind == "score":
        yield f"score {case}", functools.partial(_score, case)
    elif kind == "gather":
        yield f"compact {case} heads={options['heads']}", functools.partial(_gather, case, **options)
    elif kind == "backward":
        yield f"backward {case}", functools.partial(_backward, case)


def _hidden(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _drop(case: Case, ids: bool = False, layers: int = 0) -> None:
    from v2drop_kernels.backends.requests import DropRequest, Source
    from v2drop_kernels.core import calls
    from v2drop_kernels.core.types import GatherSpec
    from v2drop_kernels.ops.drop_tokens.triton import drop_tokens

    b, n = case.batch, case.n
    h = _hidden(b, n, case.d, dtype=case.dtype)
    gathers = [GatherSpec(h, 0, 1)]
    if ids:
        gathers.append(GatherSpec(torch.empty(3, b, n, dtype=torch.int64), 1, 2))
        gathers.append(GatherSpec(torch.empty(b, n, dtype=torch.bool), 0, 1))
    gathers += [GatherSpec(_hidden(b, 4, n, 128), 0, 2) for _ in range(2 * layers)]
    plan = calls.resolve("drop", h, case.k, None, None, traced=False).plan
    drop_tokens(DropRequest(Source(None, h, h), plan, None, gathers))


def _ragged(case: Case) -> None:
    import v2drop_kernels as vk
    from v2drop_kernels.backends.requests import DropRequest, Source
    from v2drop_kernels.core import calls
    from v2drop_kernels.core.types import GatherSpec
    from v2drop_kernels.ops.drop_tokens.triton import drop_tokens

    lengths = ragged_lengths(case)
    h = _hidden(sum(lengths), case.d, dtype=case.dtype)
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    plan = calls.resolve("drop", h, [vk.n_keep(n, case.ratio) for n in lengths], None, offsets, traced=False).plan
    drop_tokens(DropRequest(Source(None, h, h), plan, None, [GatherSpec(h, -1, 0)]))


def _select(case: Case) -> None:
    from v2drop_kernels.backends.requests import Source, TopKRequest
    from v2drop_kernels.core import calls
    from v2drop_kernels.ops.topk.triton import topk

    scores = torch.empty(case.batch, case.n)
    plan = calls.resolve("topk", scores, case.k, None, None, traced=False).plan
    topk(TopKRequest(Source(scores, None, None), plan, None, "position"))


def _score(case: Case) -> None:
    from v2drop_kernels.backends.requests import Source
    from v2drop_kernels.ops.variation_score.triton import variation_score

    h = _hidden(case.batch, case.n, case.d, dtype=case.dtype)
    variation_score(Source(None, h, h))


def _gather(case: Case, heads: int, layers: int) -> None:
    from v2drop_kernels.backends.requests import CompactRequest
    from v2drop_kernels.core.types import GatherSpec
    from v2drop_kernels.ops.compact.triton import compact

    b, n = case.batch, case.n
    keep = torch.empty(b, case.k, dtype=torch.int64)
    if heads:
        gathers = [GatherSpec(_hidden(b, n, 1), 0, 1), *(GatherSpec(_hidden(b, heads, n, 128), 0, 2) for _ in range(2 * layers))]
    else:
        gathers = [GatherSpec(_hidden(b, n, case.d), 0, 1)]
    compact(CompactRequest(keep, gathers))


def _backward(case: Case) -> None:
    from v2drop_kernels.backends.requests import CompactBackwardRequest
    from v2drop_kernels.core.types import GatherSpec
    from v2drop_kernels.ops.compact.triton import compact_backward

    keep = torch.empty(case.batch, case.k, dtype=torch.int64)
    compact_backward(CompactBackwardRequest(keep, [GatherSpec(_hidden(case.batch, case.k, case.d), 0, 1)], case.n))


def triton_counts() -> dict[str, Any]:
    """``kernels`` by an id, and the launches of every problem, which name them."""
    import triton
    from support import compiled

    kernels: dict[str, Any] = {}
    ids: dict[str, str] = {}
    launches: dict[str, list[dict[str, Any]]] = {}
    for key, call in problems():
        with compiled.recorded(compiled.SM90) as found:
            call()
        launches[key] = []
        for item in found:
            source, options = compiled.specialize(compiled.SM90, item)
            which = f"{source.hash()} {options.hash()}"
            if which not in ids:
                made = triton.compile(source, target=compiled.SM90, options=options.__dict__)
                ids[which] = f"{item.name} {len(ids)}"
                kernel = next(gpu_sass.kernels_of(made.asm["cubin"]))
                kernels[ids[which]] = gpu_sass.as_json(kernel._replace(shared=max(kernel.shared, made.metadata.shared)))
            meta = {name: int(item.meta[name]) for name in META if name in item.meta}
            launches[key].append({"kernel": ids[which], "name": item.name, "programs": item.programs, "meta": meta})
        print(f"{key}: {', '.join(f'{x.name} {x.programs}' for x in found)}", file=sys.stderr, flush=True)
    return {"kernels": kernels, "launches": launches}


def cuda_counts() -> dict[str, Any]:
    """The kernels that the model names, by their demangled names without arguments."""
    found = {}
    for source in SOURCES:
        for kernel in gpu_sass.kernels_of(sass_count.compile_source(CORE / source)):
            name = gpu_sass.demangled(kernel.name)
            if any(part in name for part in CUDA_KERNELS):
                found[name] = gpu_sass.as_json(kernel._replace(name=name))
    return found


def as_text(counts: dict[str, Any]) -> str:
    """JSON with a kernel, or a problem of the Triton backend, on a line."""
    parts = []
    for name, value in sorted(counts.items()):
        if isinstance(value, dict):
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value[key], sort_keys=True)}" for key in sorted(value))
            parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    """Write the counts, or compare with them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with gpu_counts.json, and write nothing")
    options = parser.parse_args()
    import triton

    counts = {
        "about": "Written by bench/gpu_counts.py; kernels compiled for sm_90, instructions of one warp.",
        "versions": {"triton": triton.__version__, "torch": torch.__version__.partition("+")[0]},
        "triton": triton_counts(), "cuda": cuda_counts(),
    }  # fmt: skip
    text = as_text(counts)
    if options.check:
        same = COUNTS.exists() and json.loads(COUNTS.read_text()) == json.loads(text)
        print("equal" if same else "the kernels have changed: run python bench/gpu_counts.py", file=sys.stderr)
        return int(not same)
    COUNTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
