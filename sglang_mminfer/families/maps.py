"""From SGLang's media items to a `ModalityMap`: one file for each model family, `generic` for all others.

Nothing here touches single tokens: a map of 100,000 tokens with three videos costs what three videos cost.
SGLang is not imported; its objects are read by attribute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_mminfer.families import generic
from sglang_mminfer.families.internvl import geometry as internvl
from sglang_mminfer.families.llava_hf import geometry as llava_hf
from sglang_mminfer.families.llava_original import geometry as llava_original
from sglang_mminfer.families.nvila import geometry as nvila
from sglang_mminfer.families.own import geometry as placed
from sglang_mminfer.families.qwen3_vl import geometry as qwen3_vl
from sglang_mminfer.families.qwen_vl import geometry as qwen_vl
from sglang_mminfer.modality.items import (
    VIDEO_KEY,
    GeometryError,
    extents_of,
    grid_rows,
    modality_of,
    offsets_of,
    whole_videos,
)
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment

__all__ = [
    "FAMILIES",
    "VIDEO_KEY",
    "GeometryError",
    "cached_map",
    "extents_of",
    "family_of",
    "grid_rows",
    "has_raster",
    "map_from_mm_inputs",
    "offsets_of",
]

FAMILIES: dict[str, Any] = {
    "qwen_vl": qwen_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "llava_hf": llava_hf,
    "llava_original": llava_original,
    "nvila": nvila,
    "placed": placed,
}
"""A family reads item by item (`segments`), or, where a medium has several items, all of them (`conversation`)."""

# No "_id" in this name: SGLang's MultimodalInputs.merge copies attributes that have it to other requests.
_CACHE = "_mminfer_map"


def family_of(hf_config: Any) -> str | None:
    """The family that reads this model's media, None where only their spans are known.

    An unusual parameter of the family follows a colon: "qwen_vl:3" merges 3 x 3 patches.
    """
    for name, family in FAMILIES.items():
        if getattr(hf_config, "model_type", None) in family.MODEL_TYPES:
            argument = family.argument_of(hf_config)
            return f"{name}:{argument}" if argument else name
    return None


def has_raster(hf_config: Any) -> bool:
    """False for a model that merges vision tokens until neither rows nor columns are left; its config class says so."""
    return getattr(hf_config, "vision_tokens_merged", False) is not True


def _offsets(mm_inputs: Any) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(offsets_of(item, f"mm_items[{index}]") for index, item in enumerate(mm_inputs.mm_items))


def map_from_mm_inputs(mm_inputs: Any, length: int, family: str | None) -> ModalityMap:
    """The map of one request.

    Args:
        mm_inputs: SGLang's MultimodalInputs; None for a request without media.
        length: tokens of the whole prompt, later chunks included. No medium may reach
            beyond it. Nothing is clipped, because SGLang never truncates a prompt that brings media (it
            aborts the request, even with --allow-auto-truncate): offsets beyond the prompt are stale ones of
            a session that was cut back, and other tokens may stand where they point.
        family: what `family_of` gave for the model.

    Raises:
        GeometryError: naming the item, what it has and what was expected.
    """
    name, _, argument = (family or "").partition(":")
    if name and name not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)} or None, got {family!r}")
    with _readable():
        return _read(mm_inputs, length, FAMILIES[name] if name else generic, argument)


@contextmanager
def _readable() -> Iterator[None]:
    """Items may come from clients and hold anything: whatever goes wrong with them is a GeometryError."""
    try:
        yield
    except GeometryError:
        raise
    except Exception as error:
        said = f"mm_items: cannot be read: {type(error).__name__}: {error}"
        raise GeometryError("unreadable", said[:300]) from error


def _read(mm_inputs: Any, length: int, reader: Any, argument: str) -> ModalityMap:
    items: list[tuple[Any, Modality, str]] = []
    for index, item in enumerate(whole_videos(mm_inputs.mm_items) if mm_inputs is not None else ()):
        modality = modality_of(item, index)
        if modality is not Modality.TEXT:
            label = f"mm_items[{index}] ({modality})"
            _check_inside(item, label, length)
            items.append((item, modality, label))
    found: list[tuple[Segment, str]] = []
    if hasattr(reader, "conversation"):
        found.extend(reader.conversation(items, argument))
    else:
        for item, modality, label in items:
            found.extend(reader.segments(item, modality, label, argument))
    found.sort(key=lambda entry: entry[0].start)

    segments: list[Segment] = []
    position, before = 0, ""
    for segment, label in found:
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
    """Before anything is made that is as large as an item says it is."""
    for i, (first, last) in enumerate(offsets_of(item, label)):
        if last >= length:
            raise GeometryError(
                "out_of_range_offsets",
                f"{label} span {i} at [{first}, {last}]: expected tokens inside the prompt of {length} tokens",
            )


def cached_map(mm_inputs: Any, length: int, family: str | None) -> ModalityMap:
    """`map_from_mm_inputs`, kept on `mm_inputs` until what it was made from changes.

    SGLang hands the same object to every chunk of a request, so chunks share one map, and one failure. It is
    kept in an attribute because the object is unhashable; sessions move offsets in place, and their turns of text
    share the object of the turn before, hence the key.

    Args:
        length: tokens of the whole prompt, as for `map_from_mm_inputs`. The same for every chunk, or the map
            would change from chunk to chunk.

    Raises:
        GeometryError: with `repeated` set if this failure was raised before.
    """
    if mm_inputs is None:
        return map_from_mm_inputs(None, length, family)
    with _readable():
        key = (_offsets(mm_inputs), length, family)
    kept = getattr(mm_inputs, _CACHE, None)
    if kept is not None and kept[0] == key:
        if isinstance(kept[1], GeometryError):
            raise GeometryError(kept[1].reason, str(kept[1]), repeated=True)
        return kept[1]
    try:
        outcome = map_from_mm_inputs(mm_inputs, length, family)
    except GeometryError as error:
        # A copy: the raised one carries the frames it went through, and with them the whole batch.
        setattr(mm_inputs, _CACHE, (key, GeometryError(error.reason, str(error))))
        raise
    setattr(mm_inputs, _CACHE, (key, outcome))
    return outcome
