"""What estimated patterns add to the tiles of a request: columns and diagonals that follow from q and the keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.kernels.block_plan import PAD_POSITION, KeyTable
from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.patterns.estimated import Estimated, Evidence, Picks, column_lanes
from sglang_mminfer.patterns.index import Scope
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.device_tiles import Tiles
from sglang_mminfer.planning.orders import CompactOrder
from sglang_mminfer.planning.row_loops import FULL, GATHERED, PARTIAL
from sglang_mminfer.planning.tiles import EstimatedVisits


class Estimates:
    """What estimated patterns pick from, for some heads of one request; each scope is computed once.

    Args:
        heads: the query heads, ascending. q: [tokens, Hq, D]; k_cache: [slots, Hkv, D].
    """

    def __init__(
        self, request: RequestChunk, heads: tuple[int, ...], q: torch.Tensor, k_cache: torch.Tensor, sm_scale: float
    ) -> None:
        self.request, self.heads, self.k_cache, self.sm_scale = request, heads, k_cache, sm_scale
        self.q = q[request.row_start : request.row_start + request.num_rows]
        self._picks: dict[tuple, Picks] = {}

    def of(self, pattern: Estimated, scope: Scope) -> Picks:
        """See `Estimated.estimate`."""
        name = (pattern, scope.rows, scope.keys)
        if name not in self._picks:
            keys = None
            if scope.keys is not None:
                keys = CompactOrder.positions_of([CompactOrder(scope.key_members, 1)], self.q.device)[0].long()
            evidence = Evidence(self.request, scope, self.heads, self.q, self.k_cache, keys, self.sm_scale)
            self._picks[name] = pattern.estimate(evidence)
        return self._picks[name]


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
    for number, (visits, first_tile) in enumerate(on_host.estimated):
        pattern, first = visits.pattern, int(visits.tile[0])
        keys_of_first_row, keys_of_last_row, full_tiles = parts[3 * number : 3 * number + 3]
        own = slice(first, first + len(visits.tile))
        beside = (first, num_tiles - own.stop)  # tiles of other groups: none of this

        def placed(x: torch.Tensor, beside: tuple[int, int] = beside) -> torch.Tensor:
            """[heads or 1, T', most, ...] -> [heads or 1, T, most, ...]"""
            return torch.nn.functional.pad(x.transpose(1, -1), beside).transpose(1, -1)

        picks = estimates.of(pattern, visits.scope)
        columns, crossings = pattern.select(picks, keys_of_first_row, keys_of_last_row, block_k)
        start, count = crossings.ranges(full_tiles)
        ranges[FULL].append((placed(start + first_tile), placed(count)))
        bounds[own, FULL] += _most_full(visits, start.shape[2])
        lanes = torch.arange(_most_partial(visits), device=device)
        blocks = (full_tiles[:, None] + lanes)[None]
        crossed = crossings.cross(blocks)
        ranges[PARTIAL].append((placed(blocks + first_tile), placed(crossed.long())))
        bounds[own, PARTIAL] += blocks.shape[-1]
        if not columns.shape[1]:
            continue
        count, lanes_excluded = column_lanes(columns, crossings, block_k)
        column_tiles = torch.arange(heads * count.shape[2], device=device).view(heads, 1, -1)
        start = (column_tiles + len(keys.kv_pos) // block_k).expand_as(count)
        ranges[GATHERED].append((placed(start), placed(count)))
        excluded.append(placed(lanes_excluded))
        bounds[own, GATHERED] += count.shape[2]
        keys = _with_columns(keys, columns + first_tile * block_k, block_k)
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


def _most_partial(visits: EstimatedVisits) -> int:
    """Key tiles that some rows of a query tile see in part, at most."""
    return int((-(-visits.keys_of_last_row // visits.base.block_k) - visits.full_tiles).max())


def _most_full(visits: EstimatedVisits, ranges: int) -> Ints:
    """int64 [T']: a bound on the full key tiles that so many crossing ranges have."""
    each = (visits.keys_of_last_row - visits.keys_of_first_row) // visits.base.block_k + 2
    return np.minimum(ranges * each, visits.full_tiles)


def _padded(tiles: Tiles, ends: torch.Tensor, kind: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranges of one kind as int64 [1, T, most]: start and count, 0 where a tile has fewer."""
    number = ends[:, kind, None] + torch.arange(most, device=ends.device)
    real = number < ends[:, kind + 1, None]
    number = number.where(real, 0)
    start, count = tiles.ranges[:, number].long()
    return start[None], count.where(real, 0)[None]


def _with_columns(keys: KeyTable, lanes: torch.Tensor, block_k: int) -> KeyTable:
    """`keys` and, after them, the keys `lanes` [H, V] of each head, padded to whole tiles."""
    number = torch.arange(-(-lanes.shape[1] // block_k) * block_k, device=lanes.device)
    real = number < lanes.shape[1]
    taken = lanes[:, number.where(real, number // block_k * block_k)]
    positions = keys.kv_pos[taken].where(real, PAD_POSITION)
    return KeyTable(
        torch.cat([keys.kv_pos, positions.flatten()]), torch.cat([keys.kv_slots, keys.kv_slots[taken].flatten()])
    )
