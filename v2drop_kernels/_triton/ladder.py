"""Sizes of the kernels. Not one of these numbers has been measured on a GPU yet; each says where it comes from.

Register and SASS statements were checked by compiling for sm_80, sm_90, sm_100 and sm_120 (tests/compile_only).
"""

from __future__ import annotations

import triton

INTERPRETED = triton.knobs.runtime.interpret

# The interpreter pays per program, not per element: fewer, taller programs.
_INTERPRETED_ROWS = 64

# Above this the select gets a kernel of its own: the limit for two launches, and the registers of twice as many keys
# would set the occupancy of the gather.
FUSED_SELECT_MAX = 2048

# Keys that the select kernel holds in registers to find the threshold (16 per thread at 16 warps); beyond, it reads as many at
# a time from L2. All else goes by 8 keys per thread: more would spill.
SELECT_KEYS_MAX = 8192
SELECT_BLOCK_MAX = 4096

# 16-byte loads per thread and tensor that the score kernel issues before it uses the first.
SCORE_STEPS = 4

# Output rows of one gather program: eight pieces of 1 KB are four 16-byte loads per thread at 4 warps. 16 rows compile to 120
# registers instead of 72, for the same bytes in flight per SM.
GATHER_ROWS = _INTERPRETED_ROWS if INTERPRETED else 8

# Keeping h_cur in L2 for the gather pays only where it fits beside what else is live: half of the 60 MB of an H100/H200.
L2_RESIDENT_BYTES = 30 << 20

# 128 tensors (their addresses: 2 KB) stay well under the 4 KB of kernel parameters of CUDA drivers before 12.1.
TENSORS_PER_LAUNCH = 128

# Rank kernel: survivors ranked by one program, and compared with at a time; 32 comparisons per thread at 4 warps.
RANK_BLOCK, RANK_TILE = (1024, 1024) if INTERPRETED else (32, 128)

# Rows of the inverse map that one program fills; a program reads all of keep, so not too few.
INVERT_ROWS = 8192
INVERT_BLOCK = 1024


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 1."""
    return 1 << max(n - 1, 0).bit_length()


def score_tile(d: int, itemsize: int) -> tuple[int, int, int]:
    """``(ROWS, BLOCK_D, num_warps)``: BLOCK_D columns are one 16-byte load per thread and tensor.

    As many warps share a row as leave at most SCORE_STEPS such loads each, quack's threads per row (32 up to D = 3072, 128 up to
    16384) within a factor of two; four warps are the least, so short rows come several to a program.
    """
    warp = 32 * 16 // itemsize
    warps_per_row = min(next_power_of_2(-(-d // (SCORE_STEPS * warp))), 16)
    num_warps = max(4, warps_per_row)
    block_d = min(warp * warps_per_row, next_power_of_2(d))
    rows = num_warps * warp // block_d
    return (max(rows, _INTERPRETED_ROWS) if INTERPRETED else min(rows, 16)), block_d, num_warps


def select_blocks(n: int, lean: bool) -> tuple[int, int, int]:
    """``(KEYS, BLOCK, num_warps)`` of the select kernel: keys held (or read) at a time, keys placed at a time.

    ``lean``: with a mask, or where n is only a bound and most stretches are far shorter.
    """
    if lean and n > SELECT_BLOCK_MAX:
        return SELECT_BLOCK_MAX, SELECT_BLOCK_MAX // 2, 8
    keys = min(max(next_power_of_2(n), 1024), SELECT_KEYS_MAX)
    block = min(keys, SELECT_BLOCK_MAX)
    return keys, block, block // 256


def fused_select_block(n: int, masked: bool) -> tuple[int, int]:
    """``(BLOCK, num_warps)`` of the select inside the gather kernel, in three variants: 8 keys per thread, 4 with a mask."""
    block = min(max(next_power_of_2(n), 512), FUSED_SELECT_MAX)
    return block, max(4, block // (128 if masked else 256))


def gather_cols(width: int) -> int:
    """Elements, of at most 8 bytes, of one piece of a row: 1 KB pieces keep full speed (512 B per warp did, on an H100)."""
    return min(next_power_of_2(width), 1024 if INTERPRETED else 128)


def gather_items(copies: int) -> int:
    """Pieces that one program copies one after the other, given the pieces of the launch.

    Enough programs first (1024: eight per SM on 132 SMs), then up to eight pieces each, which share one index load (and one
    select, where fused): 8 rows of 14 KB per program were the published optimum of a row gather on an H200.
    """
    return 32 if INTERPRETED else min(max(copies // 1024, 1), 8)


def inplace_tile(width: int) -> tuple[int, int]:
    """``(ROWS, COLS)`` of one step of the in-place kernel: 16 KB, so that a step hides its own latency."""
    cols = min(next_power_of_2(width), 128)
    return (_INTERPRETED_ROWS if INTERPRETED else min(max(2048 // cols, 16), 256)), cols
