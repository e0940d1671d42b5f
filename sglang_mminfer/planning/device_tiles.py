"""Tiles on the device: what `placed.py` says on the host, uploaded in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.planning.placed import PlacedTiles


@dataclass(frozen=True, eq=False)
class Tiles:
    """Query tiles of one pass of one request and what they hold on the device, as `PlacedTiles` has it on the host.

    rows, most_visits: int [T] on the host, the rows of each tile, and its key tiles or a bound on them.
    """

    placed: PlacedTiles
    q_rows: torch.Tensor
    q_stop: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    excluded: torch.Tensor

    @property
    def rows(self) -> Ints:
        return self.placed.rows_per_tile

    @property
    def most_visits(self) -> Ints:
        return self.placed.visits.sum(axis=1)


def upload(tiles: Sequence[PlacedTiles], device: torch.device) -> list[Tiles]:
    """All of them in one copy."""
    arrays = [(t.q_rows, t.q_stop, t.start, t.count, t.excluded) for t in tiles]
    tensors = iter(to_device(device, *(array for own in arrays for array in own)))
    return [Tiles(t, *(next(tensors) for _ in own)) for t, own in zip(tiles, arrays)]
