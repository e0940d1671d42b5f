"""How an executor on the host walks a plan: in stacks of tiles of one shape, and in runs of plain causal attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch

from .block_plan import PAD_POSITION, BlockPlan, unpack_lanes

MAX_STACKED_PAIRS = 1 << 18  # (row, key) pairs of one head in a stack of tiles: few, so that every thread gets stacks
MAX_STACKED_KEYS = 2048  # keys of a stack: few, so that what is gathered of them stays in a core's cache
MAX_MASKED_KEYS = 4096  # a tile with more masked keys is cut into strips of rows
ROWS_OF_A_STRIP = 32
MAX_CAUSAL_ROWS = 2048  # of a run of plain causal attention: few, so that every thread gets runs


def host_tiles(plan: BlockPlan) -> HostTiles:
    """The tiles of a plan of one pass, made once for all layers that run it."""
    if ("host_tiles",) not in plan.derived:
        plan.derived["host_tiles",] = HostTiles(plan.for_keeping())
    return plan.derived["host_tiles",]


class HostTiles:
    """The tiles of one pass as a host executor takes them."""

    def __init__(self, plan: BlockPlan) -> None:
        self.plan = plan

    @cached_property
    def batches(self) -> list[TileBatch]:
        """All tiles of the pass, in stacks of one shape."""
        return self._stacked(range(self.plan.num_tiles))

    @cached_property
    def scattered(self) -> list[TileBatch]:
        """The tiles that belong to none of the `causal_runs`, in stacks of one shape."""
        in_runs = {t for run in self.causal_runs for t in run.tiles}
        return self._stacked(t for t in range(self.plan.num_tiles) if t not in in_runs) if in_runs else self.batches

    @cached_property
    def causal_runs(self) -> list[CausalRun]:
        """Runs of at least two successive tiles that together are plain causal attention."""
        runs: list[CausalRun] = []
        q_indptr, heads = self.plan.q_indptr.tolist(), self.plan.q_heads.tolist()
        first_key, stop, first_row, last_row = self._causal_tiles().tolist()

        def follows(t: int) -> bool:
            """Whether tile t continues the run of tile t - 1."""
            return (
                (heads[t], first_key[t]) == (heads[t - 1], first_key[t - 1])
                and stop[t] == stop[t - 1] + q_indptr[t + 1] - q_indptr[t]
                and first_row[t] == last_row[t - 1] + 1
            )

        t = 0
        while t < self.plan.num_tiles:
            first, t = t, t + 1
            if first_key[first] < 0:
                continue
            while t < self.plan.num_tiles and follows(t) and last_row[t] - first_row[first] < MAX_CAUSAL_ROWS:
                t += 1
            if t - first > 1:
                keys = slice(first_key[first], first_key[first] + stop[t - 1])
                rows = slice(first_row[first], last_row[t - 1] + 1)
                slots = self.plan.keys.kv_slots[keys][None]
                runs.append(CausalRun(range(first, t), self.plan.head_groups[heads[first]], rows, slots))
        return runs

    def _causal_tiles(self) -> torch.Tensor:
        """int64 [4, T]: for each tile its first key lane, the bound of its last row, its first and its last row of q.

        A tile is plain causal attention if its rows and their bounds ascend by 1, and its keys are those of the
        positions from 0 to the last bound, side by side in the key table. Other tiles have -1 as first key lane.
        """
        indptr, block_indptr = self.plan.q_indptr.long(), self.plan.block_indptr.long()
        first, last, blocks = indptr[:-1], indptr[1:] - 1, block_indptr.diff()
        tile, number = self.plan.visits()
        visited = self.plan.visited_blocks(tile, number)
        lowest = torch.zeros_like(blocks).scatter_reduce(0, tile, visited, "amin", include_self=False)
        highest = torch.zeros_like(blocks).scatter_reduce(0, tile, visited, "amax", include_self=False)
        stop, pos = self.plan.q_stop[last].long(), self.plan.keys.kv_pos
        if not len(visited):
            return torch.full((4, self.plan.num_tiles), -1, device=blocks.device)

        def free_of(bad: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
            """Whether no element of bad[start:end] is True."""
            count = torch.cat([bad.new_zeros(1, dtype=torch.int64), bad.cumsum(0)])
            return count[end.clamp(0, len(bad))] == count[start.clamp(0, len(bad))]

        def jumps(values: torch.Tensor) -> torch.Tensor:
            """Whether a value is not its predecessor plus 1."""
            return torch.cat([values.new_zeros(1, dtype=torch.bool), values.diff() != 1])

        start, end = lowest * self.plan.block_k, (lowest + blocks) * self.plan.block_k
        plain = (blocks > 0) & (highest - lowest == blocks - 1) & (blocks == -(-stop // self.plan.block_k))
        plain &= stop > last - first
        plain &= free_of(jumps(self.plan.q_stop) | jumps(self.plan.q_rows), first + 1, last + 1)
        plain &= self.plan.num_gathered == 0
        plain &= free_of(jumps(pos) & (pos != PAD_POSITION), start + 1, end)
        lane = (start + stop - 1).clamp(0, len(pos) - 1)
        plain &= (pos[start] == 0) & (pos[lane] == stop - 1)
        return torch.stack(
            [start.where(plain, -1), stop, self.plan.q_rows[first].long(), self.plan.q_rows[last].long()]
        )

    def _stacked(self, tiles: Iterable[int]) -> list[TileBatch]:
        q_indptr, block_indptr = self.plan.q_indptr.tolist(), self.plan.block_indptr.tolist()
        num_full, num_gathered, q_heads = (
            self.plan.num_full.tolist(),
            self.plan.num_gathered.tolist(),
            self.plan.q_heads.tolist(),
        )
        shapes: dict[tuple[int, int, int, int, int], list[int]] = {}
        for t in tiles:
            rows, blocks = q_indptr[t + 1] - q_indptr[t], block_indptr[t + 1] - block_indptr[t]
            if blocks:
                shapes.setdefault((q_heads[t], rows, blocks, num_full[t], num_gathered[t]), []).append(t)
        batches = []
        for (heads, rows, blocks, full, gathered), members in shapes.items():
            if (blocks - full) * self.plan.block_k > MAX_MASKED_KEYS and rows > ROWS_OF_A_STRIP:
                for t, skip in product(members, range(0, rows, ROWS_OF_A_STRIP)):
                    strip = min(ROWS_OF_A_STRIP, rows - skip)
                    batches.append(
                        TileBatch(self.plan, [t], self.plan.head_groups[heads], strip, blocks, full, gathered, skip)
                    )
                continue
            keys = blocks * self.plan.block_k
            size = max(1, min(MAX_STACKED_PAIRS // (rows * keys), MAX_STACKED_KEYS // keys))
            for i in range(0, len(members), size):
                stack = members[i : i + size]
                batches.append(TileBatch(self.plan, stack, self.plan.head_groups[heads], rows, blocks, full, gathered))
        return sorted(batches, key=TileBatch.pairs, reverse=True)  # longest first, so that threads end together


@dataclass
class CausalRun:
    """Causal attention of the rows q[q_rows] over the keys of positions 0 to n - 1, aligned at the last row.

    kv_slots: int32 [1, n], rows of the cache.
    """

    tiles: range
    heads: tuple[int, ...]
    q_rows: slice
    kv_slots: torch.Tensor

    @cached_property
    def kv_slice(self) -> slice | None:
        """`kv_slots` as a slice of the cache, if the keys lie side by side in it."""
        return slice_of(self.kv_slots[0])


def slice_of(slots: torch.Tensor) -> slice | None:
    """`slots` [n] as a slice of the cache, if they lie side by side in it."""
    first, last = int(slots[0]), int(slots[-1])
    side_by_side = last - first == len(slots) - 1 and bool((slots.diff() == 1).all())
    return slice(first, last + 1) if side_by_side else None


@dataclass
class TileBatch:
    """B tiles of one shape, as a host executor wants them: their rows, their keys, and the mask of the last keys.

    Each tile has m = `rows` rows, which follow the first `skip` rows of its query tile, and visits n = `blocks` *
    block_k keys. All rows see the keys of the first `full` key tiles; the last `gathered` key tiles have excluded
    lanes. The tensors are made on first use, by the thread that runs the tiles, and kept for all layers.
    """

    plan: BlockPlan
    tiles: list[int]
    heads: tuple[int, ...]
    rows: int
    blocks: int
    full: int
    gathered: int
    skip: int = 0

    def forget(self) -> None:
        """Drop the tensors. The next use makes them again."""
        for name, attribute in vars(type(self)).items():
            if isinstance(attribute, cached_property):
                self.__dict__.pop(name, None)

    def pairs(self) -> int:
        """(row, key) pairs to compute for one head, masked ones included."""
        return len(self.tiles) * self.rows * self.blocks * self.plan.block_k

    @property
    def num_unmasked(self) -> int:
        """How many keys of a tile, the first ones, all rows see. `visible` is about the other, masked keys."""
        return self._keys[2]

    @cached_property
    def q_rows(self) -> torch.Tensor:
        """int64 [B, m]: rows of q and out."""
        return self.plan.q_rows[self._row_index].long()

    @cached_property
    def kv_slots(self) -> torch.Tensor:
        """int32 [B, n]: rows of the cache, in the order of the visits.

        Where B is 1, keys that no row sees are left out, and the keys that all rows see come first.
        """
        return self.plan.keys.kv_slots[self._keys[0]]

    @cached_property
    def kv_slice(self) -> slice | None:
        """`kv_slots` as a slice of the cache, if there is one tile and its keys lie side by side."""
        return slice_of(self.kv_slots[0]) if len(self.tiles) == 1 and self.kv_slots.shape[1] else None

    @property
    def kv_pos(self) -> torch.Tensor:
        """int32 [B, n]: positions of the keys."""
        return self.plan.keys.kv_pos[self._keys[0]]

    @cached_property
    def visible(self) -> torch.Tensor:
        """bool [B, m, n - num_unmasked]: whether a row sees a masked key."""
        return self._bounds[:, None, :] < self.q_stop[:, :, None]

    @cached_property
    def q_stop(self) -> torch.Tensor:
        """int32 [B, m]: exclusive bound on the key positions that a row may see."""
        return self.plan.q_stop[self._row_index]

    @property
    def _bounds(self) -> torch.Tensor:
        """int32 [B, n - num_unmasked]: a row sees a masked key if the key's bound lies below the row's `q_stop`."""
        return self._keys[1]

    @cached_property
    def _row_index(self) -> torch.Tensor:
        first = self.plan.q_indptr[self.tiles].long() + self.skip
        return first[:, None] + torch.arange(self.rows, device=first.device)

    @cached_property
    def _keys(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """int64 [B, n], the keys by their lanes in the key table; `_bounds`; and `num_unmasked`."""
        plan, table = self.plan, self.plan.keys
        first = plan.block_indptr[self.tiles].long()
        visited = plan.block_indices[first[:, None] + torch.arange(self.blocks, device=first.device)].long()
        lane = torch.arange(plan.block_k, device=first.device)
        keys = (visited[:, :, None] * plan.block_k + lane).flatten(1)
        num_unmasked = self.full * plan.block_k
        masked = keys[:, num_unmasked:]
        bounds = table.kv_pos[masked]
        if self.gathered:
            rows = plan.gathered_start[self.tiles].long()[:, None] + torch.arange(self.gathered, device=first.device)
            excluded = unpack_lanes(plan.excluded_lanes[rows], plan.block_k).flatten(1)
            bounds[:, -excluded.shape[1] :].masked_fill_(excluded, PAD_POSITION)
        if len(self.tiles) == 1 and bounds.shape[1]:
            lowest_stop, highest_stop = self.q_stop.aminmax()
            seen_by_all, seen_by_some = bounds[0] < lowest_stop, bounds[0] < highest_stop
            nearest = bounds[0].masked_fill(~seen_by_all, -1).max()
            # The nearest of the keys that all rows see stays masked, so that the masked part has no empty row.
            seen_by_all &= bounds[0] != nearest
            seen_by_some &= ~seen_by_all
            bounds = bounds[:, seen_by_some]
            keys = torch.cat([keys[:, :num_unmasked], masked[:, seen_by_all], masked[:, seen_by_some]], dim=1)
            num_unmasked = keys.shape[1] - bounds.shape[1]
        return keys, bounds, num_unmasked

    @cached_property
    def empty_rows(self) -> torch.Tensor | None:
        """bool [B, m]: the rows that see no masked key. None: there are no such rows."""
        empty = self.count_masked == 0
        return empty if bool(empty.any()) else None

    @cached_property
    def count_masked(self) -> torch.Tensor:
        """int64 [B, m]: how many of the masked keys a row sees."""
        return torch.searchsorted(self._bounds.sort(dim=1).values, self.q_stop)

    @cached_property
    def additive_mask(self) -> torch.Tensor:
        """float32, shaped like `visible`: 0 where a key is visible, -inf where not."""
        invisible = self._bounds[:, None, :] >= self.q_stop[:, :, None]
        return torch.zeros(invisible.shape, device=invisible.device).masked_fill_(invisible, -torch.inf)
