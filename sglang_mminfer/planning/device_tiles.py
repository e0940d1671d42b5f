"""Tiles on the device: what `placed.py` says on the host, uploaded in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.planning.placed import PlacedTiles


@dataclass(frozen=True, eq=False)
class Tiles:
    """Query tiles of one pass of one request. `rows`, `ranges` and `excluded` of `PlacedTiles` are on the device."""

    placed: PlacedTiles
    rows: torch.Tensor
    ranges: torch.Tensor
    excluded: torch.Tensor

    @property
    def rows_per_tile(self) -> NDArray[np.int32]:
        return self.placed.rows_per_tile

    @property
    def visits(self) -> NDArray[np.int32]:
        return self.placed.visits


def upload(tiles: Sequence[PlacedTiles], device: torch.device) -> list[Tiles]:
    """All of them in one copy."""
    tensors = iter(to_device(device, *(array for own in tiles for array in (own.rows, own.ranges, own.excluded))))
    return [Tiles(own, next(tensors), next(tensors), next(tensors)) for own in tiles]
