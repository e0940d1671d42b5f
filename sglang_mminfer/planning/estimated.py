"""What estimated patterns add to the tiles of a request: visits that follow from q and the keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.kernels.block_plan import PAD_POSITION, KeyTable
from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.kernels.triton import interpreted
from sglang_mminfer.patterns.basis import Basis
from sglang_mminfer.patterns.estimated import Estimated, Evidence, Findings, Picked, QueryTiles
from sglang_mminfer.patterns.index import Scope
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.device_tiles import Tiles
from sglang_mminfer.planning.orders import CompactOrder
from sglang_mminfer.planning.row_loops import FULL, GATHERED, PARTIAL

KINDS = {"full": FULL, "partial": PARTIAL, "gathered": GATHERED}


class Estimates:
    """What estimated patterns pick from, for some heads of one request; each scope is computed once.

    Args:
        heads: the query heads, ascending. q: [tokens, Hq, D]; k_cache: [slots, Hkv, D].
    """

    def __init__(
        self,
        request: RequestChunk,
        heads: tuple[int, ...],
        q: torch.Tensor,
        k_cache: torch.Tensor,
        sm_scale: float,
        basis: Basis | None,
    ) -> None:
        self.request, self.heads, self.k_cache, self.sm_scale, self.basis = request, heads, k_cache, sm_scale, basis
        self.q = q[request.row_start : request.row_start + request.num_rows]
        self._findings: dict[tuple, tuple[Evidence, Findings]] = {}
        self.overflow: list[torch.Tensor] = []

    def of(self, pattern: Estimated, scope: Scope, tiles: QueryTiles) -> Picked:
        """See `Estimated.select`."""
        name = (pattern, scope.rows, scope.keys)
        if name not in self._findings:
            keys = None
            if scope.keys is not None:
                keys = CompactOrder.positions_of([CompactOrder(scope.key_members, 1)], self.q.device)[0].long()
            evidence = Evidence(self.request, scope, self.heads, self.q, self.k_cache, keys, self.sm_scale, self.basis)
            self._findings[name] = evidence, pattern.estimate(evidence)
        picked = pattern.select(*self._findings[name], tiles)
        if picked.overflow is not None:
            self.overflow.append(picked.overflow)
        return picked


@dataclass(frozen=True, eq=False)
class EstimatedTiles:
    """Query tiles of one pass of one request; only the device knows how much they visit.

    rows, ranges, excluded: as in `Tiles`, ranges int64. ends: int64 [T, 4], see `TilePass`. gathered_count: int64
    [gathered ranges], 0 or 1.
    rows_per_tile, visits: as in `PlacedTiles`, on the host; `visits` are bounds.
    """

    rows: torch.Tensor
    ranges: torch.Tensor
    excluded: torch.Tensor
    ends: torch.Tensor
    gathered_count: torch.Tensor
    rows_per_tile: NDArray[np.int32]
    visits: NDArray[np.int32]


def with_estimate(tiles: Tiles, estimates: Estimates, keys: KeyTable, block_k: int) -> tuple[EstimatedTiles, KeyTable]:
    """A copy of `tiles` for each head, with what the head's estimate adds, and `keys` with the gathered columns."""
    heads, num_tiles, on_host = len(estimates.heads), tiles.placed.num_tiles, tiles.placed
    device, bounds = tiles.ranges.device, on_host.visits.copy()
    uploads = [(x.keys_of_first_row, x.keys_of_last_row, x.full_tiles) for x, _ in on_host.estimated]
    ends, *parts = (x.long() for x in to_device(device, on_host.ends, *(array for own in uploads for array in own)))
    most = np.diff(on_host.ends, axis=1).max(axis=0, initial=0).tolist()
    # [heads or 1, T, most] start and count
    ranges = [[_padded(tiles, ends, kind, most[kind])] for kind in (FULL, PARTIAL, GATHERED)]
    before = (ends[:, 3] - ends[:, 2]).cumsum(0) - (ends[:, 3] - ends[:, 2])
    lane_rows = before[:, None] + torch.arange(most[GATHERED], device=device)
    # [heads or 1, T, most, words]
    excluded = [tiles.excluded[lane_rows.clamp_max(max(len(tiles.excluded) - 1, 0))][None]]
    rows_before = np.concatenate([[0], on_host.rows_per_tile.cumsum()])
    for number, (visits, first_tile) in enumerate(on_host.estimated):
        first = int(visits.tile[0])
        own = slice(first, first + len(visits.tile))
        beside = (first, num_tiles - own.stop)  # tiles of other groups: none of this

        def placed(x: torch.Tensor, beside: tuple[int, int] = beside) -> torch.Tensor:
            """[heads or 1, T', most, ...] -> [heads or 1, T, most, ...]"""
            return torch.nn.functional.pad(x.transpose(1, -1), beside).transpose(1, -1)

        on_device = parts[3 * number], parts[3 * number + 1], parts[3 * number + 2]
        rows = tiles.rows[0, rows_before[own.start] : rows_before[own.stop]].long() - estimates.request.row_start
        query_tiles = QueryTiles(rows, on_host.rows_per_tile[own], *uploads[number], on_device, block_k)
        picked = estimates.of(visits.pattern, visits.scope, query_tiles)
        first_picked = len(keys.kv_pos) // block_k
        for more in picked.added:
            kind = KINDS[more.kind]
            start = more.start + (first_picked if more.picked else first_tile)
            ranges[kind].append((placed(start), placed(more.count)))
            bounds[own, kind] += more.most
            if more.excluded is not None:
                excluded.append(placed(more.excluded))
        keys = _with_picked(keys, picked.lanes, first_tile * block_k, block_k)
    starts, counts = (
        torch.cat([pair[i].expand(heads, num_tiles, -1) for of_kind in ranges for pair in of_kind], dim=2)
        for i in range(2)
    )
    sizes = [sum(pair[0].shape[2] for pair in of_kind) for of_kind in ranges]
    first_range = torch.arange(heads * num_tiles, device=device) * sum(sizes)
    all_ends = [first_range, first_range + sizes[0], first_range + sizes[0] + sizes[1], first_range + sum(sizes)]
    all_excluded = torch.cat([rows.expand(heads, num_tiles, -1, -1) for rows in excluded], dim=2)
    return (
        EstimatedTiles(
            rows=tiles.rows.repeat(1, heads),
            ranges=torch.stack([starts.flatten(), counts.flatten()]),
            excluded=all_excluded.flatten(0, 2),
            ends=torch.stack(all_ends, dim=1),
            gathered_count=counts[:, :, sum(sizes[:2]) :].flatten(),
            rows_per_tile=np.tile(on_host.rows_per_tile, heads),
            visits=np.tile(bounds, (heads, 1)),
        ),
        keys,
    )


def _padded(tiles: Tiles, ends: torch.Tensor, kind: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranges of one kind as int64 [1, T, most]: start and count, 0 where a tile has fewer."""
    number = ends[:, kind, None] + torch.arange(most, device=ends.device)
    real = number < ends[:, kind + 1, None]
    number = number.where(real, 0)
    start, count = tiles.ranges[:, number].long()
    return start[None], count.where(real, 0)[None]


def _with_picked(keys: KeyTable, lanes: torch.Tensor, first_lane: int, block_k: int) -> KeyTable:
    """`keys` and, after them, the keys at `lanes` of the order that begins at `first_lane`; see `Picked`."""
    if not len(lanes):
        return keys
    if lanes.device.type == "cuda" or interpreted():
        from sglang_mminfer.kernels.triton.picked_keys import with_picked  # Triton, which a CPU may lack

        return KeyTable(*with_picked(keys.kv_pos, keys.kv_slots, lanes, first_lane, block_k, PAD_POSITION))
    real = lanes >= 0
    nearest = lanes[::block_k].clamp_min(0).repeat_interleave(block_k, output_size=len(lanes))
    taken = lanes.where(real, nearest) + first_lane
    positions = keys.kv_pos[taken].where(real, PAD_POSITION)
    return KeyTable(torch.cat([keys.kv_pos, positions]), torch.cat([keys.kv_slots, keys.kv_slots[taken]]))
