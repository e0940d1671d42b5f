"""Token orders: permutations of key positions that make what a pattern sees contiguous.

An order is cut into tiles by its own index, so its tiles never depend on how a prompt was cut into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_mminfer.kernels.block_plan import PAD_POSITION
from sglang_mminfer.modality.segments import Segment


@dataclass(eq=False)
class KeyOrder:
    """Key positions in visiting order, padded to whole tiles of `block_k` with PAD_POSITION. int32.

    A list of gathered columns also names its `base`, the order that holds all keys of the class, and for each
    entry the tile of `base` that holds the same key.
    """

    positions: torch.Tensor
    block_k: int
    base: KeyOrder | None = None
    base_tiles: torch.Tensor | None = None

    @property
    def num_tiles(self) -> int:
        return len(self.positions) // self.block_k


def compact_order(positions: torch.Tensor, block_k: int) -> KeyOrder:
    """The given ascending positions, one after the other (identity, where they are all)."""
    return KeyOrder(_padded(positions, block_k), block_k)


def column_order(columns: torch.Tensor, ranks: torch.Tensor, base: KeyOrder) -> KeyOrder:
    """Gathered columns at ascending positions `columns`, whose index in `base` is `ranks`."""
    tiles = torch.div(ranks, base.block_k, rounding_mode="floor").to(torch.int32)
    pad = -len(columns) % base.block_k
    return KeyOrder(
        _padded(columns, base.block_k),
        base.block_k,
        base=base,
        base_tiles=torch.cat([tiles, torch.full((pad,), -1, dtype=torch.int32)]),
    )


def phase_major(segment: Segment, stride: str) -> tuple[torch.Tensor, int]:
    """Positions of a gridded segment line by line, ascending inside a line, and the length of a line.

    "frame": all frames' cell 0, then all frames' cell 1, ...; "row": all rows' column 0, then column 1, ...
    Fixed by the map, frames that are yet to be prefilled included.
    """
    grid = segment.grid
    assert grid is not None
    frames = torch.tensor(grid.frame_starts, dtype=torch.int64)[:, None] + torch.arange(grid.cells)
    if stride == "row":
        frames = frames.view(grid.frames * grid.rows, grid.cols)
    return frames.T.flatten(), frames.shape[0]


def line_order(positions: torch.Tensor, keep: torch.Tensor, block_k: int) -> KeyOrder:
    """A phase-major order in which positions that are not kept are padding, in place: no index moves."""
    return KeyOrder(_padded(positions.masked_fill(~keep, PAD_POSITION), block_k), block_k)


def _padded(positions: torch.Tensor, block_k: int) -> torch.Tensor:
    pad = torch.full((-len(positions) % block_k,), PAD_POSITION, dtype=torch.int32)
    return torch.cat([positions.to(torch.int32), pad])
