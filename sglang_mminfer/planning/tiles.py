"""From what a pattern wants (`PairIndex`) to visits of tiles, for one chunk of one request.

Rows of a class are grouped by which of their pairs they see whole, each group is cut into query tiles by the rows'
index in the group's order, anew where rows are far apart, and each tile names the ranges of key tiles that any of its
rows wants. A row's group, its tile and that tile's rows so far depend only on what comes before the row, which is why
neither chunks nor cached prefixes nor later turns change what it sees.

All of this is arithmetic on runs and ranges, done on the host while the device is busy with what came before: it
costs what segments, frames, and tiles of the chunk cost, not what the prompt's tokens do. `device_tiles.py` uploads
the ranges, and `assembly.py` spells them out on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from sglang_mminfer.kernels.block_plan import PAD_POSITION, pack_lanes_on_host
from sglang_mminfer.modality.runs import Ints, Runs, expand
from sglang_mminfer.modality.segment_table import codes_of
from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.boundary import HeadPattern, RowClass, row_classes
from sglang_mminfer.patterns.estimated import Estimated
from sglang_mminfer.patterns.index import Lines, PairIndex, Scope
from sglang_mminfer.planning.lines import LineOrder
from sglang_mminfer.planning.orders import CompactOrder, KeyOrder

BLOCK_Q, BLOCK_K = 128, 64
"""The rows of a query tile, at most, and the keys of a key tile."""

# How a key tile is visited, and so which mask it needs: none, a comparison of positions, that and a mask of lanes.
FULL, PARTIAL, GATHERED = range(3)


@dataclass(frozen=True)
class Visits:
    """Query tile tile[i] visits the key tiles start[i] .. start[i] + count[i] - 1 of `order`.

    excluded: int32 [visits, words], excluded lanes, packed; only for GATHERED, whose visits are of one key tile each.
    """

    order: KeyOrder
    kind: int
    tile: Ints
    start: Ints
    count: Ints
    excluded: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class EstimatedVisits:
    """Tiles that also visit what an estimate picks: all tiles of one group.

    keys_of_first_row, keys_of_last_row: keys of the class up to that row of a tile; full_tiles: the first so many are
    visible to all of its rows.
    """

    pattern: Estimated
    scope: Scope
    base: CompactOrder
    tile: Ints
    keys_of_first_row: Ints
    keys_of_last_row: Ints
    full_tiles: Ints


@dataclass
class TilePass:
    """Tiles of one pass: the chunk's rows by position and their bounds, and what each tile visits. int64."""

    q_pos: list[Ints] = field(default_factory=list)
    q_stop: list[Ints] = field(default_factory=list)
    rows_per_tile: list[Ints] = field(default_factory=list)
    visits: list[Visits] = field(default_factory=list)
    estimated: list[EstimatedVisits] = field(default_factory=list)
    num_tiles: int = 0

    def add_tiles(self, q_pos: Ints, q_stop: Ints, rows_per_tile: Ints) -> Ints:
        """Append tiles and return their numbers."""
        first = self.num_tiles
        self.q_pos.append(q_pos)
        self.q_stop.append(q_stop)
        self.rows_per_tile.append(rows_per_tile)
        self.num_tiles += len(rows_per_tile)
        return np.arange(first, self.num_tiles)

    def visit(self, order: KeyOrder, kind: int, tiles: Ints, start: Ints, stop: Ints) -> None:
        """Tile tiles[i] visits the key tiles start[i] .. stop[i] - 1 of `order`."""
        some = start < stop
        if some.any():
            self.visits.append(Visits(order, kind, tiles[some], start[some], (stop - start)[some]))

    def visit_ascending(self, order: KeyOrder, tiles: Ints, start: Ints, stop: Ints, full_tiles: Ints) -> None:
        """The same, where the first `full_tiles` key tiles are visible to all rows of the query tile."""
        self.visit(order, FULL, tiles, start, np.minimum(stop, full_tiles))
        self.visit(order, PARTIAL, tiles, np.maximum(start, full_tiles), stop)

    def gather(self, order: KeyOrder, tiles: Ints, blocks: Ints, excluded: NDArray[np.int32]) -> None:
        """Tile tiles[i] visits key tile blocks[i], of which excluded[i] (packed) does not count."""
        if len(tiles):
            self.visits.append(Visits(order, GATHERED, tiles, blocks, np.ones_like(blocks), excluded))


class ChunkTiler:
    """Tiles of one request's chunk: rows [q_start, kv_len), keys [0, kv_len). Orders are built once and shared."""

    def __init__(
        self,
        modality_map: ModalityMap,
        q_start: int,
        kv_len: int,
        dense_below: int,
        block_q: int,
        block_k: int,
    ) -> None:
        self.map, self.q_start, self.kv_len = modality_map, q_start, kv_len
        self.dense_below, self.block_q, self.block_k = dense_below, block_q, block_k
        self._base: dict[Modality | None, CompactOrder] = {}
        self._columns: dict[tuple, CompactOrder] = {}
        self._lines: dict[str, LineOrder] = {}

    def tile(self, head: HeadPattern) -> list[TilePass]:
        """The passes of one head pattern: first all tiles by row class, then one for each set of raster lines."""
        first, passes = TilePass(), []
        for row_class in row_classes(head):
            for key_class, index, bound in self._row_class(row_class, first):
                assert index.lines is not None
                lines = self._line_pass(row_class, key_class, index, index.lines, bound)
                if lines.num_tiles:
                    passes.append(lines)
        return [first, *passes]

    # ---- rows of one class, tiled in ascending order -------------------------------------------------------

    def _row_class(self, row_class: RowClass, out: TilePass) -> list[tuple[Modality | None, PairIndex, Ints]]:
        """Tile one row class. Returns, for pairs with lines, the bound below which a row's lines may count:
        int64 [kv_len - q_start], the position where the row's own window starts, 0 for rows without lines."""
        scope = Scope(self.map, self.kv_len, row_class.rows, text_rule=row_class.text_rule)
        if not len(scope.row_members.clip(self.q_start, self.kv_len)):
            return []
        scopes = [replace(scope, keys=keys) for keys, _ in row_class.pairs]
        pairs = [(s, p.index(s)) for s, (_, p) in zip(scopes, row_class.pairs)]
        bounds = [np.zeros(self.kv_len - self.q_start, dtype=np.int64) for _ in pairs]
        for sees_whole, order in self._groups(scope.row_members, [index for _, index in pairs]):
            if len(order.clip(self.q_start, self.kv_len)):
                self._group(order, sees_whole, pairs, out, bounds)
        return [(s.keys, index, bounds[j]) for j, (s, index) in enumerate(pairs) if index.lines is not None]

    def _groups(self, members: Runs, pairs: list[PairIndex]) -> list[tuple[tuple[bool, ...], Runs]]:
        """Rows by which of the pairs they see whole."""
        early = members.clip(0, self.dense_below)
        groups = [((), members.clip(self.dense_below, self.kv_len))]
        for index in pairs:
            cut: list[tuple[tuple[bool, ...], Runs]] = []
            for sees_whole, rows in groups:
                if index.whole_rows is None:
                    cut.append(((*sees_whole, False), rows))
                else:
                    cut.append(((*sees_whole, False), rows - index.whole_rows))
                    cut.append(((*sees_whole, True), rows & index.whole_rows))
            groups = cut  # type: ignore[assignment]
        every = (True,) * len(pairs)
        whole = next((rows for sees_whole, rows in groups if sees_whole == every), Runs([], []))
        return [g for g in groups if g[0] != every] + [(every, early | whole)]

    def _group(
        self,
        order: Runs,
        sees_whole: tuple[bool, ...],
        pairs: list[tuple[Scope, PairIndex]],
        out: TilePass,
        bounds: list[Ints],
    ) -> None:
        low = int(order.rank(self.q_start))
        begin, end = self._query_tiles(order, low, sees_whole, pairs)
        live_begin = np.maximum(begin, low)
        first_row, last_row, first_live = order.select(begin), order.select(end - 1), order.select(live_begin)
        rows_of_chunk = order.clip(self.q_start, self.kv_len).members()
        rows_per_tile = end - live_begin
        tiles = out.add_tiles(rows_of_chunk, rows_of_chunk + 1, rows_per_tile)
        zero = np.zeros_like(tiles)
        for j, (scope, index) in enumerate(pairs):
            base = self._base_order(scope)
            if base.num_tiles == 0:
                continue
            # Keys of the class up to the first and the last row.
            keys_of_first_row, keys_of_last_row = base.keys.rank(first_row + 1), base.keys.rank(last_row + 1)
            stop, full_tiles = -(-keys_of_last_row // self.block_k), base.keys.rank(first_live + 1) // self.block_k
            if sees_whole[j]:
                out.visit_ascending(base, tiles, zero, stop, full_tiles)
                continue
            if index.estimated is not None:
                visits = EstimatedVisits(
                    index.estimated, scope, base, tiles, keys_of_first_row, keys_of_last_row, full_tiles
                )
                out.estimated.append(visits)
                continue
            sink_tiles = -(-index.sink // self.block_k)
            window = np.maximum(keys_of_first_row - index.local, 0) // self.block_k
            out.visit_ascending(base, tiles, zero, np.minimum(np.minimum(window, stop), sink_tiles), full_tiles)
            out.visit_ascending(base, tiles, window, stop, full_tiles)
            if index.columns is not None:
                self._visit_columns(index.columns, scope, base, sink_tiles, window, tiles, out)
            if index.lines is not None:
                # local >= 1, so the window starts inside the order
                starts = np.where(window == 0, 0, base.keys.select(window * self.block_k))
                bounds[j][rows_of_chunk - self.q_start] = np.repeat(starts, rows_per_tile)

    def _query_tiles(
        self, order: Runs, low: int, sees_whole: tuple[bool, ...], pairs: list[tuple[Scope, PairIndex]]
    ) -> tuple[Ints, Ints]:
        """First and last + 1 of the rows of each tile, by their index in the order, from the one that has `low` on.

        A window reaches from a tile's first row to its last, so that a tile with text from both sides of a video would
        visit the video. Where rows are further apart than what one more tile would visit, a tile begins.
        """
        gap, row = order.starts[1:] - order.stops[:-1], order.starts[1:]
        more = self.block_q + sum(
            self._base_order(scope).keys.rank(row) if whole else index.keys_of_one_more_tile(self.map.length)
            for whole, (scope, index) in zip(sees_whole, pairs)
        )
        starts_tiles = np.concatenate([[True], gap > more])
        start = order.before[:-1][starts_tiles]
        stop = np.concatenate([start[1:], [len(order)]])
        start, stop = start[stop > low], stop[stop > low]
        start = start + np.maximum(low - start, 0) // self.block_q * self.block_q
        count = -(-(stop - start) // self.block_q)
        begin = np.repeat(start, count) + expand(np.zeros_like(count), count) * self.block_q
        return begin, np.minimum(begin + self.block_q, np.repeat(stop, count))

    def _visit_columns(
        self,
        columns: Ints,
        scope: Scope,
        base: CompactOrder,
        sink_tiles: int,
        window: Ints,
        tiles: Ints,
        out: TilePass,
    ) -> None:
        """Gathered columns between the sink and the window, which all rows of a tile see."""
        ranks = base.keys.rank(columns)
        gathered = ranks >= sink_tiles * self.block_k
        columns, ranks = columns[gathered], ranks[gathered]
        order = self._column_order(scope, columns)
        in_reach = np.searchsorted(ranks, window * self.block_k)
        whole = in_reach // self.block_k
        out.visit(order, FULL, tiles, np.zeros_like(whole), whole)
        cut = in_reach % self.block_k > 0
        excluded = np.arange(self.block_k) >= (in_reach % self.block_k)[cut, None]
        out.gather(order, tiles[cut], whole[cut], pack_lanes_on_host(excluded))

    # ---- rows along the lines of a raster ------------------------------------------------------------------

    def _line_pass(
        self, row_class: RowClass, key_class: Modality | None, index: PairIndex, lines: Lines, bound: Ints
    ) -> TilePass:
        """Rows in phase-major order over the keys of their own line, in all packs of the same raster so far.

        Only keys between the sink and the row's window count (`bound`); the rest is visited by the first pass.
        """
        out = TilePass()
        keys = self._base_order(Scope(self.map, self.kv_len, keys=key_class)).keys
        sink_stop = -(-index.sink // self.block_k) * self.block_k
        first_key = int(keys.select(sink_stop)) if sink_stop < len(keys) else self.kv_len
        order = self._line_order(lines.stride)
        pack, row, q_pos = order.rows
        wanted = (bound[q_pos - self.q_start] > first_key) & np.isin(order.code[pack], codes_of(row_class.rows))
        if lines.skip is not None:
            wanted &= row // order.length[pack] != lines.skip
        pack, row, q_pos = pack[wanted], row[wanted], q_pos[wanted]
        if not len(pack):
            return out
        begin = np.flatnonzero(np.append(True, (np.diff(pack) > 0) | (np.diff(row // self.block_q) != 0)))
        stops = bound[q_pos - self.q_start]
        tiles = out.add_tiles(q_pos, stops, np.diff(np.append(begin, len(pack))))
        least, most = np.minimum.reduceat(stops, begin), np.maximum.reduceat(stops, begin)
        # A tile's lines are those of all its places, whether their rows are in this chunk or not.
        pack, first = pack[begin], row[begin] // self.block_q * self.block_q
        last = np.minimum(first + self.block_q, order.size[pack]) - 1
        first_line, last_line = first // order.length[pack], last // order.length[pack]
        for code in codes_of(key_class):
            first_pack, count = order.packs_before(pack, code, most)
            number, earlier = np.repeat(tiles, count), expand(first_pack, count)
            start, count = order.tiles_of_lines(earlier, first_line[number], last_line[number])
            blocks, number = expand(start, count), np.repeat(number, count)
            reached = order.nearest[blocks] < most[number]
            blocks, number = blocks[reached], number[reached]
            self._visit_lines(order, lines, first_key, blocks, number, least[number], out)
        return out

    def _visit_lines(
        self,
        order: LineOrder,
        lines: Lines,
        first_key: int,
        blocks: Ints,
        tiles: Ints,
        least: Ints,
        out: TilePass,
    ) -> None:
        """Tile tiles[i], whose rows all see the positions below least[i], visits blocks[i]. Keys in the sink and
        those that are columns are visited by the first pass already: they are excluded here."""
        suspect = order.nearest < first_key
        if lines.skip is not None and lines.skip_keys:
            suspect |= order.touches(lines.skip)
        gathered, full = suspect[blocks], order.farthest[blocks] < least
        for kind, chosen in ((FULL, full & ~gathered), (PARTIAL, ~full & ~gathered)):
            out.visit(order, kind, tiles[chosen], blocks[chosen], blocks[chosen] + 1)
        tiles, blocks = tiles[gathered], blocks[gathered]
        distinct = np.flatnonzero(np.bincount(blocks, minlength=order.num_tiles))
        position, line = order.lanes(distinct)
        excluded = (position < first_key) | (lines.skip_keys & (line == lines.skip)) | (position == PAD_POSITION)
        which = np.searchsorted(distinct, blocks)
        counts = ~excluded.all(axis=1)[which]
        out.gather(order, tiles[counts], blocks[counts], pack_lanes_on_host(excluded)[which[counts]])

    # ---- shared orders -------------------------------------------------------------------------------------

    def _base_order(self, scope: Scope) -> CompactOrder:
        if scope.keys not in self._base:
            self._base[scope.keys] = CompactOrder(scope.key_members, self.block_k)
        return self._base[scope.keys]

    def _column_order(self, scope: Scope, columns: Ints) -> CompactOrder:
        name = (scope.keys, columns.tobytes())
        if name not in self._columns:
            self._columns[name] = CompactOrder(Runs.points(columns), self.block_k)
        return self._columns[name]

    def _line_order(self, stride: str) -> LineOrder:
        if stride not in self._lines:
            self._lines[stride] = LineOrder(
                self.map.table, stride, self.q_start, self.kv_len, self.block_q, self.block_k
            )
        return self._lines[stride]
