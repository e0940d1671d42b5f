"""The modality map: which tokens of one conversation are text, image or video, and where the frames lie.

Every position is an index into the whole prompt of ONE request: the cached prefix and the chunks still to come are
included. Stops are exclusive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sglang_mminfer.modality.integers import plain_int
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


def modality_named(name: str, value: Any) -> Modality:
    """The modality that `value` is or names; `name` is the argument, for errors."""
    try:
        return Modality(value)
    except ValueError:
        known = ", ".join(Modality)
        raise ValueError(f"{name}: expected one of {known}, got {value!r}") from None


def _integer(name: str, value: Any) -> int:
    """`value` as a plain int: an integer of NumPy or torch is one, too."""
    plain = plain_int(value)
    if plain is None:
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    return plain


def _items(name: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected a sequence, got {values!r}")
    return tuple(values)


@dataclass(frozen=True)
class VisionGrid:
    """The raster of one image or video, in language-model tokens (after the vision tower's merger).

    A frame is `rows * cols` contiguous tokens in row-major order. Other tokens, such as timestamps, may lie between
    frames.

    Attributes:
        frames, rows, cols: integers >= 1.
        frame_starts: the position of every frame's first token, ascending.
        raster: False for a vision tower whose tokens have no rows and columns. Its frames (or clips) have equal lengths
            and nothing else in common: `rows` is 1, and tokens have a cell for the frame stride only.

    Raises:
        ValueError: naming the field that does not fit the others.
    """

    frames: int
    rows: int
    cols: int
    frame_starts: tuple[int, ...]
    raster: bool = True

    def __post_init__(self) -> None:
        starts = _items("VisionGrid.frame_starts", self.frame_starts)
        starts = tuple(_integer(f"VisionGrid.frame_starts[{i}]", start) for i, start in enumerate(starts))
        object.__setattr__(self, "frame_starts", starts)
        for name in ("frames", "rows", "cols"):
            value = _integer(f"VisionGrid.{name}", getattr(self, name))
            if value < 1:
                raise ValueError(f"VisionGrid.{name}: expected an integer >= 1, got {value!r}")
            object.__setattr__(self, name, value)
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
        """(rows, cols). Tokens of two grids can share a cell only if the shapes are equal."""
        return self.rows, self.cols

    def has_cells(self, stride: str) -> bool:
        """Whether tokens have a cell under `stride`, "frame" or "row"."""
        return self.raster or stride == "frame"


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of one modality.

    Tokens of a vision segment outside its frames (separators, timestamps) belong to the segment and have no cell.

    Attributes:
        grid: None for text, and for media whose grid the model does not tell.

    Raises:
        ValueError: if the range is empty, the modality is VISION, or the grid does not fit.
    """

    modality: Modality
    start: int
    stop: int
    grid: VisionGrid | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "modality", modality_named("Segment.modality", self.modality))
        for name in ("start", "stop"):
            object.__setattr__(self, name, _integer(f"Segment.{name}", getattr(self, name)))
        if self.modality is Modality.VISION:
            raise ValueError("Segment.modality: expected text, image or video, got vision")
        if not 0 <= self.start < self.stop:
            raise ValueError(f"Segment: expected 0 <= start < stop, got [{self.start}, {self.stop})")
        if self.grid is None:
            return
        if not isinstance(self.grid, VisionGrid):
            raise ValueError(f"Segment.grid: expected a VisionGrid or None, got {self.grid!r}")
        if self.modality is Modality.TEXT:
            raise ValueError(f"Segment [{self.start}, {self.stop}): a text segment has no grid")
        first, end = self.grid.frame_starts[0], self.grid.frame_starts[-1] + self.grid.cells
        if first < self.start or end > self.stop:
            raise ValueError(
                f"Segment [{self.start}, {self.stop}): its grid of {self.grid.frames} x {self.grid.rows} x "
                f"{self.grid.cols} tokens covers [{first}, {end})"
            )


@dataclass(frozen=True)
class ModalityMap:
    """One conversation as a sorted list of segments that cover it from position 0 without gaps or overlaps.

    Raises:
        ValueError: naming the first segment that overlaps the segment before it or leaves a gap.
    """

    segments: tuple[Segment, ...]

    def __init__(self, segments: Sequence[Segment]) -> None:
        object.__setattr__(self, "segments", _items("ModalityMap.segments", segments))
        position = 0
        for i, segment in enumerate(self.segments):
            if not isinstance(segment, Segment):
                raise ValueError(f"ModalityMap.segments[{i}]: expected a Segment, got {segment!r}")
            if segment.start != position:
                fault = "overlaps the one before" if segment.start < position else "leaves a gap"
                raise ValueError(
                    f"ModalityMap.segments[{i}]: expected a start of {position}, got {segment.start} ({fault})"
                )
            position = segment.stop

    @property
    def length(self) -> int:
        """Tokens of the whole prompt."""
        return self.segments[-1].stop if self.segments else 0

    def __len__(self) -> int:
        return self.length

    @cached_property
    def derived(self) -> dict[tuple[object, ...], Any]:
        """What others have made of the map and keep with it, by keys of their own."""
        return {}

    @cached_property
    def has_vision(self) -> bool:
        """Whether any segment is image or video."""
        return any(segment.modality is not Modality.TEXT for segment in self.segments)

    @cached_property
    def first_vision(self) -> int:
        """Position of the first image or video token; the map's length if it has none."""
        return next((s.start for s in self.segments if s.modality is not Modality.TEXT), self.length)

    @cached_property
    def segment_ids(self) -> torch.Tensor:
        """int32 [length]: the index in `segments` of the segment that holds each token."""
        lengths = torch.tensor([s.stop - s.start for s in self.segments], dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.segments), dtype=torch.int32), lengths)

    def members(self, modality: Modality) -> torch.Tensor:
        """bool [length]: which tokens `modality` covers."""
        flags = torch.tensor([modality.covers(s.modality) for s in self.segments], dtype=torch.bool)
        return flags[self.segment_ids.long()] if self.segments else flags

    @cached_property
    def table(self) -> SegmentTable:
        """The segments as arrays."""
        return SegmentTable.of(self.segments)

    def runs(self, modality: Modality) -> Runs:
        """The positions whose modality `modality` covers."""
        table = self.table
        covered = np.isin(table.code, codes_of(modality))
        # Segments leave no gaps, so a run begins or ends at each segment whose neighbour is not covered.
        starts = covered & ~np.concatenate([[False], covered[:-1]])
        stops = covered & ~np.concatenate([covered[1:], [False]])
        return Runs(table.start[starts], table.stop[stops])

    def on_phase(self, stride: str, phase: int) -> Runs:
        """The positions whose cell is `phase`.

        Args:
            stride: as in `cells`.
        """
        table = self.table
        in_frame = stride == "frame"
        cell_counts = table.rows * table.cols if in_frame else table.cols
        chosen = np.flatnonzero(table.has_cells(stride) & (phase < cell_counts))
        frames = table.frames[chosen]
        starts = table.frame_starts[expand(table.first_frame[chosen], frames)]
        if in_frame:
            return Runs.points(starts + phase)
        rows, cols = (np.repeat(size[chosen], frames) for size in (table.rows, table.cols))
        row = expand(np.zeros_like(rows), rows)
        return Runs.points(np.repeat(starts, rows) + row * np.repeat(cols, rows) + phase)

    def cells(self, stride: str) -> torch.Tensor:
        """int32 [length]: the cell of each token; -1 for a token without one (text, separators, no grid, no raster).

        Args:
            stride: "frame": the cell is the index in the frame, 0 .. rows*cols-1. "row": it is the column, 0 .. cols-1.
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
