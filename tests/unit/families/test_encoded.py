"""Encoder disaggregation: a request whose media come as embeddings has the map of the same request with the media."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality

from families import qwen3_vl
from processing import Processed, Processing
from sglang_mminfer.families import encoded
from sglang_mminfer.modality.items import KEY
from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl
from sglang_mminfer.tools.media import make_image, make_video

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SMALL = {"video": {"min_pixels": 64 * 64, "max_pixels": 128 * 128}}
MAKERS = {"qwen2_5_vl": make_tiny_qwen2_5_vl, "qwen3_vl": qwen3_vl.make}


@pytest.fixture(scope="module", params=list(MAKERS))
def processing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processing]:
    path = MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "model")
    yield Processing(path, "qwen_vl", mm_process_config=SMALL)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    root = tmp_path_factory.mktemp("media")
    sizes = [(12, 128, 96, 4), (8, 96, 160, 2)]
    videos = [make_video(root / f"{i}.mp4", n, w, h, fps, seed=i) for i, (n, w, h, fps) in enumerate(sizes)]
    return videos, [make_image(root / f"{i}.png", 80 + 60 * i, 130, seed=i) for i in range(2)]


def as_embeddings(processing: Processing, whole: Processed, prompt: str, **changed: Any) -> Any:
    """What SGLang makes of the embeddings and of what the encoder says beside them."""
    embeddings: dict[Modality, torch.Tensor] = {}
    said: dict[str, Any] = {}
    for modality, key, name in (
        (Modality.IMAGE, "image_grid_thw", "img_grid_thw"),
        (Modality.VIDEO, "video_grid_thw", "video_grid_thw"),
    ):
        items = [item for item in whole.items if item.modality is modality]
        if items:
            tokens = sum(last + 1 - first for item in items for first, last in item.offsets)
            embeddings[modality] = torch.randn(tokens, 8)
            said[name] = torch.cat([item.model_specific_data[key] for item in items])
    seconds = [item.model_specific_data.get("second_per_grid_ts") for item in whole.items]
    if processing.hf_config.model_type == "qwen3_vl":
        times = iter(re.findall(r"<(\d+\.\d) seconds>", processing.tokenizer.decode(whole.ids)))
        said["video_timestamps"] = [
            [float(next(times)) for _ in range(int(frames))] for frames, _, _ in said.get("video_grid_thw", [])
        ]
    elif any(second is not None for second in seconds):
        said["second_per_grid_ts"] = torch.cat([torch.as_tensor(s).flatten() for s in seconds if s is not None])
    with processing.published():
        output = processing.processor.get_validated_mm_data(prompt, embeddings, **(said | changed))
    return output


PROMPTS = [f"What? {VIDEO} and {IMAGE}{VIDEO} then {IMAGE}?", f"{VIDEO}{VIDEO}", f"{IMAGE} only"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_map_is_that_of_the_media(
    processing: Processing, files: tuple[list[Path], list[Path]], prompt: str
) -> None:
    videos, images = files[0][: prompt.count(VIDEO)], files[1][: prompt.count(IMAGE)]
    whole = processing(prompt, images=images, videos=videos)
    got = Processed(as_embeddings(processing, whole, prompt), processing.hf_config)
    assert got.ids == whole.ids
    assert got.map.segments == whole.map.segments
    assert all(segment.grid is not None for segment in got.map.segments if segment.modality != "text")


def test_rows_that_do_not_fit_leave_media_without_a_raster(
    processing: Processing, files: tuple[list[Path], list[Path]]
) -> None:
    prompt = PROMPTS[2]
    whole = processing(prompt, images=files[1][:1])
    output = as_embeddings(processing, whole, prompt)
    (item,) = output.mm_items
    ((_, rows, cols),) = whole.items[0].model_specific_data["image_grid_thw"].tolist()
    for wrong in ([[1, rows + 2, cols]], [[2, rows, cols]], [[1, rows, cols]] * 2, [], None, "no rows"):
        item.model_specific_data.pop(KEY, None)
        encoded.place(output, processing.hf_config, {"img_grid_thw": wrong})
        assert KEY not in item.model_specific_data, wrong
        segments = Processed(output, processing.hf_config).map.segments
        assert [s.grid for s in segments if s.modality == "image"] == [None]


def test_equal_embeddings_in_other_arrangements_are_other_media(processing: Processing) -> None:
    """Positions follow from the arrangement, and keys from the positions."""
    hashes = set()
    for thw in ([[1, 8, 4]], [[1, 4, 8]]):
        with processing.published():
            output = processing.processor.get_validated_mm_data(
                PROMPTS[2], {Modality.IMAGE: torch.ones(8, 8)}, img_grid_thw=torch.tensor(thw)
            )
        (item,) = output.mm_items
        item.set_pad_value()
        hashes.add(item.hash)
    assert len(hashes) == 2


def test_models_of_other_layouts_are_left_alone() -> None:
    item = SimpleNamespace(modality=Modality.IMAGE, offsets=[(0, 7)], model_specific_data={})
    output = SimpleNamespace(mm_items=[item])
    encoded.place(output, SimpleNamespace(model_type="kimi_vl"), {"img_grid_thw": torch.tensor([[1, 4, 8]])})
    assert item.model_specific_data == {}
