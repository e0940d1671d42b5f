"""The contract between the pattern builders and every executor.

A `PrefillPlan` is a short list of passes over one ragged batch; a pass (`BlockPlan`) visits every (row, head)
at most once, and no (row, head, key) is visited by two passes, so the passes of a row join exactly by their LSE.
A pass is a list of query tiles. Each tile has its rows, the heads that share it, and the ascending list of key
tiles to visit, those visible to all its rows ("full") before those that need a comparison of positions
("partial"). Keys are named through one table that composes every token order of the batch with its page table,
so that an executor never permutes anything: key tile j is `kv_slots[j * block_k : (j + 1) * block_k]`.

A key of a visited tile counts for a row if and only if
    kv_pos[key] < q_stop[row]        and        not (kv_home[key] >= 0 and tile kv_home[key] is on the list)
The second condition is for gathered columns: a column whose own tile is visited anyway must not count twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

PAD_POSITION = torch.iinfo(torch.int32).max  # position of padding keys: beyond every row's bound
NO_HOME = -1
MAX_BATCHED_PAIRS = 1 << 18  # (row, key) pairs of a head in a stack of tiles: small enough to share out to threads


@dataclass
class KeyTable:
    """All key orders of a batch, one after the other, each padded to whole tiles. int32 throughout.

    kv_pos:   [tiles * block_k] absolute position in its request; PAD_POSITION for padding.
    kv_slots: [tiles * block_k] row of the cache viewed as [slots, kv_heads, head_dim]; for padding
              the request's first token: a weight of zero times what others left in the cache may be NaN.
    kv_home:  [tiles * block_k] for a gathered column the tile of its base order, else NO_HOME.
    """

    kv_pos: torch.Tensor
    kv_slots: torch.Tensor
    kv_home: torch.Tensor


@dataclass
class BlockPlan:
    """One pass. T tiles, R rows in all, nnz visited (query tile, key tile) pairs. int32 throughout.

    q_rows:        [R] row of q and out.
    q_stop:        [R] exclusive bound on the key positions that the row may see in this pass.
    q_indptr:      [T + 1] rows of tile t: q_rows[q_indptr[t] : q_indptr[t + 1]], at most block_q of them.
    q_heads:       [T] index into `head_groups`: the query heads that run this tile.
    block_indptr:  [T + 1], block_indices: [nnz] key tiles of `keys`: full ones first, each part ascending.
    num_full:      [T] how many of a tile's key tiles are full.
    """

    keys: KeyTable
    q_rows: torch.Tensor
    q_stop: torch.Tensor
    q_indptr: torch.Tensor
    q_heads: torch.Tensor
    block_indptr: torch.Tensor
    block_indices: torch.Tensor
    num_full: torch.Tensor
    head_groups: tuple[tuple[int, ...], ...]
    block_k: int

    @property
    def num_tiles(self) -> int:
        return len(self.q_heads)

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
        q_indptr, block_indptr, heads = self.q_indptr.tolist(), self.block_indptr.tolist(), self.q_heads.tolist()
        ends = [self._causal_end(t, q_indptr, block_indptr) for t in range(self.num_tiles)]
        t = 0
        while t < self.num_tiles:
            first, end = t, ends[t]
            t += 1
            while end is not None and t < self.num_tiles and heads[t] == heads[first] and ends[t] is not None:
                rows = q_indptr[t + 1] - q_indptr[t]
                follows = int(self.q_rows[q_indptr[t]]) == int(self.q_rows[q_indptr[t] - 1]) + 1
                if ends[t] != (end[0], end[1] + rows) or not follows:
                    break
                end, t = ends[t], t + 1
            if end is not None and t - first > 1:
                rows = slice(q_indptr[first], q_indptr[t])
                keys = slice(end[0] * self.block_k, end[0] * self.block_k + end[1])
                runs.append(
                    CausalRun(
                        range(first, t),
                        self.head_groups[heads[first]],
                        slice(int(self.q_rows[rows][0]), int(self.q_rows[rows][-1]) + 1),
                        self.keys.kv_slots[keys].long(),
                    )
                )
        return runs

    def _causal_end(self, t: int, q_indptr: list[int], block_indptr: list[int]) -> tuple[int, int] | None:
        """(first key tile, causal bound of the last row) if the tile's rows follow each other and see all before."""
        rows = slice(q_indptr[t], q_indptr[t + 1])
        stop, q_rows = self.q_stop[rows], self.q_rows[rows]
        last = int(stop[-1])
        blocks = self.block_indices[block_indptr[t] : block_indptr[t + 1]]
        if not len(blocks) or len(blocks) != -(-last // self.block_k):
            return None
        first = int(blocks.min())
        if (
            int(blocks.max()) - first != len(blocks) - 1
            or bool((stop.diff() != 1).any())
            or bool((q_rows.diff() != 1).any())
        ):
            return None
        keys = slice(first * self.block_k, (first + len(blocks)) * self.block_k)
        pos, home = self.keys.kv_pos[keys], self.keys.kv_home[keys]
        follow = torch.equal(pos[:last], torch.arange(last, dtype=pos.dtype, device=pos.device))
        plain = follow and bool((pos[last:] >= last).all()) and bool((home < 0).all())
        return (first, last) if plain and last >= len(stop) else None

    def _stacked(self, tiles: Iterable[int]) -> list[TileBatch]:
        q_indptr, block_indptr = self.q_indptr.tolist(), self.block_indptr.tolist()
        num_full, q_heads = self.num_full.tolist(), self.q_heads.tolist()
        shapes: dict[tuple[int, int, int, int], list[int]] = {}
        for t in tiles:
            rows, blocks = q_indptr[t + 1] - q_indptr[t], block_indptr[t + 1] - block_indptr[t]
            if blocks:
                shapes.setdefault((q_heads[t], rows, blocks, num_full[t]), []).append(t)
        batches = []
        for (heads, rows, blocks, full), members in shapes.items():
            size = max(1, MAX_BATCHED_PAIRS // (rows * blocks * self.block_k))
            for i in range(0, len(members), size):
                batches.append(TileBatch(self, members[i : i + size], self.head_groups[heads], rows, blocks, full))
        return sorted(batches, key=TileBatch.pairs, reverse=True)  # longest first, so that threads end together


@dataclass
class CausalRun:
    """Rows q[q_rows] over the keys `kv_slots` [n] of positions 0 to n - 1: causal, aligned at the last row."""

    tiles: range
    heads: tuple[int, ...]
    q_rows: slice
    kv_slots: torch.Tensor


@dataclass
class TileBatch:
    """B tiles of one shape as a host executor wants them: rows, visited keys, and the mask of the last of these.

    Each has m `rows`, visits n = blocks * block_k keys, and of its key tiles the first `full` are visible to all
    rows. The tensors are made when first asked for, by whichever thread runs the tiles, and kept for all layers.
    """

    plan: BlockPlan
    tiles: list[int]
    heads: tuple[int, ...]
    rows: int
    blocks: int
    full: int

    def pairs(self) -> int:
        """(row, key) pairs to compute for one head, masked ones included."""
        return len(self.tiles) * self.rows * self.blocks * self.plan.block_k

    @property
    def num_unmasked(self) -> int:
        """The first so many keys of a tile are visible to all its rows; of the others `visible` tells."""
        return self.full * self.plan.block_k

    @cached_property
    def q_rows(self) -> torch.Tensor:
        """int64 [B, m]: rows of q and out."""
        return self.plan.q_rows[self._row_index].long()

    @property
    def kv_slots(self) -> torch.Tensor:
        """int64 [B, n]: rows of the cache. Where B is 1, keys that no row sees are left out."""
        return self._keys[0]

    @property
    def kv_pos(self) -> torch.Tensor:
        """int32 [B, n]: positions of the keys."""
        return self._keys[1]

    @property
    def visible(self) -> torch.Tensor:
        """bool [B, m, n - num_unmasked]"""
        return self._keys[2]

    @cached_property
    def _row_index(self) -> torch.Tensor:
        first = self.plan.q_indptr[self.tiles].long()
        return first[:, None] + torch.arange(self.rows, device=first.device)

    @cached_property
    def _keys(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        plan, table = self.plan, self.plan.keys
        first = plan.block_indptr[self.tiles].long()
        visited = plan.block_indices[first[:, None] + torch.arange(self.blocks, device=first.device)].long()
        lane = torch.arange(plan.block_k, device=first.device)
        keys = (visited[:, :, None] * plan.block_k + lane).flatten(1)
        masked = keys[:, self.num_unmasked :]
        visible = table.kv_pos[masked][:, None, :] < plan.q_stop[self._row_index][:, :, None]
        home = table.kv_home[masked]
        if bool((home >= 0).any()):
            visible &= ~(home[:, :, None] == visited[:, None, :]).any(dim=2)[:, None, :]
        if len(self.tiles) == 1:
            seen = visible[0].any(dim=0)
            visible = visible[:, :, seen]
            keys = torch.cat([keys[:, : self.num_unmasked], masked[:, seen]], dim=1)
        return table.kv_slots[keys].long(), table.kv_pos[keys], visible

    @cached_property
    def empty_rows(self) -> torch.Tensor | None:
        """bool [B, m], the rows that see none of the masked keys; None where there are none."""
        empty = ~self.visible.any(dim=2)
        return empty if bool(empty.any()) else None

    @cached_property
    def additive_mask(self) -> torch.Tensor:
        """float32, shaped like `visible`: 0 where a key is visible, -inf where not."""
        zeros = torch.zeros(self.visible.shape, device=self.visible.device)
        return zeros.masked_fill_(~self.visible, -torch.inf)


@dataclass
class PrefillPlan:
    """The passes of one layer over one ragged batch; `num_rows` rows of q in all."""

    passes: tuple[BlockPlan, ...]
    num_rows: int
    num_heads: int

    @cached_property
    def visited_by_row(self) -> torch.Tensor:
        """int64 [num_rows, num_heads]: keys at or below the diagonal that each row and head visits."""
        pairs = torch.zeros(self.num_rows, self.num_heads, dtype=torch.int64)
        for plan in self.passes:
            for tiles in plan.batches:
                count = (tiles.visible.sum(dim=2) + tiles.num_unmasked).cpu()
                pairs[tiles.q_rows.cpu()[:, :, None], torch.tensor(tiles.heads)] += count[:, :, None]
        return pairs
