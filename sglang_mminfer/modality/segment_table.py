"""The segments of a map as arrays, so that what asks about all of them is arithmetic and no loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from sglang_mminfer.modality.runs import Bools, Ints

CODES = {"text": 0, "image": 1, "video": 2}


@dataclass(frozen=True)
class SegmentTable:
    """One row for each segment. int64 where nothing else is said.

    start, stop: positions. code: the modality, by `CODES`. frames, rows, cols: the grid's, 0 where there is none.
    raster: bool, the grid's. frame_starts: [frames of all grids], ascending. first_frame: [segments + 1], where each
    segment's frames begin among them.
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
        grids = [segment.grid for segment in segments]
        sizes = [(0, 0, 0, False) if grid is None else (grid.frames, grid.rows, grid.cols, grid.raster) for grid in grids]
        frames, rows, cols, raster = np.array(sizes, dtype=np.int64).reshape(-1, 4).T
        starts = chain.from_iterable(grid.frame_starts for grid in grids if grid is not None)
        return cls(
            start=np.array([segment.start for segment in segments], dtype=np.int64),
            stop=np.array([segment.stop for segment in segments], dtype=np.int64),
            code=np.array([CODES[segment.modality] for segment in segments], dtype=np.int64),
            frames=frames,
            rows=rows,
            cols=cols,
            raster=raster.astype(np.bool_),
            frame_starts=np.fromiter(starts, dtype=np.int64, count=int(frames.sum())),
            first_frame=np.concatenate([[0], np.cumsum(frames)]),
        )

    def has_cells(self, stride: str) -> Bools:
        """The segments whose tokens have a cell under `stride`, "frame" or "row"."""
        return (self.frames > 0) & (self.raster | (stride == "frame"))


def codes_of(modality: str | None) -> tuple[int, ...]:
    """The codes of the modalities that `modality` covers, ascending; None covers all."""
    if modality is None:
        return tuple(CODES.values())
    return (CODES["image"], CODES["video"]) if modality == "vision" else (CODES[modality],)
