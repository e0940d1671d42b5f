"""Qwen3-VL, and Qwen3.5, which lays media out alike: SGLang's own processing of real files, and the map cell by cell
against token ids and M-RoPE positions."""

from __future__ import annotations

import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import Modality as SglModality
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from transformers import Qwen3_5Config, Qwen3_5MoeConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from families import qwen3_5, qwen3_vl
from processing import Processing, cells_of
from sglang_mminfer.families.grid_thw import FrameSpanReader, GridReader
from sglang_mminfer.families.maps import GeometryError, map_from_mm_inputs, reader_of
from sglang_mminfer.tools.media import make_image, make_video

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SMALL = {"video": {"min_pixels": 64 * 64, "max_pixels": 128 * 128}}
BETWEEN = re.compile(r"<\|vision_end\|><\d+\.\d seconds><\|vision_start\|>")


@pytest.fixture(scope="module", params=[qwen3_vl.make, qwen3_5.make], ids=["qwen3_vl", "qwen3_5"])
def processing(request, tmp_path_factory):
    path = request.param(tmp_path_factory.mktemp("qwen3") / "model")
    return Processing(path, "qwen_vl", mm_process_config=SMALL)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Videos with the temporal patches that 2 frames a second make of them, and images."""
    root = tmp_path_factory.mktemp("media")
    videos = [
        (make_video(root / f"{i}.mp4", frames, width, height, fps, seed=i), patches)
        for i, (frames, width, height, fps, patches) in enumerate(
            [(12, 128, 96, 4, 3), (5, 64, 160, 1, 2), (30, 96, 96, 30, 2), (40, 64, 64, 2, 20)]
        )
    ]
    return videos, [make_image(root / f"{i}.png", 40 + 60 * i, 130, seed=i) for i in range(3)]


@settings(max_examples=12)
@given(st.data())
def test_cells_agree_with_token_ids_and_positions(processing, files, data):
    videos, images = files
    parts = data.draw(
        st.lists(st.one_of(st.sampled_from(videos), st.sampled_from(images), st.just("What? ")), min_size=1, max_size=5)
    )
    shown = [part for part in parts if isinstance(part, tuple)]
    if all(isinstance(part, str) for part in parts):
        return
    prompt = "".join(part if isinstance(part, str) else VIDEO if isinstance(part, tuple) else IMAGE for part in parts)
    got = processing(
        prompt,
        images=[part for part in parts if not isinstance(part, tuple | str)],
        videos=[path for path, _ in shown],
    )
    positions = got.output.mrope_positions

    expected = [("text", None, None)] * len(got.ids)
    video_runs = iter(got.runs(processing.token("<|video_pad|>")))
    image_runs = iter(got.runs(processing.token("<|image_pad|>")))
    medium = -1
    for part in parts:
        if isinstance(part, str):
            continue
        medium += 1
        name, frames = ("video", part[1]) if isinstance(part, tuple) else ("image", 1)
        runs = [next(video_runs if name == "video" else image_runs) for _ in range(frames)]
        for token in range(runs[0][0], runs[-1][1]):
            expected[token] = (name, medium, None)  # a timestamp and its brackets, if nothing better comes
        for before, after in pairwise(runs):
            assert BETWEEN.fullmatch(processing.tokenizer.decode(got.ids[before[1] : after[0]]))
        for frame, (start, stop) in enumerate(runs):
            t, h, w = positions[:, start:stop] - positions[:, start : start + 1]
            assert not t.any()
            for token in range(start, stop):
                expected[token] = (name, medium, (frame, int(h[token - start]), int(w[token - start])))
    assert next(video_runs, None) is None and next(image_runs, None) is None
    assert cells_of(got.map) == expected


def video(offsets, rows):
    data = {"video_grid_thw": torch.tensor(rows)}
    return SimpleNamespace(
        mm_items=[MultimodalDataItem(modality=SglModality.VIDEO, offsets=offsets, model_specific_data=data)]
    )


def test_two_videos_in_one_item_are_two_segments():
    mmap = map_from_mm_inputs(video([(2, 5), (9, 12), (20, 21)], [[2, 4, 4], [1, 2, 4]]), 30, FrameSpanReader())
    assert [(s.modality, s.start, s.stop) for s in mmap.segments if s.grid] == [("video", 2, 13), ("video", 20, 22)]
    assert mmap.segments[1].grid.frame_starts == (2, 9)
    assert mmap.cells("frame").tolist()[6:9] == [-1, -1, -1]


@pytest.mark.parametrize(
    ("offsets", "rows", "reason", "words"),
    [
        ([(2, 5), (9, 12)], [[3, 4, 4]], "grid_mismatch", "one span for each of 3 temporal patches .* got 2"),
        ([(2, 5), (9, 13)], [[2, 4, 4]], "grid_mismatch", r"span 1 at \[9, 13\]: expected 4 tokens .* got 5"),
        ([(2, 5), (5, 8)], [[2, 4, 4]], "overlapping_offsets", r"span 1 at \[5, 8\]: overlaps"),
        ([(9, 12), (2, 5)], [[2, 4, 4]], "overlapping_offsets", "overlaps"),
        ([(2, 5)], [[1, 3, 4]], "grid_mismatch", "divisible by the merge of 2, got 3 x 4"),
        ([(2, 5)], [[0, 4, 4]], "zero_frames", "0 frames"),
        (None, [[1, 4, 4]], "no_offsets", "got none"),
    ],
)
def test_what_is_wrong_is_named(offsets, rows, reason, words):
    with pytest.raises(GeometryError, match=words) as caught:
        map_from_mm_inputs(video(offsets, rows), 64, FrameSpanReader())
    assert caught.value.reason == reason


def test_families_of_real_configs():
    assert reader_of(Qwen3VLConfig()) == reader_of(Qwen3VLMoeConfig()) == FrameSpanReader() != GridReader()
    assert reader_of(Qwen3VLConfig(vision_config={"spatial_merge_size": 3})) == FrameSpanReader(3)
    assert reader_of(Qwen3_5Config()) == reader_of(Qwen3_5MoeConfig()) == FrameSpanReader()
