"""The tiles of one pass of one request and pattern on the device: the ranges of `tiles.py`, uploaded in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.orders import KeyOrders
from sglang_mminfer.planning.row_loops import sort_ranges
from sglang_mminfer.planning.tiles import EstimatedVisits, TilePass


@dataclass
class Tiles:
    """The tiles of one pass of one request and pattern, on the device, key tiles numbered in the batch's table.

    q_rows, q_stop: int32 [rows]; rows_per_tile: int32 [T].
    start, count: int64 [E], ranges of key tiles; ends: int64 [T, 4]: a tile's full ranges begin at ends[t, 0],
    its partial ones at ends[t, 1], its gathered ones at ends[t, 2], and end at ends[t, 3].
    excluded: int32 [gathered ranges, words], the lanes of each that do not count.
    most: the most full, partial and gathered ranges of a tile. room: the sum of `count`, or a bound on it.
    """

    num_tiles: int
    q_rows: torch.Tensor
    q_stop: torch.Tensor
    rows_per_tile: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    ends: torch.Tensor
    excluded: torch.Tensor
    most: tuple[int, int, int]
    room: int
    estimated: tuple[EstimatedTiles, ...] = ()
    gathered_count: torch.Tensor | None = None  # int64 [gathered ranges], 0 or 1; None: all 1


@dataclass
class EstimatedTiles:
    """`EstimatedVisits` on the device: int64 [T'] keys_of_first_row, keys_of_last_row and full_tiles."""

    visits: EstimatedVisits
    first_tile: int  # of the base order in the table
    keys_of_first_row: torch.Tensor
    keys_of_last_row: torch.Tensor
    full_tiles: torch.Tensor

    @property
    def most_partial(self) -> int:
        """Key tiles that some rows of a query tile see in part, at most."""
        visits = self.visits
        return int((-(-visits.keys_of_last_row // visits.base.block_k) - visits.full_tiles).max())

    def room(self, ranges: int) -> int:
        """A bound on the full key tiles that so many crossing ranges have."""
        visits = self.visits
        each = (visits.keys_of_last_row - visits.keys_of_first_row) // visits.base.block_k + 2
        return int(np.minimum(ranges * each, visits.full_tiles).sum())


def upload(tile_pass: TilePass, request: int, chunk: RequestChunk, keys: KeyOrders, device: torch.device) -> Tiles:
    """The pass of request number `request` on the device; the key orders that it visits get their place in `keys`."""
    start, count, excluded = tile_pass.start, tile_pass.count, tile_pass.excluded
    if tile_pass.orders:
        first_tile = np.array([keys.first_tile(request, order) for order in tile_pass.orders], dtype=np.int32)
        start = start + first_tile[tile_pass.order]
    if len(tile_pass.orders) > 1:
        count, excluded = count.copy(), excluded.copy()
        sort_ranges(start, count, tile_pass.ends, excluded)
    estimated = tile_pass.estimated
    uploads = [[e.keys_of_first_row, e.keys_of_last_row, e.full_tiles] for e in estimated]
    q_rows, q_stop, rows_per_tile, *parts = to_device(
        device,
        tile_pass.q_pos + (chunk.row_start - chunk.q_start),
        tile_pass.q_stop,
        tile_pass.rows_per_tile,
        start,
        count,
        tile_pass.ends,
        excluded,
        *(array for arrays in uploads for array in arrays),
    )
    by_kind = np.diff(tile_pass.ends, axis=1)
    return Tiles(
        num_tiles=tile_pass.num_tiles,
        q_rows=q_rows,
        q_stop=q_stop,
        rows_per_tile=rows_per_tile,
        start=parts[0].long(),
        count=parts[1].long(),
        ends=parts[2].long(),
        excluded=parts[3],
        most=tuple(by_kind.max(axis=0, initial=0).tolist()),
        room=int(count.sum()),
        estimated=tuple(
            EstimatedTiles(e, keys.first_tile(request, e.base), *(x.long() for x in parts[4 + 3 * i : 7 + 3 * i]))
            for i, e in enumerate(estimated)
        ),
    )


def joined(parts: Sequence[TilePass]) -> TilePass:
    """The tiles of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    first_tile = np.cumsum([0, *(part.num_tiles for part in parts)])
    first_range = np.cumsum([0, *(len(part.start) for part in parts)], dtype=np.int32)
    orders = tuple(dict.fromkeys(order for part in parts for order in part.orders))
    places = [np.array([*map(orders.index, part.orders), 0], dtype=np.int32) for part in parts]

    def all_of(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return TilePass(
        q_pos=all_of("q_pos"),
        q_stop=all_of("q_stop"),
        rows_per_tile=all_of("rows_per_tile"),
        orders=orders,
        order=np.concatenate([place[part.order] for place, part in zip(places, parts)]),
        start=all_of("start"),
        count=all_of("count"),
        ends=np.concatenate([part.ends + first for part, first in zip(parts, first_range)]),
        excluded=all_of("excluded"),
        estimated=tuple(
            replace(visits, tile=visits.tile + first)
            for part, first in zip(parts, first_tile)
            for visits in part.estimated
        ),
    )
