"""Makes a `ModalityMap` of SGLang's media items, with the reader of the model's family, or else with `SpanReader`.

Nothing here touches single tokens: a map of 100,000 tokens with three videos costs as much as its three videos.
SGLang is not imported; its objects are read by attribute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_mminfer import families
from sglang_mminfer.families.base import LabelledSegment, MediaItem, Reader
from sglang_mminfer.families.generic import SpanReader
from sglang_mminfer.modality.items import GeometryError, modality_of, offsets_of
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment

__all__ = ["GeometryError", "cached_map", "map_from_mm_inputs", "reader_of"]

# There is no "_id" in this name, because SGLang's MultimodalInputs.merge copies such attributes to other requests.
_CACHE = "_mminfer_map"


def reader_of(hf_config: Any) -> Reader | None:
    """The reader of this model's media; None if only their spans are known."""
    family = families.family_of(hf_config)
    return None if family is None else family.geometry(hf_config)


def _offsets(mm_inputs: Any) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(offsets_of(item, f"mm_items[{index}]") for index, item in enumerate(mm_inputs.mm_items))


def map_from_mm_inputs(mm_inputs: Any, length: int, reader: Reader | None) -> ModalityMap:
    """The map of one request.

    Args:
        mm_inputs: SGLang's MultimodalInputs; None for a request without media.
        length: tokens of the whole prompt, later chunks included. No medium may reach beyond it. Nothing is clipped,
            because SGLang never truncates a prompt that brings media (it aborts the request, even with
            --allow-auto-truncate). So offsets beyond the prompt are stale ones of a session that was cut back, and
            other tokens may stand where they point.
        reader: what `reader_of` returns for the model.

    Raises:
        GeometryError: naming the item, what it has and what was expected.
    """
    with _readable():
        return _read(mm_inputs, length, reader or SpanReader())


@contextmanager
def _readable() -> Iterator[None]:
    """Items may come from clients and hold anything: whatever goes wrong with them is a GeometryError."""
    try:
        yield
    except GeometryError:
        raise
    except Exception as error:
        message = f"mm_items: cannot be read: {type(error).__name__}: {error}"
        raise GeometryError("unreadable", message[:300]) from error


def _read(mm_inputs: Any, length: int, reader: Reader) -> ModalityMap:
    items: list[MediaItem] = []
    for index, item in enumerate(mm_inputs.mm_items if mm_inputs is not None else ()):
        modality = modality_of(item, index)
        if modality is not Modality.TEXT:
            label = f"mm_items[{index}] ({modality})"
            _check_inside(item, label, length)
            items.append(MediaItem(item, modality, label))
    vision: list[LabelledSegment] = sorted(reader.segments(items), key=lambda entry: entry[0].start)
    segments: list[Segment] = []
    position, before = 0, ""
    for segment, label in vision:
        if segment.start < position:
            raise GeometryError("overlapping_offsets", f"{label}: overlaps {before}")
        if segment.start > position:
            segments.append(Segment(Modality.TEXT, position, segment.start))
        segments.append(segment)
        position, before = segment.stop, label
    if position < length:
        segments.append(Segment(Modality.TEXT, position, length))
    return ModalityMap(segments)


def _check_inside(item: Any, label: str, length: int) -> None:
    """Raises GeometryError for tokens beyond the prompt, before anything as large as the item claims is allocated."""
    for i, (first, last) in enumerate(offsets_of(item, label)):
        if last >= length:
            raise GeometryError(
                "out_of_range_offsets",
                f"{label} span {i} at [{first}, {last}]: expected tokens inside the prompt of {length} tokens",
            )


def cached_map(mm_inputs: Any, length: int, reader: Reader | None) -> ModalityMap:
    """`map_from_mm_inputs`, kept on `mm_inputs` until what it was made from changes.

    SGLang hands the same object to every chunk of a request, so chunks share one map, or one failure. The map is kept
    in an attribute because the object is unhashable. It is kept with a key because sessions move offsets in place, and
    their turns of text share the object of the turn before.

    Args:
        length: tokens of the whole prompt, as for `map_from_mm_inputs`, and not those of a chunk.

    Raises:
        GeometryError: with `repeated` set if this failure was raised before.
    """
    if mm_inputs is None:
        return map_from_mm_inputs(None, length, reader)
    with _readable():
        key = (_offsets(mm_inputs), length, reader)
    cached = getattr(mm_inputs, _CACHE, None)
    if cached is not None and cached[0] == key:
        if isinstance(cached[1], GeometryError):
            raise GeometryError(cached[1].reason, str(cached[1]), repeated=True)
        return cached[1]
    try:
        outcome = map_from_mm_inputs(mm_inputs, length, reader)
    except GeometryError as error:
        # A copy, because the raised error holds the stack frames that it went through, and with them the whole batch.
        setattr(mm_inputs, _CACHE, (key, GeometryError(error.reason, str(error))))
        raise
    setattr(mm_inputs, _CACHE, (key, outcome))
    return outcome
