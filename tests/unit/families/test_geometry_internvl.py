"""InternVL: SGLang's own processing of real files, and the map cell by cell against the token ids alone."""

from __future__ import annotations

from array import array
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import Modality as SglModality
from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs

from families import internvl
from processing import Processing, cells_of, check_padding, kind_of
from sglang_mminfer.families.counted_frames import frames_wanted
from sglang_mminfer.families.internvl.geometry import TileReader
from sglang_mminfer.families.maps import GeometryError, map_from_mm_inputs, reader_of
from sglang_mminfer.settings import SPLIT_VIDEOS
from sglang_mminfer.tools.media import make_image, make_video
from sglang_versions import skip_before

FRAMES = 5
SIDE = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return internvl.make(tmp_path_factory.mktemp("internvl") / "model")


def processing_of(path, **video):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SPLIT_VIDEOS.variable, "1")
        return Processing(path, "internvl", mm_process_config={"video": video})


@pytest.fixture(scope="module")
def processing(path):
    return processing_of(path, num_frames=FRAMES)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    videos = [make_video(root / f"{i}.mp4", 3 + 4 * i, 96, 64 + 32 * i, 4, seed=i) for i in range(3)]
    return videos, [make_image(root / f"{i}.png", 64 * (1 + i), 64, seed=i) for i in range(3)]


@settings(max_examples=12)
@given(st.data())
def test_cells_agree_with_the_token_ids(processing, files, data):
    videos, images = files
    medium = st.one_of(st.sampled_from(videos), st.sampled_from(images))
    parts = data.draw(st.lists(st.one_of(medium, st.sampled_from(["What? ", "\n"])), min_size=1, max_size=6))
    prompt = "".join({"str": str(p), ".mp4": "<video>", ".png": "<image>"}[kind_of(p)] for p in parts)
    got = processing(
        prompt,
        images=[p for p in parts if kind_of(p) == ".png"],
        videos=[p for p in parts if kind_of(p) == ".mp4"],
    )
    expected = [("text", None, None)] * len(got.ids)
    spans = iter(bracketed(got.ids, processing))
    medium = -1
    for part in parts:
        if isinstance(part, str):
            continue
        medium += 1
        name = "video" if part.suffix == ".mp4" else "image"
        own = [next(spans) for _ in range(FRAMES if name == "video" else 1)]
        tiles = [tile for start, stop in own for tile in range(start, stop, SIDE * SIDE)]
        for token in range(own[0][0], own[-1][1]):
            expected[token] = (name, medium, None)
        for frame, start in enumerate(tiles):
            for cell in range(SIDE * SIDE):
                expected[start + cell] = (name, medium, (frame, cell // SIDE, cell % SIDE))
        if name == "video":
            assert len(tiles) == FRAMES
            numbers = [processing.tokenizer.decode(got.ids[a[1] : b[0]]) for a, b in pairwise(own)]
            assert numbers == [f"</img>\nFrame {i}: <img>" for i in range(2, FRAMES + 1)]
    assert next(spans, None) is None
    assert cells_of(got.map) == expected


def bracketed(ids, processing):
    """[start, stop) of what stands between <img> and </img>, each of one kind of placeholder."""
    first, last = processing.token("<img>"), processing.token("</img>")
    kinds = {processing.token("<IMG_CONTEXT>"), processing.token("<|video_pad|>")}
    starts, stops = ([i for i, token in enumerate(ids) if token == mark] for mark in (first, last))
    for start, stop in zip(starts, stops, strict=True):
        assert set(ids[start + 1 : stop]) < kinds
        yield start + 1, stop


def test_every_token_gets_the_hash_of_its_own_medium(processing, files):
    """SGLang pads by brackets, one item after the other: right for items in the order of the prompt."""
    skip_before("0.5.23")
    from sglang.srt.managers.mm_utils import pad_mm_token_pairs

    videos, images = files
    got = processing("<video> and <image> or <image>", images=images[:2], videos=videos[1:2])  # no frame twice
    for item in got.items:
        item.set_pad_value()
    media = MultimodalInputs(
        mm_items=got.items, im_start_id=processing.token("<img>"), im_end_id=processing.token("</img>")
    )
    padded = pad_mm_token_pairs(array("q", got.ids), media, data_token_pairs=[(media.im_start_id, media.im_end_id)])
    check_padding(got.items, padded)
    assert len({item.pad_value for item in got.items}) == len(got.items) == FRAMES + 2


def test_a_longer_conversation_keeps_the_hashes_of_the_shorter_one(processing, files):
    videos, _ = files
    one, two = processing("<video> and", videos=videos[:1]), processing("<video> and <video>", videos=videos[:2])
    for item in [*one.items, *two.items]:
        item.set_pad_value()
    assert [i.hash for i in one.items] == [i.hash for i in two.items[:FRAMES]]
    assert two.ids[: len(one.ids)] == one.ids


def test_a_session_keeps_videos_of_two_requests_apart(processing, files):
    """SGLang puts the items of a session's requests into one list, with offsets moved."""
    first, second = (processing("<video>", videos=files[0][:1]) for _ in range(2))
    items = list(first.items)
    for item in second.items:
        item.offsets = [(start + len(first.ids), stop + len(first.ids)) for start, stop in item.offsets]
        items.append(item)
    length = len(first.ids) + len(second.ids)
    mmap = map_from_mm_inputs(SimpleNamespace(mm_items=items), length, reader_of(processing.hf_config))
    assert [segment.grid.frames for segment in mmap.segments if segment.grid] == [FRAMES, FRAMES]


def test_more_than_32_frames(path, files):
    got = processing_of(path, num_frames=40)("<video>", videos=files[0][:1])
    assert got.map.segments[1].grid.frames == 40


def video(*offsets):
    items = [MultimodalDataItem(modality=SglModality.VIDEO, offsets=list(offsets), model_specific_data={})]
    return SimpleNamespace(mm_items=items)


def test_all_videos_in_one_item_are_told_apart_by_the_text_between_them():
    """As SGLang's own processor has it."""
    mmap = map_from_mm_inputs(video((4, 7), (16, 19), (33, 36), (46, 49)), 60, TileReader(2))
    assert [(s.start, s.stop, s.grid.frames) for s in mmap.segments if s.grid] == [(4, 20, 2), (33, 50, 2)]


def test_what_is_wrong_is_named():
    with pytest.raises(GeometryError, match=r"expected tiles of 4 tokens, got 6 tokens in all") as caught:
        map_from_mm_inputs(video((4, 9)), 60, TileReader(2))
    assert caught.value.reason == "grid_mismatch"
    with pytest.raises(GeometryError, match="overlaps"):
        map_from_mm_inputs(video((4, 7), (6, 9)), 60, TileReader(2))


@pytest.mark.parametrize("wanted", [0, -1, 2.5, "8", True])
def test_a_number_of_frames_that_is_none(wanted):
    with pytest.raises(ValueError, match=r"video: num_frames: expected an integer >= 1, got"):
        frames_wanted({"num_frames": wanted})


def test_families_of_configs():
    vision = SimpleNamespace(image_size=448, patch_size=14)
    config = SimpleNamespace(model_type="internvl_chat", vision_config=vision, downsample_ratio=0.5)
    assert reader_of(config) == TileReader(16)
    vision.patch_size = 28
    assert reader_of(config) == TileReader(8)
