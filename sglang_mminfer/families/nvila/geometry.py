"""NVILA and NVILA-Lite.

Everything is tiles of the same size, each of them a span of `side` x `side` tokens: what is left of its patches when
the projector has merged them 2 by 2 (Lite: 3 by 3), the last row and column padded where there are not enough. A line
break follows every span.

A video is one tile for each frame. Several images in a prompt are one tile each. A single image is cut: by NVILA-Lite
into tiles row by row and a thumbnail of the whole image last, each a frame of the image's raster and followed by one
more line break; by NVILA into tiles whose tokens are put together again, so that it is one span and one raster of as
many tiles as its `block_sizes` says.

Line breaks between two tiles of a medium are members of it without a cell. The ones behind the last tile are text.

Our processor says which tiles are of one medium. Without it each span is a medium of its own: nothing in the prompt
tells two frames of a video from two videos, or two tiles of an image from two images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_mminfer.modality.items import VIDEO_KEY, GeometryError, Span, data_of, one_segment, spans_of, whole
from sglang_mminfer.modality.segments import Modality, Segment

MERGED = {"nvila": 2, "nvila_lite": 3}
"""Patches that the projector merges, by side."""

MODEL_TYPES = tuple(MERGED)


def argument_of(hf_config: Any) -> str:
    """The side of a tile in tokens: 16 of released NVILA, 11 of NVILA-Lite."""
    vision = hf_config.vision_config
    return str(-(-(vision.image_size // vision.patch_size) // MERGED[hf_config.model_type]))


def segments(item: Any, modality: Modality, name: str, argument: str) -> Iterator[tuple[Segment, str]]:
    """One segment with its grid for each image or video of the item.

    Raises:
        GeometryError: "grid_mismatch", besides what the offsets themselves can be wrong in.
    """
    side = int(argument)
    spans = spans_of(item, name)
    if len(spans) == 1 and (blocks := _blocks(item, name)) is not None:
        rows, cols = blocks
        _check(spans[0], side, rows * cols)
        yield one_segment(spans, rows * side, cols * side, modality)
        return
    for span in spans:
        _check(span, side, 1)
    for medium in [spans] if VIDEO_KEY in data_of(item) else [[span] for span in spans]:
        yield one_segment(medium, side, side, modality)


def _check(span: Span, side: int, tiles: int) -> None:
    expected, tokens = side * side * tiles, span.stop - span.start
    if tokens != expected:
        raise GeometryError("grid_mismatch", f"{span.name}: expected {tiles} x {side * side} tokens, got {tokens}")


def _blocks(item: Any, name: str) -> tuple[int, int] | None:
    """Rows and columns of tiles that were put together in a span; None where the span is a tile."""
    given: Any = data_of(item).get("block_sizes")
    if given is None:
        return None
    try:
        (one,) = given
        if one is None:
            return None
        rows, cols = map(whole, one)
        if min(rows, cols) < 1:
            raise ValueError
        return rows, cols
    except (TypeError, ValueError):
        raise GeometryError(
            "grid_mismatch", f"{name}: expected rows and columns of tiles in block_sizes, got {given!r:.80}"
        ) from None
