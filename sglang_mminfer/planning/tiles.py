"""From what a pattern wants (`PairIndex`) to visits of tiles, for one chunk of one request.

Rows of a class are grouped by which of their pairs they see whole (`groups.py`), each group is cut into query tiles by
the rows' index in the group's order, anew where rows are far apart, and each tile names the ranges of key tiles that
any of its rows wants. A row's group, its tile and that tile's rows so far depend only on what comes before the row,
which is why neither chunks nor cached prefixes nor later turns change what it sees.

All of this is arithmetic on runs and ranges, done on the host while the device is busy with what came before: it
costs what segments, frames, and tiles of the chunk cost, not what the prompt's tokens do. Heads whose boundaries do
the same with rows of one class share that class's tiles. `device_tiles.py` uploads the ranges, and `assembly.py` spells
them out on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from sglang_mminfer.modality.runs import Bools, Ints
from sglang_mminfer.modality.segment_table import CODES, codes_of
from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.boundary import HeadPattern, RowClass, row_classes
from sglang_mminfer.patterns.estimated import Estimated
from sglang_mminfer.patterns.index import Lines, Scope
from sglang_mminfer.planning.groups import RowGroups
from sglang_mminfer.planning.line_loops import tile_lines
from sglang_mminfer.planning.lines import LineOrder
from sglang_mminfer.planning.orders import ColumnOrder, CompactOrder, KeyOrder
from sglang_mminfer.planning.row_loops import RowCut, RowTiles, cut_rows, tile_rows

BLOCK_Q, BLOCK_K = 128, 64
"""The rows of a query tile, at most, and the keys of a key tile."""


@dataclass(frozen=True)
class EstimatedVisits:
    """Tiles that also visit what an estimate picks: all tiles of one group.

    tile: int64, their numbers. keys_of_first_row, keys_of_last_row: int64, keys of the class up to that row of a tile;
    full_tiles: int64, the first so many are visible to all of its rows.
    """

    pattern: Estimated
    scope: Scope
    base: CompactOrder
    tile: Ints
    keys_of_first_row: Ints
    keys_of_last_row: Ints
    full_tiles: Ints


@dataclass(eq=False)
class TilePass:
    """Tiles of one pass: T query tiles of R rows, and the E ranges of key tiles that they visit, tile by tile.

    rows: int32 [2, R], rows of q, and bounds on the positions that they see. rows_per_tile: int32 [T].
    orders: the key orders that are visited, by numbers, in the sequence in which they come up. order: int32 [E], such a
    number; ranges: int32 [2, E], the first key tile of that order, and how many. ends: int32 [T, 4]: a tile's full
    ranges begin at ends[t, 0], its partial ones at ends[t, 1], its gathered ones, which are of one key tile each, at
    ends[t, 2], and end at ends[t, 3]. A tile has those of one kind and order in ascending order.
    excluded: int32 [gathered ranges, words], excluded lanes, packed.
    """

    rows: NDArray[np.int32]
    rows_per_tile: NDArray[np.int32]
    orders: Mapping[int, KeyOrder]
    order: NDArray[np.int32]
    ranges: NDArray[np.int32]
    ends: NDArray[np.int32]
    excluded: NDArray[np.int32]
    estimated: tuple[EstimatedVisits, ...] = ()

    @property
    def num_tiles(self) -> int:
        return len(self.rows_per_tile)

    @classmethod
    def joined(cls, parts: Sequence[TilePass]) -> TilePass:
        """The tiles of all parts, one after the other."""
        first_tile = list(accumulate((part.num_tiles for part in parts), initial=0))
        first_range = accumulate((len(part.order) for part in parts), initial=0)
        first_order = list(accumulate((1 + max(part.orders, default=-1) for part in parts), initial=0))
        return cls(
            rows=np.concatenate([part.rows for part in parts], axis=1),
            rows_per_tile=np.concatenate([part.rows_per_tile for part in parts]),
            orders={first + n: order for first, part in zip(first_order, parts) for n, order in part.orders.items()},
            order=np.concatenate([part.order + np.int32(first) for first, part in zip(first_order, parts)]),
            ranges=np.concatenate([part.ranges for part in parts], axis=1),
            ends=np.concatenate([part.ends + np.int32(first) for first, part in zip(first_range, parts)]),
            excluded=np.concatenate([part.excluded for part in parts]),
            estimated=tuple(
                replace(visits, tile=visits.tile + first)
                for first, part in zip(first_tile, parts)
                for visits in part.estimated
            ),
        )


class ChunkTiler:
    """Tiles of one request's chunk: rows [q_start, kv_len), keys [0, kv_len). Orders are built once and shared.

    Args:
        row_start: the row of q at q_start.
    """

    def __init__(
        self,
        modality_map: ModalityMap,
        q_start: int,
        kv_len: int,
        dense_below: int,
        block_q: int,
        block_k: int,
        row_start: int = 0,
    ) -> None:
        self.map, self.q_start, self.kv_len, self.row_start = modality_map, q_start, kv_len, row_start
        self.dense_below, self.block_q, self.block_k = dense_below, block_q, block_k
        self._base: dict[Modality | None, CompactOrder] = {}
        self._columns: dict[tuple[Modality | None, int, int, int], ColumnOrder] = {}
        self._lines: dict[str, LineOrder] = {}
        self._cuts: dict[int, RowCut] = {}
        self._row_classes: dict[RowClass, list[TilePass]] = {}

    def tile(self, head: HeadPattern) -> list[list[TilePass]]:
        """The passes of one head pattern, in parts: first the tiles of each row class, then those of each set of raster
        lines."""
        of_classes = [tiles for row_class in row_classes(head) if (tiles := self._row_class(row_class))]
        if not of_classes:
            return []
        return [[first for first, *_ in of_classes], *([lines] for _, *passes in of_classes for lines in passes)]

    def _row_class(self, row_class: RowClass) -> list[TilePass]:
        """Tiles in ascending order, and those along the lines of each pair that has some; nothing without rows."""
        if row_class not in self._row_classes:
            self._row_classes[row_class] = self._tile(row_class)
        return self._row_classes[row_class]

    def _tile(self, row_class: RowClass) -> list[TilePass]:
        groups = RowGroups.of(self.map, row_class, self.dense_below, self.block_q)
        cut = self._cut(groups)
        if not len(cut.first_row):
            return []
        tiles = tile_rows(
            cut,
            groups.sees_whole,
            groups.keys,
            groups.wanted,
            groups.columns,
            groups.column_first,
            self.row_start,
            self.kv_len - self.q_start,
            self.kv_len,
            self.block_k,
        )
        group_of = tiles.group_of_order.tolist()
        orders: dict[int, KeyOrder] = {}
        # In the sequence in which groups, and in a group pairs, come upon them.
        for _, order in sorted((group, order) for order, group in enumerate(group_of) if group >= 0):
            keys, index = row_class.pairs[order // 2][0], groups.pairs[order // 2]
            if order % 2 and index.columns is not None:
                orders[order] = self._column_order(keys, index.columns, *tiles.column_ends[order // 2].tolist())
            else:
                orders[order] = self._base_order(keys)
        first = TilePass(
            rows=cut.rows,
            rows_per_tile=cut.rows_per_tile,
            orders=orders,
            order=tiles.order,
            ranges=tiles.ranges,
            ends=tiles.ends,
            excluded=tiles.excluded,
            estimated=tuple(self._estimated(row_class, groups, cut, tiles)) if groups.estimates else (),
        )
        passes = [first]
        for pair, index in enumerate(groups.pairs):
            if index.lines is not None:
                lines = self._line_pass(row_class, pair, index.lines, tiles)
                if lines.num_tiles:
                    passes.append(lines)
        return passes

    def _cut(self, groups: RowGroups) -> RowCut:
        name = id(groups.rows)  # the map keeps the rows
        if name not in self._cuts:
            self._cuts[name] = cut_rows(*groups.rows, self.q_start, self.kv_len, self.row_start)
        return self._cuts[name]

    def _estimated(
        self, row_class: RowClass, groups: RowGroups, cut: RowCut, tiles: RowTiles
    ) -> Iterator[EstimatedVisits]:
        for group, (begin, end) in enumerate(pairwise(cut.tile_first.tolist())):
            for pair, ((keys, _), index) in enumerate(zip(row_class.pairs, groups.pairs)):
                base = self._base_order(keys)
                if begin < end and index.estimated and not groups.sees_whole[group, pair] and base.num_tiles:
                    yield EstimatedVisits(
                        index.estimated,
                        Scope(self.map, self.kv_len, row_class.rows, keys, row_class.text_rule),
                        base,
                        np.arange(begin, end),
                        *tiles.counts[:, pair, begin:end],
                    )

    def _line_pass(self, row_class: RowClass, pair: int, lines: Lines, tiles_of_rows: RowTiles) -> TilePass:
        """Rows in phase-major order over the keys of their own line, in all packs of the same raster so far.

        Only keys between the sink and the row's window count; the rest is visited by the first pass.
        """
        order = self._line_order(lines.stride)
        tiles = tile_lines(
            order.packs,
            order.rows,
            order.tile_ends,
            tiles_of_rows.bound[pair],
            _covered(row_class.rows),
            _covered(row_class.pairs[pair][0]),
            self.q_start,
            self.row_start,
            tiles_of_rows.first_key[pair],
            -1 if lines.skip is None else lines.skip,
            lines.skip_keys,
            self.block_q,
            self.block_k,
        )
        num_ranges = tiles.ranges.shape[1]
        return TilePass(
            rows=tiles.rows,
            rows_per_tile=tiles.rows_per_tile,
            orders={0: order} if num_ranges else {},
            order=np.zeros(num_ranges, dtype=np.int32),
            ranges=tiles.ranges,
            ends=tiles.ends,
            excluded=tiles.excluded,
        )

    # ---- shared orders -------------------------------------------------------------------------------------

    def _base_order(self, keys: Modality | None) -> CompactOrder:
        if keys not in self._base:
            self._base[keys] = CompactOrder(Scope(self.map, self.kv_len, keys=keys).key_members, self.block_k)
        return self._base[keys]

    def _column_order(self, keys: Modality | None, columns: Ints, first: int, stop: int) -> ColumnOrder:
        name = (keys, id(columns), first, stop)  # the map keeps the columns
        if name not in self._columns:
            self._columns[name] = ColumnOrder(columns[first:stop], self.block_k)
        return self._columns[name]

    def _line_order(self, stride: str) -> LineOrder:
        if stride not in self._lines:
            self._lines[stride] = LineOrder(
                self.map.table, stride, self.q_start, self.kv_len, self.block_q, self.block_k
            )
        return self._lines[stride]


@cache
def _covered(modality: Modality | None) -> Bools:
    """bool [codes]: which modalities a class covers."""
    return np.isin(list(CODES.values()), codes_of(modality))
