"""Media items as processors make them and as nobody should: each request is refused with a reason, or gets a map in
which every token is what the items say, and a plan that visits what a head wants."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from sglang_mminfer import Modality
from sglang_mminfer.families.generic import SpanReader
from sglang_mminfer.families.grid_thw import FrameSpanReader, GridReader
from sglang_mminfer.families.internvl import geometry as internvl
from sglang_mminfer.families.llava_hf.geometry import LlavaReader
from sglang_mminfer.families.maps import cached_map
from sglang_mminfer.families.nvila import geometry as nvila
from sglang_mminfer.families.own.geometry import PlacedReader
from sglang_mminfer.modality.items import KEY, GeometryError, Place
from support import alone, heads, static

REASONS = {
    *("no_offsets", "bad_offsets", "empty_span", "out_of_range_offsets", "overlapping_offsets", "grid_mismatch"),
    *("zero_frames", "unknown_modality", "moving_offsets", "unreadable"),
}

READERS = (
    *(SpanReader(), GridReader(), GridReader(1), FrameSpanReader(), internvl.TileReader(2), nvila.TileReader(2)),
    *(PlacedReader(), PlacedReader(merged=True)),
    *(
        LlavaReader(3, 42, 2, 1, ((1, 1), (1, 2), (2, 1), (2, 2)), 9),
        LlavaReader(4, 56, 2, 0, ((1, 2), (2, 1), (2, 2)), 0),
    ),
)

CUT_UP = {3: ([84, 84], 9 + 6 * 7), 4: ([56, 112], 16 + 4 * 9)}
"""By the side of a tile: a picture that is cut up, and its tokens."""

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.sampled_from([1 << 31, 1 << 63, 1 << 70, 2.0, 2.5, float("nan"), float("inf"), "x", "3", b"3", ""]),
    st.lists(st.integers(-1, 4), max_size=4),
    st.lists(st.lists(st.integers(-1, 4), max_size=4), max_size=3),
    st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=3), max_size=3).map(lambda rows: torch.tensor(rows)),
    st.just(SimpleNamespace()),
)
NUMBERS = {n: st.integers(0, n) for n in range(1, 8)}
ODD_OFFSETS = st.one_of(ODD, st.lists(st.tuples(st.integers(-3, 90), st.integers(-3, 130)), max_size=3))
ODD_KINDS = st.sampled_from(["IMAGE", "VIDEO", "AUDIO", "MULTI_IMAGES", "smell", None, 3])
KEYS = st.sampled_from([KEY, "video_grid_thw", "image_grid_thw", "image_sizes", "pre_chunked_input_ids", "x"])
READER = st.sampled_from(READERS)
HEAD = heads(static)


class Case(NamedTuple):
    items: list[Any]
    length: int
    reader: Any
    head: Any
    changed: bool


def media(draw: st.DrawFn, reader: Any, position: int) -> tuple[list[Any], int]:
    """The items of one medium as this reader's family makes them, from a position on, and where it ends."""

    def below(most: int, least: int = 1) -> int:
        return least + draw(NUMBERS[most - least]) if most > least else least

    is_video = bool(draw(NUMBERS[1]))
    kind, frames, rows, cols = "VIDEO" if is_video else "IMAGE", below(4) if is_video else 1, below(3), below(3)
    gap, data, spans = 0, {}, []
    if isinstance(reader, GridReader):
        merge = reader.merge
        data = {f"{kind.lower()}_grid_thw": [[frames, rows * merge, cols * merge]]}
        if isinstance(reader, FrameSpanReader) and is_video:
            gap = below(2, 0)
            spans = [(position + n * (rows * cols + gap), rows * cols) for n in range(frames)]
        else:
            spans = [(position, frames * rows * cols)]
    elif isinstance(reader, PlacedReader) or draw(NUMBERS[3]) == 0:
        rows = 1 if getattr(reader, "merged", False) else rows
        tail, gap = below(2, 0), below(2, 0)
        step = rows * cols + tail + gap
        items = [
            SimpleNamespace(
                modality=kind,
                offsets=[(position + n * step, position + n * step + rows * cols + tail - 1)],
                model_specific_data={KEY: [tuple(Place(position, n, frames, rows, cols, tail))]},
            )
            for n in range(frames)
        ]
        return items, position + frames * step
    elif isinstance(reader, LlavaReader):
        if is_video:
            spans = [(position, frames * reader.frame_side**2 + reader.video_tail)]
        else:
            spans, data = [(position, CUT_UP[reader.side][1])], {"image_sizes": [CUT_UP[reader.side][0]]}
    elif isinstance(reader, internvl.TileReader | nvila.TileReader):
        tokens = reader.side**2
        spans = [(position + n * (tokens + 1), tokens) for n in range(frames)]
    else:
        spans = [(position, frames * rows * cols)]
    offsets = [(start, start + tokens - 1) for start, tokens in spans]
    return [SimpleNamespace(modality=kind, offsets=offsets, model_specific_data=data)], offsets[-1][1] + 1


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    reader, position = draw(READER), draw(NUMBERS[6])
    items: list[Any] = []
    for _ in range(1 + draw(NUMBERS[2])):
        more, position = media(draw, reader, position)
        items += more
        position += draw(NUMBERS[5])
    length = position + draw(NUMBERS[7])
    changes = draw(NUMBERS[2])
    for _ in range(changes):
        item = items[draw(st.integers(0, len(items) - 1))]
        what = draw(NUMBERS[7])
        if what == 0:
            item.modality = draw(ODD_KINDS)
        elif what <= 2:
            item.offsets = draw(ODD_OFFSETS)
        elif what == 3:
            items.append(item)
        elif what == 4:
            known = item.model_specific_data if isinstance(item.model_specific_data, dict) else {}
            item.model_specific_data = {**known, draw(KEYS): draw(ODD)}
        elif what == 5:
            length = draw(st.integers(1, length))
        elif isinstance(item.model_specific_data, dict) and item.model_specific_data:
            key = draw(st.sampled_from(sorted(item.model_specific_data)))
            value = item.model_specific_data[key]
            row = value[0] if isinstance(value, list) and value else None
            if what == 6 or not isinstance(row, list | tuple) or not row:
                item.model_specific_data = {**item.model_specific_data, key: draw(ODD)}
            else:
                row = list(row)
                row[draw(st.integers(0, len(row) - 1))] = draw(ODD)
                item.model_specific_data = {**item.model_specific_data, key: [row, *value[1:]]}
        else:
            item.model_specific_data = draw(ODD)
    return Case(items, length, reader, draw(HEAD), changes > 0)


CASES = _cases()


def cases() -> st.SearchStrategy[Case]:
    return CASES


def check(case: Case) -> str:
    inputs = SimpleNamespace(mm_items=case.items)
    try:
        chat = cached_map(inputs, case.length, case.reader)
    except GeometryError as error:
        assert case.changed, f"refused though nothing is wrong: {error}"
        assert error.reason in REASONS and str(error), error.reason
        return error.reason
    assert chat.length == case.length and cached_map(inputs, case.length, case.reader) is chat
    hold_tokens(chat, case.items)
    batch = alone(chat, case.head)
    wrapper = batch.planned()
    batch.run(wrapper)
    missed = batch.exact_mask(0, 0) & ~wrapper.visited_mask(0, 0)
    assert not missed.any(), f"{case.head} wants keys that are not visited: {missed.nonzero()[:5].tolist()}"
    return "mapped"


def hold_tokens(chat: Any, items: Sequence[Any]) -> None:
    """Asserts that the tokens of an item have its modality, and that cells are tokens of items."""
    kinds: dict[int, Modality] = {}
    for item in items:
        kind = {"IMAGE": Modality.IMAGE, "MULTI_IMAGES": Modality.IMAGE, "VIDEO": Modality.VIDEO}.get(item.modality)
        if kind is not None:
            for first, last in item.offsets:
                kinds.update(dict.fromkeys(range(int(first), int(last) + 1), kind))
    for segment in chat.segments:
        here = {position: kinds.get(position) for position in range(segment.start, segment.stop)}
        if segment.modality is Modality.TEXT:
            assert set(here.values()) == {None}, f"text in place of media: {segment}"
            continue
        assert here[segment.start] is segment.modality or segment.grid is not None, segment
        assert set(here.values()) <= {None, segment.modality}, f"another medium in {segment}"
        if segment.grid is not None:
            cells = [start + n for start in segment.grid.frame_starts for n in range(segment.grid.cells)]
            assert all(here[position] is segment.modality for position in cells), f"a cell is no token: {segment}"
