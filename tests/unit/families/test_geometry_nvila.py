"""NVILA and NVILA-Lite: SGLang's processing of real files, and the map cell by cell against the token ids alone."""

from __future__ import annotations

from array import array
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sglang.srt.managers.schedule_batch import Modality as SglModality
from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs

from families import nvila
from families.nvila import LITE, NVILA, PATCH, best_shape
from processing import Processing, cells_of, check_padding, kind_of, runs_of
from sglang_mminfer import releases
from sglang_mminfer.families.maps import GeometryError, map_from_mm_inputs, reader_of
from sglang_mminfer.families.nvila.geometry import TileReader
from sglang_mminfer.families.nvila.processor import frames_of
from sglang_mminfer.modality.items import KEY, Place
from sglang_mminfer.settings import SPLIT_VIDEOS
from sglang_mminfer.tools.media import make_image, make_video

FRAMES = 5
SIDE = 4
VARIANTS = {"nvila": (NVILA, nvila.make), "nvila_lite": (LITE, nvila.make_lite)}


def processing_of(path, **video):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SPLIT_VIDEOS.variable, "1")
        return Processing(path, "nvila", trust_remote_code=True, mm_process_config={"video": video})


@pytest.fixture(scope="module", params=VARIANTS)
def made(request, tmp_path_factory):
    variant, make = VARIANTS[request.param]
    path = make(tmp_path_factory.mktemp(request.param) / "model")
    return variant, path, processing_of(path, num_frames=FRAMES)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    videos = [make_video(root / f"{i}.mp4", 3 + 4 * i, 96, 64 + 32 * i, 4, seed=i) for i in range(3)]
    sizes = [(64, 64), (256, 64), (90, 130), (800, 300)]
    return videos, [make_image(root / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes)]


@settings(max_examples=15)
@given(st.data())
def test_cells_agree_with_the_token_ids(made, files, data):
    variant, _, processing = made
    videos, images = files
    medium = st.one_of(st.sampled_from(videos), st.sampled_from(images))
    parts = data.draw(st.lists(st.one_of(medium, st.sampled_from(["What? ", "\n"])), min_size=1, max_size=6))
    frames = data.draw(st.integers(1, 6))
    pictures = [p for p in parts if kind_of(p) == ".png"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing.processor, "num_frames", frames)
        got = processing(
            "".join({"str": str(p), ".mp4": "<vila/video>", ".png": "<image>"}[kind_of(p)] for p in parts),
            images=pictures,
            videos=[p for p in parts if kind_of(p) == ".mp4"],
        )
    newline = processing.token("Ċ")
    expected = [("text", None, None)] * len(got.ids)
    kinds = {processing.token("<image>"): "image", processing.token("<vila/video>"): "video"}
    spans = iter([(kinds[token], start, stop) for token, start, stop in runs_of(got.ids) if token in kinds])
    number = -1
    for part in parts:
        if isinstance(part, str):
            continue
        number += 1
        name, rasters, breaks = "video", [(SIDE, SIDE)] * frames, 1
        if part.suffix == ".png":
            name, rasters, breaks = "image", *image_rasters(variant, part, alone=len(pictures) == 1)
        own = [next(spans) for _ in rasters]
        assert {kind for kind, _, _ in own} == {name}
        for token in range(own[0][1], own[-1][2]):
            expected[token] = (name, number, None)
        for frame, ((rows, cols), (_, start, stop)) in enumerate(zip(rasters, own, strict=True)):
            assert stop - start == rows * cols
            assert got.ids[stop] == newline
            for cell in range(rows * cols):
                expected[start + cell] = (name, number, (frame, cell // cols, cell % cols))
        for (_, _, stop), (_, start, _) in pairwise(own):
            assert got.ids[stop:start] == [newline] * breaks
    assert next(spans, None) is None
    assert cells_of(got.map) == expected


def image_rasters(variant, path, alone):
    """Rows and columns of each span of an image, and how many line breaks are between two."""
    if not alone:
        return [(SIDE, SIDE)], 1
    with Image.open(path) as picture:
        rows, cols = best_shape(*picture.size, 9 if variant is NVILA else 1, variant.patches * PATCH)
    if variant is NVILA:
        return [(SIDE * rows, SIDE * cols)], 1
    return [(SIDE, SIDE)] * (rows * cols + (rows * cols > 1)), 2


def padded(processing, got):
    for item in got.items:
        item.set_pad_value()
    media = MultimodalInputs(
        mm_items=got.items, im_token_id=processing.token("<image>"), video_token_id=processing.token("<vila/video>")
    )
    return list(releases.pad_mm_tokens(array("q", got.ids), media))


def test_every_token_gets_the_hash_of_its_own_tile(made, files):
    _, _, processing = made
    videos, images = files
    got = processing("<vila/video> and <image> or <image>", images=images[:2], videos=videos[1:2])
    ids = padded(processing, got)
    check_padding(got.items, ids)
    assert len({item.pad_value for item in got.items}) == len(got.items) == FRAMES + 2


def test_a_longer_conversation_keeps_the_keys_of_the_shorter_one(made, files):
    _, _, processing = made
    videos, images = files
    one = processing("<vila/video> and <image> and", images=images[1:2], videos=videos[:1])
    two = processing("<vila/video> and <image> and <vila/video>", images=images[1:2], videos=videos[:2])
    keys = padded(processing, one)
    assert padded(processing, two)[: len(keys)] == keys
    assert one.map.segments[0].grid.frames == FRAMES


def test_a_session_keeps_videos_of_two_requests_apart(made, files):
    """SGLang puts the items of a session's requests into one list, with offsets moved."""
    _, _, processing = made
    first, second = (processing("<vila/video>", videos=files[0][:1]) for _ in range(2))
    items = list(first.items)
    for item in second.items:
        item.offsets = [(start + len(first.ids), stop + len(first.ids)) for start, stop in item.offsets]
        items.append(item)
    length = len(first.ids) + len(second.ids)
    mmap = map_from_mm_inputs(SimpleNamespace(mm_items=items), length, reader_of(processing.hf_config))
    assert [segment.grid.frames for segment in mmap.segments if segment.grid] == [FRAMES, FRAMES]


def test_more_than_8_frames_and_8_by_default(made, files):
    _, path, _ = made
    videos, _ = files
    assert processing_of(path, num_frames=40)("<vila/video>", videos=videos[:1]).map.segments[0].grid.frames == 40
    assert processing_of(path)("<vila/video>", videos=videos[:1]).map.segments[0].grid.frames == 8


def test_images_of_several_requests_are_encoded_together(files, tmp_path):
    """SGLang's own class, as the scheduler calls it: an image in many tiles between images in one each."""
    from sglang.srt.models.nvila import NVILAForConditionalGeneration, NVILAMultiModalProjector

    path = nvila.make(tmp_path / "model")
    processing, oracle = processing_of(path), nvila.oracle(path, {"num_frames": FRAMES})
    projector = NVILAMultiModalProjector(processing.hf_config)
    projector.load_state_dict(oracle.projector)
    model = SimpleNamespace(vision_tower=oracle.tower, mm_projector=projector)
    _, images = files
    several = processing("<image><image>", images=[images[0], images[2]]).items
    (joined,) = processing("<image>", images=[images[1]]).items
    with torch.no_grad():
        got = NVILAForConditionalGeneration.get_image_feature(model, [several[0], joined, several[1]])
    expected = []
    for index, alone in ((0, False), (1, True), (2, False)):
        oracle.alone = alone
        pieces, _ = oracle.shown("image_url", str(images[index]))
        expected += [piece for piece in pieces if isinstance(piece, torch.Tensor)]
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-4)


def media(*items):
    """Each item as modality, spans (first, last) and data."""
    made = [
        MultimodalDataItem(modality=kind, offsets=list(spans), model_specific_data=data) for kind, spans, data in items
    ]
    return SimpleNamespace(mm_items=made)


IMAGE, VIDEO = SglModality.IMAGE, SglModality.VIDEO


def test_without_numbers_each_span_is_a_medium():
    """As SGLang's own processor has it."""
    mmap = map_from_mm_inputs(media((IMAGE, [(4, 7)], {}), (VIDEO, [(16, 19), (21, 24)], {})), 60, TileReader(2))
    assert [(s.start, s.stop) for s in mmap.segments if s.grid] == [(4, 8), (16, 20), (21, 25)]


@pytest.mark.parametrize(
    "item, message",
    [
        ((VIDEO, [(4, 9)], {}), r"span 0 at \[4, 9\]: expected 1 x 4 tokens, got 6$"),
        ((IMAGE, [(4, 11)], {"block_sizes": [(3, 1)]}), r"expected 3 x 4 tokens, got 8$"),
        ((IMAGE, [(4, 11)], {"block_sizes": [(1, 2), (2, 1)]}), r"expected rows and columns of tiles in block_sizes"),
    ],
)
def test_what_is_wrong_is_named(item, message):
    with pytest.raises(GeometryError, match=message) as caught:
        map_from_mm_inputs(media(item), 60, TileReader(2))
    assert caught.value.reason == "grid_mismatch"


def test_frames_out_of_order_are_named():
    frames = [(VIDEO, [span], {KEY: [Place(0, i, 2, 2, 2)]}) for i, span in enumerate(((9, 12), (4, 7)))]
    with pytest.raises(GeometryError, match=r"the 2 frames of one video of 2 x 2 tokens in order, got") as caught:
        map_from_mm_inputs(media(*frames), 60, TileReader(2))
    assert caught.value.reason == "grid_mismatch"


def test_a_joined_image_is_one_raster():
    mmap = map_from_mm_inputs(media((IMAGE, [(4, 27)], {"block_sizes": torch.tensor([[2, 3]])})), 60, TileReader(2))
    grid = mmap.segments[1].grid
    assert (grid.frames, grid.rows, grid.cols, grid.frame_starts) == (1, 4, 6, (4,))


class Broken:
    """A file that ends too early."""

    def __len__(self):
        return 100

    def get_frames_at(self, indices):
        raise RuntimeError("no frame 99")


def test_a_video_that_cannot_be_decoded_is_the_clients():
    with pytest.raises(ValueError, match=r"video: 3 frames of 100 cannot be decoded: no frame 99"):
        frames_of(Broken(), 3)
    with pytest.raises(ValueError, match="expected at least one frame"):
        frames_of([], 3)


def test_families_of_configs():
    vision = SimpleNamespace(image_size=448, patch_size=14)
    assert reader_of(SimpleNamespace(model_type="nvila", vision_config=vision)) == TileReader(16)
    assert reader_of(SimpleNamespace(model_type="nvila_lite", vision_config=vision)) == TileReader(11)
