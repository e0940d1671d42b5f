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

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

PAD_POSITION = torch.iinfo(torch.int32).max  # position of padding keys: beyond every row's bound
NO_HOME = -1


@dataclass
class KeyTable:
    """All key orders of a batch, one after the other, each padded to whole tiles. int32 throughout.

    kv_pos:   [tiles * block_k] absolute position in its request; PAD_POSITION for padding.
    kv_slots: [tiles * block_k] row of the cache viewed as [slots, kv_heads, head_dim]; 0 for padding.
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
    _views: dict[int, TileView] = field(default_factory=dict, repr=False)

    @property
    def num_tiles(self) -> int:
        return len(self.q_heads)

    @cached_property
    def _host(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Indptrs as Python integers, for the executors that walk tiles on the host."""
        return (
            self.q_indptr.tolist(),
            self.block_indptr.tolist(),
            self.num_full.tolist(),
            self.q_heads.tolist(),
        )

    def tiles(self) -> Iterator[TileView]:
        for t in range(self.num_tiles):
            view = self._views.get(t)
            if view is None:
                view = self._views[t] = self._view(t)
            yield view

    def _view(self, t: int) -> TileView:
        q_indptr, block_indptr, num_full, q_heads = self._host
        rows = slice(q_indptr[t], q_indptr[t + 1])
        blocks = self.block_indices[block_indptr[t] : block_indptr[t + 1]].long()
        full, partial = blocks[: num_full[t]], blocks[num_full[t] :]
        lane = torch.arange(self.block_k, device=blocks.device)
        full_keys = (full[:, None] * self.block_k + lane).flatten()
        keys = (partial[:, None] * self.block_k + lane).flatten()
        pos, home = self.keys.kv_pos[keys], self.keys.kv_home[keys]
        stop = self.q_stop[rows]
        counted = pos < stop.max()
        columns = home >= 0
        if columns.any():
            counted &= ~(
                columns & torch.isin(home, self.block_indices[block_indptr[t] : block_indptr[t + 1]])
            )
        keys, pos = keys[counted], pos[counted]
        return TileView(
            q_rows=self.q_rows[rows].long(),
            heads=self.head_groups[q_heads[t]],
            kv_slots=self.keys.kv_slots[torch.cat([full_keys, keys])].long(),
            kv_pos=self.keys.kv_pos[torch.cat([full_keys, keys])],
            num_unmasked=len(full_keys),
            visible=pos[None, :] < stop[:, None],
        )


@dataclass
class TileView:
    """One tile as a host executor wants it: its rows, the keys it visits, and the mask of the last of them.

    q_rows [m]; kv_slots, kv_pos [n]; the first `num_unmasked` keys are visible to every row, of the others
    `visible` [m, n - num_unmasked] tells.
    """

    q_rows: torch.Tensor
    heads: tuple[int, ...]
    kv_slots: torch.Tensor
    kv_pos: torch.Tensor
    num_unmasked: int
    visible: torch.Tensor

    @cached_property
    def empty_rows(self) -> torch.Tensor | None:
        """bool [m], the rows that see none of the masked keys; None where there are none."""
        empty = ~self.visible.any(dim=1)
        return empty if bool(empty.any()) else None

    @cached_property
    def additive_mask(self) -> torch.Tensor:
        """float32, shaped like `visible`: 0 where a key is visible, -inf where not."""
        return torch.zeros(self.visible.shape, device=self.visible.device).masked_fill_(
            ~self.visible, -torch.inf
        )


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
            for tile in plan.tiles():
                count = tile.visible.sum(dim=1) + tile.num_unmasked
                rows = tile.q_rows[:, None].cpu()
                pairs[rows, torch.tensor(tile.heads)] += count[:, None].cpu()
        return pairs
