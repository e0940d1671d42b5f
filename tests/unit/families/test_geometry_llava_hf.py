"""Hugging Face LLaVA: rasters against what transformers' own models do to marked features, and whole prompts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import Modality as SglModality
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from transformers import LlavaNextVideoConfig, LlavaOnevisionConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoModel, LlavaNextVideoPooler
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from families import llava_hf
from processing import Processing, cells_of
from sglang_mminfer.families.maps import GeometryError, map_from_mm_inputs, reader_of
from sglang_mminfer.settings import SPLIT_VIDEOS
from sglang_mminfer.tools.media import make_image, make_video

RELEASED = {"llava_onevision": LlavaOnevisionConfig(), "llava_next_video": LlavaNextVideoConfig()}
START = 7
NEWLINE = torch.tensor([-1.0, -1.0, -1.0])

kinds = pytest.mark.parametrize("kind", RELEASED)


def side_of(config) -> int:
    return config.vision_config.image_size // config.vision_config.patch_size


def marked(config, height: int, width: int) -> torch.Tensor:
    """Features [1 + tiles, side * side, 3] of an image that say where they are: whole image or not, y, x."""
    side = side_of(config)
    best = select_best_resolution((height, width), config.image_grid_pinpoints)
    rows, cols = (pixels // config.vision_config.image_size for pixels in best)

    def tile(kind: int, top: int, left: int) -> torch.Tensor:
        y, x = torch.meshgrid(torch.arange(side) + top, torch.arange(side) + left, indexing="ij")
        return torch.stack([torch.full_like(y, kind), y, x], dim=-1).reshape(-1, 3).float()

    cut = [tile(1, r * side, c * side) for r in range(rows) for c in range(cols)]
    return torch.stack([tile(0, 0, 0), *cut])


def packed(kind: str, height: int, width: int) -> torch.Tensor:
    """[tokens, 3]: the features in the order of the prompt, as transformers' model packs them."""
    config = RELEASED[kind]
    model = SimpleNamespace(config=config)
    features, sizes = [marked(config, height, width)], torch.tensor([[height, width]])
    if kind == "llava_onevision":
        (tokens,), _ = LlavaOnevisionModel.pack_image_features(
            model, features, sizes, image_newline=NEWLINE, vision_aspect_ratio=config.vision_aspect_ratio
        )
    else:
        (tokens,), _ = LlavaNextVideoModel.pack_image_features(model, features, sizes, "default", image_newline=NEWLINE)
    return tokens


def item(modality, length: int, **data):
    offsets = [(START, START + length - 1)]
    return SimpleNamespace(mm_items=[MultimodalDataItem(modality=modality, offsets=offsets, model_specific_data=data)])


@kinds
@settings(max_examples=60)
@given(height=st.integers(20, 3000), width=st.integers(20, 3000))
def test_an_image_is_laid_out_as_the_model_packs_it(kind, height, width):
    config, tokens = RELEASED[kind], packed(kind, height, width)
    assume(len(tokens) > side_of(config) ** 2)  # a line of pixels leaves no row
    length = START + len(tokens)
    mm = item(SglModality.IMAGE, len(tokens), image_sizes=torch.tensor([[height, width]]))
    mmap = map_from_mm_inputs(mm, length, reader_of(config))
    _, whole, cut = mmap.segments
    assert (whole.start, cut.stop) == (START, length)
    side = side_of(config)
    assert whole.grid.shape == (side, side)
    cells = torch.tensor([where for _, medium, where in cells_of(mmap) if medium is not None])
    first = tokens[:, 0] == 0
    assert torch.equal(tokens[first][:, 1:].long(), cells[first][:, 1:])
    # In the cut image each row ends with the newline, and nowhere else is one.
    newline = (tokens == NEWLINE).all(dim=1)
    rows, cols = cut.grid.shape
    assert torch.equal(newline[~first], cells[~first][:, 2] == cols - 1)
    y, x = tokens[~first].reshape(rows, cols, 3)[:, :-1, 1:].unbind(-1)
    assert torch.allclose(y, y[:, :1].expand_as(y)) and (y.diff(dim=0) > 0).all()
    assert torch.allclose(x, x[:1].expand_as(x)) and (x.diff(dim=1) > 0).all()


@kinds
@settings(max_examples=10)
@given(frames=st.integers(1, 40))
def test_a_video_is_laid_out_as_the_model_pools_it(kind, frames):
    config = RELEASED[kind]
    side = side_of(config)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frame = torch.arange(frames)[:, None].expand(frames, side * side)
    features = torch.stack([frame, y.flatten().expand_as(frame), x.flatten().expand_as(frame)], dim=-1).float()
    if kind == "llava_onevision":
        pooled = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), features)
    else:
        pooled = LlavaNextVideoPooler(config)(features)
    tokens = pooled.flatten(0, 1)
    tail = 1 if kind == "llava_onevision" else 0
    mmap = map_from_mm_inputs(
        item(SglModality.VIDEO, len(tokens) + tail), START + len(tokens) + tail, reader_of(config)
    )
    cells = [where for _, medium, where in cells_of(mmap) if medium is not None]
    assert cells[len(tokens) :] == [None] * tail
    found = torch.tensor(cells[: len(tokens)]).float()
    pool = side / mmap.segments[1].grid.rows
    expected = torch.stack([tokens[:, 0], *((tokens[:, i] - (pool - 1) / 2) / pool for i in (1, 2))], dim=1)
    assert torch.allclose(found, expected, atol=0.2)


@pytest.fixture(scope="module", params=["onevision", "next_video"])
def processing(request, tmp_path_factory):
    make = {"onevision": llava_hf.make_onevision, "next_video": llava_hf.make_next_video}[request.param]
    path = make(tmp_path_factory.mktemp(request.param) / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SPLIT_VIDEOS.variable, "1")
        return Processing(
            path, "transformers_auto", model_impl="transformers", mm_process_config={"video": {"num_frames": 6}}
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    videos = [make_video(root / f"{i}.mp4", 4 + 5 * i, 96, 64, 4, seed=i) for i in range(2)]
    return videos, [make_image(root / f"{i}.png", 64 + 100 * i, 130, seed=i) for i in range(3)]


@pytest.mark.parametrize("order", ["v", "i", "vv", "iv", "vi", "ivi", "iiv v"])
def test_whole_prompts(processing, files, order):
    videos, images = files
    shown = {kind: iter(paths) for kind, paths in (("v", videos), ("i", images))}
    used = {kind: [next(shown[kind]) for _ in range(order.count(kind))] for kind in "vi"}
    # Words around them: SGLang loses the first run of a prompt that begins and ends with one medium; no template does.
    prompt = "See: {} So?".format(" What? ".join({"v": "<video>", "i": "<image>", " ": ""}[part] for part in order))
    got = processing(prompt, images=used["i"], videos=used["v"])
    runs = {"v": got.runs(processing.token("<video>")), "i": got.runs(processing.token("<image>"))}
    assert {kind: len(found) for kind, found in runs.items()} == {kind: len(paths) for kind, paths in used.items()}
    vision = [s for s in got.map.segments if s.modality != "text"]
    covered = {(kind, token) for kind, found in runs.items() for a, b in found for token in range(a, b)}
    assert {(s.modality[0], token) for s in vision for token in range(s.start, s.stop)} == covered
    assert all(segment.grid is not None for segment in vision)
    frames = [s.grid.frames for s in vision if s.modality == "video"]
    assert frames == [6] * len(videos[: order.count("v")])
    side = side_of(processing.hf_config)
    per_frame = [s.grid.shape for s in vision if s.modality == "video"]
    half = math.ceil(side / 2)
    assert per_frame == [(half, half)] * len(frames)


def test_what_is_wrong_is_named():
    reader = reader_of(RELEASED["llava_onevision"])
    with pytest.raises(GeometryError, match="expected frames of 196 tokens and 1 at the end, got 392") as caught:
        map_from_mm_inputs(item(SglModality.VIDEO, 392), 400, reader)
    assert caught.value.reason == "grid_mismatch"
    with pytest.raises(GeometryError, match="for an image of 384 x 384, got 900"):
        map_from_mm_inputs(item(SglModality.IMAGE, 900, image_sizes=[[384, 384]]), 1000, reader)
    with pytest.raises(GeometryError, match="each of 1 images, got 0"):
        map_from_mm_inputs(item(SglModality.IMAGE, 900), 1000, reader)
