"""InternVL in its native form (InternVLChatModel), up to 3.5.

Everything is tiles of the same size. An image is one span of tiles, cut row by row, a thumbnail of the whole image
last; each tile, the thumbnail too, is a frame of its raster. A video is one span for each frame. Between two of them
stand `</img>`, a line break and the next frame's number as text, and `<img>`: these tokens are members of the video
without a cell.

Our processor says which frames are of one video (`modality.items.Place`). SGLang's own keeps all videos of a
conversation in one item; there frames are of one video as long as no more text stands between them than a frame's
number needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sglang_mminfer.families.base import LabelledSegment, MediaItem, Reader
from sglang_mminfer.modality.items import GeometryError, Span, one_segment, spans_of
from sglang_mminfer.modality.segments import Modality

SIDE = 16  # of a tile of every published checkpoint, in tokens

MOST_BETWEEN = 12
"""Tokens from one frame to the next of a video: `</img>`, "\\nFrame 1234: " and `<img>` are 11 for Qwen tokenizers."""


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
        side: of a tile, in tokens.
    """

    side: int = SIDE

    def of_item(self, one: MediaItem) -> Iterator[LabelledSegment]:
        """Raises GeometryError "grid_mismatch", besides what offsets can be wrong in."""
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
