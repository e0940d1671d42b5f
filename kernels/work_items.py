"""Work items: what the programs of a GPU take up, made from a plan on the host.

A query tile has few rows where it lies along the lines of a raster, and many key tiles where its rows see everything;
matrix units want the opposite. So an item is a number of (row, query head) pairs of one KV head, which are the rows of
one matrix product (FlashAttention's PackGQA), times a part of the tile's key tiles (its split-KV). Pair p of a tile is
row p // h and query head p % h of the h query heads that share the tile and a KV head. Part i of n covers the visits
v * i // n to v * (i + 1) // n - 1 of the tile's v visits; so the host needs only a bound on v to cut a list.

An item that is all there is of its pairs writes out and lse. The others write to slots of a scratch, from which
`merge` joins them by LSE: the parts of one list lie in successive slots, and `first_slot` says where those of each
(pass, row, head) begin.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from .block_plan import BlockPlan
from .indexing import to_device

PROCESSORS = 132
"""Multiprocessors of the card that lists are cut for: an H100's. Another card's number changes nothing but speed."""

LEAST_VISITS = 16
"""A list is not cut into parts of fewer key tiles: a part costs as much as two or three key tiles by itself."""

DIRECT = -2
"""In `first_slot`: the pair's only item writes out and lse itself."""

TILE, FIRST_PAIR, FIRST_HEAD, NUM_HEADS, PART, NUM_PARTS, SLOT, NUM_PAIRS = range(8)
COLUMNS = 8


@dataclass(frozen=True)
class WorkItems:
    """W items of at most `pairs` (row, head) pairs each, the longest first.

    plan:       the plan that they are of.
    table:      int64 [W, COLUMNS] on the host, in the order in which programs take them up:
                TILE                   the query tile
                FIRST_PAIR, NUM_PAIRS  the item's pairs, among those of the tile and KV head
                FIRST_HEAD, NUM_HEADS  the query heads, in `heads`
                PART, NUM_PARTS        the item's part of the tile's visits
                SLOT                   where in the scratch it writes; -1: into out and lse
    heads:      int64 on the host, the query heads of all (head group, KV head), one after the other.
    pass_of:    int64 [W] on the host, the pass of each item.
    visits:     int64 [W] on the host, a bound on the item's key tiles.
    num_slots:  slots of the scratch.
    """

    plan: BlockPlan
    pairs: int
    table: NDArray[np.int64]
    heads: NDArray[np.int64]
    pass_of: NDArray[np.int64]
    visits: NDArray[np.int64]
    num_slots: int

    @property
    def num_items(self) -> int:
        return len(self.table)

    @property
    def merges(self) -> bool:
        """Whether something is left to write after all items have run: joined parts, or rows without keys."""
        return self.num_slots > 0 or int(self.table[:, NUM_PAIRS].sum()) < self.plan.num_rows * self.plan.num_heads

    @cached_property
    def on_device(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`table` and `heads`, int32."""
        table, heads = to_device(self.plan.q_rows.device, self.table, self.heads)
        return table, heads

    def lanes(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pairs of some items, int64 [n, pairs] each: the row's index in `q_rows` and the query head, 0 where an
        item has no pair; and bool, which there are.

        Args:
            items: int32 [n, COLUMNS], rows of the table on the device.
        """
        _, heads = self.on_device
        column = items.long().unbind(1)
        lane = torch.arange(self.pairs, device=items.device)
        there = lane < column[NUM_PAIRS][:, None]
        pair, size = column[FIRST_PAIR][:, None] + lane, column[NUM_HEADS][:, None]
        row = self.plan.q_indptr.long()[column[TILE]][:, None] + pair // size
        head = column[FIRST_HEAD][:, None] + pair % size
        return row.where(there, 0), heads[head.where(there, 0)].long().where(there, 0), there

    @cached_property
    def first_slot(self) -> torch.Tensor:
        """int32 [passes, num_rows * num_heads] on the device: slot * pairs + lane of the first part, -1 where a pass
        has nothing of a (row, head), or DIRECT."""
        plan, device = self.plan, self.plan.q_rows.device
        first = np.flatnonzero(self.table[:, PART] == 0)
        chosen, pass_of = to_device(device, first, self.pass_of[first])
        items = self.on_device[0][chosen.long()]
        row, head, there = self.lanes(items)
        pairs = plan.num_rows * plan.num_heads
        place = (pass_of.long() * pairs)[:, None] + plan.q_rows.long()[row] * plan.num_heads + head
        num_passes = len(plan.pass_indptr) - 1
        slot = items[:, SLOT, None].long()
        value = (slot * self.pairs + torch.arange(self.pairs, device=device)).where(slot >= 0, DIRECT)
        out = torch.full((num_passes * pairs + 1,), -1, dtype=torch.int32, device=device)
        out[place.where(there, num_passes * pairs).flatten()] = value.flatten().to(torch.int32)  # the last is nobody's
        return out[:-1].view(num_passes, pairs)

    @cached_property
    def parts(self) -> torch.Tensor:
        """int32 [num_slots] on the device: of how many parts the item that writes a slot is one."""
        scattered = self.table[self.table[:, SLOT] >= 0]
        parts = np.ones(self.num_slots, dtype=np.int64)
        parts[scattered[:, SLOT]] = scattered[:, NUM_PARTS]
        return to_device(self.plan.q_rows.device, parts)[0]


def work_items(plan: BlockPlan, group: int, pairs: int, most_visits: int | None = None) -> WorkItems:
    """The items of a plan, made once.

    Args:
        group: how many query heads share a KV head.
        pairs: (row, head) pairs of an item, at most.
        most_visits: key tiles of an item, at most. Default: a quarter of what a multiprocessor has to do, at least
            LEAST_VISITS.
    """
    key = ("work_items", group, pairs, most_visits)
    if key not in plan.derived:
        plan.derived[key] = _made(plan.for_keeping(), group, pairs, most_visits)
    return plan.derived[key]


def length_class(visits: NDArray[np.int64]) -> NDArray[np.int32]:
    """Equal for items of about one length, within a factor of two; it grows with the length."""
    return np.frexp(visits.astype(np.float64))[1]


def most_visits_of(visits: NDArray[np.int64], items: NDArray[np.int64]) -> int:
    """How long a list may be, in key tiles.

    Args:
        visits: of each list. items: how many items each list would be if it were not cut.
    """
    return max(LEAST_VISITS, int(visits @ items) // (4 * PROCESSORS))


def _made(plan: BlockPlan, group: int, pairs: int, most_visits: int | None) -> WorkItems:
    sizes, pass_of_tile = plan.sizes, np.repeat(np.arange(len(plan.pass_indptr) - 1), np.diff(plan.pass_indptr))
    # The query heads of each head group by KV head: share s has the heads first_head[s] to first_head[s + 1] - 1.
    shares: list[list[int]] = []
    first_share = [0]
    for heads in plan.head_groups:
        by_kv = [[head for head in heads if head // group == kv] for kv in sorted({head // group for head in heads})]
        shares += by_kv
        first_share.append(len(shares))
    num_heads = np.array([len(share) for share in shares], dtype=np.int64)
    kv_head = np.array([share[0] // group for share in shares], dtype=np.int64)
    first_head = np.cumsum(num_heads) - num_heads

    # One list for each tile and share, then its strips of pairs, then its parts.
    tile = np.flatnonzero(sizes.visits)
    starts = np.array(first_share)
    which, nth = _spread(np.diff(starts)[sizes.group[tile]])
    tile = tile[which]
    share = starts[sizes.group[tile]] + nth
    all_pairs = sizes.rows[tile] * num_heads[share]
    strips = -(-all_pairs // pairs)
    if most_visits is None:
        most_visits = most_visits_of(sizes.visits[tile], strips)
    which, strip = _spread(strips)
    tile, share, all_pairs = tile[which], share[which], all_pairs[which]
    which, part = _spread(-(-sizes.visits[tile] // most_visits))
    tile, share, all_pairs, strip = tile[which], share[which], all_pairs[which], strip[which]
    parts = -(-sizes.visits[tile] // most_visits)
    scattered = ~sizes.alone[tile] | (parts > 1)
    slot = np.where(scattered, np.cumsum(scattered) - 1, -1)

    visits = -(-sizes.visits[tile] // parts)
    # Programs of about one length go together, the longest first. Among these, those that share keys go together: one
    # KV head, tiles in the plan's own order (by phase, then by position).
    order = np.lexsort((part, tile, kv_head[share], -length_class(visits)))
    columns = {
        TILE: tile,
        FIRST_PAIR: strip * pairs,
        FIRST_HEAD: first_head[share],
        NUM_HEADS: num_heads[share],
        PART: part,
        NUM_PARTS: parts,
        SLOT: slot,
        NUM_PAIRS: np.minimum(all_pairs - strip * pairs, pairs),
    }
    table = np.stack([columns[column] for column in range(COLUMNS)], axis=1)[order]
    all_heads = np.array([head for share in shares for head in share], dtype=np.int64)
    return WorkItems(plan, pairs, table, all_heads, pass_of_tile[tile][order], visits[order], int(scattered.sum()))


def _spread(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """counts[0] zeros, counts[1] ones and so on; and beside each its number among its equals."""
    before = np.cumsum(counts) - counts
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - before[which]
