"""The loops of `lines.py`: rows along the lines of rasters, and the key tiles of other frames that they visit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang_mminfer.kernels.block_plan import PAD_POSITION
from sglang_mminfer.kernels.compiled import compiled
from sglang_mminfer.modality.runs import Bools, Ints

UNKNOWN, NOTHING = -1, -2
"""What `tile_lines` remembers of a key tile before it has looked at its lanes, and where no lane counts."""


class Packs(NamedTuple):
    """Packs of frames of one shape and modality, see `lines.py`; they stand by shape, then modality, then position.

    int64 [packs] each:
    code: the modality, as in `SegmentTable`. length: keys of one line, room for frames yet to come included. filled:
    how many of them the map has. num_lines. size: length * num_lines; an index counts from the start of its pack.
    nearest_key: position of the first. first_frame, num_frames: in `frame_starts`. cells: of a frame. rows: keys of one
    frame in a line, `cols` apart.
    alike: the first pack of the same shape.
    first_tile: [packs + 1], packs begin at whole tiles.
    frame_starts: [frames], the position of each frame's first key.
    """

    code: Ints
    length: Ints
    filled: Ints
    num_lines: Ints
    size: Ints
    nearest_key: Ints
    first_frame: Ints
    num_frames: Ints
    cells: Ints
    rows: Ints
    cols: Ints
    alike: Ints
    first_tile: Ints
    frame_starts: Ints


class LineRows(NamedTuple):
    """Rows of a chunk that have a cell, by pack, line and place in it. int64 [rows]: pack, index in the pack, line,
    and position."""

    pack: Ints
    index: Ints
    line: Ints
    position: Ints


class LineTiles(NamedTuple):
    """T query tiles of R rows and the E ranges of key tiles that they visit, tile by tile.

    q_pos, q_stop: int32 [R]. rows_per_tile: int32 [T]. start, count: int32 [E]. ends, excluded: as in `RowTiles`.
    """

    q_pos: NDArray[np.int32]
    q_stop: NDArray[np.int32]
    rows_per_tile: NDArray[np.int32]
    start: NDArray[np.int32]
    count: NDArray[np.int32]
    ends: NDArray[np.int32]
    excluded: NDArray[np.int32]


@compiled
def rows_by_line(packs: Packs, q_start: int, kv_len: int) -> LineRows:
    """The rows [q_start, kv_len) that have a cell."""
    most = kv_len - q_start
    pack, index = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    lines, position = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    n = 0
    for p in range(len(packs.code)):
        first, stop = packs.first_frame[p], packs.first_frame[p] + packs.num_frames[p]
        low, high = first, stop
        while low < stop and packs.frame_starts[low] + packs.cells[p] <= q_start:
            low += 1
        while high > low and packs.frame_starts[high - 1] >= kv_len:
            high -= 1
        if low == high:
            continue
        rows, cols = packs.rows[p], packs.cols[p]
        for line in range(packs.num_lines[p]):
            for frame in range(low, high):
                for row in range(rows):
                    at = packs.frame_starts[frame] + row * cols + line
                    if q_start <= at < kv_len:
                        pack[n], lines[n], position[n] = p, line, at
                        index[n] = line * packs.length[p] + (frame - first) * rows + row
                        n += 1
    return LineRows(pack[:n].copy(), index[:n].copy(), lines[:n].copy(), position[:n].copy())


@compiled
def _position(packs: Packs, pack: int, line: int, at: int) -> int:
    """Absolute position of key number `at` of a line; PAD_POSITION where there is none yet."""
    if at >= packs.filled[pack]:
        return PAD_POSITION
    frame, row = divmod(at, packs.rows[pack])
    return packs.frame_starts[packs.first_frame[pack] + frame] + row * packs.cols[pack] + line


@compiled
def ends_of_tiles(packs: Packs, block_k: int) -> tuple[Ints, Ints]:
    """int64 [key tiles] twice: the least position in each, PAD_POSITION where it has no key yet; and the greatest,
    PAD_POSITION where it is not filled."""
    nearest = np.full(packs.first_tile[-1], PAD_POSITION, dtype=np.int64)
    farthest = np.full(packs.first_tile[-1], PAD_POSITION, dtype=np.int64)
    for p in range(len(packs.code)):
        length = packs.length[p]
        for tile in range(packs.first_tile[p], packs.first_tile[p + 1]):
            first = (tile - packs.first_tile[p]) * block_k
            last = min(first + block_k, packs.size[p]) - 1
            first_line, last_line = first // length, last // length
            # Lines ascend, and so do their first keys, which a pack always has.
            nearest[tile] = _position(packs, p, first_line, first - first_line * length)
            if first_line < last_line:
                nearest[tile] = min(nearest[tile], _position(packs, p, first_line + 1, 0))
            if last - first < block_k - 1:
                continue
            farthest[tile] = _position(packs, p, last_line, last - last_line * length)
            if first_line < last_line:
                farthest[tile] = max(farthest[tile], _position(packs, p, last_line - 1, length - 1))
    return nearest, farthest


@compiled
def _exclude(
    packs: Packs, pack: int, tile: int, first_key: int, skipped_line: int, block_k: int, excluded: NDArray[np.int32]
) -> bool:
    """Write which lanes of a key tile do not count, and return whether any does."""
    length, size = packs.length[pack], packs.size[pack]
    index = (tile - packs.first_tile[pack]) * block_k
    line, at = divmod(index, length)
    excluded[:] = 0
    counts = False
    for lane in range(block_k):
        position = PAD_POSITION
        if index + lane < size and line != skipped_line:
            position = _position(packs, pack, line, at)
        if first_key <= position < PAD_POSITION:
            counts = True
        else:
            excluded[lane // 32] |= np.int32(1) << np.int32(lane % 32)
        at += 1
        if at == length:
            at, line = 0, line + 1
    return counts


@compiled
def tile_lines(
    packs: Packs,
    rows: LineRows,
    nearest: Ints,
    farthest: Ints,
    bound: Ints,
    row_codes: Bools,
    key_codes: Bools,
    q_start: int,
    first_key: int,
    skip: int,
    skip_keys: bool,
    block_q: int,
    block_k: int,
) -> LineTiles:
    """Tiles of rows in phase-major order over the keys of their own line, in all packs of the same shape so far.

    Args:
        rows: of the chunk. bound: int64 [rows of the chunk], a row sees keys below it. row_codes, key_codes: bool
            [codes], the modalities of rows and keys.
        first_key: keys before it are excluded, and rows whose bound is not above it are left out.
        skip: the line whose rows are left out, -1 for none; skip_keys: whether its keys are excluded.
    """
    num_rows = len(rows.pack)
    q_pos, q_stop = np.empty(num_rows, dtype=np.int32), np.empty(num_rows, dtype=np.int32)
    pack, number = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.int64)
    least, most = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.int64)
    rows_per_tile = np.zeros(num_rows, dtype=np.int32)
    n, t = 0, -1
    for i in range(num_rows):
        p, stop = rows.pack[i], bound[rows.position[i] - q_start]
        if stop <= first_key or rows.line[i] == skip or not row_codes[packs.code[p]]:
            continue
        own = rows.index[i] // block_q
        if t < 0 or pack[t] != p or number[t] != own:
            t += 1
            pack[t], number[t], least[t], most[t] = p, own, stop, stop
        least[t], most[t] = min(least[t], stop), max(most[t], stop)
        q_pos[n], q_stop[n] = rows.position[i], stop
        rows_per_tile[t] += 1
        n += 1
    tiles = t + 1

    ends = np.zeros((tiles, 4), dtype=np.int32)
    memory = np.full(packs.first_tile[-1] if tiles else 0, UNKNOWN, dtype=np.int64)  # its row of `excluded`
    excluded = np.empty((64, -(-block_k // 32)), dtype=np.int32)
    start, count = np.empty(1024, dtype=np.int32), np.empty(1024, dtype=np.int32)
    partial, gathered = np.empty(256, dtype=np.int32), np.empty(256, dtype=np.int32)
    skipped = skip if skip_keys else -1
    ranges = num_gathered = 0
    for t in range(tiles):
        p = pack[t]
        # A tile's lines are those of all its places, whether their rows are in this chunk or not.
        first, last = number[t] * block_q, min((number[t] + 1) * block_q, packs.size[p]) - 1
        first_line, last_line = first // packs.length[p], last // packs.length[p]
        ends[t, 0] = ranges
        num_partial = own_gathered = 0
        for other in range(packs.alike[p], len(packs.code)):
            if packs.alike[other] != packs.alike[p]:
                break
            if not key_codes[packs.code[other]] or packs.nearest_key[other] >= most[t]:
                continue
            length, tile = packs.length[other], packs.first_tile[other]
            low, high = tile + first_line * length // block_k, tile - (-(last_line + 1) * length // block_k)
            skip_low = skip_high = np.int64(0)
            if skip_keys and skip < packs.num_lines[other]:
                skip_low, skip_high = tile + skip * length // block_k, tile - (-(skip + 1) * length // block_k)
            room = high - low
            if ranges + room > len(start):
                start, count = _grown(start, ranges + room), _grown(count, ranges + room)
            if num_partial + room > len(partial):
                partial = _grown(partial, num_partial + room)
            if own_gathered + room > len(gathered):
                gathered = _grown(gathered, own_gathered + room)
            for block in range(low, high):
                if nearest[block] >= most[t]:
                    continue
                if nearest[block] < first_key or skip_low <= block < skip_high:
                    row = memory[block]
                    if num_gathered == len(excluded):
                        excluded = _grown_rows(excluded)
                    if row == UNKNOWN:
                        counts = _exclude(packs, other, block, first_key, skipped, block_k, excluded[num_gathered])
                        row = memory[block] = num_gathered if counts else NOTHING
                    if row != NOTHING:
                        excluded[num_gathered] = excluded[row]
                        gathered[own_gathered] = block
                        own_gathered += 1
                        num_gathered += 1
                elif farthest[block] < least[t]:
                    ranges = _append(start, count, ends[t, 0], ranges, block)
                else:
                    partial[num_partial] = block
                    num_partial += 1
        if ranges + num_partial + own_gathered > len(start):
            room = ranges + num_partial + own_gathered
            start, count = _grown(start, room), _grown(count, room)
        ends[t, 1] = ranges
        for i in range(num_partial):
            ranges = _append(start, count, ends[t, 1], ranges, partial[i])
        ends[t, 2] = ranges
        for i in range(own_gathered):
            start[ranges], count[ranges] = gathered[i], 1
            ranges += 1
        ends[t, 3] = ranges
    return LineTiles(
        q_pos[:n].copy(),
        q_stop[:n].copy(),
        rows_per_tile[:tiles].copy(),
        start[:ranges].copy(),
        count[:ranges].copy(),
        ends,
        excluded[:num_gathered].copy(),
    )


@compiled
def _append(start: Ints, count: Ints, begin: int, ranges: int, block: int) -> int:
    """Append a key tile to the ranges begin .. ranges - 1, and return how many ranges there are then."""
    if ranges > begin and start[ranges - 1] + count[ranges - 1] == block:
        count[ranges - 1] += 1
        return ranges
    start[ranges], count[ranges] = block, 1
    return ranges + 1


@compiled
def _grown(values: NDArray[np.int32], room: int) -> NDArray[np.int32]:
    """The values with room for at least so many, and as many again as there were."""
    grown = np.empty(max(room, 2 * len(values)), dtype=np.int32)
    grown[: len(values)] = values
    return grown


@compiled
def _grown_rows(values: NDArray[np.int32]) -> NDArray[np.int32]:
    grown = np.empty((2 * len(values), values.shape[1]), dtype=np.int32)
    grown[: len(values)] = values
    return grown
