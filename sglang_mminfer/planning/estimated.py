"""What estimated patterns add to the tiles of a request: columns and diagonals that follow from q and the keys."""

from __future__ import annotations

import numpy as np
import torch

from sglang_mminfer.kernels.block_plan import PAD_POSITION, KeyTable
from sglang_mminfer.patterns.estimated import Estimated, Evidence, Picks, column_lanes
from sglang_mminfer.patterns.index import Scope
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.device_tiles import Tiles
from sglang_mminfer.planning.orders import CompactOrder
from sglang_mminfer.planning.tiles import FULL, GATHERED, PARTIAL


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
                keys = CompactOrder(scope.key_members, 1).positions(self.q.device).long()
            evidence = Evidence(self.request, scope, self.heads, self.q, self.k_cache, keys, self.sm_scale)
            self._picks[name] = pattern.estimate(evidence)
        return self._picks[name]


def with_estimate(tiles: Tiles, estimates: Estimates, keys: KeyTable, block_k: int) -> tuple[Tiles, KeyTable]:
    """A copy of `tiles` for each head, with what the head's estimate adds, and `keys` with the gathered columns."""
    heads, num_tiles, room = len(estimates.heads), tiles.num_tiles, tiles.room.copy()
    ranges = [[_padded(tiles, kind)] for kind in (FULL, PARTIAL, GATHERED)]  # [heads or 1, T, most] start and count
    before = (tiles.ends[:, 3] - tiles.ends[:, 2]).cumsum(0) - (tiles.ends[:, 3] - tiles.ends[:, 2])
    lane_rows = before[:, None] + torch.arange(tiles.most[GATHERED], device=before.device)
    excluded = [
        tiles.excluded[lane_rows.clamp_max(max(len(tiles.excluded) - 1, 0))][None]
    ]  # [heads or 1, T, most, words]
    for estimated in tiles.estimated:
        pattern, first = estimated.visits.pattern, int(estimated.visits.tile[0])
        own = slice(first, first + len(estimated.visits.tile))
        beside = (first, num_tiles - own.stop)  # tiles of other groups: none of this

        def placed(x: torch.Tensor, beside: tuple[int, int] = beside) -> torch.Tensor:
            """[heads or 1, T', most, ...] -> [heads or 1, T, most, ...]"""
            return torch.nn.functional.pad(x.transpose(1, -1), beside).transpose(1, -1)

        picks = estimates.of(pattern, estimated.visits.scope)
        columns, crossings = pattern.select(picks, estimated.keys_of_first_row, estimated.keys_of_last_row, block_k)
        start, count = crossings.ranges(estimated.full_tiles)
        ranges[FULL].append((placed(start + estimated.first_tile), placed(count)))
        room[own] += estimated.room(start.shape[2])
        lanes = torch.arange(estimated.most_partial, device=start.device)
        blocks = (estimated.full_tiles[:, None] + lanes)[None]
        crossed = crossings.cross(blocks)
        ranges[PARTIAL].append((placed(blocks + estimated.first_tile), placed(crossed.long())))
        room[own] += blocks.shape[-1]
        if not columns.shape[1]:
            continue
        count, lanes_excluded = column_lanes(columns, crossings, block_k)
        column_tiles = torch.arange(heads * count.shape[2], device=start.device).view(heads, 1, -1)
        start = (column_tiles + len(keys.kv_pos) // block_k).expand_as(count)
        ranges[GATHERED].append((placed(start), placed(count)))
        excluded.append(placed(lanes_excluded))
        room[own] += count.shape[2]
        keys = _with_columns(keys, columns + estimated.first_tile * block_k, block_k)
    starts, counts = (
        torch.cat([pair[i].expand(heads, num_tiles, -1) for of_kind in ranges for pair in of_kind], dim=2)
        for i in range(2)
    )
    sizes = [sum(pair[0].shape[2] for pair in of_kind) for of_kind in ranges]
    first_range = torch.arange(heads * num_tiles, device=starts.device) * sum(sizes)
    ends = [first_range, first_range + sizes[0], first_range + sizes[0] + sizes[1], first_range + sum(sizes)]
    all_excluded = torch.cat([rows.expand(heads, num_tiles, -1, -1) for rows in excluded], dim=2)
    return (
        Tiles(
            num_tiles=heads * num_tiles,
            q_rows=tiles.q_rows.repeat(heads),
            q_stop=tiles.q_stop.repeat(heads),
            rows_per_tile=tiles.rows_per_tile.repeat(heads),
            start=starts.flatten(),
            count=counts.flatten(),
            ends=torch.stack(ends, dim=1),
            excluded=all_excluded.flatten(0, 2),
            most=(sizes[0], sizes[1], sizes[2]),
            rows=np.tile(tiles.rows, heads),
            room=np.tile(room, heads),
            gathered_count=counts[:, :, sum(sizes[:2]) :].flatten(),
        ),
        keys,
    )


def _padded(tiles: Tiles, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranges of one kind as [1, T, most]: start and count, 0 where a tile has fewer."""
    number = tiles.ends[:, kind, None] + torch.arange(tiles.most[kind], device=tiles.ends.device)
    real = number < tiles.ends[:, kind + 1, None]
    number = number.where(real, 0)
    return tiles.start[number][None], tiles.count[number].where(real, 0)[None]


def _with_columns(keys: KeyTable, lanes: torch.Tensor, block_k: int) -> KeyTable:
    """`keys` and, after them, the keys `lanes` [H, V] of each head, padded to whole tiles."""
    number = torch.arange(-(-lanes.shape[1] // block_k) * block_k, device=lanes.device)
    real = number < lanes.shape[1]
    taken = lanes[:, number.where(real, number // block_k * block_k)]
    positions = keys.kv_pos[taken].where(real, PAD_POSITION)
    return KeyTable(
        torch.cat([keys.kv_pos, positions.flatten()]), torch.cat([keys.kv_slots, keys.kv_slots[taken].flatten()])
    )
