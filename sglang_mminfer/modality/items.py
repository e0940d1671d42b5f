"""What all families read from SGLang's media items (modality, spans of tokens, grids), and the error they share."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from sglang_mminfer.modality.segments import Modality, Segment, VisionGrid

KEY = "mminfer"
"""In the `model_specific_data` of an item that our processors made: a `Place` for each of its rasters, in order."""


class Place(NamedTuple):
    """One raster of an item, and where it belongs. Items hold it as a plain tuple: they go to other processes.

    Attributes:
        medium: the number of its picture or video; no two of a session have the same.
        frame, frames: it is number `frame` of `frames` rasters of one shape, which stand one behind the other. The
            frames of a video may be items each, and so may the tiles of a picture.
        rows, cols: of its tokens. Where a model ends each row with a newline token, that is the last column. Where it
            merges tokens until no raster is left, there is one row.
        tail: tokens behind the raster that have no cell.
    """

    medium: int
    frame: int
    frames: int
    rows: int
    cols: int
    tail: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.cols + self.tail


class GeometryError(ValueError):
    """The media of a request do not add up, so the request runs dense, counted under `reason`.

    Attributes:
        reason: a dense_reason: "no_offsets", "bad_offsets", "empty_span", "out_of_range_offsets",
            "overlapping_offsets", "grid_mismatch", "zero_frames", "unknown_modality", "moving_offsets" or
            "unreadable".
        repeated: True if `cached_map` raises a failure again that it raised before, so that a log has it once.
    """

    def __init__(self, reason: str, message: str, repeated: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.repeated = repeated


class Span(NamedTuple):
    """Tokens [start, stop) of one media placeholder, and the name that errors give it."""

    start: int
    stop: int
    name: str


# Keys are the names of SGLang's Modality, so that SGLang is not imported. The map counts audio as text: it has no
# raster, and patterns are about rasters.
_MODALITIES = {
    "IMAGE": Modality.IMAGE,
    "MULTI_IMAGES": Modality.IMAGE,
    "VIDEO": Modality.VIDEO,
    "AUDIO": Modality.TEXT,
}


def modality_of(item: Any, index: int) -> Modality:
    """The modality of one item, TEXT for audio.

    Args:
        index: the item's index in the request, for the error.

    Raises:
        GeometryError: "unknown_modality".
    """
    name = getattr(item.modality, "name", item.modality)
    modality = _MODALITIES.get(str(name).upper())
    if modality is None:
        raise GeometryError(
            "unknown_modality", f"mm_items[{index}]: expected an image, video or audio item, got {name}"
        )
    return modality


def data_of(item: Any) -> Mapping[str, Any]:
    """The values that a model's processor adds to an item (grids and the like)."""
    return getattr(item, "model_specific_data", None) or {}


def fresh_numbers(count: int) -> range:
    """A number for each of `count` media of a request, which those of no other request have.

    A session puts the items of its requests behind each other.
    """
    first = int.from_bytes(os.urandom(7))
    return range(first, first + count)


def is_placed(item: Any) -> bool:
    """Whether one of our processors wrote where the item's rasters belong."""
    return data_of(item).get(KEY) is not None


def places_of(item: Any, name: str) -> list[Place]:
    """What an item that `is_placed` says of its rasters; `name` is what an error calls it.

    Raises:
        GeometryError: "grid_mismatch" or "zero_frames".
    """
    given: Any = data_of(item)[KEY]
    try:
        places = [Place(*map(whole, place)) for place in given]
        if not places or any(min(place.rows, place.cols) < 1 or place.tail < 0 for place in places):
            raise ValueError
    except (TypeError, ValueError):
        fields = ", ".join(Place._fields)
        raise GeometryError(
            "grid_mismatch", f"{name}: expected [{fields}] of each raster in {KEY}, got {given!r:.80}"
        ) from None
    for place in places:
        if place.frames < 1:
            raise GeometryError("zero_frames", f"{name}: expected at least one frame, got {place.frames}")
    return places


def media_of(items: Iterable[Any]) -> list[list[Any]]:
    """The items of each medium: a list of one item, or of one item for each frame or tile."""
    media: list[list[Any]] = []
    for number, group in groupby(items, key=_number_of):
        same = list(group)
        media += [[item] for item in same] if number is None else [same]
    return media


def _number_of(item: Any) -> int | None:
    """The number of an item's medium, None for an item that is a medium."""
    try:
        return whole(data_of(item)[KEY][0][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def extents_of(items: Iterable[Any]) -> list[tuple[int, int, list[Any]]]:
    """(first token, token after the last, items) of each medium whose items have offsets."""
    extents = []
    for medium in media_of(items):
        offsets = [offset for item in medium for offset in offsets_of(item, "item")]
        if offsets:
            first, last = min(first for first, _ in offsets), max(last for _, last in offsets)
            extents.append((first, last + 1, medium))
    return extents


def offsets_of(item: Any, name: str) -> tuple[tuple[int, int], ...]:
    """The (first, last) pairs of an item as plain integers, whatever type holds them; () if it has none.

    Raises:
        GeometryError: "bad_offsets".
    """
    offsets = getattr(item, "offsets", None)
    try:
        return () if offsets is None else tuple((whole(first), whole(last)) for first, last in offsets)
    except (TypeError, ValueError):
        raise GeometryError(
            "bad_offsets", f"{name}: expected offsets as (first, last) pairs, got {offsets!r}"
        ) from None


def spans_of(item: Any, name: str) -> list[Span]:
    """The spans of one item. SGLang's offsets include the last token, spans do not.

    Args:
        name: what errors call the item.

    Raises:
        GeometryError: "moving_offsets", "no_offsets", "bad_offsets", "out_of_range_offsets" or "empty_span".
    """
    if "pre_chunked_input_ids" in data_of(item):
        # EVS drops video tokens after the offsets are computed, so the offsets will be wrong.
        raise GeometryError("moving_offsets", f"{name}: its tokens move during embedding (EVS)")
    offsets = offsets_of(item, name)
    if not offsets:
        raise GeometryError("no_offsets", f"{name}: expected the offsets of its tokens, got none")
    spans = []
    for i, (first, last) in enumerate(offsets):
        start, stop = first, last + 1
        label = f"{name} span {i} at [{start}, {stop - 1}]"
        if start < 0:
            raise GeometryError("out_of_range_offsets", f"{label}: expected a first token >= 0")
        if stop <= start:
            raise GeometryError("empty_span", f"{label}: expected at least one token, got {stop - start}")
        spans.append(Span(start, stop, label))
    return spans


def whole(value: Any) -> int:
    """The value as an int.

    Raises:
        TypeError, ValueError: if it is no whole number.
    """
    try:
        return operator.index(value)
    except TypeError:
        number = float(value)
        if not number.is_integer() or isinstance(value, str | bytes):
            raise ValueError(f"expected a whole number, got {value!r}") from None
        return int(number)


def grid_rows(value: Any) -> list[tuple[int, int, int]] | None:
    """[(t, h, w), ...] from a tensor, an array or lists of rows, or from a single [t, h, w]; None if it is neither."""
    try:
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in value]
        if len(rows) == 3 and not any(isinstance(row, list | tuple) for row in rows):
            rows = [rows]
        return [(whole(t), whole(h), whole(w)) for t, h, w in rows]
    except (TypeError, ValueError):
        return None


def one_segment(frames: list[Span], rows: int, cols: int, modality: Modality) -> tuple[Segment, str]:
    """The segment of one medium, which includes the tokens between its frames, and the name of its first frame.

    Args:
        frames: the span of each frame, in the order of the prompt.
        rows, cols: the grid of a frame, in tokens.

    Raises:
        GeometryError: "overlapping_offsets".
    """
    for before, after in pairwise(frames):
        if after.start < before.stop:
            raise GeometryError("overlapping_offsets", f"{after.name}: overlaps {before.name}")
    grid = VisionGrid(len(frames), rows, cols, tuple(frame.start for frame in frames))
    return Segment(modality, frames[0].start, frames[-1].stop, grid), frames[0].name
