"""The loops of `tiles.py`: rows in ascending order, the key tiles that they visit, and the order in which they do."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang_mminfer.kernels.compiled import compiled
from sglang_mminfer.modality.runs import Bools, Ints

# How a key tile is visited, and so which mask it needs: none, a comparison of positions, that and a mask of lanes.
FULL, PARTIAL, GATHERED = range(3)


class RunTable(NamedTuple):
    """Several sets of positions, one after the other. Set i has runs first[i] to first[i + 1] - 1, half open.

    starts, stops: int64 [runs]. before: int64 [runs], how many members of the same set lie before each run. first:
    int64 [sets + 1].
    """

    starts: Ints
    stops: Ints
    before: Ints
    first: Ints


class Wanted(NamedTuple):
    """What rows want of the keys of each of their pairs. Arrays have a value for each pair.

    sink, local: int64, tokens. of_one_more: int64, about how many keys one more query tile would visit. lines: bool,
    whether rows also visit along lines. estimated: bool, an estimate says what is visited.
    """

    sink: Ints
    local: Ints
    of_one_more: Ints
    lines: Bools
    estimated: Bools


class RowTiles(NamedTuple):
    """T query tiles of R rows, and the E ranges of key tiles that they visit, tile by tile.

    q_pos: int32 [R]. rows_per_tile: int32 [T].
    order, start, count: int32 [E], the key order (twice the number of a pair for its keys, one more for its columns)
    and the key tiles of it. ends: int32 [T, 4]: a tile's full ranges begin at ends[t, 0], its partial ones at
    ends[t, 1], its gathered ones at ends[t, 2], and end at ends[t, 3].
    excluded: int32 [gathered ranges, words], packed.
    group_of_order: int64 [2 * pairs], the first group that visits each order; -1: none does.
    bound: int64 [pairs, rows of the chunk], for pairs with lines: the position where a row's own window starts, 0
    where it has none.
    tile_first: int64 [groups + 1], the tiles of each group.
    keys_of_first_row, keys_of_last_row, full_tiles: int64 [pairs, T], see `EstimatedVisits`.
    """

    q_pos: NDArray[np.int32]
    rows_per_tile: NDArray[np.int32]
    order: NDArray[np.int32]
    start: NDArray[np.int32]
    count: NDArray[np.int32]
    ends: NDArray[np.int32]
    excluded: NDArray[np.int32]
    group_of_order: Ints
    bound: Ints
    tile_first: Ints
    keys_of_first_row: Ints
    keys_of_last_row: Ints
    full_tiles: Ints

    @property
    def num_tiles(self) -> int:
        return len(self.rows_per_tile)


@compiled
def last_at_most(values: Ints, low: int, high: int, value: int) -> int:
    """The last i in low .. high - 1 with values[i] <= value, of ascending values; low - 1 where there is none."""
    while low < high:
        middle = (low + high) // 2
        if values[middle] <= value:
            low = middle + 1
        else:
            high = middle
    return low - 1


@compiled
def rank(runs: RunTable, number: int, position: int) -> int:
    """How many members of set `number` lie below a position."""
    run = last_at_most(runs.starts, runs.first[number], runs.first[number + 1], position)
    if run < runs.first[number]:
        return 0
    return runs.before[run] + min(position, runs.stops[run]) - runs.starts[run]


@compiled
def select(runs: RunTable, number: int, index: int) -> int:
    """The member of set `number` with this rank."""
    run = last_at_most(runs.before, runs.first[number], runs.first[number + 1], index)
    return runs.starts[run] + index - runs.before[run]


@compiled
def _begins_tile(groups: RunTable, run: int, keys: RunTable, sees_whole: Bools, wanted: Wanted, block_q: int) -> bool:
    """Whether a tile begins with a run of rows, because it is further from the run before than what one more tile
    would visit. A window reaches from a tile's first row to its last, so that a tile with text from both sides of a
    video would visit the video."""
    row = groups.starts[run]
    gap = row - groups.stops[run - 1]
    more = block_q
    for pair in range(len(sees_whole)):
        if gap <= more:
            return False
        if sees_whole[pair]:
            more += rank(keys, pair, row)
        else:
            more += wanted.of_one_more[pair]
    return gap > more


@compiled
def _sort_by_kind(kind: Ints, order: Ints, start: Ints, count: Ints, begin: int, end: int) -> None:
    """Sort a tile's ranges begin .. end - 1 by kind. Those of one kind stay in their order."""
    for i in range(begin + 1, end):
        own = kind[i], order[i], start[i], count[i]
        j = i
        while j > begin and kind[j - 1] > own[0]:
            kind[j], order[j], start[j], count[j] = kind[j - 1], order[j - 1], start[j - 1], count[j - 1]
            j -= 1
        kind[j], order[j], start[j], count[j] = own


@compiled
def sort_ranges(start: Ints, count: Ints, ends: Ints, excluded: Ints) -> None:
    """Sort the ranges of each tile and kind by where they start, in place.

    Args:
        start, count: int32 [ranges]. ends: int32 [tiles, 4]. excluded: int32 [gathered ranges, words].
    """
    gathered = 0
    for t in range(len(ends)):
        for kind in range(3):
            begin = ends[t, kind]
            for i in range(begin + 1, ends[t, kind + 1]):
                j = i
                while j > begin and start[j - 1] > start[j]:
                    start[j - 1], start[j] = start[j], start[j - 1]
                    count[j - 1], count[j] = count[j], count[j - 1]
                    if kind == GATHERED:
                        row = gathered + j - begin
                        for word in range(excluded.shape[1]):
                            saved = excluded[row, word]
                            excluded[row, word] = excluded[row - 1, word]
                            excluded[row - 1, word] = saved
                    j -= 1
        gathered += ends[t, 3] - ends[t, 2]


@compiled
def key_tiles_of(count: Ints, ends: Ints) -> Ints:
    """int32 [tiles, 3]: how many key tiles of each kind the ranges of each tile have.

    Args:
        count: int32 [ranges]. ends: int32 [tiles, 4].
    """
    out = np.zeros((len(ends), 3), dtype=np.int32)
    for t in range(len(ends)):
        for kind in range(3):
            for i in range(ends[t, kind], ends[t, kind + 1]):
                out[t, kind] += count[i]
    return out


@compiled
def tile_rows(
    groups: RunTable,
    sees_whole: Bools,
    keys: RunTable,
    wanted: Wanted,
    columns: Ints,
    column_first: Ints,
    q_start: int,
    kv_len: int,
    block_q: int,
    block_k: int,
) -> RowTiles:
    """Tiles of the rows [q_start, kv_len), group by group.

    Args:
        groups: the rows of each group. sees_whole: bool [groups, pairs]. keys: the keys of each pair.
        wanted: of the rows that do not see a pair whole.
        columns: int64, positions of the columns of all pairs, those of pair p from column_first[p] to
            column_first[p + 1] - 1: keys of the pair from its sink's tiles to the end of the chunk, ascending.
    """
    num_groups, num_pairs, num_rows = len(sees_whole), len(wanted.sink), kv_len - q_start
    q_pos = np.empty(num_rows, dtype=np.int32)
    begins, stops = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.int64)
    low_of_group = np.zeros(num_groups, dtype=np.int64)
    tile_first = np.zeros(num_groups + 1, dtype=np.int64)
    rows = tiles = 0
    for g in range(num_groups):
        first, end = groups.first[g], groups.first[g + 1]
        low, high = rank(groups, g, q_start), rank(groups, g, kv_len)
        low_of_group[g] = low
        if low < high:
            run = last_at_most(groups.before, first, end, low)
            begin = run  # the run with which the tiles of these rows begin
            while begin > first and not _begins_tile(groups, begin, keys, sees_whole[g], wanted, block_q):
                begin -= 1
            at = groups.before[begin] + (low - groups.before[begin]) // block_q * block_q
            position = groups.starts[run] + low - groups.before[run]
            for index in range(low, high):
                if position == groups.stops[run]:
                    run += 1
                    position = groups.starts[run]
                    if _begins_tile(groups, run, keys, sees_whole[g], wanted, block_q):
                        begins[tiles], stops[tiles] = at, index
                        tiles += 1
                        at = index
                if index - at == block_q:
                    begins[tiles], stops[tiles] = at, index
                    tiles += 1
                    at = index
                q_pos[rows] = position
                position += 1
                rows += 1
            begins[tiles], stops[tiles] = at, high
            tiles += 1
        tile_first[g + 1] = tiles

    most = tiles * num_pairs * 5
    order = np.empty(most, dtype=np.int32)
    start, count = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.int32)
    kind = np.empty(most, dtype=np.int8)
    rows_per_tile, ends = np.empty(tiles, dtype=np.int32), np.zeros((tiles, 4), dtype=np.int32)
    excluded = np.zeros((tiles * num_pairs, -(-block_k // 32)), dtype=np.int32)
    group_of_order = np.full(2 * num_pairs, -1, dtype=np.int64)
    bound = np.zeros((num_pairs, num_rows if wanted.lines.any() else 0), dtype=np.int64)
    keys_of_first_row = np.zeros((num_pairs, tiles), dtype=np.int64)
    keys_of_last_row = np.zeros((num_pairs, tiles), dtype=np.int64)
    full_tiles = np.zeros((num_pairs, tiles), dtype=np.int64)
    ranges = gathered = row = 0
    for g in range(num_groups):
        for t in range(tile_first[g], tile_first[g + 1]):
            live = max(begins[t], low_of_group[g])
            rows_per_tile[t] = stops[t] - live
            first_row, last_row = select(groups, g, begins[t]), select(groups, g, stops[t] - 1)
            first_live = select(groups, g, live)
            begin = ranges
            for p in range(num_pairs):
                keys_of_first, keys_of_last = rank(keys, p, first_row + 1), rank(keys, p, last_row + 1)
                full = rank(keys, p, first_live + 1) // block_k
                keys_of_first_row[p, t], keys_of_last_row[p, t] = keys_of_first, keys_of_last
                full_tiles[p, t] = full
                stop = -(-keys_of_last // block_k)
                if stop == 0 or (wanted.estimated[p] and not sees_whole[g, p]):
                    continue
                # Two ranges of key tiles, the sink's and the window's, each full at first and then partial.
                window = sink_stop = np.int64(0)
                if not sees_whole[g, p]:
                    window = max(keys_of_first - wanted.local[p], 0) // block_k
                    sink_stop = min(window, stop, -(-wanted.sink[p] // block_k))
                for low, high in ((np.int64(0), sink_stop), (window, stop)):
                    for k, a, b in ((FULL, low, min(high, full)), (PARTIAL, max(low, full), high)):
                        if a < b:
                            order[ranges], kind[ranges], start[ranges], count[ranges] = 2 * p, k, a, b - a
                            ranges += 1
                if group_of_order[2 * p] < 0:
                    group_of_order[2 * p] = g
                if sees_whole[g, p] or window == 0:
                    continue
                position = select(keys, p, window * block_k)
                if wanted.lines[p]:
                    for i in range(row, row + rows_per_tile[t]):
                        bound[p, q_pos[i] - q_start] = position
                column, column_stop = column_first[p], column_first[p + 1]
                in_reach = last_at_most(columns, column, column_stop, position - 1) + 1 - column
                if in_reach == 0:
                    continue
                if group_of_order[2 * p + 1] < 0:
                    group_of_order[2 * p + 1] = g
                if in_reach >= block_k:
                    order[ranges], kind[ranges] = 2 * p + 1, FULL
                    start[ranges], count[ranges] = 0, in_reach // block_k
                    ranges += 1
                if in_reach % block_k:
                    order[ranges], kind[ranges] = 2 * p + 1, GATHERED
                    start[ranges], count[ranges] = in_reach // block_k, 1
                    ranges += 1
                    for lane in range(in_reach % block_k, block_k):
                        excluded[gathered, lane // 32] |= np.int32(1) << np.int32(lane % 32)
                    gathered += 1
            row += rows_per_tile[t]
            _sort_by_kind(kind, order, start, count, begin, ranges)
            ends[t, 0], ends[t, 1], ends[t, 2], ends[t, 3] = begin, begin, begin, ranges
            for i in range(begin, ranges):
                ends[t, 1] += kind[i] == FULL
                ends[t, 2] += kind[i] != GATHERED
    return RowTiles(
        q_pos[:rows],
        rows_per_tile,
        order[:ranges].copy(),
        start[:ranges].copy(),
        count[:ranges].copy(),
        ends,
        excluded[:gathered],
        group_of_order,
        bound,
        tile_first,
        keys_of_first_row,
        keys_of_last_row,
        full_tiles,
    )
