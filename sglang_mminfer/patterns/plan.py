"""From the tiles of single requests to the plan of a whole ragged batch, for one layer's head patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_mminfer.kernels.block_plan import NO_HOME, PAD_POSITION, BlockPlan, KeyTable, PrefillPlan
from sglang_mminfer.kernels.threads import one_thread
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment
from sglang_mminfer.patterns import vertical_slash
from sglang_mminfer.patterns.boundary import row_classes
from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.order import KeyOrder
from sglang_mminfer.patterns.spec import Dense, HeadPattern, VerticalSlash
from sglang_mminfer.patterns.tiles import ChunkTiler, TilePass

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
    return not any(isinstance(p, VerticalSlash) for c in row_classes(head) for _, p in c.pairs)


class BatchPlanner:
    """Plans for one batch. Tiles of static patterns are made once, whatever layer asks for them."""

    def __init__(
        self,
        requests: Sequence[RequestChunk],
        num_rows: int,
        *,
        dense_below: int = 0,
        block_q: int = BLOCK_Q,
        block_k: int = BLOCK_K,
    ) -> None:
        self.requests, self.num_rows = tuple(requests), num_rows
        self.block_q, self.block_k = block_q, block_k
        self._tilers = [
            ChunkTiler(r.map or _any_map(r.kv_len), r.q_start, r.kv_len, dense_below, block_q, block_k)
            for r in self.requests
        ]
        self._static_tiles: dict[tuple[int, HeadPattern], list[TilePass]] = {}
        self._static_plans: dict[tuple[HeadPattern, ...], PrefillPlan] = {}

    def plan(
        self,
        heads: Sequence[HeadPattern],
        q: torch.Tensor | None = None,
        k_cache: torch.Tensor | None = None,
        sm_scale: float = 1.0,
    ) -> PrefillPlan:
        """The plan of one layer.

        Args:
            heads: the pattern of every query head.
            q [tokens, Hq, D], k_cache [slots, Hkv, D], sm_scale: for the heads whose pattern is estimated.
        """
        name = tuple(heads)
        if name not in self._static_plans:
            with one_thread():
                plan, lasting = self._make(name, q, k_cache, sm_scale)
            if not lasting:
                return plan
            self._static_plans[name] = plan
        return self._static_plans[name]

    def _make(
        self, heads: tuple[HeadPattern, ...], q: torch.Tensor | None, k_cache: torch.Tensor | None, sm_scale: float
    ) -> tuple[PrefillPlan, bool]:
        """A plan, and whether it holds for every layer with these heads."""
        sharing: dict[HeadPattern, list[int]] = {}
        for head, pattern in enumerate(heads):
            sharing.setdefault(pattern, []).append(head)
        with_map = [r for r, request in enumerate(self.requests) if request.map is not None]
        every_head = tuple(range(len(heads)))
        items = [(r, every_head, self._tiles(r, Dense())) for r in range(len(self.requests)) if r not in with_map]
        all_static = True
        for pattern, members in sharing.items():
            if is_static(pattern):
                items += [(r, tuple(members), self._tiles(r, pattern)) for r in with_map]
                continue
            all_static = False
            if q is None or k_cache is None:
                raise ValueError(f"{pattern}: this pattern is estimated, so its plan needs q and the keys")
            for r in with_map:
                estimates = _Estimates(self.requests[r], members, q, k_cache, sm_scale)
                for head in members:
                    items.append((r, (head,), self._tilers[r].tile(pattern, estimates.of(head))))
        return self._assemble(items, len(heads)), all_static

    def _tiles(self, request: int, pattern: HeadPattern) -> list[TilePass]:
        name = (request, pattern)
        if name not in self._static_tiles:
            self._static_tiles[name] = self._tilers[request].tile(pattern)
        return self._static_tiles[name]

    def _assemble(self, items: list[tuple[int, tuple[int, ...], list[TilePass]]], num_heads: int) -> PrefillPlan:
        device = self.requests[0].slots.device if self.requests else torch.device("cpu")
        table = _KeyTableBuilder(self.requests, self.block_k)
        depth = max((len(passes) for _, _, passes in items), default=0)
        drafts = []
        for number in range(depth):
            level = [(r, heads, passes[number]) for r, heads, passes in items if len(passes) > number]
            level = [item for item in level if item[2].num_tiles]
            if level:
                drafts.append(_PassDraft(level, self.requests, table, self.block_q))
        keys = table.build(device)
        return PrefillPlan(tuple(draft.build(keys, device) for draft in drafts), self.num_rows, num_heads)


class _Estimates:
    """Column and diagonal masses of the heads of one request that need them; each scope is computed once."""

    def __init__(
        self, request: RequestChunk, heads: list[int], q: torch.Tensor, k_cache: torch.Tensor, sm_scale: float
    ) -> None:
        self.request, self.heads, self.sm_scale = request, heads, sm_scale
        self.q = q[request.row_start : request.row_start + request.num_rows]
        self.k = k_cache[request.slots]
        self.group = q.shape[1] // k_cache.shape[1]
        self._masses: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, head: int):
        number = self.heads.index(head)

        def estimator(pattern: VerticalSlash, scope: Scope) -> PairIndex:
            columns, diagonals = self._of_scope(pattern.last_q, scope)
            return vertical_slash.pair_index(pattern, scope, columns[number], diagonals[number])

        return estimator

    def _of_scope(self, last_q: int, scope: Scope) -> tuple[torch.Tensor, torch.Tensor]:
        name: tuple[int, Modality | None, Modality | None] = (last_q, scope.rows, scope.keys)
        if name not in self._masses:
            q_start, kv_len = self.request.q_start, self.request.kv_len
            rows = torch.arange(q_start, kv_len)
            if scope.rows is not None:
                rows = rows[scope.map.members(scope.rows)[q_start:kv_len]]
            rows = rows[-last_q:].to(self.q.device)
            self._masses[name] = vertical_slash.estimate(
                self.q[rows - q_start][:, self.heads],
                self.k,
                [head // self.group for head in self.heads],
                rows,
                self.sm_scale,
                scope.key_members.to(self.q.device),
            )
        return self._masses[name]


class _KeyTableBuilder:
    """Gives every distinct key order of a batch its place in one table."""

    def __init__(self, requests: Sequence[RequestChunk], block_k: int) -> None:
        self.requests, self.block_k = requests, block_k
        self._first_tile: dict[tuple[int, int], int] = {}
        self._orders: list[tuple[int, KeyOrder]] = []
        self._tiles = 0

    def first_tile(self, request: int, order: KeyOrder) -> int:
        name = (request, id(order))
        if name not in self._first_tile:
            if order.base is not None:
                self.first_tile(request, order.base)
            self._first_tile[name] = self._tiles
            self._orders.append((request, order))
            self._tiles += order.num_tiles
        return self._first_tile[name]

    def build(self, device: torch.device) -> KeyTable:
        pos, slots, homes = (
            [torch.empty(0, dtype=torch.int32)],
            [torch.empty(0, dtype=torch.int32, device=device)],
            [],
        )
        for request, order in self._orders:
            positions = order.positions.long().to(device)
            nearest = positions.view(-1, self.block_k).amin(dim=1).repeat_interleave(self.block_k)
            positions = positions.where(positions != PAD_POSITION, nearest)  # padding: see KeyTable
            own = self.requests[request].slots[positions.masked_fill(positions == PAD_POSITION, 0)]
            pos.append(order.positions)
            slots.append(own.to(torch.int32))
            if order.base is None or order.base_tiles is None:
                homes.append(torch.full_like(order.positions, NO_HOME))
            else:
                first = self.first_tile(request, order.base)
                homes.append(torch.where(order.base_tiles >= 0, order.base_tiles + first, NO_HOME))
        kv_home = torch.cat([torch.empty(0, dtype=torch.int32), *homes])
        return KeyTable(torch.cat(pos).to(device), torch.cat(slots), kv_home.to(device))


class _PassDraft:
    """The tiles of one pass over the whole batch, before they are packed into a BlockPlan."""

    def __init__(
        self,
        level: list[tuple[int, tuple[int, ...], TilePass]],
        requests: Sequence[RequestChunk],
        table: _KeyTableBuilder,
        block_q: int,
    ) -> None:
        self.block_q, self.block_k = block_q, table.block_k
        groups: dict[tuple[int, ...], int] = {}
        rows, stops, counts, heads, tiles, blocks = [], [], [], [], [], []
        num_tiles = 0
        for request, head_group, tile_pass in level:
            chunk = requests[request]
            group = groups.setdefault(head_group, len(groups))
            rows += [q_pos - chunk.q_start + chunk.row_start for q_pos in tile_pass.q_pos]
            stops += tile_pass.q_stop
            counts += tile_pass.rows_per_tile
            heads.append(torch.full((tile_pass.num_tiles,), group))
            for order, tile, block in tile_pass.visits:
                tiles.append(tile + num_tiles)
                blocks.append(block + table.first_tile(request, order))
            num_tiles += tile_pass.num_tiles
        none = [torch.empty(0, dtype=torch.int64)]
        self.head_groups = tuple(groups)
        self.q_rows, self.q_stop = torch.cat(rows), torch.cat(stops)
        self.q_indptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
        self.q_heads = torch.cat(heads)
        self.tiles, self.blocks = torch.cat(none + tiles), torch.cat(none + blocks)

    def build(self, keys: KeyTable, device: torch.device) -> BlockPlan:
        key_tiles = keys.kv_pos.cpu().view(-1, self.block_k)
        nearest, farthest = key_tiles.amin(dim=1), key_tiles.amax(dim=1)
        is_column = (keys.kv_home.cpu().view(-1, self.block_k) >= 0).any(dim=1)
        counts = self.q_indptr.diff()
        stops = torch.segment_reduce(self.q_stop.double(), "max", lengths=counts).long()
        least = torch.segment_reduce(self.q_stop.double(), "min", lengths=counts).long()
        reached = nearest[self.blocks] < stops[self.tiles]
        tiles, blocks = self.tiles[reached], self.blocks[reached]
        partial = (farthest[blocks] >= least[tiles]) | is_column[blocks]
        kind = partial + is_column[blocks].long()  # 0: full, 1: partial, 2: columns
        # One sort puts the visits in order: by tile, then by kind, ascending.
        size = len(key_tiles)
        packed = ((tiles * 3 + kind) * size + blocks).sort().values
        blocks, tiles, kind = packed % size, packed // size // 3, packed // size % 3
        num_tiles = len(counts)
        indptr = torch.zeros(num_tiles + 1, dtype=torch.int64)
        indptr[1:] = torch.bincount(tiles, minlength=num_tiles).cumsum(0)

        def packed_int(values: torch.Tensor) -> torch.Tensor:
            return values.to(torch.int32).to(device)

        return BlockPlan(
            keys=keys,
            q_rows=packed_int(self.q_rows),
            q_stop=packed_int(self.q_stop),
            q_indptr=packed_int(self.q_indptr),
            q_heads=packed_int(self.q_heads),
            block_indptr=packed_int(indptr),
            block_indices=packed_int(blocks),
            num_full=packed_int(torch.bincount(tiles[kind == 0], minlength=num_tiles)),
            num_columns=packed_int(torch.bincount(tiles[kind == 2], minlength=num_tiles)),
            head_groups=self.head_groups,
            block_q=self.block_q,
            block_k=self.block_k,
        )
