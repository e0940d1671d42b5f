"""Qwen3-Omni in SGLang's own processing: the map against token ids, and positions against transformers' thinker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.utils import VideoData

from families import qwen3_omni, qwen3_vl
from families.qwen3_omni import POSITIONS_PER_SECOND, SOUND
from processing import Processed, Processing, cells_of
from sglang_mminfer import families, settings
from sglang_mminfer.families.maps import reader_of
from sglang_mminfer.head_config.fingerprint import fingerprint_of
from sglang_mminfer.testing import qwen_video
from sglang_mminfer.testing.oracle_media import open_video
from sglang_mminfer.testing.tiny_model import PLACEHOLDERS
from sglang_mminfer.tools.media import make_image, make_video, write_video
from sounds import make_sound

IMAGE, VIDEO = PLACEHOLDERS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_omni.make(tmp_path_factory.mktemp("qwen3_omni") / "model")


@pytest.fixture(scope="module")
def processing(checkpoint: Path) -> Processing:
    return Processing(checkpoint, "qwen_vl")


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> qwen3_omni.Oracle:
    return qwen3_omni.Oracle(checkpoint, mm_process_config={"video": {}})


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("media")
    return {
        "picture": make_image(root / "a.png", 160, 120, seed=1),
        "even": make_video(root / "even.mp4", 12, 128, 96, 4, seed=2),
        "odd": make_video(root / "odd.mp4", 31, 96, 160, 7, seed=3),
        "slow": make_video(root / "slow.mp4", 10, 64, 64, 1, seed=4),
        "sound": make_sound(root / "a.wav", 1.3, seed=5),
        "short sound": make_sound(root / "b.wav", 0.6, seed=6),
    }


def seconds_of(*videos: Path) -> list[float]:
    """The time between two temporal patches of each video."""
    return [2 / qwen_video.sample(open_video(path), {}).sampled_fps for path in videos]


def steps(got: Processed) -> list[list[int]]:
    """The positions in time of the temporal patches of each video, from 0."""
    found = []
    for item in got.items:
        for (first, last), (patches, _, _) in zip(item.offsets, item.model_specific_data.get("video_grid_thw", ())):
            time = got.output.mrope_positions[0, first : last + 1].view(int(patches), -1)
            assert bool((time == time[:, :1]).all())
            found.append((time[:, 0] - time[0, 0]).tolist())
    return found


def theirs(oracle: qwen3_omni.Oracle, got: Processed, seconds: Sequence[float]) -> torch.Tensor:
    """Transformers' positions for a prompt of ours, fractions included."""
    grids: dict[str, list[Any]] = {"image_grid_thw": [], "video_grid_thw": []}
    lengths = []
    for item in sorted(got.items, key=lambda item: item.offsets[0]):
        for key, rows in grids.items():
            rows += [item.model_specific_data[key]] if key in item.model_specific_data else []
        if item.is_audio():
            lengths.append(item.model_specific_data["feature_attention_mask"].sum(-1))
    positions, _ = oracle.model.get_rope_index(
        torch.tensor([got.ids]),
        **{key: torch.cat(rows) if rows else None for key, rows in grids.items()},
        attention_mask=torch.ones(1, len(got.ids), dtype=torch.int64),
        audio_seqlens=torch.cat(lengths) if lengths else None,
        second_per_grids=torch.tensor(list(seconds)),
    )
    return positions[:, 0]


def test_cells_agree_with_token_ids(processing: Processing, media: dict[str, Path]) -> None:
    got = processing(
        f"{IMAGE}What?{VIDEO}And{VIDEO}{SOUND}Who?",
        images=[media["picture"]],
        videos=[media["odd"], media["even"]],
        sounds=[media["sound"]],
    )
    expected: list[tuple[str, int | None, tuple[int, int, int] | None]] = [("text", None, None)] * len(got.ids)
    runs = [("image", run) for run in got.runs(processing.token("<|image_pad|>"))]
    runs += [("video", run) for run in got.runs(processing.token("<|video_pad|>"))]
    data = [item.model_specific_data for item in got.items]
    grids = [one[key] for key in ("image_grid_thw", "video_grid_thw") for one in data if key in one]
    shapes = [(t, h // 2, w // 2) for t, h, w in torch.cat(grids).tolist()]
    assert len(runs) == len(shapes) == 3
    for medium, ((kind, (start, stop)), (frames, rows, cols)) in enumerate(zip(runs, shapes)):
        assert stop - start == frames * rows * cols
        expected[start:stop] = [
            (kind, medium, (frame, row, col)) for frame in range(frames) for row in range(rows) for col in range(cols)
        ]
    assert cells_of(got.map) == expected


@pytest.mark.parametrize("films", [["even"], ["odd"], ["slow"], ["odd", "slow", "even"]])
def test_frames_stand_at_their_time(
    processing: Processing, oracle: qwen3_omni.Oracle, media: dict[str, Path], films: list[str]
) -> None:
    videos = [media[name] for name in films]
    got = processing(f"{IMAGE}What?{'And'.join([VIDEO] * len(films))}Who?", images=[media["picture"]], videos=videos)
    seconds = seconds_of(*videos)
    exact = theirs(oracle, got, seconds)
    whole = got.output.mrope_positions
    assert whole.dtype == torch.int64
    assert torch.equal(whole, exact.floor().long())
    assert got.output.mrope_position_delta.tolist() == [[int(whole.max()) + 1 - len(got.ids)]]
    for own, second in zip(steps(got), seconds, strict=True):
        rate = POSITIONS_PER_SECOND * second
        assert all(abs(position - patch * rate) < 1 for patch, position in enumerate(own))


def test_the_request_sets_the_rate(processing: Processing, media: dict[str, Path]) -> None:
    """Twelve frames at 4 a second: three seconds."""
    for fps, times in ((2, [0, 13, 26]), (4, [0, 6, 13, 19, 26, 32]), (1, [0, 19])):
        asked = VideoData(url=str(media["even"]), preprocess_kwargs={"fps": fps})
        assert steps(processing(f"{VIDEO}What?", videos=[asked])) == [times]


def test_equal_frames_at_another_rate_are_another_video(processing: Processing, tmp_path: Path) -> None:
    """The radix cache finds a video by its hash, and its keys hold its positions in time."""

    def hashes(rate: float) -> list[int]:
        asked = [VideoData(url=str(tmp_path / f"{name}.mp4"), preprocess_kwargs={"fps": rate}) for name in "ab"]
        got = processing(f"{VIDEO}What?{VIDEO}", videos=asked)
        for item in got.items:
            item.set_pad_value()
        return [item.hash for item in got.items]

    for name, fps in (("a", 2), ("b", 1)):
        write_video(tmp_path / f"{name}.mp4", [np.zeros((64, 64, 3), np.uint8)] * 8, 64, 64, fps)
    first, second = hashes(2)
    assert first != second and hashes(2) == [first, second]


def test_sounds_have_their_own_lengths(
    processing: Processing, oracle: qwen3_omni.Oracle, media: dict[str, Path]
) -> None:
    videos, sounds = [media["odd"]], [media["sound"], media["short sound"]]
    got = processing(f"Hear{SOUND}see{VIDEO}and{SOUND}. What?", videos=videos, sounds=sounds)
    lengths = sorted(last + 1 - first for item in got.items if item.is_audio() for first, last in item.offsets)
    assert lengths == [8, 17]
    assert torch.equal(got.output.mrope_positions, theirs(oracle, got, seconds_of(*videos)).floor().long())


def test_without_the_mend(processing: Processing, media: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.MENDS.variable, "-qwen3_omni")
    assert steps(processing(f"{VIDEO}What?", videos=[media["even"]])) == [[0, 26, 52]]
    with pytest.raises(ValueError, match="IndexError"):
        processing(f"{IMAGE}{SOUND}{SOUND}", images=[media["picture"]], sounds=[media["sound"]] * 2)


def test_ids_of_a_prompt_with_sounds_are_found_again(processing: Processing, media: dict[str, Path]) -> None:
    sounds = [media["sound"], media["short sound"]]
    shown: dict[str, Any] = {"images": [media["picture"]], "sounds": sounds}
    got = processing(f"Hear{SOUND}see{IMAGE}and{SOUND}. What?", **shown)
    assert processing(got.ids, **shown).ids == got.ids


def test_a_sound_without_a_placeholder_is_refused(processing: Processing, media: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="expected one audio placeholder for each of the 1 audios given, found 0"):
        processing("What?", sounds=[media["sound"]])


def test_a_preprocessed_video_without_its_time_is_refused(processing: Processing, media: dict[str, Path]) -> None:
    got = processing(f"{VIDEO}What?", videos=[media["even"]])
    (item,) = got.items
    made = {
        "format": "processor_output",
        "pixel_values_videos": item.feature,
        "video_grid_thw": item.model_specific_data["video_grid_thw"],
    }
    with pytest.raises(ValueError, match="video_data: expected second_per_grid_ts in what a client preprocessed"):
        processing(got.ids, videos=[made])
    again = processing(got.ids, videos=[{**made, "second_per_grid_ts": torch.tensor([1.0])}])
    assert steps(again) == [[0, 13, 26]] and again.map == got.map


def test_parts_of_the_whole_config_are_found(processing: Processing) -> None:
    whole, thinker = processing.hf_config, processing.processor.hf_config
    assert whole.model_type != thinker.model_type
    assert families.family_of(whole) is families.family_of(thinker) is not None
    assert reader_of(whole) == reader_of(thinker)
    coarse = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=4))
    merged = reader_of(SimpleNamespace(model_type="qwen3_omni_moe", thinker_config=coarse))
    assert merged.merge == 4  # type: ignore[union-attr]
    fingerprint = fingerprint_of(whole)
    assert fingerprint.architecture == "Qwen3OmniMoeForConditionalGeneration"
    assert (fingerprint.layers, fingerprint.heads) == (qwen3_vl.LAYERS, qwen3_vl.HEADS)
    assert (fingerprint.kv_heads, fingerprint.head_dim) == (qwen3_vl.KV_HEADS, qwen3_vl.HEAD_DIM)
    assert fingerprint.rope_theta == 1e6
