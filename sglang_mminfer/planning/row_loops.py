"""The loops of `tiles.py`: rows in ascending order, the key tiles that they visit, and the order in which they do."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang_mminfer.kernels.compiled import compiled

Array = NDArray[Any]
"""An array of a type that the docstrings name: to numba a number of an array is a plain number, to other checkers it is
not."""

# How a key tile is visited, and so which mask it needs: none, a comparison of positions, that and a mask of lanes.
FULL, PARTIAL, GATHERED = range(3)


class RunTable(NamedTuple):
    """Several sets of positions, one after the other. Set i has runs first[i] to first[i + 1] - 1, half open.

    starts, stops: int64 [runs]. before: int64 [runs], how many members of the same set lie before each run. first:
    int64 [sets + 1].
    """

    starts: Array
    stops: Array
    before: Array
    first: Array


class Wanted(NamedTuple):
    """What rows want of the keys of each of their pairs. Arrays have a value for each pair.

    sink, local: int64, tokens. of_one_more: int64, about how many keys one more query tile would visit. lines: bool,
    whether rows also visit along lines. estimated: bool, an estimate alone says what is visited.
    """

    sink: Array
    local: Array
    of_one_more: Array
    lines: Array
    estimated: Array


class RowCut(NamedTuple):
    """T query tiles of R rows of a chunk.

    rows: int32 [2, R], rows of q, and bounds on the positions that they see, which are one more than their own.
    rows_per_tile: int32 [T]. first_row: int64 [T], the position of the first row of each tile, in this chunk or before
    it. indptr: int64 [T + 1], the rows of tile t are indptr[t] to indptr[t + 1] - 1. tile_first: int64 [groups + 1],
    the tiles of group g are tile_first[g] to tile_first[g + 1] - 1.
    """

    rows: Array
    rows_per_tile: Array
    first_row: Array
    indptr: Array
    tile_first: Array


class RowTiles(NamedTuple):
    """The E ranges of key tiles that T query tiles visit, tile by tile.

    order: int32 [E], the key order: twice the number of a pair for its keys, one more for its columns. ranges: int32
    [2, E], the first key tile of it and how many. ends: int32 [T, 4]: a tile's full ranges begin at ends[t, 0], its
    partial ones at ends[t, 1], its gathered ones at ends[t, 2], and end at ends[t, 3].
    excluded: int32 [gathered ranges, words], packed.
    group_of_order: int64 [2 * pairs], the first group that visits each order; -1: none does.
    bound: int64 [pairs, rows of the chunk], for pairs with lines: the position where a row's own window starts, 0
    where it has none.
    counts: int64 [3, pairs, T], keys_of_first_row, keys_of_last_row and full_tiles, see `EstimatedVisits`.
    first_key: int64 [pairs], the position of the first key behind the sink's key tiles; the end of the chunk where it
    has no such key. column_ends: int64 [pairs, 2], the columns from there to the end of the chunk, which are gathered.
    """

    order: Array
    ranges: Array
    ends: Array
    excluded: Array
    group_of_order: Array
    bound: Array
    counts: Array
    first_key: Array
    column_ends: Array


@compiled
def last_at_most(values: Array, low: int, high: int, value: int) -> int:
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
def first_runs(groups: RunTable, sees_whole: Array, keys: RunTable, wanted: Wanted, most_rows: Array) -> Array:
    """int32 [runs]: the run with which the tiles of each run's rows begin.

    A window reaches from a tile's first row to its last, so that a tile with text from both sides of a video would
    visit the video. Where rows are further apart than what one more tile would visit, a tile begins.

    Args:
        groups, sees_whole, keys, wanted, most_rows: as in `cut_rows` and `tile_rows`.
    """
    out = np.empty(len(groups.starts), dtype=np.int32)
    for g in range(len(sees_whole)):
        for run in range(groups.first[g], groups.first[g + 1]):
            out[run] = run
            if run == groups.first[g]:
                continue
            row = groups.starts[run]
            gap, more = row - groups.stops[run - 1], most_rows[g]
            for pair in range(len(wanted.sink)):
                if gap > more:
                    more += rank(keys, pair, row) if sees_whole[g, pair] else wanted.of_one_more[pair]
            if gap <= more:
                out[run] = out[run - 1]
    return out


@compiled
def cut_rows(groups: RunTable, first_run: Array, most_rows: Array, q_start: int, kv_len: int, row_start: int) -> RowCut:
    """The rows [q_start, kv_len), group by group.

    Args:
        groups: the rows of each group. first_run: see `first_runs`. most_rows: [groups], the most rows of a tile.
        row_start: the row of q at q_start.
    """
    num_groups, num_rows = len(groups.first) - 1, kv_len - q_start
    rows = np.empty((2, num_rows), dtype=np.int32)
    first_row, indptr = np.empty(num_rows, dtype=np.int64), np.empty(num_rows + 1, dtype=np.int64)
    tile_first = np.zeros(num_groups + 1, dtype=np.int64)
    n = tiles = 0
    for g in range(num_groups):
        low, high = rank(groups, g, q_start), rank(groups, g, kv_len)
        block_q = most_rows[g]
        run, index = last_at_most(groups.before, groups.first[g], groups.first[g + 1], low), low
        while index < high:
            # The tile that has this row, and its rows in this chunk.
            first = first_run[run]
            begin = groups.before[first] + (index - groups.before[first]) // block_q * block_q
            first_row[tiles], indptr[tiles] = select(groups, g, begin), n
            tiles += 1
            while index < min(begin + block_q, high) and first_run[run] == first:
                position = groups.starts[run] + index - groups.before[run]
                count = min(groups.stops[run] - position, begin + block_q - index, high - index)
                for i in range(count):
                    rows[0, n + i], rows[1, n + i] = row_start + position - q_start + i, position + i + 1
                n += count
                index += count
                if position + count == groups.stops[run] and run + 1 < groups.first[g + 1]:
                    run += 1
        tile_first[g + 1] = tiles
    indptr[tiles] = n
    rows_per_tile = (indptr[1 : tiles + 1] - indptr[:tiles]).astype(np.int32)
    return RowCut(rows[:, :n].copy(), rows_per_tile, first_row[:tiles].copy(), indptr[: tiles + 1].copy(), tile_first)


@compiled
def _sort_by_kind(kind: Array, order: Array, ranges: Array, begin: int, end: int) -> None:
    """Sort a tile's ranges begin .. end - 1 by kind. Those of one kind stay in their order."""
    for i in range(begin + 1, end):
        own = kind[i], order[i], ranges[0, i], ranges[1, i]
        j = i
        while j > begin and kind[j - 1] > own[0]:
            kind[j], order[j], ranges[0, j], ranges[1, j] = (
                kind[j - 1],
                order[j - 1],
                ranges[0, j - 1],
                ranges[1, j - 1],
            )
            j -= 1
        kind[j], order[j], ranges[0, j], ranges[1, j] = own


@compiled
def tile_rows(
    cut: RowCut,
    sees_whole: Array,
    keys: RunTable,
    wanted: Wanted,
    columns: Array,
    column_first: Array,
    row_start: int,
    num_rows: int,
    kv_len: int,
    block_k: int,
) -> RowTiles:
    """What the tiles of a cut visit.

    Args:
        sees_whole: bool [groups, pairs]. keys: the keys of each pair.
        wanted: of the rows that do not see a pair whole.
        columns: int64, positions of the columns of all pairs, those of pair p from column_first[p] to
            column_first[p + 1] - 1: keys of the pair, ascending.
        row_start, num_rows: the chunk's rows in q. kv_len: its keys.
    """
    num_groups, num_pairs = len(sees_whole), len(wanted.sink)
    tiles, most = len(cut.first_row), len(cut.first_row) * num_pairs * 5
    order, kind = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.int8)
    ranges = np.empty((2, most), dtype=np.int32)
    ends = np.zeros((tiles, 4), dtype=np.int32)
    excluded = np.zeros((tiles * num_pairs, -(-block_k // 32)), dtype=np.int32)
    group_of_order = np.full(2 * num_pairs, -1, dtype=np.int64)
    bound = np.zeros((num_pairs, num_rows if wanted.lines.any() else 0), dtype=np.int64)
    counts = np.zeros((3, num_pairs, tiles), dtype=np.int64)
    first_key = np.full(num_pairs, kv_len, dtype=np.int64)
    column_ends = np.zeros((num_pairs, 2), dtype=np.int64)
    for p in range(num_pairs):
        sink_keys = -(-wanted.sink[p] // block_k) * block_k
        if sink_keys < rank(keys, p, kv_len):
            first_key[p] = select(keys, p, sink_keys)
        for end, position in enumerate((first_key[p], kv_len)):
            column = last_at_most(columns, column_first[p], column_first[p + 1], position - 1) + 1
            column_ends[p, end] = column - column_first[p]
    n = gathered = 0
    for g in range(num_groups):
        for t in range(cut.tile_first[g], cut.tile_first[g + 1]):
            begin, first, last = n, cut.indptr[t], cut.indptr[t + 1] - 1
            for p in range(num_pairs):
                keys_of_first_row = rank(keys, p, cut.first_row[t] + 1)
                keys_of_last_row, full_tiles = (
                    rank(keys, p, cut.rows[1, last]),
                    rank(keys, p, cut.rows[1, first]) // block_k,
                )
                stop = -(-keys_of_last_row // block_k)
                counts[0, p, t], counts[1, p, t], counts[2, p, t] = keys_of_first_row, keys_of_last_row, full_tiles
                if stop == 0 or (wanted.estimated[p] and not sees_whole[g, p]):
                    continue
                # Two ranges of key tiles, the sink's and the window's, each full at first and then partial.
                window: Any = np.int64(0)
                sink_stop: Any = np.int64(0)
                if not sees_whole[g, p]:
                    window = max(keys_of_first_row - wanted.local[p], 0) // block_k
                    sink_stop = min(window, stop, -(-wanted.sink[p] // block_k))
                for low, high in ((0 * window, sink_stop), (window, stop)):
                    for k, a, b in ((FULL, low, min(high, full_tiles)), (PARTIAL, max(low, full_tiles), high)):
                        if a < b:
                            order[n], kind[n], ranges[0, n], ranges[1, n] = 2 * p, k, a, b - a
                            n += 1
                if group_of_order[2 * p] < 0:
                    group_of_order[2 * p] = g
                if window == 0:
                    continue
                position = select(keys, p, window * block_k)
                if wanted.lines[p]:
                    for i in range(first, last + 1):
                        bound[p, cut.rows[0, i] - row_start] = position
                first_column = column_first[p] + column_ends[p, 0]
                stop_column = column_first[p] + column_ends[p, 1]
                in_reach = last_at_most(columns, first_column, stop_column, position - 1) + 1 - first_column
                if in_reach == 0:
                    continue
                if group_of_order[2 * p + 1] < 0:
                    group_of_order[2 * p + 1] = g
                if in_reach >= block_k:
                    order[n], kind[n], ranges[0, n], ranges[1, n] = 2 * p + 1, FULL, 0, in_reach // block_k
                    n += 1
                if in_reach % block_k:
                    order[n], kind[n], ranges[0, n], ranges[1, n] = 2 * p + 1, GATHERED, in_reach // block_k, 1
                    n += 1
                    for lane in range(in_reach % block_k, block_k):
                        excluded[gathered, lane // 32] |= np.int32(1) << np.int32(lane % 32)
                    gathered += 1
            _sort_by_kind(kind, order, ranges, begin, n)
            ends[t, 0], ends[t, 1], ends[t, 2], ends[t, 3] = begin, begin, begin, n
            for i in range(begin, n):
                ends[t, 1] += kind[i] == FULL
                ends[t, 2] += kind[i] != GATHERED
    return RowTiles(
        order[:n].copy(),
        ranges[:, :n].copy(),
        ends,
        excluded[:gathered],
        group_of_order,
        bound,
        counts,
        first_key,
        column_ends,
    )


@compiled
def place(order: Array, ranges: Array, ends: Array, excluded: Array, first_tile: Array) -> tuple[Array, Array, Array]:
    """`ranges`, with numbers in a table in place of those in an order, those of each tile and kind sorted by them;
    `excluded`, sorted with them; and int32 [T, 3], how many key tiles of each kind each tile visits.

    Args:
        first_tile: int64 [orders], added to the key tiles of each order.
    """
    ranges, excluded = ranges.copy(), excluded.copy()
    for i in range(len(order)):
        ranges[0, i] += first_tile[order[i]]
    visits = np.zeros((len(ends), 3), dtype=np.int32)
    gathered = 0
    for t in range(len(ends)):
        for kind in range(3):
            begin = ends[t, kind]
            for i in range(begin, ends[t, kind + 1]):
                visits[t, kind] += ranges[1, i]
                j = i
                while j > begin and ranges[0, j - 1] > ranges[0, j]:
                    for k in range(2):
                        ranges[k, j - 1], ranges[k, j] = ranges[k, j], ranges[k, j - 1]
                    if kind == GATHERED:
                        row = gathered + j - begin
                        for word in range(excluded.shape[1]):
                            excluded[row - 1, word], excluded[row, word] = excluded[row, word], excluded[row - 1, word]
                    j -= 1
        gathered += ends[t, 3] - ends[t, 2]
    return ranges, excluded, visits
