"""The contract between the pattern builders and every executor.

A `PrefillPlan` is a short list of passes over one ragged batch; a pass (`BlockPlan`) visits every (row, head)
at most once, and no (row, head, key) is visited by two passes, so the passes of a row join exactly by their LSE.
A pass is a list of query tiles. Each tile has its rows, the heads that share it, and the list of key tiles to
visit: those visible to all its rows ("full"), then those that need a comparison of positions ("partial"), then
those of which some lanes do not count ("picked": gathered columns, lines through a raster), each part ascending.
Keys are named through one table that composes every token order of the batch with its page table, so that an
executor never permutes anything: key tile j is `kv_slots[j * block_k : (j + 1) * block_k]`.

A key of a visited tile counts for a row if and only if
    kv_pos[key] < q_stop[row]        and, in a picked tile,        its lane is not hidden
The second condition is for keys that the row's tile visits elsewhere: they must not count twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch

from .indexing import to_device

PAD_POSITION = torch.iinfo(torch.int32).max  # position of padding keys: beyond every row's bound
MAX_BATCHED_PAIRS = 1 << 18  # (row, key) pairs of a head in a stack of tiles: small enough to share out to threads
MAX_MASKED_KEYS = 4096  # a tile with more keys that only some of its rows see is cut into strips of rows
ROWS_OF_A_STRIP = 32


@dataclass
class KeyTable:
    """All key orders of a batch, one after the other, each padded to whole tiles. int32 throughout.

    kv_pos:   [tiles * block_k] absolute position in its request; PAD_POSITION for padding.
    kv_slots: [tiles * block_k] row of the cache viewed as [slots, kv_heads, head_dim]; for padding, and for
              keys yet to come, that of the tile's nearest key: zero times what others left there may be NaN.
    """

    kv_pos: torch.Tensor
    kv_slots: torch.Tensor


def pack_lanes(hidden: torch.Tensor) -> torch.Tensor:
    """bool [..., block_k] -> int32 [..., words]: bit i of word w is lane 32 w + i."""
    words = -(-hidden.shape[-1] // 32)
    padded = torch.nn.functional.pad(hidden, (0, words * 32 - hidden.shape[-1])).unflatten(-1, (words, 32))
    bits = (padded.long() << torch.arange(32, device=hidden.device)).sum(dim=-1)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)


def pack_lanes_on_host(hidden: np.ndarray) -> np.ndarray:
    """`pack_lanes` for numpy."""
    padded = np.pad(hidden.astype(np.bool_), ((0, 0), (0, -hidden.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


def unpack_lanes(words: torch.Tensor, block_k: int) -> torch.Tensor:
    """The inverse of `pack_lanes`."""
    bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten(-2)[..., :block_k]


@dataclass
class BlockPlan:
    """One pass. T tiles, R rows in all, nnz visited (query tile, key tile) pairs. int32 throughout.

    q_rows:        [R] row of q and out.
    q_stop:        [R] exclusive bound on the key positions that the row may see in this pass.
    q_indptr:      [T + 1] rows of tile t: q_rows[q_indptr[t] : q_indptr[t + 1]], at most block_q of them.
    q_heads:       [T] index into `head_groups`: the query heads that run this tile.
    block_indptr:  [T + 1], block_indices: [at least nnz] key tiles of `keys`: full, partial, picked, each part
                   ascending. Of an estimated pattern only the device knows nnz, and there is room to spare.
    num_full:      [T] how many of a tile's key tiles are full: the first ones.
    num_picked:    [T] how many of them are picked: the last ones.
    hidden_lanes:  [at least all picked, words] the lanes that do not count, packed by `pack_lanes`, a row for each
                   picked key tile in the order of the visits.
    num_work:      (tile, head) pairs in all, if the host knows.
    derived:       what an executor made of the plan and keeps with it, by a key of its own.
    """

    keys: KeyTable
    q_rows: torch.Tensor
    q_stop: torch.Tensor
    q_indptr: torch.Tensor
    q_heads: torch.Tensor
    block_indptr: torch.Tensor
    block_indices: torch.Tensor
    num_full: torch.Tensor
    num_picked: torch.Tensor
    hidden_lanes: torch.Tensor
    head_groups: tuple[tuple[int, ...], ...]
    block_q: int
    block_k: int
    num_work: int | None = None
    derived: dict[tuple[object, ...], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_tiles(self) -> int:
        return len(self.q_heads)

    @cached_property
    def group_arrays(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`head_groups` on the device, int32: their sizes, where each begins, and all heads one after the other."""
        sizes = np.array([len(heads) for heads in self.head_groups], dtype=np.int64)
        heads = np.array([head for heads in self.head_groups for head in heads], dtype=np.int64)
        return tuple(to_device(self.q_rows.device, sizes, np.cumsum(sizes) - sizes, heads))

    @cached_property
    def picked_start(self) -> torch.Tensor:
        """int32 [T]: the row of `hidden_lanes` that belongs to a tile's first picked key tile."""
        return (self.num_picked.cumsum(0) - self.num_picked).to(torch.int32)

    def visits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [nnz] twice: the query tile of each visit, and the visit's number in its tile. Waits for the device."""
        counts = self.block_indptr.diff().long()
        tile = torch.repeat_interleave(torch.arange(self.num_tiles, device=counts.device), counts)
        return tile, torch.arange(len(tile), device=tile.device) - self.block_indptr[:-1].long()[tile]

    def visited_blocks(self, tile: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """int64, shaped like `number`: the key tiles of these visits."""
        return self.block_indices[self.block_indptr[tile].long() + number].long()

    def visited_positions(self, tile: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """int32 [visits, block_k]: positions of the keys of these visits; PAD_POSITION for lanes that do not count."""
        positions = self.keys.kv_pos.view(-1, self.block_k)[self.visited_blocks(tile, number)]
        picked = number - (self.block_indptr.diff() - self.num_picked)[tile]  # from 0 on for picked key tiles
        lanes = self.hidden_lanes[(self.picked_start[tile] + picked).long()[picked >= 0]]
        positions[picked >= 0] = positions[picked >= 0].masked_fill(unpack_lanes(lanes, self.block_k), PAD_POSITION)
        return positions

    def count_masked(self, tile_of_row: torch.Tensor) -> torch.Tensor:
        """int64 [R]: how many keys of its partial and picked key tiles each row sees."""
        tile, number = self.visits()
        masked = number >= self.num_full[tile]
        tile, bounds = tile[masked], self.visited_positions(tile[masked], number[masked])
        count = torch.bincount(tile, minlength=self.num_tiles)
        before = count.cumsum(0) - count
        # Sort the bounds of each tile's keys at once: a row's count is where its own bound falls among them.
        size = PAD_POSITION + 1
        packed = (tile[:, None] * size + bounds).flatten().sort().values
        below = torch.searchsorted(packed, tile_of_row * size + self.q_stop)
        return below - before[tile_of_row] * self.block_k

    @cached_property
    def batches(self) -> list[TileBatch]:
        """All tiles, those of one shape stacked, for executors that walk them on the host. Made once."""
        return self._stacked(range(self.num_tiles))

    @cached_property
    def scattered(self) -> list[TileBatch]:
        """The tiles that are in none of the `causal_runs`."""
        in_runs = {t for run in self.causal_runs for t in run.tiles}
        return self._stacked(t for t in range(self.num_tiles) if t not in in_runs) if in_runs else self.batches

    @cached_property
    def causal_runs(self) -> list[CausalRun]:
        """Tiles one after the other that together are plain causal attention: two of them or more."""
        runs: list[CausalRun] = []
        q_indptr, heads = self.q_indptr.tolist(), self.q_heads.tolist()
        first_key, stop, first_row, last_row = self._causal_tiles().tolist()

        def follows(t: int) -> bool:
            """Tile t goes on where tile t - 1 ended."""
            return (
                (heads[t], first_key[t]) == (heads[t - 1], first_key[t - 1])
                and stop[t] == stop[t - 1] + q_indptr[t + 1] - q_indptr[t]
                and first_row[t] == last_row[t - 1] + 1
            )

        t = 0
        while t < self.num_tiles:
            first, t = t, t + 1
            if first_key[first] < 0:
                continue
            while t < self.num_tiles and follows(t):
                t += 1
            if t - first > 1:
                keys = slice(first_key[first], first_key[first] + stop[t - 1])
                rows = slice(first_row[first], last_row[t - 1] + 1)
                slots = self.keys.kv_slots[keys].long()
                runs.append(CausalRun(range(first, t), self.head_groups[heads[first]], rows, slots))
        return runs

    def _causal_tiles(self) -> torch.Tensor:
        """int64 [4, T]: first key lane, bound of the last row, first and last row of q.

        The first key lane is -1 where the tile is not plain causal attention: rows and their bounds follow each
        other, and the keys are those of positions 0 to the last bound, side by side in the table.
        """
        indptr, block_indptr = self.q_indptr.long(), self.block_indptr.long()
        first, last, blocks = indptr[:-1], indptr[1:] - 1, block_indptr.diff()
        tile_of = torch.repeat_interleave(torch.arange(self.num_tiles, device=blocks.device), blocks)
        visited = self.block_indices.long()
        lowest = torch.zeros_like(blocks).scatter_reduce(0, tile_of, visited, "amin", include_self=False)
        highest = torch.zeros_like(blocks).scatter_reduce(0, tile_of, visited, "amax", include_self=False)
        stop, pos = self.q_stop[last].long(), self.keys.kv_pos
        if not len(visited):
            return torch.full((4, self.num_tiles), -1, device=blocks.device)

        def free_of(bad: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
            """Nothing of bad[start:end] is set."""
            count = torch.cat([bad.new_zeros(1, dtype=torch.int64), bad.cumsum(0)])
            return count[end.clamp(0, len(bad))] == count[start.clamp(0, len(bad))]

        def jumps(values: torch.Tensor) -> torch.Tensor:
            return torch.cat([values.new_zeros(1, dtype=torch.bool), values.diff() != 1])

        start, end = lowest * self.block_k, (lowest + blocks) * self.block_k
        plain = (blocks > 0) & (highest - lowest == blocks - 1) & (blocks == -(-stop // self.block_k))
        plain &= stop > last - first
        plain &= free_of(jumps(self.q_stop) | jumps(self.q_rows), first + 1, last + 1)
        plain &= self.num_picked == 0
        plain &= free_of(jumps(pos) & (pos != PAD_POSITION), start + 1, end)
        lane = (start + stop - 1).clamp(0, len(pos) - 1)
        plain &= (pos[start] == 0) & (pos[lane] == stop - 1)
        return torch.stack([start.where(plain, -1), stop, self.q_rows[first].long(), self.q_rows[last].long()])

    def _stacked(self, tiles: Iterable[int]) -> list[TileBatch]:
        q_indptr, block_indptr = self.q_indptr.tolist(), self.block_indptr.tolist()
        num_full, num_picked, q_heads = self.num_full.tolist(), self.num_picked.tolist(), self.q_heads.tolist()
        shapes: dict[tuple[int, int, int, int, int], list[int]] = {}
        for t in tiles:
            rows, blocks = q_indptr[t + 1] - q_indptr[t], block_indptr[t + 1] - block_indptr[t]
            if blocks:
                shapes.setdefault((q_heads[t], rows, blocks, num_full[t], num_picked[t]), []).append(t)
        batches = []
        for (heads, rows, blocks, full, picked), members in shapes.items():
            if (blocks - full) * self.block_k > MAX_MASKED_KEYS and rows > ROWS_OF_A_STRIP:
                for t, skip in product(members, range(0, rows, ROWS_OF_A_STRIP)):
                    strip = min(ROWS_OF_A_STRIP, rows - skip)
                    batches.append(TileBatch(self, [t], self.head_groups[heads], strip, blocks, full, picked, skip))
                continue
            size = max(1, MAX_BATCHED_PAIRS // (rows * blocks * self.block_k))
            for i in range(0, len(members), size):
                some = members[i : i + size]
                batches.append(TileBatch(self, some, self.head_groups[heads], rows, blocks, full, picked))
        return sorted(batches, key=TileBatch.pairs, reverse=True)  # longest first, so that threads end together


@dataclass
class CausalRun:
    """Rows q[q_rows] over the keys `kv_slots` [n] of positions 0 to n - 1: causal, aligned at the last row."""

    tiles: range
    heads: tuple[int, ...]
    q_rows: slice
    kv_slots: torch.Tensor

    @cached_property
    def kv_slice(self) -> slice | None:
        return slice_of(self.kv_slots)


def slice_of(slots: torch.Tensor) -> slice | None:
    """The slice of the cache that `slots` [n] are, if they lie side by side in it."""
    first, last = int(slots[0]), int(slots[-1])
    side_by_side = last - first == len(slots) - 1 and bool((slots.diff() == 1).all())
    return slice(first, last + 1) if side_by_side else None


@dataclass
class TileBatch:
    """B tiles of one shape as a host executor wants them: rows, visited keys, and the mask of the last of these.

    Each has m `rows`, which are those of its tile after the first `skip`, visits n = blocks * block_k keys, and
    of its key tiles the first `full` are visible to all rows and the last `picked` have hidden lanes. The
    tensors are made when first asked for, by whichever thread runs the tiles, and kept for all layers.
    """

    plan: BlockPlan
    tiles: list[int]
    heads: tuple[int, ...]
    rows: int
    blocks: int
    full: int
    picked: int
    skip: int = 0

    def forget(self) -> None:
        """Drop the tensors. They are made again when asked for."""
        for name, what in vars(type(self)).items():
            if isinstance(what, cached_property):
                self.__dict__.pop(name, None)

    def pairs(self) -> int:
        """(row, key) pairs to compute for one head, masked ones included."""
        return len(self.tiles) * self.rows * self.blocks * self.plan.block_k

    @property
    def num_unmasked(self) -> int:
        """The first so many keys of a tile are visible to all its rows; of the others `visible` tells."""
        return self._keys[3]

    @cached_property
    def q_rows(self) -> torch.Tensor:
        """int64 [B, m]: rows of q and out."""
        return self.plan.q_rows[self._row_index].long()

    @property
    def kv_slots(self) -> torch.Tensor:
        """int64 [B, n]: rows of the cache. Where B is 1, keys that no row sees are left out.

        The order is that of the visits, except that where B is 1 the keys that all rows see come first.
        """
        return self._keys[0]

    @cached_property
    def kv_slice(self) -> slice | None:
        """`kv_slots` as a slice of the cache where there is one tile and its keys lie side by side."""
        return slice_of(self.kv_slots[0]) if len(self.tiles) == 1 and self.kv_slots.shape[1] else None

    @property
    def kv_pos(self) -> torch.Tensor:
        """int32 [B, n]: positions of the keys."""
        return self._keys[1]

    @cached_property
    def visible(self) -> torch.Tensor:
        """bool [B, m, n - num_unmasked]"""
        return self._bounds[:, None, :] < self.q_stop[:, :, None]

    @cached_property
    def q_stop(self) -> torch.Tensor:
        """int32 [B, m]: exclusive bound on the key positions that a row may see."""
        return self.plan.q_stop[self._row_index]

    @property
    def _bounds(self) -> torch.Tensor:
        """int32 [B, n - num_unmasked]: a row sees the masked key if this lies below its `q_stop`."""
        return self._keys[2]

    @cached_property
    def _row_index(self) -> torch.Tensor:
        first = self.plan.q_indptr[self.tiles].long() + self.skip
        return first[:, None] + torch.arange(self.rows, device=first.device)

    @cached_property
    def _keys(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        plan, table = self.plan, self.plan.keys
        first = plan.block_indptr[self.tiles].long()
        visited = plan.block_indices[first[:, None] + torch.arange(self.blocks, device=first.device)].long()
        lane = torch.arange(plan.block_k, device=first.device)
        keys = (visited[:, :, None] * plan.block_k + lane).flatten(1)
        num_unmasked = self.full * plan.block_k
        masked = keys[:, num_unmasked:]
        bounds = table.kv_pos[masked]
        if self.picked:
            rows = plan.picked_start[self.tiles].long()[:, None] + torch.arange(self.picked, device=first.device)
            hidden = unpack_lanes(plan.hidden_lanes[rows], plan.block_k).flatten(1)
            bounds[:, -hidden.shape[1] :].masked_fill_(hidden, PAD_POSITION)
        if len(self.tiles) == 1 and bounds.shape[1]:
            least, most = self.q_stop.aminmax()
            by_all, by_some = bounds[0] < least, bounds[0] < most
            nearest = bounds[0].masked_fill(~by_all, -1).max()
            by_all &= bounds[0] != nearest  # one stays masked, so that no row is empty there
            by_some &= ~by_all
            bounds = bounds[:, by_some]
            keys = torch.cat([keys[:, :num_unmasked], masked[:, by_all], masked[:, by_some]], dim=1)
            num_unmasked = keys.shape[1] - bounds.shape[1]
        return table.kv_slots[keys].long(), table.kv_pos[keys], bounds, num_unmasked

    @cached_property
    def empty_rows(self) -> torch.Tensor | None:
        """bool [B, m], the rows that see none of the masked keys; None where there are none."""
        empty = self.count_masked == 0
        return empty if bool(empty.any()) else None

    @cached_property
    def count_masked(self) -> torch.Tensor:
        """int64 [B, m]: how many of the masked keys a row sees."""
        return torch.searchsorted(self._bounds.sort(dim=1).values, self.q_stop)

    @cached_property
    def additive_mask(self) -> torch.Tensor:
        """float32, shaped like `visible`: 0 where a key is visible, -inf where not."""
        hidden = self._bounds[:, None, :] >= self.q_stop[:, :, None]
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)


@dataclass
class PrefillPlan:
    """The passes of one layer over one ragged batch; `num_rows` rows of q in all.

    once: it runs once, so an executor drops what it makes of a tile as soon as it has run it.
    """

    passes: tuple[BlockPlan, ...]
    num_rows: int
    num_heads: int
    once: bool = False

    @cached_property
    def visited_by_row(self) -> torch.Tensor:
        """int64 [num_rows, num_heads], on the plan's device: keys that each row and head visits below its bound."""
        device = self.passes[0].q_rows.device if self.passes else torch.device("cpu")
        pairs = torch.zeros(self.num_rows, self.num_heads, dtype=torch.int64, device=device)
        for plan in self.passes:
            in_group = torch.tensor([[h in group for h in range(self.num_heads)] for group in plan.head_groups])
            rows_of_tile = plan.q_indptr.diff()
            tile = torch.repeat_interleave(torch.arange(plan.num_tiles, device=device), rows_of_tile)
            count = plan.num_full.long()[tile] * plan.block_k + plan.count_masked(tile)
            weight = in_group.to(device)[plan.q_heads.long()[tile]]
            pairs.index_add_(0, plan.q_rows.long(), count[:, None] * weight)
        return pairs
