"""The contract between planning and every executor.

A `PrefillPlan` is a short list of passes over one ragged batch. A pass (`BlockPlan`) visits every (row, head) at most
once, and no two passes visit the same (row, head, key), so the passes of a row join exactly by their LSE.

A pass is a list of query tiles. Each query tile has its rows, the heads that share it, and the key tiles that it
visits, in three parts, each ascending:

    full      every row sees every key: no mask
    partial   a row sees the keys below its bound: positions are compared
    gathered  as partial, and some lanes are excluded: columns and lines through a raster, gathered from many places

One table (`KeyTable`) names all keys. It composes every token order of the batch with its page table, so that an
executor never permutes anything: the slots of key tile j are `kv_slots[j * block_k : (j + 1) * block_k]`.

A row sees a key of a key tile that its query tile visits if and only if
    kv_pos[key] < q_stop[row]        and, in a gathered tile,        the key's lane is not excluded
The second condition is for keys that the query tile visits in another key tile, too: they must not count twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .indexing import to_device

PAD_POSITION = torch.iinfo(torch.int32).max  # the position of padding keys: no row's bound lies above it


@dataclass
class KeyTable:
    """All key orders of a batch, one after the other, each padded to whole tiles. int32 throughout.

    kv_pos:   [tiles * block_k] absolute position in its request; PAD_POSITION for padding.
    kv_slots: [tiles * block_k] row of the cache viewed as [slots, kv_heads, head_dim]. Padding and keys that are
              not written yet point at a real slot of the same tile: their weight is 0, but 0 x NaN is NaN.
    """

    kv_pos: torch.Tensor
    kv_slots: torch.Tensor


def pack_lanes(excluded: torch.Tensor) -> torch.Tensor:
    """bool [..., block_k], True for excluded lanes -> int32 [..., words]: bit i of word w is lane 32 w + i."""
    words = -(-excluded.shape[-1] // 32)
    padded = torch.nn.functional.pad(excluded, (0, words * 32 - excluded.shape[-1])).unflatten(-1, (words, 32))
    bits = (padded.long() << torch.arange(32, device=excluded.device)).sum(dim=-1)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)


def pack_lanes_on_host(excluded: np.ndarray) -> np.ndarray:
    """`pack_lanes` for a numpy array [tiles, block_k]."""
    padded = np.pad(excluded.astype(np.bool_), ((0, 0), (0, -excluded.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


def unpack_lanes(words: torch.Tensor, block_k: int) -> torch.Tensor:
    """The inverse of `pack_lanes`: int32 [..., words] -> bool [..., block_k]."""
    bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten(-2)[..., :block_k]


@dataclass
class BlockPlan:
    """One pass: T query tiles of R rows in all, and nnz visits, which are (query tile, key tile) pairs. All int32.

    q_rows:         [R] the row of q and out.
    q_stop:         [R] exclusive bound on the key positions that the row may see in this pass.
    q_indptr:       [T + 1] the rows of tile t are q_rows[q_indptr[t] : q_indptr[t + 1]], at most block_q of them.
    q_heads:        [T] index into `head_groups`: the query heads that run this tile.
    block_indptr:   [T + 1] the visits of tile t are block_indices[block_indptr[t] : block_indptr[t + 1]].
    block_indices:  [at least nnz] key tiles of `keys`: full, partial, gathered, each part ascending. Only the device
                    knows nnz of an estimated pattern, so its array has room to spare.
    num_full:       [T] how many visits of a tile are full: the first ones.
    num_gathered:   [T] how many visits of a tile are gathered: the last ones.
    excluded_lanes: [at least all gathered, words] the excluded lanes, packed by `pack_lanes`: a row for each gathered
                    key tile in the order of the visits.
    num_work:       how many (query tile, head) pairs there are; None where only the device knows.
    derived:        what executors have made of the plan and keep with it, by keys of their own.
    """

    keys: KeyTable
    q_rows: torch.Tensor
    q_stop: torch.Tensor
    q_indptr: torch.Tensor
    q_heads: torch.Tensor
    block_indptr: torch.Tensor
    block_indices: torch.Tensor
    num_full: torch.Tensor
    num_gathered: torch.Tensor
    excluded_lanes: torch.Tensor
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
        """`head_groups` on the device, int32: the sizes, where each group begins, and the heads of all groups."""
        sizes = np.array([len(heads) for heads in self.head_groups], dtype=np.int64)
        heads = np.array([head for heads in self.head_groups for head in heads], dtype=np.int64)
        on_device = to_device(self.q_rows.device, sizes, np.cumsum(sizes) - sizes, heads)
        return on_device[0], on_device[1], on_device[2]

    @cached_property
    def gathered_start(self) -> torch.Tensor:
        """int32 [T]: the row of `excluded_lanes` that belongs to a query tile's first gathered key tile."""
        return (self.num_gathered.cumsum(0) - self.num_gathered).to(torch.int32)

    def visits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [nnz] twice: the query tile of each visit, and the visit's number in its tile. Waits for the device."""
        counts = self.block_indptr.diff().long()
        tile = torch.repeat_interleave(torch.arange(self.num_tiles, device=counts.device), counts)
        return tile, torch.arange(len(tile), device=tile.device) - self.block_indptr[:-1].long()[tile]

    def visited_blocks(self, tile: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """int64, shaped like `number`: the key tiles of these visits."""
        return self.block_indices[self.block_indptr[tile].long() + number].long()

    def visited_positions(self, tile: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """int32 [visits, block_k]: positions of the keys of these visits; PAD_POSITION for excluded lanes."""
        positions = self.keys.kv_pos.view(-1, self.block_k)[self.visited_blocks(tile, number)]
        gathered_number = number - (self.block_indptr.diff() - self.num_gathered)[tile]  # negative if not gathered
        lanes = self.excluded_lanes[(self.gathered_start[tile] + gathered_number).long()[gathered_number >= 0]]
        positions[gathered_number >= 0] = positions[gathered_number >= 0].masked_fill(
            unpack_lanes(lanes, self.block_k), PAD_POSITION
        )
        return positions

    def count_masked(self, tile_of_row: torch.Tensor) -> torch.Tensor:
        """int64 [R]: how many keys of its partial and gathered key tiles each row sees."""
        tile, number = self.visits()
        masked = number >= self.num_full[tile]
        tile, bounds = tile[masked], self.visited_positions(tile[masked], number[masked])
        count = torch.bincount(tile, minlength=self.num_tiles)
        before = count.cumsum(0) - count
        # Sort the key positions of all tiles at once: a row's count is where its bound falls among those of its tile.
        size = PAD_POSITION + 1
        packed = (tile[:, None] * size + bounds).flatten().sort().values
        below = torch.searchsorted(packed, tile_of_row * size + self.q_stop)
        return below - before[tile_of_row] * self.block_k


@dataclass
class PrefillPlan:
    """The passes of one layer over one ragged batch of `num_rows` rows of q, with `num_heads` query heads.

    once: the plan runs only once, so an executor drops what it made of a tile as soon as the tile has run.
    """

    passes: tuple[BlockPlan, ...]
    num_rows: int
    num_heads: int
    once: bool = False

    @cached_property
    def visited_by_row(self) -> torch.Tensor:
        """int64 [num_rows, num_heads], on the plan's device: how many keys each row sees with each head."""
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
