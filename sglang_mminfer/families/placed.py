"""Media whose items say where their rasters belong (`modality.items.Place`), as our own processors write it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from sglang_mminfer.modality.items import GeometryError, Place, Span, places_of, spans_of
from sglang_mminfer.modality.segments import Modality, Segment, VisionGrid

if TYPE_CHECKING:
    from sglang_mminfer.families.base import LabelledSegment, MediaItem


def segments(items: Iterable[MediaItem], has_raster: bool) -> Iterator[LabelledSegment]:
    """One segment for the rasters of a medium that have one shape. What stands between them belongs to the segment.

    Args:
        items: items that our processors made, in any order.
        has_raster: whether tokens have rows and columns; else every raster has one row.

    Raises:
        GeometryError: "grid_mismatch" if the places of an item do not fit its spans or its neighbours;
            "overlapping_offsets" if rasters overlap.
    """
    placed = sorted(
        (raster for one in items for raster in _rasters(one, has_raster)), key=lambda raster: raster[0].start
    )
    at = 0
    while at < len(placed):
        span, first, modality = placed[at]
        frames = placed[at : at + first.frames]
        got = [(place._replace(tail=first.tail), kind) for _, place, kind in frames]
        if len(got) < first.frames or got != [(first._replace(frame=n), modality) for n in range(first.frames)]:
            raise GeometryError(
                "grid_mismatch",
                f"{span.name}: expected the {first.frames} frames of one {modality} of {first.rows} x {first.cols} "
                f"tokens in order, got frames {[place.frame for place, _ in got][:8]}",
            )
        for (before, _, _), (after, _, _) in pairwise(frames):
            if after.start < before.stop:
                raise GeometryError("overlapping_offsets", f"{after.name}: overlaps {before.name}")
        starts = tuple(span.start for span, _, _ in frames)
        grid = VisionGrid(first.frames, first.rows, first.cols, starts, raster=has_raster)
        yield Segment(modality, span.start, frames[-1][0].stop, grid), span.name
        at += first.frames


def _rasters(one: MediaItem, has_raster: bool) -> Iterator[tuple[Span, Place, Modality]]:
    """The tokens of each raster of an item, and where it belongs."""
    spans, places = spans_of(one.item, one.label), places_of(one.item, one.label)
    if rows := [place.rows for place in places if place.rows != 1 and not has_raster]:
        raise GeometryError("grid_mismatch", f"{one.label}: expected one row of merged tokens, got {rows[0]}")
    if [span.stop - span.start for span in spans] == [place.tokens for place in places]:
        yield from ((span, place, one.modality) for span, place in zip(spans, places))
        return
    tokens = sum(place.tokens for place in places)
    if len(spans) != 1 or tokens != spans[0].stop - spans[0].start:
        raise GeometryError(
            "grid_mismatch",
            f"{one.label}: expected one span of {tokens} tokens for rasters "
            f"{[(place.rows, place.cols, place.tail) for place in places[:8]]}, got "
            f"{[span.stop - span.start for span in spans[:8]]}",
        )
    start = spans[0].start
    for place in places:
        yield Span(start, start + place.tokens, spans[0].name), place, one.modality
        start += place.tokens
