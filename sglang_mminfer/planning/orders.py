"""Key orders: permutations of key positions that make what a pattern sees contiguous.

An order is cut into tiles by its own index, so its tiles never depend on how a prompt was cut into chunks. It is
described on the host, by runs and frames; its positions are spelled out on the device.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sglang_mminfer.kernels.block_plan import PAD_POSITION
from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.modality.runs import Runs


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
