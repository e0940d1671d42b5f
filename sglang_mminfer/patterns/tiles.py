"""From what a pattern wants (`PairIndex`) to lists of tiles, for one chunk of one request.

Rows of a class are grouped by which of their pairs they see whole, each group is cut into query tiles by the
rows' index in the group's order, and each tile lists the key tiles that any of its rows wants. A row's group,
its tile and that tile's rows so far depend only on what comes before the row, which is why neither chunks nor
cached prefixes nor later turns change what it sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns import a_shape, dense, grid, tri_shape
from sglang_mminfer.patterns.boundary import RowClass, row_classes
from sglang_mminfer.patterns.index import Lines, PairIndex, Scope
from sglang_mminfer.patterns.order import KeyOrder, column_order, compact_order, line_order, phase_major
from sglang_mminfer.patterns.spec import AShape, Dense, Grid, HeadPattern, Pattern, TriShape, VerticalSlash

# How the estimated patterns get their index: given the scope, one PairIndex.
Estimator = Callable[[VerticalSlash, Scope], PairIndex]

STATIC: dict[type, Callable[..., PairIndex]] = {
    Dense: dense.pair_index,
    AShape: a_shape.pair_index,
    TriShape: tri_shape.pair_index,
    Grid: grid.pair_index,
}


@dataclass
class TilePass:
    """Tiles of one pass: live rows by position, and (tile, key tile) visits by key order. int64."""

    q_pos: list[torch.Tensor] = field(default_factory=list)
    q_stop: list[torch.Tensor] = field(default_factory=list)
    rows_per_tile: list[torch.Tensor] = field(default_factory=list)
    visits: list[tuple[KeyOrder, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    num_tiles: int = 0

    def add_tiles(self, q_pos: torch.Tensor, q_stop: torch.Tensor, rows_per_tile: torch.Tensor) -> int:
        """Append tiles and return the number of the first."""
        first = self.num_tiles
        self.q_pos.append(q_pos)
        self.q_stop.append(q_stop)
        self.rows_per_tile.append(rows_per_tile)
        self.num_tiles += len(rows_per_tile)
        return first

    def visit(self, order: KeyOrder, tiles: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> None:
        """Tile tiles[i] visits the key tiles start[i] .. stop[i] - 1 of `order`."""
        stop = stop.clamp_max(order.num_tiles)
        count = (stop - start).clamp_min(0)
        total = int(count.sum())
        if total:
            begin = torch.repeat_interleave(start - (count.cumsum(0) - count), count)
            self.visits.append((order, torch.repeat_interleave(tiles, count), begin + torch.arange(total)))


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
        self._base: dict[Modality | None, KeyOrder] = {}
        self._frontier: dict[Modality | None, torch.Tensor] = {}
        self._lines: dict[tuple, KeyOrder] = {}

    def tile(self, head: HeadPattern, estimator: Estimator | None = None) -> list[TilePass]:
        """The passes of one head pattern: first all tiles by row class, then one for each set of raster lines."""
        first, passes = TilePass(), []
        for row_class in row_classes(head):
            window_starts = self._row_class(row_class, estimator, first)
            for key_class, index, bound in window_starts:
                assert index.lines is not None
                lines = self._line_pass(row_class, key_class, index, bound)
                if lines.num_tiles:
                    passes.append(lines)
        return [first, *passes]

    # ---- rows of one class, tiled in ascending order -------------------------------------------------------

    def _row_class(
        self, row_class: RowClass, estimator: Estimator | None, out: TilePass
    ) -> list[tuple[Modality | None, PairIndex, torch.Tensor]]:
        """Tile one row class. Returns, for pairs with lines, the bound below which a row's lines may count:
        int64 [kv_len - q_start], the position where the row's own window starts, 0 for rows without lines."""
        scope = Scope(self.map, self.kv_len, row_class.rows, text_rule=row_class.text_rule)
        members = self._members(row_class.rows)
        if not bool(members[self.q_start :].any()):
            return []
        pairs = [(k, self._index(replace(scope, keys=k), p, estimator)) for k, p in row_class.pairs]
        sees_whole = torch.zeros(self.kv_len, dtype=torch.int64)  # bit j: the row sees all keys of pair j
        for j, (_, index) in enumerate(pairs):
            if index.dense_rows is not None:
                sees_whole |= index.dense_rows.long() << j
        sees_whole[: self.dense_below] = (1 << len(pairs)) - 1
        bounds = {j: torch.zeros(self.kv_len - self.q_start, dtype=torch.int64) for j in range(len(pairs))}
        for group in sees_whole[self.q_start :][members[self.q_start :]].unique().tolist():
            order = torch.nonzero(members & (sees_whole == group)).flatten()
            self._group(order, group, pairs, out, bounds)
        return [(k, index, bounds[j]) for j, (k, index) in enumerate(pairs) if index.lines is not None]

    def _group(
        self,
        order: torch.Tensor,
        sees_whole: int,
        pairs: list[tuple[Modality | None, PairIndex]],
        out: TilePass,
        bounds: dict[int, torch.Tensor],
    ) -> None:
        low, high = int(torch.searchsorted(order, self.q_start)), len(order)
        tile_ids = torch.arange(low // self.block_q, -(-high // self.block_q))
        begin, end = tile_ids * self.block_q, ((tile_ids + 1) * self.block_q).clamp_max(high)
        first_row, last_row = order[begin], order[end - 1]
        live = order[low:]
        rows_per_tile = end - begin.clamp_min(low)
        tiles = out.add_tiles(live, live + 1, rows_per_tile) + torch.arange(len(tile_ids))
        zero = torch.zeros_like(tiles)
        for j, (key_class, index) in enumerate(pairs):
            base, frontier = self._base_order(key_class), self._frontier_of(key_class)
            if base.num_tiles == 0:
                continue
            near, far = frontier[first_row], frontier[last_row]  # keys of the class up to first and last row
            stop = -(-far // self.block_k)
            if sees_whole >> j & 1:
                out.visit(base, tiles, zero, stop)
                continue
            window = (near - index.local).clamp_min(0) // self.block_k if index.local else stop
            sink_tiles = -(-index.sink // self.block_k)
            out.visit(base, tiles, zero, torch.minimum(window, stop).clamp_max(sink_tiles))
            out.visit(base, tiles, window, stop)
            if index.diagonals is not None:
                self._visit_diagonals(index.diagonals, base, near, far, tiles, out)
            if index.columns is not None and len(index.columns):
                ranks = frontier[index.columns] - 1
                gathered = ranks >= sink_tiles * self.block_k  # a column in the sink is visited already
                order_of_columns = column_order(index.columns[gathered], ranks[gathered], base)
                in_reach = torch.searchsorted(ranks[gathered], window * self.block_k)
                out.visit(order_of_columns, tiles, zero, -(-in_reach // self.block_k))
            if index.lines is not None:
                # local >= 1, so the window starts inside the order
                starts = base.positions[window * self.block_k].long().masked_fill(window == 0, 0)
                bounds[j][live - self.q_start] = torch.repeat_interleave(starts, rows_per_tile)

    def _visit_diagonals(
        self,
        diagonals: torch.Tensor,
        base: KeyOrder,
        near: torch.Tensor,
        far: torch.Tensor,
        tiles: torch.Tensor,
        out: TilePass,
    ) -> None:
        """A diagonal at distance d crosses a tile's keys near - 1 - d .. far - 1 - d."""
        start = (near[:, None] - 1 - diagonals).clamp_min(0) // self.block_k
        stop = (far[:, None] - 1 - diagonals + self.block_k).clamp_min(0) // self.block_k
        # +1 where a run of tiles starts, -1 where it stops: the running sum is positive on visited tiles.
        edges = torch.zeros(len(tiles), base.num_tiles + 2, dtype=torch.int32)
        crossed = (stop > start).to(torch.int32)
        edges.scatter_add_(1, start.clamp_max(base.num_tiles + 1), crossed)
        edges.scatter_add_(1, stop.clamp_max(base.num_tiles + 1), -crossed)
        tile, block = torch.nonzero(edges.cumsum(1)[:, : base.num_tiles] > 0, as_tuple=True)
        out.visit(base, tiles[tile], block, block + 1)

    # ---- rows along the lines of a raster ------------------------------------------------------------------

    def _line_pass(
        self, row_class: RowClass, key_class: Modality | None, index: PairIndex, bound: torch.Tensor
    ) -> TilePass:
        """Rows in phase-major order over the keys of their own line, in all segments of the same raster so far.

        Only keys between the sink and the row's window count (`bound`); the rest is visited by the first pass.
        """
        out, lines = TilePass(), index.lines
        assert lines is not None
        base = self._base_order(key_class)
        sink_stop = -(-index.sink // self.block_k) * self.block_k
        first_key = int(base.positions[sink_stop]) if sink_stop < len(base.positions) else self.kv_len
        for number, segment in enumerate(self.map.segments):
            if segment.stop <= self.q_start or segment.start >= self.kv_len or segment.grid is None:
                continue
            if row_class.rows is not None and not row_class.rows.covers(segment.modality):
                continue
            order, line_length = phase_major(segment, lines.stride)
            live = self._live_rows(order, line_length, lines, bound, first_key)
            if not len(live):
                continue
            tile_ids, tile_of_row = torch.unique(live // self.block_q, return_inverse=True)
            q_pos = order[live]
            rows_per_tile = torch.bincount(tile_of_row)
            tiles = out.add_tiles(q_pos, bound[q_pos - self.q_start], rows_per_tile) + torch.arange(len(tile_ids))
            last_index = ((tile_ids + 1) * self.block_q).clamp_max(len(order)) - 1
            first_line, last_line = tile_ids * self.block_q // line_length, last_index // line_length
            for earlier in range(number + 1):
                grid = self.map.segments[earlier].grid
                if grid is None or grid.shape != segment.grid.shape:
                    continue
                keys = self._line_keys(earlier, key_class, lines, first_key)
                if keys is not None:
                    self._visit_lines(keys, earlier, lines, first_line, last_line, tiles, out)
        return out

    def _live_rows(
        self, order: torch.Tensor, line_length: int, lines: Lines, bound: torch.Tensor, first_key: int
    ) -> torch.Tensor:
        """Ascending indices in `order` of this chunk's rows that have anything to see along their line."""
        live = (order >= self.q_start) & (order < self.kv_len)
        index = torch.nonzero(live).flatten()
        wanted = bound[order[index] - self.q_start] > first_key
        if lines.skip is not None:
            wanted &= index // line_length != lines.skip
        return index[wanted]

    def _visit_lines(
        self,
        keys: KeyOrder,
        segment: int,
        lines: Lines,
        first_line: torch.Tensor,
        last_line: torch.Tensor,
        tiles: torch.Tensor,
        out: TilePass,
    ) -> None:
        grid = self.map.segments[segment].grid
        assert grid is not None
        line_length = grid.frames if lines.stride == "frame" else grid.frames * grid.rows
        start = first_line * line_length // self.block_k
        stop = -(-(last_line + 1) * line_length // self.block_k)
        out.visit(keys, tiles, start, stop)

    def _line_keys(self, number: int, key_class: Modality | None, lines: Lines, first_key: int) -> KeyOrder | None:
        segment = self.map.segments[number]
        if segment.grid is None or (key_class is not None and not key_class.covers(segment.modality)):
            return None
        name = (number, key_class, lines, first_key)
        if name not in self._lines:
            order, line_length = phase_major(segment, lines.stride)
            keep = (order >= first_key) & (order < self.kv_len)
            if lines.skip is not None:
                keep &= torch.arange(len(order)) // line_length != lines.skip
            self._lines[name] = line_order(order, keep, self.block_k)
        return self._lines[name]

    # ---- shared orders -------------------------------------------------------------------------------------

    def _index(self, scope: Scope, pattern: Pattern, estimator: Estimator | None) -> PairIndex:
        if isinstance(pattern, VerticalSlash):
            if estimator is None:
                raise ValueError("vertical_slash is estimated from q and k: it has no static tiles")
            return estimator(pattern, scope)
        return STATIC[type(pattern)](pattern, scope)

    def _members(self, modality: Modality | None) -> torch.Tensor:
        if modality is None:
            return torch.ones(self.kv_len, dtype=torch.bool)
        return self.map.members(modality)[: self.kv_len]

    def _base_order(self, key_class: Modality | None) -> KeyOrder:
        if key_class not in self._base:
            positions = torch.nonzero(self._members(key_class)).flatten()
            self._base[key_class] = compact_order(positions, self.block_k)
        return self._base[key_class]

    def _frontier_of(self, key_class: Modality | None) -> torch.Tensor:
        """int64 [kv_len]: how many keys of the class a row at each position may see."""
        if key_class not in self._frontier:
            self._frontier[key_class] = self._members(key_class).cumsum(0)
        return self._frontier[key_class]
