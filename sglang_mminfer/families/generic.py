"""Models that say where their media stand but not how they are laid out: each span is a segment without a grid.

That is enough for boundaries and for patterns that need no cells (A-shape, tri-shape, vertical-slash). Grid patterns
find no cells here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sglang_mminfer.families.base import LabelledSegment, MediaItem, Reader
from sglang_mminfer.modality.items import spans_of
from sglang_mminfer.modality.segments import Segment


@dataclass(frozen=True)
class SpanReader(Reader):
    """One segment for each span of an item."""

    def of_item(self, one: MediaItem) -> Iterator[LabelledSegment]:
        for span in spans_of(one.item, one.label):
            yield Segment(one.modality, span.start, span.stop), span.name
