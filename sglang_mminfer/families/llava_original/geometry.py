"""LLaVA in the form of its original code (LLaVA-1.5, LLaVA-NeXT, lmms-lab's LLaVA-OneVision), pictures only.

A picture is one span of one or two rasters, each a segment: the whole picture, then, where it alone is asked about
and may have any resolution, the picture in tiles put together again without the padding, whose rows end with a
newline token. That is the last column of its row; a newline token behind a picture that is not cut belongs to the
picture and has no cell.

How large they are follows from the vision tower, which the checkpoint only names: `processor`, which lays the prompt
out, says it of each picture. A "llava" of another origin says nothing, and its spans have no
grid (`generic`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sglang_mminfer.families.base import LabelledSegment, MediaItem, Reader
from sglang_mminfer.families.generic import SpanReader
from sglang_mminfer.modality.items import GeometryError, data_of, spans_of, whole
from sglang_mminfer.modality.segments import Segment, VisionGrid

RASTERS = "mminfer_rasters"
"""In an item's `model_specific_data`: [rows, cols, tail] of each of its rasters, `tail` tokens without a cell."""


@dataclass(frozen=True)
class PictureReader(Reader):
    """The segments of each picture; the items say all."""

    def of_item(self, one: MediaItem) -> Iterator[LabelledSegment]:
        """Raises GeometryError "grid_mismatch" where a picture's rasters do not fill its span."""
        rasters = data_of(one.item).get(RASTERS)
        if rasters is None:
            yield from SpanReader().of_item(one)
            return
        spans = spans_of(one.item, one.label)
        try:
            rasters = [(whole(rows), whole(cols), whole(tail)) for rows, cols, tail in rasters]
        except (TypeError, ValueError):
            rasters = [(0, 0, 0)]
        if any(min(rows, cols) < 1 or tail < 0 for rows, cols, tail in rasters):
            raise GeometryError(
                "grid_mismatch", f"{one.label}: expected [rows, cols, tail] of each raster in {RASTERS}"
            )
        tokens = [rows * cols + tail for rows, cols, tail in rasters]
        if len(spans) != 1 or sum(tokens) != spans[0].stop - spans[0].start:
            raise GeometryError(
                "grid_mismatch",
                f"{one.label}: expected one span of {sum(tokens)} tokens for rasters {rasters}, got "
                f"{[span.stop - span.start for span in spans]}",
            )
        start = spans[0].start
        for (rows, cols, _), length in zip(rasters, tokens):
            yield Segment(one.modality, start, start + length, VisionGrid(1, rows, cols, (start,))), spans[0].name
            start += length
