"""LLaVA-OneVision and LLaVA-NeXT-Video in their Hugging Face form, served by SGLang's Transformers fallback.

A video is one span, frame behind frame without anything between; LLaVA-OneVision ends it with one newline token, a
member of the video without a cell. An image is one span of two rasters, each a segment: the whole image in one tile,
then the image at its own resolution, cut into tiles and put together again, without the padding. In the second raster
every row ends with a newline token, which is the last column of its row. Several images in one LLaVA-OneVision prompt
are not cut: each is one tile and a newline token, a member without a cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sglang_mminfer.families.base import LabelledSegment, MediaItem, Reader
from sglang_mminfer.modality.items import GeometryError, Span, data_of, spans_of, whole
from sglang_mminfer.modality.segments import Modality, Segment, VisionGrid

ONEVISION, NEXT_VIDEO = "llava_onevision", "llava_next_video"
SHRINK_ABOVE = 1.1  # LLaVA-OneVision shrinks features whose sides are more than this many times too long


@dataclass(frozen=True)
class LlavaReader(Reader):
    """What a config says about rasters. Sides are in patches of the vision tower.

    Attributes:
        side: the side of a tile.
        tile_pixels: the side of a tile in pixels.
        frame_side: the side of a video's frame, after pooling.
        video_tail: newline tokens at the end of a video.
        tiles: rows and columns of tiles that an image may be cut into, in the config's order.
        most_tiles: an image keeps at most the features of so many tiles; 0: no limit.
    """

    side: int
    tile_pixels: int
    frame_side: int
    video_tail: int
    tiles: tuple[tuple[int, int], ...]
    most_tiles: int

    def of_item(self, one: MediaItem) -> Iterator[LabelledSegment]:
        """Raises GeometryError: "grid_mismatch", or an error of `spans_of`."""
        spans = spans_of(one.item, one.label)
        if one.modality is Modality.VIDEO:
            for span in spans:
                yield _video(span, self), span.name
            return
        sizes = _sizes(data_of(one.item).get("image_sizes"), one.label)
        if len(sizes) != len(spans):
            raise GeometryError(
                "grid_mismatch",
                f"{one.label}: expected a height and width in image_sizes for each of {len(spans)} images, got "
                f"{len(sizes)}",
            )
        for span, size in zip(spans, sizes):
            for segment in _image(span, size, self):
                yield segment, span.name


def reader_of(hf_config: Any) -> LlavaReader:
    """The reader for a config of one of the two models."""
    vision = hf_config.vision_config
    pixels = vision.image_size
    side = pixels // vision.patch_size
    tiles = tuple((height // pixels, width // pixels) for height, width in hf_config.image_grid_pinpoints)
    if hf_config.model_type == ONEVISION:
        most = int(hf_config.vision_aspect_ratio.removeprefix("anyres_max_"))
        return LlavaReader(side, pixels, math.ceil(side / 2), 1, tiles, most)
    return LlavaReader(side, pixels, side // 2, 0, tiles, 0)


def _sizes(value: Any, name: str) -> list[tuple[int, int]]:
    try:
        rows = value.tolist() if hasattr(value, "tolist") else list(() if value is None else value)
        if len(rows) == 2 and not any(isinstance(row, list | tuple) or hasattr(row, "tolist") for row in rows):
            rows = [rows]
        sizes = [(whole(height), whole(width)) for height, width in rows]
    except (TypeError, ValueError):
        sizes = [(0, 0)]
    if any(min(size) < 1 for size in sizes):
        raise GeometryError("grid_mismatch", f"{name}: expected heights and widths in image_sizes, got {value!r:.80}")
    return sizes


def _video(span: Span, layout: LlavaReader) -> Segment:
    cells, tokens = layout.frame_side**2, span.stop - span.start
    frames, tail = divmod(tokens, cells)
    if not frames or tail != layout.video_tail:
        raise GeometryError(
            "grid_mismatch",
            f"{span.name}: expected frames of {cells} tokens and {layout.video_tail} at the end, got {tokens}",
        )
    starts = tuple(range(span.start, span.start + frames * cells, cells))
    return Segment(
        Modality.VIDEO, span.start, span.stop, VisionGrid(frames, layout.frame_side, layout.frame_side, starts)
    )


def _image(span: Span, size: tuple[int, int], layout: LlavaReader) -> Iterator[Segment]:
    tile, tokens = layout.side**2, span.stop - span.start
    tile_grid = VisionGrid(1, layout.side, layout.side, (span.start,))
    if layout.video_tail and tokens == tile + 1:  # one of several images
        yield Segment(Modality.IMAGE, span.start, span.stop, tile_grid)
        return
    rows, cols = _unpadded(size, layout)
    if tokens != tile + rows * (cols + 1):
        raise GeometryError(
            "grid_mismatch",
            f"{span.name}: expected {tile} tokens and {rows} rows of {cols + 1} for an image of {size[0]} x {size[1]}, "
            f"got {tokens}",
        )
    middle = span.start + tile
    yield Segment(Modality.IMAGE, span.start, middle, tile_grid)
    if rows:  # an image that is far too long for its tiles has no rows left
        yield Segment(Modality.IMAGE, middle, span.stop, VisionGrid(1, rows, cols + 1, (middle,)))


def _unpadded(size: tuple[int, int], layout: LlavaReader) -> tuple[int, int]:
    """Rows and columns of patches of an image of that height and width, without the padding of its tiles."""
    height, width = size
    rows, cols = (tiles * layout.side for tiles in _best_fit(size, layout))
    # Both sides lose the same number of rows or columns, so an even number is cut off.
    if width * rows > height * cols:
        rows -= (rows - int(round(height * (cols / width), 7))) // 2 * 2
    else:
        cols -= (cols - int(round(width * (rows / height), 7))) // 2 * 2
    if layout.most_tiles:
        excess = math.sqrt(rows * cols / (layout.most_tiles * layout.side**2))
        if excess > SHRINK_ABOVE:
            rows, cols = int(rows // excess), int(cols // excess)
    return rows, cols


def _best_fit(size: tuple[int, int], layout: LlavaReader) -> tuple[int, int]:
    """(rows, columns) of the tiles that keep most of an image's pixels; among equals the fewest, then the first."""
    height, width = size

    def worth(tiles: tuple[int, int]) -> tuple[int, int]:
        full_height, full_width = (count * layout.tile_pixels for count in tiles)
        scale = min(full_width / width, full_height / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - full_height * full_width

    return max(layout.tiles, key=worth)
