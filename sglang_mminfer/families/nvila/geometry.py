"""NVILA and NVILA-Lite.

Pictures and frames are cut into tiles of one size. A tile is a span of `side` x `side` tokens: its patches, which the
projector merges 2 by 2 (Lite: 3 by 3), the last row and column padded if there are not enough. A line break follows
every span.

A video is one tile for each frame. Several images in a prompt are one tile each. A single image is cut: by NVILA-Lite
into tiles row by row and a thumbnail of the whole image last, each a frame of the image's raster and followed by one
more line break; by NVILA into tiles whose tokens are put together again, so that it is one span and one raster of as
many tiles as its `block_sizes` says.

Line breaks between two tiles of a medium are members of it without a cell. The ones behind the last tile are text.

Our processor says which tiles belong to one medium (`modality.items.Place`). Without it each span is a medium of its
own: nothing in the prompt tells two frames of a video from two videos, or two tiles of an image from two images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sglang_mminfer.families.base import LabelledSegment, MediaItem, Reader
from sglang_mminfer.modality.items import GeometryError, Span, data_of, one_segment, spans_of, whole

MERGED = {"nvila": 2, "nvila_lite": 3}
"""Patches along a side that the projector merges into one token, by model type."""


def side_of(hf_config: Any) -> int:
    """The side of a tile in tokens: 16 in released NVILA, 11 in NVILA-Lite."""
    vision = hf_config.vision_config
    return -(-(vision.image_size // vision.patch_size) // MERGED[hf_config.model_type])


@dataclass(frozen=True)
class TileReader(Reader):
    """One segment for each image or video of an item.

    Attributes:
        side: tokens along a side of a tile.
    """

    side: int

    def of_item(self, one: MediaItem) -> Iterator[LabelledSegment]:
        """Raises GeometryError: "grid_mismatch", or an error of `spans_of`."""
        side = self.side
        spans = spans_of(one.item, one.label)
        if len(spans) == 1 and (blocks := blocks_of(one.item, one.label)) is not None:
            rows, cols = blocks
            _check(spans[0], side, rows * cols)
            yield one_segment(spans, rows * side, cols * side, one.modality)
            return
        for span in spans:
            _check(span, side, 1)
        for span in spans:
            yield one_segment([span], side, side, one.modality)


def _check(span: Span, side: int, tiles: int) -> None:
    expected, tokens = side * side * tiles, span.stop - span.start
    if tokens != expected:
        raise GeometryError("grid_mismatch", f"{span.name}: expected {tiles} x {side * side} tokens, got {tokens}")


def blocks_of(item: Any, name: str) -> tuple[int, int] | None:
    """(rows, columns) of the tiles that an item's span is put together from; None if the span is one tile.

    Raises:
        GeometryError: "grid_mismatch" if `block_sizes` holds something else.
    """
    sizes: Any = data_of(item).get("block_sizes")
    if sizes is None:
        return None
    try:
        (one,) = sizes
        if one is None:
            return None
        rows, cols = map(whole, one)
        if min(rows, cols) < 1:
            raise ValueError
        return rows, cols
    except (TypeError, ValueError):
        raise GeometryError(
            "grid_mismatch", f"{name}: expected rows and columns of tiles in block_sizes, got {sizes!r:.80}"
        ) from None
