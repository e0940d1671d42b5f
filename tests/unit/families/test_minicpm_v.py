"""MiniCPM-V 4.6 in SGLang's own processing: the map cell by cell against token ids, and which frames are taken."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality as SglModality
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from sglang.srt.utils import VideoData

from families import minicpm_v
from families.minicpm_v import IMAGE, VIDEO
from processing import Processed, Processing, cells_of
from sglang_mminfer.families.maps import GeometryError, map_from_mm_inputs
from sglang_mminfer.families.minicpm_v.geometry import SliceReader
from sglang_mminfer.testing.oracle_media import open_video
from sglang_mminfer.tools.media import make_image, make_video
from sglang_versions import skip_before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return minicpm_v.make(tmp_path_factory.mktemp("minicpm_v") / "model")


@pytest.fixture(scope="module")
def processing(checkpoint: Path) -> Processing:
    return Processing(checkpoint, "minicpmv4_6")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("media")
    return {
        "small": make_image(root / "small.png", 160, 120, seed=1),
        "large": make_image(root / "large.png", 900, 600, seed=2),
        "film": make_video(root / "film.mp4", 12, 128, 96, 4, seed=3),
        "large film": make_video(root / "large.mp4", 3, 640, 480, 1, seed=4),
    }


def rasters(got: Processed, processing: Processing) -> Iterator[tuple[str, int, int, int, int]]:
    """Kind, start, stop, rows and columns of each run of placeholders. The sizes are what the encoder is told."""
    sizes = {item.offsets[0][0]: item.model_specific_data["tgt_size"][0].tolist() for item in got.items}
    runs = [(kind, *run) for kind in ("image", "video") for run in got.runs(processing.token(f"<|{kind}_pad|>"))]
    for kind, start, stop in sorted(runs, key=lambda run: run[1]):
        height, width = sizes.pop(start)
        yield kind, start, stop, height // 4, width // 4
    assert not sizes


def test_cells_agree_with_token_ids(processing: Processing, media: dict[str, Path]) -> None:
    skip_before("0.5.23")  # nothing says which slices belong to one medium
    got = processing(
        f"{IMAGE}What?{VIDEO}{IMAGE}{VIDEO}Who?",
        images=[media["large"], media["small"]],
        videos=[media["film"], media["large film"]],
    )
    found = list(rasters(got, processing))
    # A thumbnail with two slices; three frames; a thumbnail; three frames with two slices each.
    assert [kind for kind, *_ in found] == ["image"] * 3 + ["video"] * 3 + ["image"] + ["video"] * 9
    expected: list[tuple[str, int | None, tuple[int, int, int] | None]] = [("text", None, None)] * len(got.ids)
    medium = -1
    for first, last in ((0, 3), (3, 6), (6, 7), (7, 16)):
        for (kind, rows, cols), run in groupby(found[first:last], key=lambda one: (one[0], *one[3:])):
            medium += 1
            spans = [(start, stop) for _, start, stop, _, _ in run]
            expected[spans[0][0] : spans[-1][1]] = [(kind, medium, None)] * (spans[-1][1] - spans[0][0])
            for frame, (start, stop) in enumerate(spans):
                assert stop - start == rows * cols
                expected[start:stop] = [
                    (kind, medium, (frame, cell // cols, cell % cols)) for cell in range(stop - start)
                ]
    assert cells_of(got.map) == expected


def test_ids_are_those_of_transformers_and_are_found_again(
    checkpoint: Path, processing: Processing, media: dict[str, Path]
) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": str(media["large"])}},
        {"type": "text", "text": "What?"},
        {"type": "video_url", "video_url": {"url": str(media["large film"])}},
        {"type": "image_url", "image_url": {"url": str(media["small"])}},
    ]
    ids = minicpm_v.Oracle(checkpoint, {}).inputs([{"role": "user", "content": parts}])["input_ids"][0].tolist()
    shown = {"images": [media["large"], media["small"]], "videos": [media["large film"]]}
    assert processing(ids, **shown).ids == ids


@pytest.mark.parametrize(
    ("frames", "fps", "options", "taken"),
    [
        (12, 4, {}, [0, 4, 8]),
        (5, 2, {}, [0, 2, 4]),
        (1, 8, {}, [0]),
        (12, 4, {"num_frames": 4}, [0, 4, 7, 11]),
        (12, 4, {"fps": 2}, [0, 2, 4, 7, 9, 11]),
        (12, 4, {"max_frames": 2}, [0, 11]),
    ],
)
def test_frames_taken(
    processing: Processing, tmp_path: Path, frames: int, fps: float, options: dict[str, Any], taken: list[int]
) -> None:
    path = make_video(tmp_path / "a.mp4", frames, 64, 64, fps, seed=5)
    own = VideoData(url=str(path), preprocess_kwargs=options) if options else str(path)
    got = processing(f"{VIDEO}What?", videos=[own])
    fed = open_video(path).frames(taken)
    expected = processing.processor.image_processor.preprocess(list(fed))["pixel_values"]
    assert len(got.items) == len(taken)
    assert all(torch.equal(item.feature[0], one[0]) for item, one in zip(got.items, expected, strict=True))


def test_frames_of_a_long_video_are_those_of_the_released_code(processing: Processing, tmp_path: Path) -> None:
    path = make_video(tmp_path / "long.mp4", 700, 32, 32, 5, seed=6)
    film = open_video(path)
    frames = film.frames(minicpm_v.frames_of(film, {}))
    assert len(frames) == minicpm_v.MOST_FRAMES < 140
    got = processing(f"{VIDEO}What?", videos=[path])
    expected = processing.processor.image_processor.preprocess(list(frames))["pixel_values"]
    assert all(torch.equal(item.feature[0], one[0]) for item, one in zip(got.items, expected, strict=True))


def item(size: Any, offsets: Any = ((3, 66),), **data: Any) -> Any:
    data = {"tgt_size": size, **data}
    return MultimodalDataItem(modality=SglModality.IMAGE, offsets=list(offsets), model_specific_data=data)


def test_without_places_each_raster_is_a_medium() -> None:
    both = SimpleNamespace(
        mm_items=[item([torch.tensor([32, 32])]), item([[32, 32]], [(70, 325)], use_vit_merger=False)]
    )
    grids = [(s.start, s.stop, s.grid.shape) for s in map_from_mm_inputs(both, 400, SliceReader()).segments if s.grid]
    assert grids == [(3, 67, (8, 8)), (70, 326, (16, 16))]


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ([[32, 28]], r"span 0 at \[3, 66\]: expected 8 x 7 tokens, got 64"),
        ([[32, 30]], "divisible by 4, in tgt_size"),
        (None, "divisible by 4, in tgt_size"),
        ([[32, 32], [32, 32]], "for each span, got 2 for 1 spans"),
    ],
)
def test_what_is_wrong_is_named(size: Any, words: str) -> None:
    with pytest.raises(GeometryError, match=words) as caught:
        map_from_mm_inputs(SimpleNamespace(mm_items=[item(size)]), 400, SliceReader())
    assert caught.value.reason == "grid_mismatch"
