"""Key orders: permutations of key positions that make what a pattern sees contiguous.

An order is cut into tiles by its own index, so its tiles never depend on how a prompt was cut into chunks. It is
described on the host, by runs and frames; its positions are spelled out on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sglang_mminfer.kernels.block_plan import PAD_POSITION, KeyTable
from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.modality.runs import Runs
from sglang_mminfer.planning.chunk import RequestChunk


class KeyOrder(Protocol):
    """Keys in visiting order, `num_tiles` tiles of `block_k` each."""

    block_k: int

    @property
    def num_tiles(self) -> int: ...

    def positions(self, device: torch.device) -> torch.Tensor:
        """int32 [num_tiles * block_k] absolute positions, PAD_POSITION where a tile is not filled."""
        ...


class CompactOrder:
    """The keys of a class (or gathered columns), ascending, one after the other: the identity, where it is all."""

    def __init__(self, keys: Runs, block_k: int) -> None:
        self.keys, self.block_k = keys, block_k

    @property
    def num_tiles(self) -> int:
        return -(-len(self.keys) // self.block_k)

    def positions(self, device: torch.device) -> torch.Tensor:
        total = len(self.keys)
        out = torch.full((self.num_tiles * self.block_k,), PAD_POSITION, dtype=torch.int32, device=device)
        first, lengths = to_device(device, self.keys.starts - self.keys.before[:-1], self.keys.stops - self.keys.starts)
        offset = torch.repeat_interleave(first, lengths, output_size=total)
        torch.add(offset, torch.arange(total, dtype=torch.int32, device=device), out=out[:total])
        return out


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
        """Of all orders so far. Numbers of tiles stay what they are when it grows."""
        orders = list(self._first_tile)[self._spelled_out :]
        if self._table is None:
            none = torch.empty(0, dtype=torch.int32, device=device)
            self._table = KeyTable(none, none)
        if orders:
            positions = [order.positions(device) for _, order in orders]
            slots = [
                _slots_of(own, self.requests[request].slots, self.block_k)
                for (request, _), own in zip(orders, positions)
            ]
            self._table = KeyTable(
                torch.cat([self._table.kv_pos, *positions]), torch.cat([self._table.kv_slots, *slots])
            )
            self._spelled_out += len(orders)
        return self._table


def _slots_of(positions: torch.Tensor, slots: torch.Tensor, block_k: int) -> torch.Tensor:
    """int32: the cache rows of the keys at `positions`. For padding, and keys that are yet to come, see KeyTable."""
    real = positions < len(slots)
    nearest = positions.where(real, PAD_POSITION).view(-1, block_k).amin(dim=1)
    nearest = nearest.where(nearest < len(slots), 0).repeat_interleave(block_k, output_size=len(positions))
    return slots[positions.where(real, nearest).long()].to(torch.int32)
