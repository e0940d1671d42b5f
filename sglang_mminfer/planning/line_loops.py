"""The loops of `lines.py`: rows along the lines of rasters, and the key tiles of other frames that they visit."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sglang_mminfer.kernels.block_plan import PAD_POSITION
from sglang_mminfer.kernels.compiled import compiled
from sglang_mminfer.planning.row_loops import Array, last_at_most

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

    code: Array
    length: Array
    filled: Array
    num_lines: Array
    size: Array
    nearest_key: Array
    first_frame: Array
    num_frames: Array
    cells: Array
    rows: Array
    cols: Array
    alike: Array
    first_tile: Array
    frame_starts: Array


class LineRows(NamedTuple):
    """Rows of a chunk that have a cell, by pack, line and place in it. int64 [rows]: pack, place in the pack, line,
    and position."""

    pack: Array
    place: Array
    line: Array
    position: Array


class TileEnds(NamedTuple):
    """Where the keys of each key tile lie. int64 [key tiles] each:

    nearest: the least position; PAD_POSITION where the tile has no key yet. farthest: the greatest; PAD_POSITION where
    the tile is not filled. ascend_to: from here to ascend_to - 1 both ascend.
    """

    nearest: Array
    farthest: Array
    ascend_to: Array


class LineTiles(NamedTuple):
    """T query tiles of R rows and the E ranges of key tiles that they visit, tile by tile.

    rows: int32 [2, R], rows of q and their bounds. rows_per_tile: int32 [T]. ranges: int32 [2, E]. ends, excluded: as
    in `RowTiles`.
    """

    rows: Array
    rows_per_tile: Array
    ranges: Array
    ends: Array
    excluded: Array


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
def ends_of_tiles(packs: Packs, block_k: int) -> TileEnds:
    """Where the keys of each key tile lie."""
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
    ascend_to = np.arange(1, len(nearest) + 1)
    for tile in range(len(nearest) - 2, -1, -1):
        if nearest[tile] <= nearest[tile + 1] and farthest[tile] <= farthest[tile + 1]:
            ascend_to[tile] = ascend_to[tile + 1]
    return TileEnds(nearest, farthest, ascend_to)


@compiled
def _exclude(
    packs: Packs, pack: int, tile: int, first_key: int, skipped_line: int, block_k: int, excluded: Array
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
    tile_ends: TileEnds,
    bound: Array,
    row_codes: Array,
    key_codes: Array,
    q_start: int,
    row_start: int,
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
        row_start: the row of q at q_start.
        first_key: keys before it are excluded, and rows whose bound is not above it are left out.
        skip: the line whose rows are left out, -1 for none; skip_keys: whether its keys are excluded.
    """
    num_rows = len(rows.pack)
    out = np.empty((2, num_rows), dtype=np.int32)
    pack, number = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.int64)
    least, most = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.int64)
    rows_per_tile = np.zeros(num_rows, dtype=np.int32)
    n, t = 0, -1
    for i in range(num_rows):
        p, stop = rows.pack[i], bound[rows.position[i] - q_start]
        if stop <= first_key or rows.line[i] == skip or not row_codes[packs.code[p]]:
            continue
        own = rows.place[i] // block_q
        if t < 0 or pack[t] != p or number[t] != own:
            t += 1
            pack[t], number[t], least[t], most[t] = p, own, stop, stop
        least[t], most[t] = min(least[t], stop), max(most[t], stop)
        out[0, n], out[1, n] = row_start + rows.position[i] - q_start, stop
        rows_per_tile[t] += 1
        n += 1
    tiles = t + 1

    ends = np.zeros((tiles, 4), dtype=np.int32)
    memory = np.full(packs.first_tile[-1] if tiles else 0, UNKNOWN, dtype=np.int64)  # its row of `excluded`
    excluded = np.empty((64, -(-block_k // 32)), dtype=np.int32)
    ranges = np.empty((2, 1024), dtype=np.int32)
    partial, gathered = np.empty((2, 256), dtype=np.int32), np.empty((256, 1), dtype=np.int32)
    nearest, farthest = tile_ends.nearest, tile_ends.farthest
    skipped = skip if skip_keys else -1
    num_ranges = num_gathered = 0
    for t in range(tiles):
        p = pack[t]
        # A tile's lines are those of all its places, whether their rows are in this chunk or not.
        first, last = number[t] * block_q, min((number[t] + 1) * block_q, packs.size[p]) - 1
        first_line, last_line = first // packs.length[p], last // packs.length[p]
        ends[t, 0] = num_ranges
        num_partial = own_gathered = 0
        for other in range(packs.alike[p], len(packs.code)):
            if packs.alike[other] != packs.alike[p]:
                break
            if not key_codes[packs.code[other]] or packs.nearest_key[other] >= most[t]:
                continue
            length, tile = packs.length[other], packs.first_tile[other]
            block, high = tile + first_line * length // block_k, tile - (-(last_line + 1) * length // block_k)
            skip_low = skip_high = high
            if skip_keys and skip < packs.num_lines[other]:
                skip_low, skip_high = tile + skip * length // block_k, tile - (-(skip + 1) * length // block_k)
            partial = _with_room(partial, num_partial + high - block)
            gathered = _rows_with_room(gathered, own_gathered + high - block)
            ranges = _with_room(ranges, num_ranges + num_partial + own_gathered + high - block)
            full_start: Any = np.int64(-1)
            full_stop: Any = np.int64(-1)
            while block < high:
                stop = min(tile_ends.ascend_to[block], high)
                if nearest[block] >= most[t]:
                    block = stop
                    continue
                if nearest[block] < first_key or skip_low <= block < skip_high:
                    row = memory[block]
                    excluded = _rows_with_room(excluded, num_gathered + 1)
                    if row == UNKNOWN:
                        counts = _exclude(packs, other, block, first_key, skipped, block_k, excluded[num_gathered])
                        row = memory[block] = num_gathered if counts else NOTHING
                    if row != NOTHING:
                        excluded[num_gathered] = excluded[row]
                        gathered[own_gathered, 0] = block
                        own_gathered += 1
                        num_gathered += 1
                    block += 1
                    continue
                if block < skip_low:
                    stop = min(stop, skip_low)
                if farthest[block] < least[t]:
                    if block != full_stop:
                        num_ranges = _append(ranges, num_ranges, full_start, full_stop)
                        full_start = block
                    block = full_stop = last_at_most(farthest, block, stop, least[t] - 1) + 1
                else:
                    partial[0, num_partial] = block
                    block = last_at_most(nearest, block, stop, most[t] - 1) + 1
                    partial[1, num_partial] = block
                    num_partial += 1
            num_ranges = _append(ranges, num_ranges, full_start, full_stop)
        ends[t, 1] = num_ranges
        for i in range(num_partial):
            num_ranges = _append(ranges, num_ranges, partial[0, i], partial[1, i])
        ends[t, 2] = num_ranges
        for i in range(own_gathered):
            num_ranges = _append(ranges, num_ranges, gathered[i, 0], gathered[i, 0] + 1)
        ends[t, 3] = num_ranges
    return LineTiles(
        out[:, :n].copy(),
        rows_per_tile[:tiles].copy(),
        ranges[:, :num_ranges].copy(),
        ends,
        excluded[:num_gathered].copy(),
    )


@compiled
def _append(ranges: Array, number: int, start: int, stop: int) -> int:
    """Append the key tiles start .. stop - 1 to so many ranges, if there are any. Returns how many ranges there are."""
    if start < stop:
        ranges[0, number], ranges[1, number] = start, stop - start
        number += 1
    return number


@compiled
def _with_room(values: Array, room: int) -> Array:
    """int32 [2, values], in an array with room for so many."""
    if room <= values.shape[1]:
        return values
    grown = np.empty((2, 2 * room), dtype=np.int32)
    grown[:, : values.shape[1]] = values
    return grown


@compiled
def _rows_with_room(values: Array, room: int) -> Array:
    """int32 [values, words], in an array with room for so many."""
    if room <= values.shape[0]:
        return values
    grown = np.empty((2 * room, values.shape[1]), dtype=np.int32)
    grown[: values.shape[0]] = values
    return grown
