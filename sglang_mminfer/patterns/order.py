"""Key orders: permutations of key positions that make what a pattern sees contiguous.

An order is cut into tiles by its own index, so its tiles never depend on how a prompt was cut into chunks. It is
described on the host, by runs and frames; its positions are spelled out on the device.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.kernels.block_plan import PAD_POSITION
from sglang_mminfer.kernels.transfer import to_device
from sglang_mminfer.modality.runs import Ints, Runs
from sglang_mminfer.modality.segments import Segment


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


class LineOrder:
    """Images and videos of one rows x cols, each line by line, ascending inside a line: phase-major.

    Stride "frame": line c holds cell c of all frames; "row": column c of all rows of all frames. The segments
    stand one after the other, each from a whole tile on, so that no later segment moves an earlier one; frames
    that are yet to be prefilled have their place. An index counts from the start of its segment.

    numbers: the segments' numbers in the map. num_lines: lines of each segment. length: int64 [segments], keys
    of one line. first_tile: int64 [segments + 1].
    """

    def __init__(self, segments: list[tuple[int, Segment]], stride: str, block_k: int) -> None:
        self.block_k = block_k
        self.numbers = [number for number, _ in segments]
        grids = [segment.grid for _, segment in segments if segment.grid is not None]
        self._cols = grids[0].cols
        self._rows_in_line = 1 if stride == "frame" else grids[0].rows  # of one frame
        self.num_lines = grids[0].cells if stride == "frame" else grids[0].cols
        frames = np.array([grid.frames for grid in grids])
        self._frame_starts = np.concatenate([grid.starts for grid in grids])
        self._first_frame = np.concatenate([[0], np.cumsum(frames)])
        self.length = frames * self._rows_in_line
        self.first_tile = np.concatenate([[0], np.cumsum(-(-self.length * self.num_lines // block_k))])

    @property
    def num_tiles(self) -> int:
        return int(self.first_tile[-1])

    def size(self, segment: int) -> int:
        """Keys of the segment."""
        return int(self.length[segment]) * self.num_lines

    def position(self, segment: Any, index: Any) -> Ints:
        """Absolute positions of the keys number `index` (below the segment's size)."""
        return _position(
            self._frame_starts,
            self._first_frame[segment],
            self.length[segment],
            self._rows_in_line,
            self._cols,
            index,
        )

    def count_below(self, segment: int, bound: int) -> Ints:
        """int64 [num_lines]: how many keys of each line lie below a position."""
        starts = self._frame_starts[self._first_frame[segment] : self._first_frame[segment + 1]]
        beyond = bound - np.arange(self.num_lines)  # of a line's frames, those that start below this
        begun = np.searchsorted(starts, beyond)
        if self._rows_in_line == 1:
            return begun
        last = starts[np.maximum(begun - 1, 0)]
        rows = np.minimum(-(-(beyond - last) // self._cols), self._rows_in_line)
        return np.where(begun == 0, 0, (begun - 1) * self._rows_in_line + rows)

    @cached_property
    def segment_of_tile(self) -> Ints:
        return np.repeat(np.arange(len(self.numbers)), np.diff(self.first_tile))

    @cached_property
    def _tile_ends(self) -> tuple[Ints, Ints, Ints]:
        """For each tile its segment, the index of its first key and of its last."""
        segment = self.segment_of_tile
        first = (np.arange(self.num_tiles) - self.first_tile[segment]) * self.block_k
        last = np.minimum(first + self.block_k, self.length[segment] * self.num_lines) - 1
        return segment, first, last

    @cached_property
    def nearest(self) -> Ints:
        """int64 [num_tiles]: the least position in each tile. Lines ascend, and so do their first keys."""
        segment, first, last = self._tile_ends
        length = self.length[segment]
        next_line = (first // length + 1) * length
        start = self.position(segment, first)
        return np.where(
            next_line <= last, np.minimum(start, self.position(segment, np.minimum(next_line, last))), start
        )

    @cached_property
    def farthest(self) -> Ints:
        """int64 [num_tiles]: the greatest position in each tile; PAD_POSITION where it is not filled."""
        segment, first, last = self._tile_ends
        length = self.length[segment]
        line_before = last // length * length - 1
        stop = self.position(segment, last)
        far = np.where(
            line_before >= first, np.maximum(stop, self.position(segment, np.maximum(line_before, first))), stop
        )
        return np.where(last - first == self.block_k - 1, far, PAD_POSITION)

    def touches(self, line: int) -> NDArray[np.bool_]:
        """bool [num_tiles]: tiles that hold a key of the line."""
        segment, first, last = self._tile_ends
        return (first // self.length[segment] <= line) & (line <= last // self.length[segment])

    def lanes(self, tiles: Ints) -> tuple[Ints, Ints]:
        """Positions and lines of the keys of some tiles, int64 [tiles, block_k]; PAD_POSITION and -1 for padding."""
        segment, first, last = (ends[tiles, None] for ends in self._tile_ends)
        index = first + np.arange(self.block_k)
        real, index = index <= last, np.minimum(index, last)
        position, line = self.position(segment, index), index // self.length[segment]
        return np.where(real, position, PAD_POSITION), np.where(real, line, -1)

    def positions(self, device: torch.device) -> torch.Tensor:
        starts, first_frame, length, first_tile = to_device(
            device, self._frame_starts, self._first_frame[:-1], self.length, self.first_tile[:-1]
        )
        tile = torch.arange(self.num_tiles, dtype=torch.int32, device=device)
        segment = torch.searchsorted(first_tile, tile, right=True) - 1
        lane = torch.arange(self.block_k, dtype=torch.int32, device=device)
        index = (tile - first_tile[segment])[:, None] * self.block_k + lane
        size = length[segment, None]
        real = index < size * self.num_lines
        index = index.where(real, 0)
        position = _position(starts, first_frame[segment, None], size, self._rows_in_line, self._cols, index)
        return position.where(real, PAD_POSITION).to(torch.int32).flatten()


def _position(frame_starts: Any, first_frame: Any, length: Any, rows: int, cols: int, index: Any) -> Any:
    """Line number index // length; in it, `rows` keys of each frame, `cols` apart. For numpy and for torch."""
    line, at = index // length, index % length
    return frame_starts[first_frame + at // rows] + at % rows * cols + line
