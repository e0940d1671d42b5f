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


class Uploads:
    """What is on the device already: no array goes there twice."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[int, tuple[NDArray[np.int32], torch.Tensor]] = {}  # by the array's id

    def tiles(self, parts: Sequence[PlacedTiles]) -> list[Tiles]:
        """All of them, with one copy of what is new."""
        new = {id(x): x for own in parts for x in (own.rows, own.ranges, own.excluded) if id(x) not in self._tensors}
        if new:
            tensors = to_device(self.device, *new.values())
            self._tensors.update((name, pair) for name, *pair in zip(new, new.values(), tensors))
        return [Tiles(own, *(self._tensors[id(x)][1] for x in (own.rows, own.ranges, own.excluded))) for own in parts]
