"""The tiles of one pass of one request and pattern on the device: the ranges of `tiles.py`, uploaded in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.orders import KeyOrders
from sglang_mminfer.planning.tiles import GATHERED, EstimatedVisits, TilePass


@dataclass
class Tiles:
    """The tiles of one pass of one request and pattern, on the device, key tiles numbered in the batch's table.

    q_rows, q_stop: int32 [rows]; rows_per_tile: int32 [T].
    start, count: int64 [E], ranges of key tiles; ends: int64 [T, 4]: a tile's full ranges begin at ends[t, 0],
    its partial ones at ends[t, 1], its gathered ones at ends[t, 2], and end at ends[t, 3].
    excluded: int32 [gathered ranges, words], the lanes of each that do not count.
    most: the most full, partial and gathered ranges of a tile.
    rows, room: int64 [T] on the host, the rows of each tile, and the sum of its `count` or a bound on it.
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
    rows: Ints
    room: Ints
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

    def room(self, ranges: int) -> Ints:
        """int64 [T']: a bound on the full key tiles that so many crossing ranges have."""
        visits = self.visits
        each = (visits.keys_of_last_row - visits.keys_of_first_row) // visits.base.block_k + 2
        return np.minimum(ranges * each, visits.full_tiles)


def upload(tile_pass: TilePass, request: int, chunk: RequestChunk, keys: KeyOrders, device: torch.device) -> Tiles:
    """The pass of request number `request` on the device; the key orders that it visits get their place in `keys`."""

    def joined(parts: Sequence[np.ndarray], none: tuple[int, ...] = (0,)) -> np.ndarray:
        return np.concatenate(parts) if parts else np.zeros(none, dtype=np.int64)

    visits, num_tiles = tile_pass.visits, tile_pass.num_tiles
    tile, count = joined([v.tile for v in visits]), joined([v.count for v in visits])
    start = joined([v.start + keys.first_tile(request, v.order) for v in visits])
    kind = joined([np.full(len(v.tile), v.kind) for v in visits])
    excluded = joined([v.excluded for v in visits if v.excluded is not None], (0, -(-keys.block_k // 32)))
    # One number for tile, kind and start: parts are ascending already, which a stable sort makes use of.
    order = ((tile * 3 + kind) * (start.max(initial=0) + 1) + start).argsort(kind="stable")
    row_of = np.cumsum(kind == GATHERED) - 1  # in `excluded`
    excluded = excluded[row_of[order[kind[order] == GATHERED]]]
    by_kind = np.bincount(tile * 3 + kind, minlength=3 * num_tiles).reshape(num_tiles, 3)
    ends = np.concatenate([[0], np.cumsum(by_kind)])
    ends = np.stack([ends[:-1:3], ends[1::3], ends[2::3], ends[3::3]], axis=1)
    rows, stop = joined(tile_pass.q_pos), joined(tile_pass.q_stop)
    rows_per_tile, estimated = joined(tile_pass.rows_per_tile), tile_pass.estimated
    uploads = [[e.keys_of_first_row, e.keys_of_last_row, e.full_tiles] for e in estimated]
    q_rows, q_stop, rows_of_tile, *parts = to_device(
        device,
        rows - chunk.q_start + chunk.row_start,
        stop,
        rows_per_tile,
        start[order],
        count[order],
        ends,
        excluded,
        *(array for arrays in uploads for array in arrays),
    )
    return Tiles(
        num_tiles=num_tiles,
        q_rows=q_rows,
        q_stop=q_stop,
        rows_per_tile=rows_of_tile,
        start=parts[0].long(),
        count=parts[1].long(),
        ends=parts[2].long(),
        excluded=parts[3],
        most=tuple(by_kind.max(axis=0, initial=0).tolist()),
        rows=rows_per_tile,
        room=np.bincount(tile, count, minlength=num_tiles).astype(np.int64),
        estimated=tuple(
            EstimatedTiles(e, keys.first_tile(request, e.base), *(x.long() for x in parts[4 + 3 * i : 7 + 3 * i]))
            for i, e in enumerate(estimated)
        ),
    )
