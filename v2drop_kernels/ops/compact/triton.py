"""Moving rows: one launch gathers every tensor of a call, of whatever layout and element type, as bytes.

A tensor is, per batch entry, *planes* of rows of *width* contiguous bytes: an M-RoPE axis or a K/V head is a plane, and so is
each element where the innermost dimension is not contiguous. Tensors of equal geometry form a class, which is all the kernel
needs of them besides two addresses each. An output row reads its source row from ``keep``; a negative or too large index is
an empty row. The backward pass is the same gather through the inverse of ``keep``: no atomics, no zero-fill before.

The file is longer than others: three launches (gather, move to the front, invert) share the code that walks segments, decodes a
class and copies a row, and Triton inlines it, so that a change of one must be read beside the others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ...backends import configs, launch, relaunch
from ...backends.launch import COL_DST_START, TABLE_FIELDS
from ...backends.launch import decode as _decode
from ...backends.launch import plain as _plain
from ...backends.requests import CompactBackwardRequest, CompactRequest, KnownGathers
from ...backends.tables import Tables
from ...core.plan import Plan
from ...core.types import GatherSpec
from ..topk.triton_keys import EXCLUDED, kept_up_to, threshold
from ..topk.triton_segments import segment
from ..variation_score.triton import segment_of

_SURVIVOR = tl.constexpr(-2)  # a row whose source stands in keep


@triton.constexpr_function
def _integer(nbytes):
    return {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}[nbytes]


@triton.jit
def _pick(addresses, which, FIRST: tl.constexpr, COUNT: tl.constexpr, BYTES: tl.constexpr):
    """Source and destination of tensor ``which`` of a class.

    Kernel parameters cannot be indexed: halves by branches, which all threads take alike, then selects among the last four.
    """
    if COUNT > 4:
        if which < COUNT // 2:
            src, dst = _pick(addresses, which, FIRST, COUNT // 2, BYTES)
        else:
            src, dst = _pick(addresses, which - COUNT // 2, FIRST + COUNT // 2, COUNT - COUNT // 2, BYTES)
        return src, dst
    else:
        src = addresses[FIRST][0]
        dst = addresses[FIRST][1]
        for i in tl.static_range(1, COUNT):
            src = tl.where(which == i, addresses[FIRST + i][0], src)
            dst = tl.where(which == i, addresses[FIRST + i][1], dst)
        return _decode(src).to(tl.pointer_type(_integer(BYTES))), _decode(dst).to(tl.pointer_type(_integer(BYTES)))


@triton.jit
def _select_rows(
    keep, row, first_row, b, all_keys, table, n_prefix, n, n_suffix, k, groups, rows, out_rows,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SEARCH_STEPS: tl.constexpr,
):  # fmt: skip
    """Source rows (-1: empty) of the output rows ``row`` of batch entry ``b``; they are written to ``keep`` as well.

    Walks the segments that make these rows. The lane that holds a survivor knows its output row, not the other way round, so
    survivors reach the rows through ``keep``: all programs of a tile write the same values, and each reads its own.
    """
    source = tl.full([ROWS], -1, tl.int64)
    lanes = tl.arange(0, BLOCK)
    first = b * out_rows + first_row
    end = b * out_rows + tl.minimum(first_row + ROWS, out_rows)
    flat = b * out_rows + row  # [ROWS]
    if table is None:
        g = b
    else:
        g = segment_of(table + COL_DST_START, first, groups, TABLE_FIELDS, SEARCH_STEPS)
    done = first
    while done < end:
        src_start, g_prefix, g_n, g_suffix, g_k, dst_start, pad_before, pad_after = segment(
            g, table, rows, out_rows, n_prefix, n, n_suffix, k
        )
        position = src_start - b * rows + g_prefix  # of the first competing row
        keys = tl.load(all_keys + (b * rows + position) + lanes, mask=lanes < g_n, other=EXCLUDED)
        t, quota, _ = threshold(keys, g_k)
        kept, upto, _, _ = kept_up_to(keys, t, quota, quota * 0, quota * 0)
        first_kept = dst_start + pad_before + g_prefix
        # In 32 bits: 64-bit row numbers of all lanes would cost 16 more registers.
        mine = kept & (upto > (first - first_kept).to(tl.int32)) & (upto <= (end - first_kept).to(tl.int32))
        tl.store((keep + first_kept) + (upto - 1), (position.to(tl.int32) + lanes).to(tl.int64), mask=mine)
        survivor = flat - first_kept  # [ROWS] negative: rows before the competition
        after = survivor - g_k
        source = tl.where((survivor >= -g_prefix) & (survivor < 0), position + survivor, source)
        source = tl.where((after >= 0) & (after < g_suffix), position + g_n + after, source)
        source = tl.where((survivor >= 0) & (after < 0), _SURVIVOR, source)
        done = dst_start + pad_before + g_prefix + g_k + g_suffix + pad_after
        g += 1
    tl.store(keep + flat, source, mask=(flat < end) & (source != _SURVIVOR))
    # Other threads wrote the survivors. Past L1, where a neighbour may have left an older line.
    tl.debug_barrier()
    return tl.load(keep + flat, mask=flat < end, other=-1, cache_modifier=".cg")


@triton.jit
def _move_rows(
    addresses, facts, begin, end, b, source, row, inside,
    FIRST: tl.constexpr, COUNT: tl.constexpr, BYTES: tl.constexpr, LOAD: tl.constexpr, COLS: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Copy rows ``source`` to ``row`` of those pieces of one class that are among this program's, ``begin`` to ``end``."""
    first_item, items, pieces, planes, width, src_b, src_r, src_p, dst_b, dst_r, dst_p = facts
    # Counts in 32 bits: 64-bit divisions are function calls.
    item = tl.maximum(begin - _decode(first_item).to(tl.int32), 0)
    stop = tl.minimum(end - _decode(first_item).to(tl.int32), _decode(items).to(tl.int32))
    if item < stop:
        row_pieces = _decode(pieces).to(tl.int32)
        of_tensor = row_pieces * _decode(planes).to(tl.int32)
        row_width = _decode(width) * LOAD
        src_row = source[:, None] * _decode(src_r)  # [ROWS, 1]
        dst_row = row[:, None] * _decode(dst_r)
        while item < stop:
            tensor = item // of_tensor
            src_batch, dst_batch = _pick(addresses, tensor, FIRST, COUNT, BYTES)
            src_batch += b * _decode(src_b)
            dst_batch += b * _decode(dst_b)
            tensor_stop = tl.minimum(stop, (tensor + 1) * of_tensor)
            while item < tensor_stop:
                plane = (item - tensor * of_tensor) // row_pieces
                src = src_batch + plane.to(tl.int64) * _decode(src_p)
                dst = dst_batch + plane.to(tl.int64) * _decode(dst_p)
                col = (item % row_pieces).to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]  # [1, COLS]
                # Every row of a class starts, and ends, on a multiple of LOAD elements.
                src_at = tl.multiple_of(src + src_row + col, (LOAD * BYTES, LOAD * BYTES))
                dst_at = tl.multiple_of(dst + dst_row + col, (LOAD * BYTES, LOAD * BYTES))
                moved = tl.load(src_at, mask=(source >= 0)[:, None] & (col < row_width), other=FILL)
                tl.store(dst_at, moved, mask=inside[:, None] & (col < row_width))
                item += 1


@triton.jit(do_not_specialize=[
    "rows", "out_rows", "n_prefix", "n", "n_suffix", "k", "groups", "tiles_per_batch", "tiles", "per_program",
])  # fmt: skip
def _gather_fwd_kernel(
    keep,  # [Bt, out_rows] int64: read, or if SELECT written
    addresses, facts,  # per tensor (source, destination); per class what _facts says
    all_keys,  # int32 [Bt * rows]; from here to groups: SELECT only
    table,  # [G, 8]; None for uniform plans
    n_prefix, n, n_suffix, k, groups,
    rows, out_rows, tiles_per_batch, tiles, per_program,
    CLASSES: tl.constexpr,  # per class: first tensor, tensors, bytes of an element, elements of a load, COLS, fill
    NUM_CLASSES: tl.constexpr,
    ROWS: tl.constexpr, SELECT: tl.constexpr, BLOCK: tl.constexpr, SEARCH_STEPS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) // tiles * per_program  # of the pieces of all classes, end to end
    tile = tl.program_id(0) % tiles
    b = (tile // tiles_per_batch).to(tl.int64)
    first_row = (tile % tiles_per_batch).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)  # [ROWS] of the output
    inside = row < out_rows
    if WAITS:
        gdc_wait()

    if SELECT:
        # Every program repeats the select of its segment: cheaper than a launch in between, as long as the keys are few.
        source = _select_rows(
            keep, row, first_row, b, all_keys, table, n_prefix, n, n_suffix, k, groups, rows,
            out_rows, ROWS, BLOCK, SEARCH_STEPS,
        )  # fmt: skip
    else:
        source = tl.load(keep + b * out_rows + row, mask=inside, other=-1)
        source = tl.where(source < rows, source, -1)

    for c in tl.static_range(NUM_CLASSES):
        _move_rows(
            addresses, facts[c], begin, begin + per_program, b, source, row, inside,
            CLASSES[c][0], CLASSES[c][1], CLASSES[c][2], CLASSES[c][3], CLASSES[c][4], CLASSES[c][5],
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "out_rows", "tiles"])
def _invert_fwd_kernel(
    dest, keep,  # [Bt, rows], [Bt, out_rows], both int64
    rows, out_rows, tiles,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dest[b, keep[b, j]] = j, -1 elsewhere. A program owns ROWS rows of dest and reads the whole of keep[b]."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    begin = pid % tiles * ROWS
    end = tl.minimum(begin + ROWS, rows)
    lanes = tl.arange(0, BLOCK)
    first = begin
    while first < end:
        tl.store(dest + b * rows + first + lanes, tl.full([BLOCK], -1, tl.int64), mask=first + lanes < end)
        first += BLOCK
    # Other threads of this program wrote the -1 that the loop below replaces.
    tl.debug_barrier()
    first = begin * 0
    while first < out_rows:
        j = first + lanes
        source = tl.load(keep + b * out_rows + j, mask=j < out_rows, other=-1)
        tl.store(dest + b * rows + source, j, mask=(source >= begin) & (source < end))
        first += BLOCK


@triton.jit
def _pull_rows_forward(
    keep, addresses, facts, item, b, rows, slots,
    FIRST: tl.constexpr, COUNT: tl.constexpr, BYTES: tl.constexpr, LOAD: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Move the kept rows of one plane and column piece to the front, tile by tile in ascending order.

    keep ascends, so keep[j] >= j: a tile never overwrites a row that a later tile still reads.
    """
    first_item, items, pieces, planes, width, data_b, data_r, data_p, _, _, _ = facts
    item -= _decode(first_item).to(tl.int32)
    pieces = _decode(pieces).to(tl.int32)
    planes = _decode(planes).to(tl.int32)
    width = _decode(width) * LOAD
    if (item >= 0) & (item < _decode(items).to(tl.int32)):
        data = _pick(addresses, item // pieces // planes, FIRST, COUNT, BYTES)[0]
        data += b * _decode(data_b) + (item // pieces % planes).to(tl.int64) * _decode(data_p)
        col = (item % pieces).to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]  # [1, COLS]
        front = b * 0
        first = b * 0
        while first < slots:
            j = first + tl.arange(0, ROWS)  # [ROWS]
            source = tl.load(keep + j, mask=j < slots, other=-1)
            moves = (source >= 0) & (source < rows)
            upto = tl.cumsum(moves.to(tl.int32), axis=0)
            to = front + upto - 1
            mask = (moves & (to < rows))[:, None] & (col < width)
            src_at = tl.multiple_of(data + source[:, None] * _decode(data_r) + col, (LOAD * BYTES, LOAD * BYTES))
            dst_at = tl.multiple_of(data + to[:, None] * _decode(data_r) + col, (LOAD * BYTES, LOAD * BYTES))
            moved = tl.load(src_at, mask=mask, other=0)
            # All rows of the tile are in registers before the first is overwritten.
            tl.debug_barrier()
            tl.store(dst_at, moved, mask=mask)
            front += tl.max(upto)
            first += ROWS


@triton.jit(do_not_specialize=["rows", "slots", "batch"])
def _compact_inplace_kernel(
    keep, addresses, facts,
    rows, slots, batch,
    CLASSES: tl.constexpr, NUM_CLASSES: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) % batch).to(tl.int64)
    for c in tl.static_range(NUM_CLASSES):
        _pull_rows_forward(
            keep + b * slots, addresses, facts[c], tl.program_id(0) // batch, b, rows, slots,
            CLASSES[c][0], CLASSES[c][1], CLASSES[c][2], CLASSES[c][3], CLASSES[c][4], CLASSES[c][5],
        )  # fmt: skip


class _Geometry(NamedTuple):
    """One tensor as planes of rows of contiguous bytes; all sizes and strides in bytes."""

    width: int
    planes: int
    src: tuple[int, int, int]  # strides of batch entry, row, plane
    dst: tuple[int, int, int]
    unrolled: tuple[tuple[int, int], ...]  # further planes, as (source, destination) offsets
    bits: int  # or of everything that an address is made of


@functools.lru_cache(maxsize=1024)
def _geometry(
    shape: tuple[int, ...], stride: tuple[int, ...], out_stride: tuple[int, ...], itemsize: int, batch_dim: int, row_dim: int
) -> _Geometry:
    """Geometry of the copy between two tensors that differ in strides and in the size of ``row_dim``."""
    src = [x * itemsize for x in stride]
    dst = [x * itemsize for x in out_stride]
    width = itemsize
    planes: list[tuple[int, int, int]] = []  # (size, source stride, destination stride), innermost first
    for dim in range(len(shape) - 1, -1, -1):
        if dim in (batch_dim, row_dim) or shape[dim] == 1:
            continue
        if src[dim] == dst[dim] == width and not planes:
            width *= shape[dim]
        elif planes and (src[dim], dst[dim]) == (planes[-1][0] * planes[-1][1], planes[-1][0] * planes[-1][2]):
            planes[-1] = (planes[-1][0] * shape[dim], *planes[-1][1:])
        else:
            planes.append((shape[dim], src[dim], dst[dim]))
    # The kernel walks the longest plane axis; the others, rare, become tensors of their own.
    planes.sort()
    size, src_plane, dst_plane = planes.pop() if planes else (1, 0, 0)
    unrolled = [(0, 0)]
    for count, a, b in planes:
        unrolled = [(x + i * a, y + i * b) for i in range(count) for x, y in unrolled]
    # The stride of a single batch entry may be anything; it is no reason to copy by narrower pieces.
    batch = (src[batch_dim], dst[batch_dim]) if batch_dim >= 0 and shape[batch_dim] > 1 else (0, 0)
    src_strides = (batch[0], src[row_dim], src_plane)
    dst_strides = (batch[1], dst[row_dim], dst_plane)
    bits = functools.reduce(int.__or__, (x for pair in unrolled for x in pair), 16 | width)
    bits = functools.reduce(int.__or__, src_strides + dst_strides, bits)
    return _Geometry(width, size, src_strides, dst_strides, tuple(unrolled), bits)


@functools.lru_cache(maxsize=64)
def _fill_pattern(dtype: torch.dtype, fill: int, nbytes: int) -> int:
    """``fill`` in ``dtype``, repeated to ``nbytes``, as a signed integer."""
    if fill == 0:
        return 0
    element = torch.tensor([fill]).to(dtype).view(torch.uint8).tolist()
    if len(element) > nbytes:
        raise NotImplementedError(f"fill: only 0 can be written into {dtype}, got {fill}")
    return int.from_bytes(bytes(element * (nbytes // len(element))), "little", signed=True)


class _Class(NamedTuple):
    """Tensors that differ in nothing but their addresses."""

    geometry: _Geometry
    align: int  # bytes of the widest access, 1 to 16
    fill: int

    @property
    def element(self) -> int:
        """Bytes of the element type of the copy: a 16-byte access is two of 8."""
        return min(self.align, 8)


def _classes(gathers: Sequence[GatherSpec], outs: Sequence[torch.Tensor]) -> dict[_Class, list[tuple[int, int]]]:
    """The (source, destination) addresses of every class."""
    classes: dict[_Class, list[tuple[int, int]]] = {}
    for spec, out in zip(gathers, outs, strict=True):
        if out.numel() == 0:
            continue
        tensor = spec.tensor
        geometry = _geometry(tensor.shape, tensor.stride(), out.stride(), tensor.element_size(), spec.batch_dim, spec.row_dim)
        addresses = tensor.data_ptr(), out.data_ptr()
        bits = geometry.bits | addresses[0] | addresses[1]
        align = bits & -bits
        key = _Class(geometry, align, _fill_pattern(tensor.dtype, spec.fill, min(align, 8)))
        members = classes.setdefault(key, [])
        members += [(addresses[0] + a, addresses[1] + b) for a, b in geometry.unrolled]
    return classes


def _portions(classes: dict[_Class, list[tuple[int, int]]]) -> list[list[tuple[_Class, list[tuple[int, int]]]]]:
    """The classes in portions of at most TENSORS_PER_LAUNCH tensors, one launch each; nearly always there is one."""
    portions: list[list[tuple[_Class, list[tuple[int, int]]]]] = [[]]
    room = configs.TENSORS_PER_LAUNCH
    for key, members in classes.items():
        while members:
            if room == 0:
                portions.append([])
                room = configs.TENSORS_PER_LAUNCH
            portions[-1].append((key, members[:room]))
            members, room = members[room:], max(room - len(members), 0)
    return portions


def _facts(key: _Class, first_item: int, pieces: int, count: int) -> tuple[int, ...]:
    """What the kernels are given of a class, in their order of decoding: the width in loads, the strides in elements."""
    width, planes, src, dst, _, _ = key.geometry
    numbers = (first_item, count * planes * pieces, pieces, planes, width // key.align)
    return tuple(map(_plain, numbers + tuple(x // key.element for x in (*src, *dst))))


class Selection(NamedTuple):
    """What a gather needs to select its rows itself."""

    keys: torch.Tensor  # int32 [Bt, rows]
    plan: Plan
    tables: Tables


def gather(
    keep: torch.Tensor, gathers: Sequence[GatherSpec], rows: int, *, selection: Selection | None = None, waits: bool = False
) -> list[torch.Tensor]:
    """Rows ``keep`` of every tensor, in its ``out`` or a new contiguous tensor; with ``selection``, ``keep`` is an output."""
    outs = [_empty_out(spec, keep.shape[1]) if spec.out is None else spec.out for spec in gathers]
    for portion in _portions(_classes(gathers, outs)):
        _launch_gather(keep, portion, rows, selection, waits)
        selection, waits = None, False
    return outs


def _empty_out(spec: GatherSpec, out_rows: int) -> torch.Tensor:
    shape = [out_rows if dim == spec.row_dim else size for dim, size in enumerate(spec.tensor.shape)]
    return torch.empty(shape, dtype=spec.tensor.dtype, device=spec.tensor.device)


def _launch_gather(
    keep: torch.Tensor,
    portion: Sequence[tuple[_Class, list[tuple[int, int]]]],
    rows: int,
    selection: Selection | None,
    waits: bool,
) -> None:
    all_keys = table = None
    n_prefix = n = n_suffix = k = segments = block = steps = 0
    num_warps, most = 4, 0
    if selection is not None:
        all_keys, plan, tables = selection
        segments = plan.groups
        block, num_warps = configs.fused_select_block(plan.max_n, len(portion))
        most = configs.FUSED_WARPS // num_warps
        if plan.uniform is None:
            table, steps = tables.segments, max(segments - 1, 0).bit_length()
        else:
            n_prefix, n, n_suffix, k = plan.uniform

    batch, out_rows = keep.shape
    row_bytes = [(len(members) * key.geometry.planes * key.geometry.width, key.geometry.width) for key, members in portion]
    tile_rows = configs.gather_rows(batch, out_rows, row_bytes, most)
    tiles_per_batch = -(-out_rows // tile_rows)
    tiles = batch * tiles_per_batch

    addresses: list[tuple[int, int]] = []
    facts, classes = [], []
    items = 0
    for key, members in portion:
        cols = configs.gather_cols(key.geometry.width // key.element, tile_rows)
        pieces = -(-key.geometry.width // (key.element * cols))
        classes.append((len(addresses), len(members), key.element, key.align // key.element, cols, key.fill))
        facts.append(_facts(key, items, pieces, len(members)))
        addresses += [(_plain(src), _plain(dst)) for src, dst in members]
        items += len(members) * key.geometry.planes * pieces
    per_program = configs.gather_items(items, tiles, batch * out_rows, most)
    bounded = selection is not None and num_warps <= 16 and len(addresses) <= 64  # with more tensors the bound would spill

    launch.start(
        _gather_fwd_kernel, max(-(-items // per_program), 1 if selection else 0) * tiles, keep.device,
        keep, tuple(addresses), tuple(facts), all_keys, table,
        n_prefix, n, n_suffix, k, segments, rows, out_rows, tiles_per_batch, tiles, per_program,
        CLASSES=tuple(classes), NUM_CLASSES=len(classes), ROWS=tile_rows,
        SELECT=selection is not None, BLOCK=block, SEARCH_STEPS=steps, WAITS=waits, num_warps=num_warps,
        **(launch.registers(keep.device, configs.FUSED_REGISTERS) if bounded else {}),
    )  # fmt: skip


def compact(request: CompactRequest) -> list[torch.Tensor]:
    """Rows ``keep`` ``[Bt, out_rows]`` of every tensor, in its ``out`` or a new tensor; empty rows hold the fill of their tensor.

    One launch for up to ``configs.TENSORS_PER_LAUNCH`` tensors.
    """
    keep, gathers, memo = request
    if not gathers:
        return []
    if type(gathers) is not KnownGathers:
        return gather(keep, gathers, gathers[0].tensor.shape[gathers[0].row_dim])
    rows = gathers.tensors[0].shape[gathers.dimensions[0][1]]
    given = lambda: [keep, *gathers.tensors, *gathers.results]
    relaunch.repeated(memo, keep.device, given, (), lambda: gather(keep, gathers, rows)[:0], gathers.addresses)
    return gathers.results


def compact_backward(request: CompactBackwardRequest) -> list[torch.Tensor]:
    """Gradients of the tensors (``rows`` rows) from those of the compacted ones: zero where a row was dropped.

    Two launches: the inverse of ``keep``, and the gather through it. A row kept twice gets one of its gradients.
    """
    keep, grads, rows = request
    batch, out_rows = keep.shape
    dest = torch.empty((batch, rows), dtype=torch.int64, device=keep.device)
    tiles = -(-rows // configs.INVERT_ROWS)
    launch.start(
        _invert_fwd_kernel, batch * tiles, keep.device, dest, keep, rows, out_rows, tiles,
        ROWS=configs.INVERT_ROWS, BLOCK=configs.INVERT_BLOCK, num_warps=8,
    )  # fmt: skip
    return gather(dest, grads, out_rows)


def compact_(request: CompactRequest) -> None:
    """Move the valid rows of ``keep``, ascending, to the front of every tensor; one launch, no second buffer."""
    keep, gathers = request.keep, request.gathers
    batch, slots = keep.shape
    for portion in _portions(_classes(gathers, [spec.tensor for spec in gathers])) if slots else ():
        addresses: list[tuple[int, int]] = []
        facts, classes = [], []
        first_item = 0
        for key, members in portion:
            tile_rows, cols = configs.inplace_tile(key.geometry.width // key.element)
            pieces = -(-key.geometry.width // (key.element * cols))
            classes.append((len(addresses), len(members), key.element, key.align // key.element, cols, tile_rows))
            facts.append(_facts(key, first_item, pieces, len(members)))
            addresses += [(_plain(src), _plain(dst)) for src, dst in members]
            first_item += len(members) * key.geometry.planes * pieces
        launch.start(
            _compact_inplace_kernel, first_item * batch, keep.device,
            keep, tuple(addresses), tuple(facts), gathers[0].tensor.shape[gathers[0].row_dim], slots, batch,
            CLASSES=tuple(classes), NUM_CLASSES=len(classes), num_warps=4,
        )  # fmt: skip
