"""Items that hold anything: a map that is right, or one kind of error, and never another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import Modality as SglModality
from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs

from sglang_mminfer.families.base import Reader
from sglang_mminfer.families.grid_thw import FrameSpanReader, GridReader
from sglang_mminfer.families.internvl import geometry as internvl
from sglang_mminfer.families.llava_hf.geometry import LlavaReader
from sglang_mminfer.families.maps import GeometryError, cached_map, map_from_mm_inputs
from sglang_mminfer.families.nvila import geometry as nvila
from sglang_mminfer.families.own.geometry import PlacedReader
from sglang_mminfer.families.qwen_vl.processor import videos_of
from sglang_mminfer.modality.items import KEY
from sglang_mminfer.modality.segments import Modality

TILES = ((1, 1), (1, 2), (2, 1))
READERS = [
    *(None, GridReader(), GridReader(3), FrameSpanReader(), internvl.TileReader(), internvl.TileReader(2)),
    *(nvila.TileReader(2), PlacedReader(), PlacedReader(merged=True)),
    *(LlavaReader(2, 28, 1, 1, TILES, 9), LlavaReader(2, 28, 1, 0, TILES, 0)),
]
LENGTH = 64

numbers = st.one_of(
    st.integers(-3, 12),
    st.integers(0, 70),
    st.sampled_from(
        [2, 4, 28, 56, 1 << 40, -(1 << 40), 1 << 70, 2.0, 2.5, float("nan"), float("inf"), True, None, "4"]
    ),
)
rows = st.one_of(
    st.lists(st.lists(numbers, max_size=5), max_size=4),
    st.lists(st.lists(st.sampled_from([1, 2, 4, 6]), min_size=3, max_size=3), max_size=3),
    st.lists(numbers, max_size=4),
    numbers,
    st.text(max_size=3),
    st.dictionaries(st.sampled_from("thw"), numbers, max_size=3),
)


def held(value: Any, holder: str) -> Any:
    """The value in another holder, where it fits."""
    try:
        if holder == "array":
            return np.array(value)
        if holder in ("int64", "float32", "int8", "bool"):
            return torch.tensor(value, dtype=getattr(torch, holder))
    except (ValueError, TypeError, RuntimeError, OverflowError):
        pass
    return value


held_rows = st.builds(held, rows, st.sampled_from(["list", "array", "int64", "float32", "int8", "bool"]))
good_offsets = st.lists(st.integers(0, LENGTH - 1), min_size=2, max_size=6).map(
    lambda ends: [(a, b) for a, b in zip(sorted(ends)[::2], sorted(ends)[1::2])]
)
DATA = ["image_grid_thw", "video_grid_thw", "image_sizes", "block_sizes", KEY]


@st.composite
def items(draw: st.DrawFn) -> Any:
    data = draw(st.dictionaries(st.sampled_from(DATA), st.one_of(held_rows, numbers), max_size=7))
    data |= draw(st.sampled_from([{}, {"pre_chunked_input_ids": 1}, {KEY: [(0, 0, 1, 2, 2, 0)]}]))
    if draw(st.booleans()):
        data[KEY] = draw(st.lists(st.tuples(*[st.one_of(st.integers(0, 4), numbers)] * 6), max_size=3))
    modality = draw(st.sampled_from([*SglModality, "VIDEO", "image", "smell", None, 3]))
    offsets = draw(st.one_of(good_offsets, held_rows, st.none()))
    if draw(st.booleans()) and isinstance(modality, SglModality):
        item = MultimodalDataItem(modality=modality, model_specific_data=data)
        item.offsets = offsets
        return item
    return SimpleNamespace(modality=modality, offsets=offsets, model_specific_data=draw(st.sampled_from([data, None])))


@pytest.mark.parametrize("reader", READERS, ids=str)
@settings(max_examples=150)
@given(found=st.lists(items(), max_size=4), length=st.sampled_from([LENGTH, 1, 20]), cached=st.booleans())
def test_a_map_that_is_right_or_a_geometry_error(
    reader: Reader | None, found: list[Any], length: int, cached: bool
) -> None:
    media = MultimodalInputs(mm_items=found)
    try:
        made = cached_map(media, length, reader) if cached else map_from_mm_inputs(media, length, reader)
    except GeometryError as error:
        assert error.reason and len(str(error)) < 2000
        return
    whole = made.segments[-1].stop if made.segments else 0
    assert whole >= length
    assert [s.start for s in made.segments] == [0, *(s.stop for s in made.segments[:-1])][: len(made.segments)]
    modality = {}  # of each token that an item says is its own
    for item in found:
        name = str(getattr(item.modality, "name", item.modality)).upper()
        kind = {"IMAGE": Modality.IMAGE, "MULTI_IMAGES": Modality.IMAGE, "VIDEO": Modality.VIDEO}.get(name)
        for first, last in item.offsets if kind else ():
            for token in range(int(first), int(last) + 1):
                assert token not in modality, "two media in one place"
                modality[token] = kind
    for segment in made.segments:
        for token in range(segment.start, segment.stop):
            if token in modality:
                assert segment.modality is modality[token]
            elif segment.modality is not Modality.TEXT:
                assert segment.grid is not None and segment.grid.frames > 1  # between two frames
        if segment.grid is not None:
            cells = {
                start + i for start in segment.grid.frame_starts for i in range(segment.grid.rows * segment.grid.cols)
            }
            assert len(cells) == segment.grid.frames * segment.grid.rows * segment.grid.cols
            assert cells <= modality.keys() and min(cells) == segment.start and max(cells) < segment.stop


@settings(max_examples=300)
@given(item=items(), feature=st.sampled_from([None, torch.zeros(8, 4), torch.zeros(12, 4), [1, 2], np.zeros((8, 2))]))
def test_videos_of_an_item_that_holds_anything(item: Any, feature: Any) -> None:
    if not isinstance(item, MultimodalDataItem) or not isinstance(item.offsets, list):
        return
    item.feature = feature
    videos = videos_of(item)
    assert videos == [item] or len(videos) == len(item.offsets)
    if len(videos) > 1:
        assert sum(len(video.feature) for video in videos) == len(feature)


def test_what_an_item_says_of_its_size_is_not_believed() -> None:
    """Nothing is made that is as large as the item says."""
    huge = MultimodalDataItem(
        modality=SglModality.VIDEO,
        offsets=[(0, (1 << 50) - 1)],
        model_specific_data={"video_grid_thw": torch.tensor([[1 << 50, 2, 2]])},
    )
    with pytest.raises(GeometryError, match="expected tokens inside the prompt of 64 tokens"):
        map_from_mm_inputs(MultimodalInputs(mm_items=[huge]), LENGTH, GridReader())
