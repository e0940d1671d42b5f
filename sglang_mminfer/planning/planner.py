"""From the tiles of single requests to the plan of a whole ragged batch, for one layer's head patterns.

`tiles.py` says on the host what every tile visits, as ranges; here the ranges are spelled out on the device. The
host never waits for the device: it knows the size of everything it allocates, exactly for static patterns and as
a bound for estimated ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sglang_mminfer.kernels.block_plan import PAD_POSITION, BlockPlan, KeyTable, PrefillPlan
from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.kernels.threads import one_thread
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment
from sglang_mminfer.patterns.boundary import UNNAMED, HeadPattern, patterns_of
from sglang_mminfer.patterns.estimated import Estimated, Evidence, Masses, column_lanes
from sglang_mminfer.patterns.index import Scope
from sglang_mminfer.planning.orders import CompactOrder, KeyOrder
from sglang_mminfer.planning.tiles import FULL, GATHERED, PARTIAL, ChunkTiler, EstimatedVisits, TilePass

BLOCK_Q, BLOCK_K = 128, 64


@dataclass(frozen=True)
class RequestChunk:
    """One request of a batch: its rows are q[row_start : row_start + kv_len - q_start].

    A request without a map runs dense, whatever the heads do.
    """

    map: ModalityMap | None
    q_start: int
    kv_len: int
    row_start: int
    slots: torch.Tensor  # int64 [kv_len]: cache row of every position

    @cached_property
    def slots32(self) -> torch.Tensor:
        """`slots` as int32."""
        return self.slots.to(torch.int32)

    @property
    def num_rows(self) -> int:
        return self.kv_len - self.q_start

    @property
    def causal_pairs(self) -> int:
        """(row, key) pairs at or below the diagonal."""
        return (self.q_start + 1 + self.kv_len) * self.num_rows // 2


def _any_map(length: int) -> ModalityMap:
    return ModalityMap([Segment(Modality.TEXT, 0, length)])


def is_static(head: HeadPattern) -> bool:
    """True if the pattern's tiles do not depend on q and k."""
    return not any(isinstance(pattern, Estimated) for pattern in patterns_of(head))


class BatchPlanner:
    """Plans for one batch. What is static is made once, whatever layer asks for it.

    Args:
        keep: False: a plan is asked for and run once; it is not kept, and keeps little while it runs.
    """

    def __init__(
        self,
        requests: Sequence[RequestChunk],
        num_rows: int,
        *,
        dense_below: int = 0,
        block_q: int = BLOCK_Q,
        block_k: int = BLOCK_K,
        keep: bool = True,
    ) -> None:
        self.requests, self.num_rows, self.keep = tuple(requests), num_rows, keep
        self.block_q, self.block_k = block_q, block_k
        self.device = self.requests[0].slots.device if self.requests else torch.device("cpu")
        self._tilers = [
            ChunkTiler(r.map or _any_map(r.kv_len), r.q_start, r.kv_len, dense_below, block_q, block_k)
            for r in self.requests
        ]
        self._keys = KeyOrders(self.requests, block_k)
        self._tiles: dict[tuple[int, HeadPattern], list[Tiles]] = {}
        self._static_plans: dict[tuple[HeadPattern | None, ...], PrefillPlan] = {}

    def plan(
        self,
        heads: Sequence[HeadPattern | None],
        q: torch.Tensor | None = None,
        k_cache: torch.Tensor | None = None,
        sm_scale: float = 1.0,
    ) -> PrefillPlan:
        """The plan of one layer.

        Args:
            heads: the pattern of every query head; None for heads that somebody else computes.
            q [tokens, Hq, D], k_cache [slots, Hkv, D], sm_scale: for the heads whose pattern is estimated.

        Raises:
            ValueError: a pattern that is estimated, without q and k_cache.
        """
        name = tuple(heads)
        if name not in self._static_plans:
            with one_thread():
                plan = self._make(name, q, k_cache, sm_scale)
            if not self.keep or not all(is_static(head) for head in set(name) if head is not None):
                return plan
            self._static_plans[name] = plan
        return self._static_plans[name]

    def _make(
        self,
        heads: tuple[HeadPattern | None, ...],
        q: torch.Tensor | None,
        k_cache: torch.Tensor | None,
        sm_scale: float,
    ) -> PrefillPlan:
        sharing: dict[HeadPattern, list[int]] = {}
        for head, pattern in enumerate(heads):
            if pattern is not None:
                sharing.setdefault(pattern, []).append(head)
        planned = tuple(head for head, pattern in enumerate(heads) if pattern is not None)
        with_map = [r for r, request in enumerate(self.requests) if request.map is not None]
        without = [r for r in range(len(self.requests)) if r not in with_map]
        items = [(r, planned, self._tiles_of(r, UNNAMED)) for r in without if planned]
        items += [(r, tuple(own), self._tiles_of(r, pattern)) for pattern, own in sharing.items() for r in with_map]
        keys = self._keys.table()
        levels: list[list[tuple[HeadTiles, Tiles]]] = []
        for r, own, passes in items:
            for number, tiles in enumerate(passes):
                if not tiles.num_tiles:
                    continue
                while len(levels) <= number:
                    levels.append([])
                if not tiles.estimated:
                    levels[number].append(((own,), tiles))
                    continue
                if q is None or k_cache is None:
                    raise ValueError(f"{heads[own[0]]}: this pattern is estimated, so its plan needs q and the keys")
                estimates = Estimates(self.requests[r], own, q, k_cache, sm_scale)
                tiles, keys = _with_estimate(tiles, estimates, keys, self.block_k)
                levels[number].append((tuple((head,) for head in own), tiles))
        passes_of_all = tuple(_assemble(level, keys, self.block_q, self.block_k) for level in levels if level)
        return PrefillPlan(passes_of_all, self.num_rows, len(heads), once=not self.keep)

    def _tiles_of(self, request: int, pattern: HeadPattern) -> list[Tiles]:
        name = (request, pattern)
        if name not in self._tiles:
            chunk, passes = self.requests[request], self._tilers[request].tile(pattern)
            self._tiles[name] = [_tiles(tile_pass, request, chunk, self._keys, self.device) for tile_pass in passes]
        return self._tiles[name]


class KeyOrders:
    """The key orders of a batch, each with its place in one table. The table grows as patterns ask for more."""

    def __init__(self, requests: Sequence[RequestChunk], block_k: int) -> None:
        self.requests, self.block_k = requests, block_k
        self._first_tile: dict[tuple[int, KeyOrder], int] = {}
        self._positions: list[torch.Tensor] = []
        self._slots: list[torch.Tensor] = []
        self._num_tiles = 0

    def first_tile(self, request: int, order: KeyOrder) -> int:
        """The number of the order's first key tile in the table."""
        if (request, order) not in self._first_tile:
            slots = self.requests[request].slots
            positions = order.positions(slots.device)
            self._positions.append(positions)
            self._slots.append(_slots_of(positions, slots, self.block_k))
            self._first_tile[request, order] = self._num_tiles
            self._num_tiles += order.num_tiles
        return self._first_tile[request, order]

    def table(self) -> KeyTable:
        """Of all orders so far. Numbers of tiles stay what they are when it grows."""
        for parts in (self._positions, self._slots):
            if len(parts) != 1:
                none = torch.empty(0, dtype=torch.int32, device=parts[0].device if parts else None)
                parts[:] = [torch.cat([none, *parts])]
        return KeyTable(self._positions[0], self._slots[0])


def _slots_of(positions: torch.Tensor, slots: torch.Tensor, block_k: int) -> torch.Tensor:
    """int32: the cache rows of the keys at `positions`. For padding, and keys that are yet to come, see KeyTable."""
    real = positions < len(slots)
    nearest = positions.where(real, PAD_POSITION).view(-1, block_k).amin(dim=1)
    nearest = nearest.where(nearest < len(slots), 0).repeat_interleave(block_k, output_size=len(positions))
    return slots[positions.where(real, nearest).long()].to(torch.int32)


HeadTiles = tuple[tuple[int, ...], ...]  # the head groups that run some tiles, each a copy, one after the other


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


def _tiles(tile_pass: TilePass, request: int, chunk: RequestChunk, keys: KeyOrders, device: torch.device) -> Tiles:
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
    estimated = tile_pass.estimated
    uploads = [[e.keys_of_first_row, e.keys_of_last_row, e.full_tiles] for e in estimated]
    q_rows, q_stop, rows_per_tile, *parts = to_device(
        device,
        rows - chunk.q_start + chunk.row_start,
        stop,
        joined(tile_pass.rows_per_tile),
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


def _with_estimate(tiles: Tiles, estimates: Estimates, keys: KeyTable, block_k: int) -> tuple[Tiles, KeyTable]:
    """A copy of `tiles` for each head, with what the head's estimate adds, and `keys` with the gathered columns."""
    heads, num_tiles, room = len(estimates.heads), tiles.num_tiles, len(estimates.heads) * tiles.room
    ranges = [[_padded(tiles, kind)] for kind in (FULL, PARTIAL, GATHERED)]  # [heads or 1, T, most] start and count
    before = (tiles.ends[:, 3] - tiles.ends[:, 2]).cumsum(0) - (tiles.ends[:, 3] - tiles.ends[:, 2])
    lane_rows = before[:, None] + torch.arange(tiles.most[GATHERED], device=before.device)
    excluded = [
        tiles.excluded[lane_rows.clamp_max(max(len(tiles.excluded) - 1, 0))][None]
    ]  # [heads or 1, T, most, words]
    for estimated in tiles.estimated:
        pattern, first = estimated.visits.pattern, int(estimated.visits.tile[0])
        beside = (first, num_tiles - first - len(estimated.visits.tile))  # tiles of other groups: none of this

        def placed(x: torch.Tensor, beside: tuple[int, int] = beside) -> torch.Tensor:
            """[heads or 1, T', most, ...] -> [heads or 1, T, most, ...]"""
            return torch.nn.functional.pad(x.transpose(1, -1), beside).transpose(1, -1)

        masses = estimates.of(pattern, estimated.visits.scope)
        columns, crossings = pattern.select(masses, estimated.keys_of_first_row, estimated.keys_of_last_row, block_k)
        start, count = crossings.ranges(estimated.full_tiles)
        ranges[FULL].append((placed(start + estimated.first_tile), placed(count)))
        room += heads * estimated.room(start.shape[2])
        lanes = torch.arange(estimated.most_partial, device=start.device)
        blocks = (estimated.full_tiles[:, None] + lanes)[None]
        crossed = crossings.cross(blocks)
        ranges[PARTIAL].append((placed(blocks + estimated.first_tile), placed(crossed.long())))
        room += heads * blocks.numel()
        if not columns.shape[1]:
            continue
        count, lanes_excluded = column_lanes(columns, crossings, block_k)
        column_tiles = torch.arange(heads * count.shape[2], device=start.device).view(heads, 1, -1)
        start = (column_tiles + len(keys.kv_pos) // block_k).expand_as(count)
        ranges[GATHERED].append((placed(start), placed(count)))
        excluded.append(placed(lanes_excluded))
        room += count.numel()
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
            room=room,
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


def _assemble(level: list[tuple[HeadTiles, Tiles]], keys: KeyTable, block_q: int, block_k: int) -> BlockPlan:
    """One pass from its items. Sizes are the host's; what the device knows better only indexes into them."""
    parts = [tiles for _, tiles in level]
    groups: dict[tuple[int, ...], int] = {}
    numbers = [[groups.setdefault(heads, len(groups)) for heads in head_tiles] for head_tiles, _ in level]
    copies = [np.repeat(own, tiles.num_tiles // len(own)) for own, tiles in zip(numbers, parts)]
    device = parts[0].q_rows.device
    (q_heads,) = to_device(device, np.concatenate(copies))

    start, count = torch.cat([t.start for t in parts]), torch.cat([t.count for t in parts])
    first_range = np.cumsum([0, *(len(t.start) for t in parts)])
    ends = torch.cat([t.ends + int(first) for t, first in zip(parts, first_range)])
    room = sum(t.room for t in parts)
    # One more range takes what is left of the room, so that the host knows the length of what follows.
    reach = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    start = torch.nn.functional.pad(start - reach[:-1], (0, 1))
    count = torch.cat([count, room - reach[-1:]])
    blocks = torch.repeat_interleave(start, count, output_size=room) + torch.arange(room, device=device)
    at = reach[ends]

    excluded = torch.cat([t.excluded for t in parts])
    if any(t.gathered_count is not None for t in parts):
        counts = [torch.ones_like(t.excluded[:, 0]) if t.gathered_count is None else t.gathered_count for t in parts]
        visited = torch.cat(counts).bool()
        row = (visited.cumsum(0) - 1).where(visited, len(excluded))  # those not visited: all to a row at the end
        excluded = excluded.new_zeros(len(excluded) + 1, excluded.shape[1]).index_copy_(0, row, excluded)
    return BlockPlan(
        keys=keys,
        q_rows=torch.cat([t.q_rows for t in parts]),
        q_stop=torch.cat([t.q_stop for t in parts]),
        q_indptr=_indptr(torch.cat([t.rows_per_tile for t in parts])),
        q_heads=q_heads,
        block_indptr=_indptr(at[:, 3] - at[:, 0]),
        block_indices=blocks.to(torch.int32),
        num_full=(at[:, 1] - at[:, 0]).to(torch.int32),
        num_gathered=(at[:, 3] - at[:, 2]).to(torch.int32),
        excluded_lanes=excluded,
        head_groups=tuple(groups),
        block_q=block_q,
        block_k=block_k,
        num_work=sum(t.num_tiles // len(own) * sum(map(len, own)) for own, t in level),
    )


def _indptr(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


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
        self._masses: dict[tuple, Masses] = {}

    def of(self, pattern: Estimated, scope: Scope) -> Masses:
        """See `Estimated.estimate`."""
        name = (pattern, scope.rows, scope.keys)
        if name not in self._masses:
            keys = None
            if scope.keys is not None:
                keys = CompactOrder(scope.key_members, 1).positions(self.q.device).long()
            evidence = Evidence(self.request, scope, self.heads, self.q, self.k_cache, keys, self.sm_scale)
            self._masses[name] = pattern.estimate(evidence)
        return self._masses[name]
