"""The contract between planning and every executor.

A `BlockPlan` says what one layer computes of one ragged batch. It is a list of query tiles in one or more passes. A
pass visits every (row, head) at most once, and no two tiles visit the same (row, head, key), so what the tiles of a row
say joins exactly by LSE. Each query tile has its rows, the heads that share it, and the key tiles that it visits, in
three parts, each ascending:

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

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.kernels.indexing import to_device

PAD_POSITION = torch.iinfo(torch.int32).max  # the position of padding keys: no row's bound lies above it


@dataclass
class KeyTable:
    """All key orders of a batch, one after the other, each padded to whole tiles. int32 throughout.

    kv_pos:   [tiles * block_k] absolute position in its request; PAD_POSITION for padding.
    kv_slots: [tiles * block_k] row of the cache viewed as [slots, kv_heads, head_dim]. Padding and keys that are
              not written yet point at a real slot of the same tile: their weight is 0, but 0 x NaN is NaN.
    derived:  what executors have made of the table for all plans that share it, by keys of their own.
    """

    kv_pos: torch.Tensor
    kv_slots: torch.Tensor
    derived: dict[tuple[object, ...], Any] = field(default_factory=dict, init=False, repr=False, compare=False)


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


@dataclass(frozen=True)
class TileSizes:
    """What the host knows of the query tiles of a plan; arrays have a value for each tile.

    rows:   int64, rows of the tile.
    visits: int64, a bound on the key tiles that it visits; exact where the pattern is static.
    group:  int64, index into `head_groups`, as `q_heads` says it on the device.
    request: int64, the request of the batch that its rows are of.
    alone:  bool, no other tile has any (row, head) of this one.
    """

    rows: NDArray[np.int64]
    visits: NDArray[np.int64]
    group: NDArray[np.int64]
    request: NDArray[np.int64]
    alone: NDArray[np.bool_]


@dataclass
class BlockPlan:
    """T query tiles of R rows in all, and nnz visits, which are (query tile, key tile) pairs. All tensors are int32.

    q_rows:         [R] the row of q and out.
    q_stop:         [R] exclusive bound on the key positions that the row may see in this tile.
    q_indptr:       [T + 1] the rows of tile t are q_rows[q_indptr[t] : q_indptr[t + 1]], at most block_q of them.
    q_heads:        [T] index into `head_groups`: the query heads that run this tile.
    block_indptr:   [T + 1] the visits of tile t are block_indices[block_indptr[t] : block_indptr[t + 1]].
    block_indices:  [at least nnz] key tiles of `keys`: full, partial, gathered, each part ascending. Only the device
                    knows nnz of an estimated pattern, so its array has room to spare.
    num_full:       [T] how many visits of a tile are full: the first ones.
    num_gathered:   [T] how many visits of a tile are gathered: the last ones.
    excluded_lanes: [at least all gathered, words] the excluded lanes, packed by `pack_lanes`: a row for each gathered
                    key tile in the order of the visits.
    gathered_start: [T] the row of `excluded_lanes` that belongs to a tile's first gathered key tile.
    num_rows, num_heads: rows and query heads of q.
    pass_indptr:    the tiles of pass i are pass_indptr[i] to pass_indptr[i + 1] - 1.
    known_sizes:    what the planner knew of the tiles on the host.
    once:           the plan runs only once, so an executor drops what it made of a tile as soon as the tile has run.
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
    num_rows: int
    num_heads: int
    block_q: int
    block_k: int
    pass_indptr: tuple[int, ...] = ()
    gathered_start: torch.Tensor = None  # type: ignore[assignment]
    known_sizes: TileSizes | None = None
    once: bool = False
    derived: dict[tuple[object, ...], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.gathered_start is None:
            self.gathered_start = (self.num_gathered.cumsum(0) - self.num_gathered).to(torch.int32)
        if not self.pass_indptr:
            self.pass_indptr = (0, self.num_tiles) if self.num_tiles else (0,)

    @property
    def num_tiles(self) -> int:
        return len(self.q_heads)

    @cached_property
    def sizes(self) -> TileSizes:
        """The sizes of the tiles. Waits for the device if the planner did not say them."""
        if self.known_sizes is not None:
            return self.known_sizes
        rows, visits, group = (
            x.cpu().numpy().astype(np.int64) for x in (self.q_indptr.diff(), self.block_indptr.diff(), self.q_heads)
        )
        return TileSizes(rows, visits, group, np.zeros_like(rows), np.full(len(rows), len(self.pass_indptr) == 2))

    def visited_area(self, num_requests: int) -> NDArray[np.int64]:
        """int64 [num_requests]: (row, key, query head) triples in visited tiles. More than what the rows see by the
        keys of partial tiles that they do not see.

        Visits are what the host knows: a bound, as `TileSizes.visits` is.
        """
        area = self._area_of_a_visit * self.sizes.visits
        return np.bincount(self.sizes.request, area, minlength=num_requests).astype(np.int64)

    def counted_area(self, num_requests: int) -> torch.Tensor:
        """float64 [num_requests], on the plan's device: `visited_area` by the visits that the device has counted. The
        host does not wait."""
        weight, request = to_device(self.block_indptr.device, self._area_of_a_visit, self.sizes.request)
        area = weight.double() * self.block_indptr.diff()
        return area.new_zeros(num_requests).index_add_(0, request.long(), area)

    @property
    def _area_of_a_visit(self) -> NDArray[np.int64]:
        """int64 [T]: (row, key, query head) triples in one key tile of each query tile."""
        heads = np.array([len(group) for group in self.head_groups], dtype=np.int64)
        return self.sizes.rows * heads[self.sizes.group] * self.block_k

    def for_keeping(self) -> BlockPlan:
        """The same plan for what is kept in `derived`. A plan that kept itself would be freed whenever Python looks for
        cycles next, and its tensors of a GPU would stay there until then.
        """
        return replace(self)

    @property
    def passes(self) -> tuple[BlockPlan, ...]:
        """Each pass as a plan of its own, whose tensors are views of this one's."""
        return (self,) if len(self.pass_indptr) == 2 else self._several_passes

    @cached_property
    def _several_passes(self) -> tuple[BlockPlan, ...]:
        rows = np.concatenate([[0], self.sizes.rows.cumsum()])
        views = []
        for first, stop in zip(self.pass_indptr[:-1], self.pass_indptr[1:]):
            tiles, own_rows = slice(first, stop), slice(int(rows[first]), int(rows[stop]))
            sizes = TileSizes(*(x[tiles] for x in vars(self.sizes).values()))
            views.append(
                replace(
                    self,
                    q_rows=self.q_rows[own_rows],
                    q_stop=self.q_stop[own_rows],
                    q_indptr=self.q_indptr[first : stop + 1] - own_rows.start,
                    q_heads=self.q_heads[tiles],
                    block_indptr=self.block_indptr[first : stop + 1],
                    num_full=self.num_full[tiles],
                    num_gathered=self.num_gathered[tiles],
                    gathered_start=self.gathered_start[tiles],
                    pass_indptr=(0, stop - first),
                    known_sizes=sizes,
                )
            )
        return tuple(views)

    def visits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [nnz] twice: the query tile of each visit, and the visit's number in its tile. Waits for the device."""
        counts = self.block_indptr.diff().long()
        tile = torch.repeat_interleave(torch.arange(self.num_tiles, device=counts.device), counts)
        return tile, torch.arange(len(tile), device=tile.device) - (counts.cumsum(0) - counts)[tile]

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

    @cached_property
    def visited_by_row(self) -> torch.Tensor:
        """int64 [num_rows, num_heads], on the plan's device: how many keys each row sees with each head."""
        device = self.q_rows.device
        pairs = torch.zeros(self.num_rows, self.num_heads, dtype=torch.int64, device=device)
        if not self.num_tiles:
            return pairs
        in_group = torch.tensor([[h in group for h in range(self.num_heads)] for group in self.head_groups])
        rows_of_tile = self.q_indptr.diff()
        tile = torch.repeat_interleave(torch.arange(self.num_tiles, device=device), rows_of_tile)
        count = self.num_full.long()[tile] * self.block_k + self.count_masked(tile)
        weight = in_group.to(device)[self.q_heads.long()[tile]]
        return pairs.index_add_(0, self.q_rows.long(), count[:, None] * weight)


def nothing(num_rows: int, num_heads: int, block_q: int, block_k: int, device: torch.device) -> BlockPlan:
    """A plan without a query tile: every row sees no key."""
    none, indptr = (torch.zeros(size, dtype=torch.int32, device=device) for size in (0, 1))
    no_tile = np.zeros(0, dtype=np.int64)
    return BlockPlan(
        keys=KeyTable(none, none),
        q_rows=none,
        q_stop=none,
        q_indptr=indptr,
        q_heads=none,
        block_indptr=indptr,
        block_indices=none,
        num_full=none,
        num_gathered=none,
        excluded_lanes=none.view(0, -(-block_k // 32)),
        head_groups=(),
        num_rows=num_rows,
        num_heads=num_heads,
        block_q=block_q,
        block_k=block_k,
        known_sizes=TileSizes(no_tile, no_tile, no_tile, no_tile, no_tile.astype(np.bool_)),
    )
