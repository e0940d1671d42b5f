"""The tiles of a request in a batch, on the host: key tiles have their number in the batch's table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_mminfer.planning.orders import KeyOrders
from sglang_mminfer.planning.row_loops import place
from sglang_mminfer.planning.tiles import EstimatedVisits, TilePass


@dataclass(eq=False)
class PlacedTiles:
    """T query tiles of R rows of one pass, and the E ranges of key tiles that they visit, tile by tile. All int32.

    rows: [2, R], rows of q, and bounds on the positions that they see. rows_per_tile: [T].
    ranges: [2, E], the first key tile and how many. ends: [T, 4], see `TilePass`; the ranges of one kind ascend.
    excluded: [gathered ranges, words].
    visits: [T, 3], how many full, partial and gathered key tiles the ranges of each tile have.
    estimated: what estimates add, and the number of the first key tile of the order that each looks at.
    """

    rows: NDArray[np.int32]
    rows_per_tile: NDArray[np.int32]
    ranges: NDArray[np.int32]
    ends: NDArray[np.int32]
    excluded: NDArray[np.int32]
    visits: NDArray[np.int32]
    estimated: tuple[tuple[EstimatedVisits, int], ...]

    @property
    def num_tiles(self) -> int:
        return len(self.rows_per_tile)


def placed(tile_pass: TilePass, request: int, keys: KeyOrders) -> PlacedTiles:
    """The pass of request number `request`; the key orders that it visits get their place in `keys`."""
    first_tile = np.zeros(1 + max(tile_pass.orders, default=0), dtype=np.int64)
    for number, order in tile_pass.orders.items():
        first_tile[number] = keys.first_tile(request, order)
    ranges, excluded, visits = place(tile_pass.order, tile_pass.ranges, tile_pass.ends, tile_pass.excluded, first_tile)
    return PlacedTiles(
        rows=tile_pass.rows,
        rows_per_tile=tile_pass.rows_per_tile,
        ranges=ranges,
        ends=tile_pass.ends,
        excluded=excluded,
        visits=visits,
        estimated=tuple((added, keys.first_tile(request, added.base)) for added in tile_pass.estimated),
    )
