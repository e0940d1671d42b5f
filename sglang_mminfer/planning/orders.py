"""Key orders: permutations of key positions that make what a pattern sees contiguous.

An order is cut into tiles by its own index, so its tiles never depend on how a prompt was cut into chunks. It is
described on the host, by runs and frames; its positions are spelled out on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from sglang_mminfer.kernels.block_plan import PAD_POSITION, KeyTable
from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.modality.runs import Ints, Runs
from sglang_mminfer.planning.chunk import RequestChunk


class KeyOrder(Protocol):
    """Keys in visiting order, `num_tiles` tiles of `block_k` each."""

    block_k: int

    @property
    def num_tiles(self) -> int: ...

    @staticmethod
    def positions_of(orders: Sequence[Any], device: torch.device) -> Sequence[torch.Tensor]:
        """int32 [num_tiles * block_k] for each of some orders of this class: absolute positions, PAD_POSITION where a
        tile is not filled."""
        ...


class CompactOrder:
    """The keys of a class, ascending, one after the other: the identity, where it is all."""

    def __init__(self, keys: Runs, block_k: int) -> None:
        self.keys, self.block_k = keys, block_k

    @property
    def num_tiles(self) -> int:
        return -(-len(self.keys) // self.block_k)

    @staticmethod
    def positions_of(orders: Sequence[CompactOrder], device: torch.device) -> Sequence[torch.Tensor]:
        sizes = [order.num_tiles * order.block_k for order in orders]
        # What fills an order's last tile is a run too, behind all keys.
        beyond = max(int(order.keys.stops.max(initial=0)) for order in orders)
        starts = np.concatenate([part for order in orders for part in (order.keys.starts, [beyond])])
        stops = [part for n, order in zip(sizes, orders) for part in (order.keys.stops, [beyond + n - len(order.keys)])]
        counts = np.concatenate(stops) - starts
        shift, count = to_device(device, starts - (counts.cumsum() - counts), counts)
        index = torch.arange(sum(sizes), dtype=torch.int32, device=device)
        positions = torch.repeat_interleave(shift, count, output_size=sum(sizes)) + index
        return positions.masked_fill(positions >= beyond, PAD_POSITION).split(sizes)


class ColumnOrder:
    """Gathered columns: single keys of a class, ascending.

    Args:
        keys: their positions.
    """

    def __init__(self, keys: Ints, block_k: int) -> None:
        self.keys, self.block_k = keys, block_k

    @property
    def num_tiles(self) -> int:
        return -(-len(self.keys) // self.block_k)

    @staticmethod
    def positions_of(orders: Sequence[ColumnOrder], device: torch.device) -> Sequence[torch.Tensor]:
        padding = [np.full(-len(order.keys) % order.block_k, PAD_POSITION) for order in orders]
        parts = to_device(device, *(part for order, own in zip(orders, padding) for part in (order.keys, own)))
        return torch.cat(list(parts)).split([order.num_tiles * order.block_k for order in orders])


class KeyOrders:
    """The key orders of a batch, each with its place in one table. The table grows as patterns ask for more."""

    def __init__(self, requests: Sequence[RequestChunk], block_k: int) -> None:
        self.requests, self.block_k = requests, block_k
        self._first_tile: dict[tuple[int, KeyOrder], int] = {}
        self._num_tiles = 0
        self._spelled_out = 0
        self._table: KeyTable | None = None

    def first_tile(self, request: int, order: KeyOrder) -> int:
        """The number of the order's first key tile in the table."""
        if (request, order) not in self._first_tile:
            self._first_tile[request, order] = self._num_tiles
            self._num_tiles += order.num_tiles
        return self._first_tile[request, order]

    def table(self, device: torch.device) -> KeyTable:
        """The keys of all orders so far. Numbers of tiles stay what they are when it grows."""
        if self._table is None:
            none = torch.empty(0, dtype=torch.int32, device=device)
            self._table = KeyTable(none, none)
        new = list(self._first_tile)[self._spelled_out :]
        if not new:
            return self._table
        self._spelled_out += len(new)
        of_class: dict[type[KeyOrder], Iterator[torch.Tensor]] = {}
        for kind in {type(order): None for _, order in new}:
            of_class[kind] = iter(kind.positions_of([order for _, order in new if type(order) is kind], device))
        positions = [next(of_class[type(order)]) for _, order in new]
        slots: dict[int, Iterator[torch.Tensor]] = {}
        for request in {request: None for request, _ in new}:
            own = [positions for (other, _), positions in zip(new, positions) if other == request]
            all_slots = _slots_of(torch.cat(own), self.requests[request].slots, self.block_k)
            slots[request] = iter(all_slots.split([len(part) for part in own]))
        self._table = KeyTable(
            torch.cat([self._table.kv_pos, *positions]),
            torch.cat([self._table.kv_slots, *(next(slots[request]) for request, _ in new)]),
        )
        return self._table


def _slots_of(positions: torch.Tensor, slots: torch.Tensor, block_k: int) -> torch.Tensor:
    """int32: the cache rows of the keys at `positions`. For padding, and keys that are yet to come, see KeyTable."""
    real = positions < len(slots)
    nearest = positions.where(real, PAD_POSITION).view(-1, block_k).amin(dim=1)
    nearest = nearest.where(nearest < len(slots), 0).repeat_interleave(block_k, output_size=len(positions))
    return slots[positions.where(real, nearest).long()].to(torch.int32)
