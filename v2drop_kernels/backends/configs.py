"""Sizes of the kernels: what stands in tuned.json for the GPU at hand, by exact key, and else the rules below.

Nothing is tuned at run time. tuned.json is what ``bench/gpu_check.sh --tune`` measured; no GPU stands in it yet, so the rules hold
everywhere. Not one of their numbers has been measured on a GPU either; each says where it comes from. No entry changes which
rows are kept for given scores; a score's last bits follow its tile, which therefore depends on the row alone, never on the batch.
Register and SASS statements were checked by compiling for sm_80, sm_90, sm_100 and sm_120 (tests/compile_only).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret

# The interpreter pays per program, not per element: fewer, taller programs.
_INTERPRETED_ROWS = 64

# Above this the select gets a kernel of its own, unless a table says otherwise: the registers of twice as many keys would set the
# occupancy of the gather.
FUSED_SELECT_MAX = 2048

# Keys that the gather could hold: the counts of its one scan have 16 bits, and 8 keys are left to each of 1024 threads.
FUSED_KEYS_MAX = 8192

# Keys that the select kernel holds in registers to find the threshold (32 per thread at 8 warps); beyond, it reads as many at
# a time from L2. It has its SM to itself and may take all registers, which 16 warps may not: ptxas then spills a few.
SELECT_KEYS_MAX = 8192
SELECT_BLOCK_MAX = 4096

# Selection by many programs (ops/topk/triton_wide.py): thresholds of the first of its three launches; keys of a program, so that
# a segment has at most 128 of them; and the largest chunk, whose counts fit 16 bits.
WIDE_SAMPLES = 128
WIDE_CHUNKS, WIDE_CHUNK_MIN, WIDE_CHUNK_MAX = 128, 2048 if INTERPRETED else 128, 4096

# Which select: a model in microseconds on an H200, from counts of instructions, to be fitted to measurements. One program per
# segment takes its keys at the rate of one SM. Many have three starts, two of which are beside what one program needs too; then
# a time per program where an SM has several; and all keys at the rate of all SMs.
SELECT_ONE_US, SELECT_ONE_US_PER_KEY = 0.5, 1.3e-3
SELECT_WIDE_US, SELECT_WIDE_US_PER_PROGRAM, SELECT_WIDE_US_PER_KEY = 5.0, 1.8, 1.6e-5

# 16-byte loads per thread and tensor that the score kernel issues before it uses the first.
SCORE_STEPS = 4

SMS = 132  # of an H100 or H200

# A piece of a gather: output rows times bytes of each. 8 KB are four 16-byte loads per thread at 4 warps, and what published row
# gathers move per program and step (8 to 14 KB). Wide rows come by 8 x 1 KB. Where at least an eighth of the bytes lies in rows of
# at most 256 bytes (a K/V head of 128 elements of 2 bytes), all come by 32 x 256 bytes, so that these fill their pieces too: the
# lines of an H100 are fetched at full speed down to 256 contiguous bytes.
GATHER_PIECE = 8192
GATHER_ROWS, GATHER_NARROW_ROWS = (_INTERPRETED_ROWS, _INTERPRETED_ROWS) if INTERPRETED else (8, 32)
NARROW_BYTES, NARROW_SHARE = 256, 8

# A gather that selects is one wave: each program repeats the select, and a second wave would pay it again. At most 128 registers
# per thread leave room for 16 warps on each SM.
FUSED_REGISTERS, FUSED_WARPS = 128, 16 * SMS

# 128 tensors (their addresses: 2 KB) stay well under the 4 KB of kernel parameters of CUDA drivers before 12.1.
TENSORS_PER_LAUNCH = 128

# Rank kernel: survivors ranked by one program, and compared with at a time; 32 comparisons per thread at 4 warps.
RANK_BLOCK, RANK_TILE = (1024, 1024) if INTERPRETED else (32, 128)

# Rows of the inverse map that one program fills, and entries of keep that it reads at a time: 16 per thread at 8 warps, so that
# the 16384 kept rows of N = 65536 are four dependent loads. A program reads all of keep, so not too few rows.
INVERT_ROWS = 2048
INVERT_BLOCK = 4096


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 1."""
    return 1 << max(n - 1, 0).bit_length()


TABLE = Path(__file__).with_name("tuned.json")

# A table: device to kind to entries. An entry is its key, then what it sets; n, kept: the power of two that holds the competing
# rows of a segment, or the kept rows of all of them. "gain" may say how many times faster than the rules it was.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "score": (("itemsize", "d"), ("rows", "block_d", "num_warps")),
    "select": (("n",), ("keys", "block", "num_warps")),
    "fused": (("n",), ("num_warps",)),
    "gather": (("kept",), ("rows", "programs", "items")),
    "launches": (("n", "batch"), ("launches",)),
    "wide": (("n", "batch"), ("chunk",)),
}

# 8192 keys in a block: the counts of a scan have 16 bits (select.kept_up_to). The others keep registers within reason.
LIMITS = {
    "itemsize": 4, "d": 1 << 31, "n": 1 << 31, "kept": 1 << 31, "batch": 1 << 31, "rows": 256, "block_d": 8192, "num_warps": 32,
    "keys": 32768, "block": 8192, "programs": 1 << 31, "items": 1 << 31, "launches": 3,
    "chunk": 1 << 31,
}  # fmt: skip
POWERS = {"itemsize", "n", "kept", "rows", "block_d", "num_warps", "keys", "block", "chunk"}

Sizes = Mapping[tuple[Any, ...], tuple[int, ...]]  # (kind, *key) to values


def parse(entries: Mapping[str, Sequence[Mapping[str, Any]]], where: str) -> Sizes:
    """The entries of one device, checked; ``where`` names them in errors."""
    found = {}
    for kind, listed in entries.items():
        if kind == "measured":  # when, with what: for readers
            continue
        if kind not in KINDS:
            raise ValueError(f"{where}: there is no kernel {kind!r}, only {', '.join(KINDS)}")
        keys, values = KINDS[kind]
        for entry in listed:
            if set(entry) - {"gain"} != {*keys, *values}:
                raise ValueError(f"{where}: an entry of {kind} has {', '.join((*keys, *values))}, got {', '.join(entry)}")
            why = _wrong(kind, entry)
            if why:
                raise ValueError(f"{where}: {kind} with {', '.join(f'{k} {entry[k]}' for k in keys)}: {why}")
            key = (kind, *(entry[k] for k in keys))
            found[key] = tuple(entry[v] for v in values)
    return found


def _wrong(kind: str, entry: Mapping[str, Any]) -> str | None:
    """Why no kernel can be launched so."""
    for name in (*KINDS[kind][0], *KINDS[kind][1]):
        value, limit = entry[name], LIMITS[name]
        if type(value) is not int or not 1 <= value <= limit or (name in POWERS and value & (value - 1)):
            return f"{name} must be {'a power of two' if name in POWERS else 'an integer'} from 1 to {limit}, got {value!r}"
    if kind == "select" and entry["keys"] < 32 * entry["num_warps"]:
        return f"keys must be at least one per thread of {entry['num_warps']} warps, got {entry['keys']}"
    if kind == "wide" and entry["chunk"] < 32:
        return f"chunk must be at least 32, got {entry['chunk']}"
    if kind == "launches" and entry["launches"] < 2:
        return "launches must be 2 or 3, got 1"
    if (kind == "fused" or entry.get("launches") == 2) and entry["n"] > FUSED_KEYS_MAX:
        return f"a select inside the gather holds at most {FUSED_KEYS_MAX} keys"
    return None


def read(path: Path, device: str) -> Sizes:
    """The entries of a device in the table at ``path``; none where it, or the file, is missing."""
    if not path.exists():
        return {}
    return parse(json.loads(path.read_text())["devices"].get(device, {}), f"{path.name}: {device}")


@functools.cache
def _shipped() -> Sizes:
    """For the device that is current at the first call: where GPUs differ, only the speed of the others does."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and not INTERPRETED else ""
    return read(TABLE, device)


_forced: contextvars.ContextVar[Sizes | None] = contextvars.ContextVar("v2drop_triton_sizes", default=None)


@contextlib.contextmanager
def override_configs(entries: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[None]:
    """Launch with these entries and no others inside a ``with`` block, for tests and for tuning."""
    token = _forced.set(parse(entries, "entries"))
    try:
        yield
    finally:
        _forced.reset(token)


def overridden() -> bool:
    """Whether a ``with`` block forces sizes."""
    return _forced.get() is not None


def _entry(*key: Any) -> tuple[int, ...] | None:
    forced = _forced.get()
    return (_shipped() if forced is None else forced).get(key)


def score_config(d: int, itemsize: int) -> tuple[int, int, int]:
    """``(ROWS, BLOCK_D, num_warps)``: BLOCK_D columns are one 16-byte load per thread and tensor.

    As many warps share a row as leave at most SCORE_STEPS such loads each, quack's threads per row (32 up to D = 3072, 128 up to
    16384) within a factor of two; four warps are the least, so short rows come several to a program.
    """
    if tuned := _entry("score", itemsize, d):
        return tuned  # type: ignore[return-value]
    warp = 32 * 16 // itemsize
    warps_per_row = min(next_power_of_2(-(-d // (SCORE_STEPS * warp))), 16)
    num_warps = max(4, warps_per_row)
    block_d = min(warp * warps_per_row, next_power_of_2(d))
    rows = num_warps * warp // block_d
    return (max(rows, _INTERPRETED_ROWS) if INTERPRETED else min(rows, 16)), block_d, num_warps


def select_blocks(n: int, lean: bool) -> tuple[int, int, int]:
    """``(KEYS, BLOCK, num_warps)`` of the select kernel: keys held (or read) at a time, keys placed at a time.

    ``lean``: with a mask, or where n is only a bound and most segments are far shorter.
    """
    if lean and n > SELECT_BLOCK_MAX:
        return SELECT_BLOCK_MAX, SELECT_BLOCK_MAX // 2, 8
    if tuned := _entry("select", next_power_of_2(n)):
        return tuned  # type: ignore[return-value]
    keys = min(max(next_power_of_2(n), 1024), SELECT_KEYS_MAX)
    block = min(keys, SELECT_BLOCK_MAX)
    return keys, block, min(block // 256, 8)


def wide_chunk(n: int, groups: int, longest: int) -> int:
    """Keys of one program of the select by many programs per segment; 0 where one program per segment is faster.

    ``n``: competing rows of a segment; ``longest``: what they can be at most, where only the device has the lengths. One program
    per segment takes as long for a batch as for one segment, while there are SMs; many programs share all SMs among the segments.
    """
    if tuned := _entry("wide", next_power_of_2(n), groups):
        return tuned[0] if tuned[0] <= WIDE_CHUNK_MAX else 0
    chunk = min(max(next_power_of_2(-(-longest // WIDE_CHUNKS)), WIDE_CHUNK_MIN), WIDE_CHUNK_MAX)
    while -(-n // chunk) * groups > 2 * SMS and chunk < WIDE_CHUNK_MAX:
        chunk *= 2
    many = SELECT_WIDE_US + SELECT_WIDE_US_PER_PROGRAM * max(-(-n // chunk) * groups / SMS, 1) + SELECT_WIDE_US_PER_KEY * n * groups
    one = (SELECT_ONE_US + SELECT_ONE_US_PER_KEY * n) * -(-groups // SMS)
    return chunk if n > FUSED_SELECT_MAX and many < one else 0


def fused_select_block(n: int, classes: int = 1) -> tuple[int, int]:
    """``(BLOCK, num_warps)`` of the select inside a gather of so many classes of tensors: 8 keys per thread, or 4.

    With 8 of more than 1024 keys, a gather of three and more classes needs more than 128 registers, and ptxas spills to come down
    to them.
    """
    block = min(max(next_power_of_2(n), 512), FUSED_KEYS_MAX)
    tuned = _entry("fused", next_power_of_2(n))
    return block, tuned[0] if tuned else min(max(4, block // (128 if block > 1024 and classes > 2 else 256)), 32)


def fuses_select(n: int, batch: int) -> bool:
    """Whether a drop of at most ``n`` competing rows a segment selects inside its gather: two launches, not three or five."""
    tuned = _entry("launches", next_power_of_2(n), batch)
    return tuned[0] == 2 if tuned else n <= FUSED_SELECT_MAX


def gather_cols(width: int, rows: int = GATHER_ROWS) -> int:
    """Elements, of at most 8 bytes, of one piece of a row, where a piece has ``rows`` rows."""
    return min(next_power_of_2(width), 1024 if INTERPRETED else max(GATHER_PIECE // (8 * rows), 1))


def gather_rows(batch: int, out_rows: int, row_bytes: Sequence[tuple[int, int]] = (), most: int = 0) -> int:
    """Output rows of one piece.

    ``row_bytes``: per class of tensors all bytes of one output row, and those that are contiguous. ``most``: programs of one
    wave, if the gather selects its rows.
    """
    if tuned := _entry("gather", next_power_of_2(batch * out_rows)):
        return tuned[0]
    narrow = sum(total for total, width in row_bytes if width <= NARROW_BYTES)
    if narrow * NARROW_SHARE >= sum(total for total, _ in row_bytes) > 0:
        return GATHER_NARROW_ROWS
    rows = GATHER_ROWS
    while most and rows < GATHER_NARROW_ROWS and batch * -(-out_rows // rows) > most:
        rows *= 2
    return rows


def gather_items(items: int, tiles: int, kept: int = 0, most: int = 0) -> int:
    """Pieces that one program copies one after the other, of ``items`` for each of ``tiles``; ``kept``: all output rows.

    Enough programs first (1024: eight per SM on 132 SMs), then up to eight pieces each, which share one index load and the
    addresses of a tensor. With the select at most ``most`` programs: as many pieces as that takes.
    """
    tuned = _entry("gather", next_power_of_2(kept)) if kept else None
    if most and tuned is None and not INTERPRETED:
        return max(-(-items // max(most // max(tiles, 1), 1)), 1)
    _, programs, longest = tuned or (0, *((1, 32) if INTERPRETED else (1024, 8)))
    return min(max(items * tiles // programs, 1), longest)


def inplace_tile(width: int) -> tuple[int, int]:
    """``(ROWS, COLS)`` of one step of the in-place kernel: 16 KB, so that a step hides its own latency."""
    cols = min(next_power_of_2(width), 128)
    return (_INTERPRETED_ROWS if INTERPRETED else min(max(2048 // cols, 16), 256)), cols
