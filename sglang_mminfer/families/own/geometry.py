"""The families that this package brings itself: every item says where it stands in its picture or video.

An item is one frame of a video, or one view of a picture, as a span of `rows * cols` tokens in raster order and
`tail` tokens without a cell. Items 0 to n - 1 of a medium stand one behind the other, and what is between them (a
separator) belongs to the medium. Where a model ends each row with a newline token, that is the last column of the
raster: the period of a row is then the number of columns, newline included. Where it merges a clip's tokens until no
raster is left, there is one row, and only the stride of the clip means anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sglang_mminfer.families.base import LabelledSegment, MediaItem, Reader
from sglang_mminfer.modality.items import FRAME_KEY, GeometryError, Span, data_of, spans_of, whole
from sglang_mminfer.modality.segments import Segment, VisionGrid

FRAME, FRAMES, ROWS, COLS, TAIL = KEYS = (
    FRAME_KEY,
    *(f"placed_{name}" for name in ("frames", "rows", "cols", "tail")),
)
"""Plain integers in an item's `model_specific_data`; `prompt.py` writes them."""


@dataclass(frozen=True)
class PlacedReader(Reader):
    """One segment for each medium, made of its items.

    Attributes:
        merged: whether the model merges tokens until no raster is left: every item has one row.
    """

    merged: bool = False

    @property
    def has_raster(self) -> bool:
        return not self.merged

    def segments(self, items: Sequence[MediaItem]) -> Iterator[LabelledSegment]:
        """Raises GeometryError "grid_mismatch" where an item's numbers do not fit its span or its neighbours."""
        placed = sorted(((*self._read(one), one.modality) for one in items), key=lambda read: read[0].start)
        at = 0
        while at < len(placed):
            span, (frame, frames, rows, cols, _), modality = placed[at]
            medium = placed[at : at + frames]
            if frame or [(n, shape[0], *shape[1:4], kind) for n, (_, shape, kind) in enumerate(medium)] != [
                (n, n, frames, rows, cols, modality) for n in range(frames)
            ]:
                raise GeometryError(
                    "grid_mismatch",
                    f"{span.name}: expected the {frames} frames of one {modality} of {rows} x {cols} tokens in order, "
                    f"got frames {[shape[0] for _, shape, _ in medium][:8]}",
                )
            starts = tuple(one[0].start for one in medium)
            grid = VisionGrid(frames, rows, cols, starts, raster=self.has_raster)
            yield Segment(modality, span.start, medium[-1][0].stop, grid), span.name
            at += frames

    def of_item(self, one: MediaItem) -> Iterator[LabelledSegment]:
        return self.segments([one])

    def _read(self, one: MediaItem) -> tuple[Span, tuple[int, ...]]:
        """The span of an item, and its numbers in the order of `KEYS`."""
        data, name = data_of(one.item), one.label
        try:
            shape = tuple(whole(data[key]) for key in KEYS)
        except (KeyError, TypeError, ValueError):
            raise GeometryError(
                "grid_mismatch",
                f"{name}: expected integers {', '.join(KEYS)}, got { ({k: data.get(k) for k in KEYS}) }",
            ) from None
        spans = spans_of(one.item, name)
        if len(spans) != 1:
            raise GeometryError("grid_mismatch", f"{name}: expected one span for each frame, got {len(spans)}")
        span, (_, frames, rows, cols, tail) = spans[0], shape
        if rows != 1 and self.merged:
            raise GeometryError("grid_mismatch", f"{span.name}: expected one row of merged tokens, got {rows}")
        if frames < 1:
            raise GeometryError("zero_frames", f"{name}: expected at least one frame, got {frames}")
        if min(rows, cols) < 1 or tail < 0 or rows * cols + tail != span.stop - span.start:
            raise GeometryError(
                "grid_mismatch",
                f"{span.name}: expected {rows} x {cols} tokens and {tail} behind them, got {span.stop - span.start}",
            )
        return span, shape
