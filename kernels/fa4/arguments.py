"""What one block-sparse forward is called with, made from a plan and its work items.

FlashAttention-4 takes dense rows of queries, a mask over (row, key), and for each tile of rows two lists of key tiles:
masked ones and full ones. Here a tile of rows is a work item, the rows of KV head h are those of the kernel's head h,
and a gathered key tile is one more key tile, whose excluded lanes have the position of padding. Nothing here waits for
the device: sizes come from the host's bounds, and the lists say how much of it counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ..block_plan import PAD_POSITION, BlockPlan, unpack_lanes
from ..work_items import (
    COLUMNS,
    FIRST_HEAD,
    FIRST_PAIR,
    NUM_HEADS,
    NUM_PAIRS,
    NUM_PARTS,
    PART,
    SLOT,
    TILE,
    WorkItems,
    length_class,
    work_items,
)


@dataclass(frozen=True)
class CallArguments:
    """The arguments of one call, for H KV heads and M items of each; P is `items.pairs`, B keys make a key tile.

    items:    the H * M items, some of them empty, in the order of the kernel's output: item h * M + m is tile m of head
              h, and every item writes to the slot of its own number.
    q_index:  int32 [H * M * P], rows of q seen as [tokens * query heads, D].
    q_stop:   int32 [H, M * P], the exclusive bound of each row; 0 for rows that no pair fills.
    lists:    int32 [H, M, 3], for each item where its key tiles begin in `tiles`, how many full ones there are, and how
              many masked ones follow.
    tiles:    int32, key tiles of `kv_slots`.
    kv_slots: int32 [key tiles * B], rows of the cache.
    kv_pos:   int32 [key tiles * B], their positions.
    """

    items: WorkItems
    q_index: torch.Tensor
    q_stop: torch.Tensor
    lists: torch.Tensor
    tiles: torch.Tensor
    kv_slots: torch.Tensor
    kv_pos: torch.Tensor

    @cached_property
    def padded_lists(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The lists as upstream's kernels take them: counts of masked key tiles int32 [1, H, M], the tiles [1, H, M,
        most], and both for full ones. Entries beyond a count mean nothing."""
        first, full, masked = self.lists.long().unbind(-1)
        most = max(1, int(self.items.visits.max(initial=0)))
        number = torch.arange(most, device=first.device)

        def padded(begin: torch.Tensor) -> torch.Tensor:
            return self.tiles[(begin[..., None] + number).clamp_max(len(self.tiles) - 1)][None]

        counts = [count.to(torch.int32)[None] for count in (masked, full)]
        return counts[0], padded(first + full), counts[1], padded(first)


def call_arguments(
    plan: BlockPlan,
    group: int,
    num_kv_heads: int,
    pairs: int,
    gathered: bool,
    most_visits: int | None = None,
) -> CallArguments:
    """The arguments for a plan, made once.

    Args:
        group: how many query heads share a KV head.
        pairs: rows of the kernel's query tile.
        gathered: whether K and V are copied: `kv_slots` are then those of visited key tiles, each once, and what room
            is left for more of them names any slots.
        most_visits: see `work_items`.
    """
    key = ("fa4", group, num_kv_heads, pairs, gathered, most_visits)
    if key not in plan.derived:
        plan.derived[key] = _made(plan, group, num_kv_heads, pairs, gathered, most_visits)
    return plan.derived[key]


def _made(
    plan: BlockPlan, group: int, num_kv_heads: int, pairs: int, gathered: bool, most_visits: int | None
) -> CallArguments:
    items = _by_kv_head(work_items(plan, group, pairs, most_visits), group, num_kv_heads)
    table, _ = items.on_device
    row, head, there = items.lanes(table)
    q_index = (plan.q_rows.long()[row] * plan.num_heads + head).where(there, 0)
    q_stop = plan.q_stop[row].where(there, 0)
    tiles, kv_slots, kv_pos = _with_private_tiles(plan)
    if gathered:
        tiles, kv_slots, kv_pos = _visited_once(plan, tiles, kv_slots, kv_pos)
    return CallArguments(
        items,
        q_index.flatten().to(torch.int32),
        q_stop.view(num_kv_heads, -1),
        _lists(plan, table).view(num_kv_heads, -1, 3),
        tiles,
        kv_slots.flatten(),
        kv_pos.flatten(),
    )


def _by_kv_head(items: WorkItems, group: int, num_kv_heads: int) -> WorkItems:
    """The items sorted by KV head, with empty ones after those of a head that has fewer than another.

    Within a head the longest come first, as before, and the parts of one list follow each other.
    """
    kv_head = items.heads[items.table[:, FIRST_HEAD]] // group
    part, first_pair, tile = (items.table[:, column] for column in (PART, FIRST_PAIR, TILE))
    order = np.lexsort((part, first_pair, tile, -length_class(items.visits), kv_head))
    counts = np.bincount(kv_head, minlength=num_kv_heads)
    slots = np.concatenate([head * counts.max() + np.arange(count) for head, count in enumerate(counts)])
    num_slots = num_kv_heads * int(counts.max())

    def spread(values: NDArray[np.int64]) -> NDArray[np.int64]:
        out = np.zeros((num_slots, *values.shape[1:]), dtype=np.int64)
        out[slots] = values[order]
        return out

    table = spread(items.table)
    assert table.shape[1] == COLUMNS
    table[:, SLOT] = np.arange(num_slots)
    empty = table[:, NUM_PAIRS] == 0
    table[empty, NUM_HEADS] = table[empty, NUM_PARTS] = 1  # they are divisors
    return replace(items, table=table, pass_of=spread(items.pass_of), visits=spread(items.visits), num_slots=num_slots)


def _lists(plan: BlockPlan, table: torch.Tensor) -> torch.Tensor:
    """int32 [items, 3]: `CallArguments.lists`."""
    column = table.long().unbind(1)
    tile, part, parts = column[TILE], column[PART], column[NUM_PARTS]
    begin, visits = plan.block_indptr.long()[tile], plan.block_indptr.diff().long()[tile]
    visits = visits * (column[NUM_PAIRS] > 0)
    first, end, num_full = visits * part // parts, visits * (part + 1) // parts, plan.num_full.long()[tile]
    full = (torch.minimum(end, num_full) - first).clamp_min(0)
    return torch.stack([begin + first, full, end - first - full], dim=1).to(torch.int32)


def _with_private_tiles(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The visited tiles int32 [room], and slots and positions [key tiles, block_k], with a key tile of its own for each
    gathered visit."""
    slots, pos = plan.keys.kv_slots.view(-1, plan.block_k), plan.keys.kv_pos.view(-1, plan.block_k)
    num_private = len(plan.excluded_lanes)
    if not num_private:
        return plan.block_indices, slots, pos
    visit = torch.arange(len(plan.block_indices), device=slots.device)
    block_indptr = plan.block_indptr.long()
    tile = torch.searchsorted(block_indptr, visit, right=True) - 1
    in_tile = tile < plan.num_tiles  # else it is room to spare
    tile = tile.clamp_max(plan.num_tiles - 1)
    number = visit - (block_indptr[1:] - plan.num_gathered)[tile]  # among the tile's gathered ones
    private = in_tile & (number >= 0)
    row = (plan.gathered_start.long()[tile] + number).where(private, num_private)
    # The last element takes what is no gathered visit.
    of_row = torch.zeros(num_private + 1, dtype=torch.int64, device=slots.device)
    of_row[row] = plan.block_indices.long()
    of_row = of_row[:-1]
    own_pos = pos[of_row].masked_fill(unpack_lanes(plan.excluded_lanes, plan.block_k), PAD_POSITION)
    extended = _ExtendedKeys.of(plan)
    first = extended.add(slots[of_row], own_pos)
    tiles = (first + row).to(torch.int32).where(private, plan.block_indices)
    return tiles, extended.slots, extended.pos


class _ExtendedKeys:
    """A key table with room behind it for the private tiles of all plans that share it.

    When the room is used up, the table is copied into a longer one; plans of before keep the one that they have.
    """

    def __init__(self, slots: torch.Tensor, pos: torch.Tensor) -> None:
        self.slots, self.pos, self.used = slots, pos, len(slots)
        self._spare = 0  # a table that no second plan shares has no room to spare

    @classmethod
    def of(cls, plan: BlockPlan) -> _ExtendedKeys:
        key = ("fa4", plan.block_k)
        if key not in plan.keys.derived:
            tables = (plan.keys.kv_slots, plan.keys.kv_pos)
            plan.keys.derived[key] = cls(*(x.view(-1, plan.block_k) for x in tables))
        return plan.keys.derived[key]

    def add(self, slots: torch.Tensor, pos: torch.Tensor) -> int:
        """Add tiles [n, block_k]; returns the number of the first."""
        first, self.used = self.used, self.used + len(slots)
        if self.used > len(self.slots):
            room = self.used + self._spare
            self._spare = room // 4
            for name in ("slots", "pos"):
                old = getattr(self, name)
                setattr(self, name, torch.cat([old[:first], old.new_zeros(room - first, old.shape[1])]))
        self.slots[first : self.used], self.pos[first : self.used] = slots, pos
        return first


def _visited_once(
    plan: BlockPlan, tiles: torch.Tensor, slots: torch.Tensor, pos: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same visits over the visited key tiles only: tiles, slots and positions as they come."""
    num_tiles = len(slots)
    counts = torch.arange(len(tiles), device=tiles.device) < plan.block_indptr[-1]
    visited = torch.zeros(num_tiles + 1, dtype=torch.int64, device=tiles.device)
    tiles = tiles.long().where(counts, num_tiles)
    visited.index_fill_(0, tiles, 1)  # to assign a number would make the host wait
    visited[-1:] = 0
    new_number = visited.cumsum(0) - 1
    room = min(num_tiles, int(plan.sizes.visits.sum()))
    old_number = torch.zeros(num_tiles + 1, dtype=torch.int64, device=tiles.device)
    old_number[new_number.where(visited > 0, num_tiles)] = torch.arange(num_tiles + 1, device=tiles.device)
    chosen = old_number[:room].clamp_max(num_tiles - 1)
    return new_number[tiles].to(torch.int32), slots[chosen], pos[chosen]


def queries_of(q: torch.Tensor, arguments: CallArguments) -> torch.Tensor:
    """[H, M * P, D]: the rows of q [tokens, Hq, D] that the items take."""
    rows = q.reshape(-1, q.shape[2]).index_select(0, arguments.q_index)
    return rows.view(*arguments.q_stop.shape, -1)


def keys_of(cache: torch.Tensor, arguments: CallArguments, gathered: bool) -> torch.Tensor:
    """What the kernel reads of a cache [slots, H, D]: [slots, 1, H, D], or a copy [1, keys, H, D] if gathered."""
    return cache.index_select(0, arguments.kv_slots)[None] if gathered else cache[:, None]
