"""MiniCPM-V 4.6.

A picture is a thumbnail, `<image>` + tokens + `</image>`. If it is large, slices of one size follow row by row,
`<slice>` + tokens + `</slice>` each, with a line break behind each row but the last. A video is such a picture for each
frame, with nothing between them. A token is a square of patches, so every thumbnail and every slice is a raster.

Our processor says which rasters stand one behind the other in one size (`modality.items.Place`): the frames of a video
without slices, or the slices of a picture. What stands between two of them is a member of the medium without a cell.
Without it each raster is a medium of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sglang_mminfer.families.base import LabelledSegment, MediaItem, Reader
from sglang_mminfer.modality.items import GeometryError, data_of, one_segment, spans_of, whole


@dataclass(frozen=True)
class SliceReader(Reader):
    """One segment for each thumbnail and each slice."""

    def of_item(self, one: MediaItem) -> Iterator[LabelledSegment]:
        """Raises GeometryError: "grid_mismatch", or an error of `spans_of`."""
        spans, sizes = spans_of(one.item, one.label), sizes_of(one.item, one.label)
        if len(spans) != len(sizes):
            raise GeometryError(
                "grid_mismatch",
                f"{one.label}: expected a height and width in tgt_size for each span, got {len(sizes)} for "
                f"{len(spans)} spans",
            )
        for span, (rows, cols) in zip(spans, sizes):
            if rows * cols != span.stop - span.start:
                raise GeometryError(
                    "grid_mismatch",
                    f"{span.name}: expected {rows} x {cols} tokens, got {span.stop - span.start}",
                )
            yield one_segment([span], rows, cols, one.modality)


def sizes_of(item: Any, name: str) -> list[tuple[int, int]]:
    """Rows and columns of tokens of each thumbnail or slice of an item.

    Raises:
        GeometryError: "grid_mismatch" if `tgt_size` does not hold heights and widths in patches.
    """
    data = data_of(item)
    given: Any = data.get("tgt_size")
    merge = merge_of(16 if data.get("use_vit_merger", True) else 4)
    try:
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in given]
        sizes = [(whole(height), whole(width)) for height, width in rows]
        if any(side < merge or side % merge for size in sizes for side in size):
            raise ValueError
    except (TypeError, ValueError):
        raise GeometryError(
            "grid_mismatch",
            f"{name}: expected heights and widths in patches, divisible by {merge}, in tgt_size, got {given!r:.80}",
        ) from None
    return [(height // merge, width // merge) for height, width in sizes]


def merge_of(patches: int) -> int:
    """Patches along a side of a token that is made of so many."""
    return math.isqrt(patches)
