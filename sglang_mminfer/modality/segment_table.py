"""The segments of a map as arrays, so that a question about all of them is arithmetic, not a loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from sglang_mminfer.modality.runs import Bools, Ints

CODES = {"text": 0, "image": 1, "video": 2}


@dataclass(frozen=True)
class SegmentTable:
    """One row for each segment. int64 [segments], unless said otherwise.

    Attributes:
        start, stop: token positions.
        code: the modality, by `CODES`.
        frames, rows, cols: of the segment's grid; 0 if it has no grid.
        raster: bool [segments], `VisionGrid.raster`; False if it has no grid.
        frame_starts: [frames of all grids], ascending: the first token of each frame.
        first_frame: [segments + 1]: the index in `frame_starts` at which each segment's frames begin.
    """

    start: Ints
    stop: Ints
    code: Ints
    frames: Ints
    rows: Ints
    cols: Ints
    raster: Bools
    frame_starts: Ints
    first_frame: Ints

    @classmethod
    def of(cls, segments: Sequence[Any]) -> SegmentTable:
        """The table of the segments of a map."""
        grids = [segment.grid for segment in segments]

        def column(values: Iterable[int]) -> Ints:  # a generator: the garbage collector would walk a list
            return np.fromiter(values, dtype=np.int64)

        frames = column(grid.frames if grid else 0 for grid in grids)
        return cls(
            start=column(segment.start for segment in segments),
            stop=column(segment.stop for segment in segments),
            code=column(CODES[segment.modality] for segment in segments),
            frames=frames,
            rows=column(grid.rows if grid else 0 for grid in grids),
            cols=column(grid.cols if grid else 0 for grid in grids),
            raster=column(grid.raster if grid else 0 for grid in grids).astype(np.bool_),
            frame_starts=column(chain.from_iterable(grid.frame_starts for grid in grids if grid)),
            first_frame=np.concatenate([[0], np.cumsum(frames)]),
        )

    def has_cells(self, stride: str) -> Bools:
        """bool [segments]: which segments' tokens have a cell under `stride`, "frame" or "row"."""
        return (self.frames > 0) & (self.raster | (stride == "frame"))


def codes_of(modality: str | None) -> tuple[int, ...]:
    """The codes of the modalities that `modality` covers, ascending; None covers all."""
    if modality is None:
        return tuple(CODES.values())
    return (CODES["image"], CODES["video"]) if modality == "vision" else (CODES[modality],)
