"""InternVL in its native form (InternVLChatModel), up to 3.5.

Pictures and frames are cut into tiles of one size. An image is one span of tiles, row by row, and a thumbnail of the
whole image last; each tile, the thumbnail too, is a frame of the image's raster. A video is one span for each frame.
Between two of them stand `</img>`, a line break and the next frame's number as text, and `<img>`: these tokens are
members of the video without a cell.

Our processor says which frames belong to one video (`modality.items.Place`). SGLang's own keeps all videos of a
conversation in one item. There, frames count as one video if no more text stands between them than a frame's number
needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sglang_mminfer.families.base import LabelledSegment, MediaItem, Reader
from sglang_mminfer.modality.items import GeometryError, Span, one_segment, spans_of
from sglang_mminfer.modality.segments import Modality

SIDE = 16  # tokens along a side of a tile, in every published checkpoint

MOST_BETWEEN = 12
"""The most tokens between two frames of a video: `</img>`, "\\nFrame 1234: " and `<img>` are 11 for Qwen tokenizers."""


def side_of(hf_config: Any) -> int:
    """The side of a tile in tokens."""
    vision = hf_config.vision_config
    size = _first(getattr(hf_config, "force_image_size", None) or vision.image_size)
    return int(size // _first(vision.patch_size) * hf_config.downsample_ratio)


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


@dataclass(frozen=True)
class TileReader(Reader):
    """One segment for each image or video of an item.

    Attributes:
        side: tokens along a side of a tile.
    """

    side: int = SIDE

    def of_item(self, one: MediaItem) -> Iterator[LabelledSegment]:
        """Raises GeometryError: "grid_mismatch", or an error of `spans_of`."""
        spans = spans_of(one.item, one.label)
        if one.modality is not Modality.VIDEO:
            videos = [[span] for span in spans]
        else:
            videos = [spans[:1]]
            for before, span in pairwise(spans):
                if span.start - before.stop > MOST_BETWEEN:
                    videos.append([])
                videos[-1].append(span)
        for video in videos:
            tiles = [tile for span in video for tile in _tiles(span, self.side**2)]
            yield one_segment(tiles, self.side, self.side, one.modality)


def _tiles(span: Span, tokens: int) -> Iterator[Span]:
    if (span.stop - span.start) % tokens:
        raise GeometryError(
            "grid_mismatch",
            f"{span.name}: expected tiles of {tokens} tokens, got {span.stop - span.start} tokens in all",
        )
    for start in range(span.start, span.stop, tokens):
        yield Span(start, start + tokens, span.name)
