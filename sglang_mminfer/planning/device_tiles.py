"""Tiles on the device: what `placed.py` says on the host, uploaded in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.planning.placed import PlacedTiles


@dataclass(eq=False)
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


class Uploads:
    """The tiles that are on the device already. Rows that several of them share go there once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tiles: dict[PlacedTiles, Tiles] = {}
        self._rows: dict[int, torch.Tensor] = {}  # by the id of what some of `_tiles` holds on the host

    @property
    def num_bytes(self) -> int:
        """What is on the device."""
        tensors = [x for own in self._tiles.values() for x in (own.ranges, own.excluded)]
        return sum(x.nbytes for x in (*tensors, *self._rows.values()))

    def tiles(self, parts: Sequence[PlacedTiles]) -> list[Tiles]:
        """All of them, with one copy of what is new."""
        new = {part: None for part in parts if part not in self._tiles}
        if new:
            rows = {id(part.rows): part.rows for part in new if id(part.rows) not in self._rows}
            arrays = (array for part in new for array in (part.ranges, part.excluded))
            tensors = iter(to_device(self.device, *rows.values(), *arrays))
            self._rows.update(zip(rows, tensors))
            self._tiles.update({p: Tiles(p, self._rows[id(p.rows)], next(tensors), next(tensors)) for p in new})
        return [self._tiles[part] for part in parts]
