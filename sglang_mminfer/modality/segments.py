"""The modality map: which tokens of one conversation are text, image or video, and where the frames lie.

All positions are absolute token indices in the whole prompt of ONE request, cached prefix included and
what later chunks will bring included too. Stops are exclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
import torch

from sglang_mminfer.modality.runs import Runs, expand
from sglang_mminfer.modality.segment_table import SegmentTable, codes_of


class Modality(StrEnum):
    """What a token carries. VISION names image and video together and occurs only in boundaries."""

    TEXT = "text"
    IMAGE = "image"
    VIDEO = "video"
    VISION = "vision"

    def covers(self, other: Modality) -> bool:
        """True if tokens of modality `other` belong to this one (VISION covers IMAGE and VIDEO)."""
        return self is other or (self is Modality.VISION and other in (Modality.IMAGE, Modality.VIDEO))


@dataclass(frozen=True)
class VisionGrid:
    """The raster of one image or video, in language-model tokens (after the vision tower's merger).

    A frame is `rows * cols` contiguous tokens in row-major order. Frames may be apart (timestamps between
    them), so `frame_starts` holds the absolute position of every frame's first token, ascending.

    `raster` is False for a tower that merges tokens as it likes: its frames (or clips) are alike in length and in
    nothing else, so `rows` is 1, the frame stride works, and for the row stride the tokens have no cell.
    """

    frames: int
    rows: int
    cols: int
    frame_starts: tuple[int, ...]
    raster: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "frame_starts", tuple(int(start) for start in self.frame_starts))
        for name in ("frames", "rows", "cols"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"VisionGrid.{name}: expected an integer >= 1, got {value!r}")
        if not self.raster and self.rows != 1:
            raise ValueError(f"VisionGrid.rows: expected 1 where there is no raster, got {self.rows}")
        if len(self.frame_starts) != self.frames:
            raise ValueError(
                f"VisionGrid.frame_starts: expected {self.frames} starts (one for each frame), "
                f"got {len(self.frame_starts)}"
            )
        for i, (a, b) in enumerate(zip(self.frame_starts, self.frame_starts[1:])):
            if b - a < self.cells:
                raise ValueError(
                    f"VisionGrid.frame_starts: frame {i} starts at {a} and has {self.cells} tokens, "
                    f"but frame {i + 1} starts at {b}"
                )

    @property
    def cells(self) -> int:
        """Tokens of one frame."""
        return self.rows * self.cols

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols): tokens of two grids can share a cell only where these are equal."""
        return self.rows, self.cols

    def has_cells(self, stride: str) -> bool:
        """True if `stride` ("frame" or "row") gives the tokens a cell."""
        return self.raster or stride == "frame"


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of one modality. `grid` is None for text, or where the model does not tell it.

    Tokens of a vision segment that lie in no frame (separators, timestamps) are members of the segment
    without a cell.
    """

    modality: Modality
    start: int
    stop: int
    grid: VisionGrid | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "modality", Modality(self.modality))
        if self.modality is Modality.VISION:
            raise ValueError("Segment.modality: expected text, image or video, got vision")
        if not 0 <= self.start < self.stop:
            raise ValueError(f"Segment: expected 0 <= start < stop, got [{self.start}, {self.stop})")
        if self.grid is None:
            return
        if self.modality is Modality.TEXT:
            raise ValueError(f"Segment [{self.start}, {self.stop}): a text segment has no grid")
        first, last = self.grid.frame_starts[0], self.grid.frame_starts[-1] + self.grid.cells
        if first < self.start or last > self.stop:
            raise ValueError(
                f"Segment [{self.start}, {self.stop}): its grid of {self.grid.frames} x {self.grid.rows} x "
                f"{self.grid.cols} tokens covers [{first}, {last})"
            )


@dataclass(frozen=True)
class ModalityMap:
    """One conversation as a sorted list of segments without gaps or overlaps, from position 0 on.

    Raises:
        ValueError: naming the first segment that overlaps its neighbour or leaves a gap.
    """

    segments: tuple[Segment, ...]

    def __init__(self, segments: Sequence[Segment]) -> None:
        object.__setattr__(self, "segments", tuple(segments))
        position = 0
        for i, segment in enumerate(self.segments):
            if segment.start != position:
                kind = "overlaps the one before" if segment.start < position else "leaves a gap"
                raise ValueError(
                    f"ModalityMap.segments[{i}]: expected a start of {position}, got {segment.start} ({kind})"
                )
            position = segment.stop

    @property
    def length(self) -> int:
        """Tokens of the whole prompt."""
        return self.segments[-1].stop if self.segments else 0

    def __len__(self) -> int:
        return self.length

    @cached_property
    def has_vision(self) -> bool:
        return any(segment.modality is not Modality.TEXT for segment in self.segments)

    @cached_property
    def first_vision(self) -> int:
        """Position of the first image or video token; the map's length where there is none."""
        return next((s.start for s in self.segments if s.modality is not Modality.TEXT), self.length)

    @cached_property
    def segment_ids(self) -> torch.Tensor:
        """int32 [length]: the index in `segments` of each token's segment."""
        lengths = torch.tensor([s.stop - s.start for s in self.segments], dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.segments), dtype=torch.int32), lengths)

    def members(self, modality: Modality) -> torch.Tensor:
        """bool [length]: the tokens that `modality` covers."""
        flags = torch.tensor([modality.covers(s.modality) for s in self.segments], dtype=torch.bool)
        return flags[self.segment_ids.long()] if self.segments else flags

    @cached_property
    def table(self) -> SegmentTable:
        """The segments as arrays."""
        return SegmentTable.of(self.segments)

    def runs(self, modality: Modality) -> Runs:
        """The positions that `modality` covers."""
        table = self.table
        covered = np.isin(table.code, codes_of(modality))
        # Segments leave no gaps, so a run begins and ends where its neighbour is of another kind.
        starts = covered & ~np.concatenate([[False], covered[:-1]])
        stops = covered & ~np.concatenate([covered[1:], [False]])
        return Runs(table.start[starts], table.stop[stops])

    def on_phase(self, stride: str, phase: int) -> Runs:
        """The positions whose cell is `phase`; `stride` as in `cells`."""
        table = self.table
        in_frame = stride == "frame"
        lines = table.rows * table.cols if in_frame else table.cols
        chosen = np.flatnonzero(table.has_cells(stride) & (phase < lines))
        frames = table.frames[chosen]
        starts = table.frame_starts[expand(table.first_frame[chosen], frames)]
        if in_frame:
            return Runs.points(starts + phase)
        rows, cols = (np.repeat(size[chosen], frames) for size in (table.rows, table.cols))
        row = expand(np.zeros_like(rows), rows)
        return Runs.points(np.repeat(starts, rows) + row * np.repeat(cols, rows) + phase)

    def cells(self, stride: str) -> torch.Tensor:
        """int32 [length]: the cell of each token, -1 where it has none (text, separators, no grid, no raster).

        `stride` "frame": the index in the frame, 0 .. rows*cols-1; "row": the column, 0 .. cols-1.
        """
        cells = torch.full((self.length,), -1, dtype=torch.int32)
        for segment in self.segments:
            grid = segment.grid
            if grid is None or not grid.has_cells(stride):
                continue
            index = torch.arange(grid.cells, dtype=torch.int32)
            if stride == "row":
                index = index % grid.cols
            starts = torch.tensor(grid.frame_starts, dtype=torch.int64)
            cells[starts[:, None] + torch.arange(grid.cells)] = index
        return cells
