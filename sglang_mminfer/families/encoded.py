"""Media that another server encoded (encoder disaggregation). Their items hold embeddings only, but the encoder sends
the grid rows along, and from these follows where each raster belongs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sglang_mminfer import families
from sglang_mminfer.families.grid_thw import GridFamily, merge_of
from sglang_mminfer.modality.items import KEY, Place, fresh_numbers, grid_rows, offsets_of

_ROWS = {"IMAGE": "img_grid_thw", "VIDEO": "video_grid_thw"}
"""The arguments of SGLang's `get_mm_data`, by modality."""


def place(output: Any, hf_config: Any, given: Mapping[str, Any]) -> None:
    """Writes into each item the `Place` of its rasters. Items that the rows do not fit stay as they are: without one.

    Args:
        output: SGLang's MultimodalProcessorOutput of a request; its items are changed in place.
        given: what the encoder said of the media: rows [t, h, w], in patches before the merger, in the order of the
            prompt.
    """
    if not isinstance(families.family_of(hf_config), GridFamily):
        return
    merge = merge_of(hf_config)
    for modality, name in _ROWS.items():
        items = [item for item in output.mm_items if item.modality.name == modality]
        rows = grid_rows(given[name]) if given.get(name) is not None else None
        if items and rows is not None:
            places = _places([_tokens(item) for item in items], rows, merge)
            for item, own in zip(items, places or ()):
                item.model_specific_data[KEY] = [tuple(one) for one in own]


def _tokens(item: Any) -> int:
    return sum(last + 1 - first for first, last in offsets_of(item, "item"))


def _places(tokens: Sequence[int], rows: Sequence[tuple[int, int, int]], merge: int) -> list[list[Place]] | None:
    """The rasters of each item, of which `tokens` says how many tokens it has; None if items and rows do not fit.

    An item is a whole medium, or one frame of a video.
    """
    found: list[list[Place]] = []
    sizes: Iterator[int] = iter(tokens)
    for number, (frames, h, w) in zip(fresh_numbers(len(rows)), rows):
        frame = Place(number, 0, frames, h // merge, w // merge)
        whole = [frame._replace(frame=n) for n in range(frames)]
        size = next(sizes, 0)
        if size == frames * frame.tokens:
            found.append(whole)
        elif size == frame.tokens and all(next(sizes, 0) == size for _ in range(frames - 1)):
            found += [[one] for one in whole]
        else:
            return None
    return found if len(found) == len(tokens) else None
