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

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .indexing import to_device

PAD_POSITION = torch.iinfo(torch.int32).max  # position of padding keys: beyond every row's bound


@dataclass
class KeyTable:
    """All key orders of a batch, one after the other, each padded to whole tiles. int32 throughout.

    kv_pos:   [tiles * block_k] absolute position in its request; PAD_POSITION for padding.
    kv_slots: [tiles * block_k] row of the cache viewed as [slots, kv_heads, head_dim]. Padding and keys that are
              not written yet point at a real slot of the same tile: their weight is 0, but 0 x NaN is NaN.
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
        on_device = to_device(self.q_rows.device, sizes, np.cumsum(sizes) - sizes, heads)
        return on_device[0], on_device[1], on_device[2]

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
