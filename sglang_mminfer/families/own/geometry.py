"""The families that this package brings itself: every item says where it stands in its picture or video.

An item is one frame of a video, or one view of a picture, as a span of `rows * cols` tokens in raster order and
`tail` tokens without a cell. Items 0 to n - 1 of a medium stand one behind the other, and what is between them (a
separator) belongs to the medium. Where a model ends each row with a newline token, that is the last column of the
raster: the period of a row is then the number of columns, newline included. Where it merges a clip's tokens until no
raster is left, there is one row, and only the stride of the clip means anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sglang_mminfer.modality.items import FRAME_KEY, GeometryError, Span, data_of, spans_of, whole
from sglang_mminfer.modality.segments import Modality, Segment, VisionGrid

MODEL_TYPES = ("llava_video", "longvila", "videochat_flash")

FRAME, FRAMES, ROWS, COLS, TAIL = KEYS = (
    FRAME_KEY,
    *(f"placed_{name}" for name in ("frames", "rows", "cols", "tail")),
)
"""Plain integers in an item's `model_specific_data`; `models/prompt.py` writes them."""


MERGED = "merged"
"""The argument of a model whose tokens have no raster."""


def argument_of(hf_config: Any) -> str:
    """`MERGED` for a model whose tokens have no raster; all else the items say."""
    return MERGED if getattr(hf_config, "vision_tokens_merged", False) is True else ""


def conversation(items: Sequence[tuple[Any, Modality, str]], argument: str) -> Iterator[tuple[Segment, str]]:
    """One segment for each medium, with the name an error should use.

    Args:
        items: with their modality and name, in any order.
        argument: `MERGED`, whose items have one row, or nothing.

    Raises:
        GeometryError: "grid_mismatch" where an item's numbers do not fit its span or its neighbours.
    """
    read = [(*_read(item, name, argument), modality) for item, modality, name in items]
    placed = sorted(read, key=lambda one: one[0].start)
    at = 0
    while at < len(placed):
        span, (frame, frames, rows, cols, _), modality = placed[at]
        medium = placed[at : at + frames]
        if frame or [(n, shape[0], *shape[1:4], kind) for n, (_, shape, kind) in enumerate(medium)] != [
            (n, n, frames, rows, cols, modality) for n in range(frames)
        ]:
            raise GeometryError(
                "grid_mismatch",
                f"{span.name}: expected the {frames} frames of one {modality} of {rows} x {cols} tokens in order, got "
                f"frames {[shape[0] for _, shape, _ in medium][:8]}",
            )
        starts = tuple(one[0].start for one in medium)
        grid = VisionGrid(frames, rows, cols, starts, raster=argument != MERGED)
        yield Segment(modality, span.start, medium[-1][0].stop, grid), span.name
        at += frames


def _read(item: Any, name: str, argument: str) -> tuple[Span, tuple[int, ...]]:
    """The span of an item, and its numbers in the order of `KEYS`."""
    data = data_of(item)
    try:
        shape = tuple(whole(data[key]) for key in KEYS)
    except (KeyError, TypeError, ValueError):
        raise GeometryError(
            "grid_mismatch", f"{name}: expected integers {', '.join(KEYS)}, got { ({k: data.get(k) for k in KEYS}) }"
        ) from None
    spans = spans_of(item, name)
    if len(spans) != 1:
        raise GeometryError("grid_mismatch", f"{name}: expected one span for each frame, got {len(spans)}")
    span, (_, frames, rows, cols, tail) = spans[0], shape
    if rows != 1 and argument == MERGED:
        raise GeometryError("grid_mismatch", f"{span.name}: expected one row of merged tokens, got {rows}")
    if frames < 1:
        raise GeometryError("zero_frames", f"{name}: expected at least one frame, got {frames}")
    if min(rows, cols) < 1 or tail < 0 or rows * cols + tail != span.stop - span.start:
        raise GeometryError(
            "grid_mismatch",
            f"{span.name}: expected {rows} x {cols} tokens and {tail} behind them, got {span.stop - span.start}",
        )
    return span, shape
