"""The tiles of a request in a batch: rows of q, and key tiles by their number in the batch's table. On the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.orders import KeyOrders
from sglang_mminfer.planning.row_loops import key_tiles_of, sort_ranges
from sglang_mminfer.planning.tiles import EstimatedVisits, TilePass


@dataclass(frozen=True, eq=False)
class PlacedTiles:
    """T query tiles of R rows of one pass, and the E ranges of key tiles that they visit, tile by tile. All int32.

    q_rows, q_stop: [R], rows of q and their bounds. rows_per_tile: [T].
    start, count: [E]. ends: [T, 4], see `TilePass`; the ranges of one kind ascend. excluded: [gathered ranges, words].
    visits: [T, 3], how many full, partial and gathered key tiles the ranges of each tile have.
    estimated: what estimates add, and the number of the first key tile of the order that each looks at.
    """

    q_rows: NDArray[np.int32]
    q_stop: NDArray[np.int32]
    rows_per_tile: NDArray[np.int32]
    start: NDArray[np.int32]
    count: NDArray[np.int32]
    ends: NDArray[np.int32]
    excluded: NDArray[np.int32]
    visits: NDArray[np.int32]
    estimated: tuple[tuple[EstimatedVisits, int], ...]

    @property
    def num_tiles(self) -> int:
        return len(self.rows_per_tile)


def placed(tile_pass: TilePass, request: int, chunk: RequestChunk, keys: KeyOrders) -> PlacedTiles:
    """The pass of request number `request`; the key orders that it visits get their place in `keys`."""
    start, count, excluded = tile_pass.start, tile_pass.count, tile_pass.excluded
    first_tile = [keys.first_tile(request, order) for order in tile_pass.orders]
    if len(first_tile) == 1:
        start = start + np.int32(first_tile[0])
    elif first_tile:
        start, count, excluded = start + np.array(first_tile, np.int32)[tile_pass.order], count.copy(), excluded.copy()
        sort_ranges(start, count, tile_pass.ends, excluded)
    return PlacedTiles(
        q_rows=tile_pass.q_pos + np.int32(chunk.row_start - chunk.q_start),
        q_stop=tile_pass.q_stop,
        rows_per_tile=tile_pass.rows_per_tile,
        start=start,
        count=count,
        ends=tile_pass.ends,
        excluded=excluded,
        visits=key_tiles_of(count, tile_pass.ends),
        estimated=tuple((visits, keys.first_tile(request, visits.base)) for visits in tile_pass.estimated),
    )
