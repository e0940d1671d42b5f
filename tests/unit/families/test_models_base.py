"""What the families share: registration, prompts, sampling, and the map made of items that say where they stand."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from family_parts import items
from sglang_mminfer.families.frames import decode
from sglang_mminfer.families.maps import GeometryError, map_from_mm_inputs, reader_of
from sglang_mminfer.families.own import registration
from sglang_mminfer.families.own.checkpoint import Checkpoint
from sglang_mminfer.families.own.geometry import PlacedReader
from sglang_mminfer.families.own.prompt import IMAGE, VIDEO, Medium, Raster, lay_out, split
from sglang_mminfer.families.sampling import evenly, every_second, first_seconds
from sglang_mminfer.modality.items import KEY, Place
from sglang_mminfer.modality.segments import Modality

PIXELS = torch.zeros(3, 2, 2, dtype=torch.uint8)


# ---- registration ------------------------------------------------------------------------------------------


def test_nothing_is_imported_before_a_checkpoint_of_ours_is_met() -> None:
    program = (
        "import sys, sglang_mminfer.families.own.registration\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'transformers', 'sglang')\n"
        "       or m.startswith('sglang_mminfer.families.own.') and m != 'sglang_mminfer.families.own.registration'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_other_models_are_left_to_sglang(tmp_path: Path) -> None:
    def original(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return (*args, kwargs)

    contents: list[Any] = [
        {"architectures": ["Qwen2_5_VLForConditionalGeneration"]},
        {"architectures": []},
        {"architectures": None},
        {},
        [1],
    ]
    (tmp_path / "config.json").write_text("{")
    for content in (None, *contents):
        if content is not None:
            (tmp_path / "config.json").write_text(json.dumps(content))
        expected = ("self", str(tmp_path), False, {"extra": 1})
        assert registration.parse_config(original, "self", str(tmp_path), False, extra=1) == expected
        assert registration.load_processor(original, str(tmp_path), use_fast=True) == (
            str(tmp_path),
            {"use_fast": True},
        )
    assert registration.parse_config(original, "self", "s3://bucket/model", False)[1] == "s3://bucket/model"


def test_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text('{"a": 1}')
    files = Checkpoint(str(tmp_path))
    assert files.json("llm/config.json") == {"a": 1}
    assert files.json("config.json") is None
    assert files.folder("llm") == str(tmp_path / "llm")


# ---- prompts -----------------------------------------------------------------------------------------------


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_a_prompt_without_a_place_for_each_medium_is_refused() -> None:
    assert split(f"a{IMAGE}b{VIDEO}", 1, 1) == ["a", IMAGE, "b", VIDEO]
    for text, images, videos in ((f"a{IMAGE}", 0, 0), ("a", 1, 0), (f"{VIDEO}", 0, 2), (f"{VIDEO}{IMAGE}", 0, 1)):
        with pytest.raises(ValueError, match=r"prompt: expected one <(image|video)> for each of the \d given"):
            split(text, images, videos)


def test_text_is_tokenized_whole_and_separators_apart() -> None:
    seen: list[str] = []

    def noting(text: str) -> list[int]:
        seen.append(text)
        return encode(text)

    film = Medium("video", [Raster(PIXELS, 1, 2, separator="\n")] * 2, text=" after")
    ids, placed = lay_out(["be", "fore", film, " words", Medium("image", [Raster(PIXELS, 2, 2, tail=1)])], noting, 7)
    assert seen == ["before", "\n", "\n", " after words"]
    assert ids == [*encode("before"), 7, 7, 10, 7, 7, 10, *encode(" after words"), *[7] * 5]
    assert [(one.start, one.frame, one.frames) for one in placed] == [(6, 0, 2), (9, 1, 2), (24, 0, 1)]


# ---- the map -----------------------------------------------------------------------------------------------


def conversation(seed: int) -> tuple[list[str | Medium], list[tuple[str, int, int, int, int, int]]]:
    """Random text and media, and of each medium: kind, frames, rows, cols, tail, length of its separator."""
    draw = random.Random(seed)
    run: list[str | Medium] = []
    said = []
    for _ in range(draw.randint(1, 5)):
        run.append("x" * draw.randint(0, 9))
        kind = draw.choice(["image", "video"])
        frames = 1 if kind == "image" else draw.randint(1, 6)
        rows, cols, tail, gap = draw.randint(1, 4), draw.randint(1, 5), draw.randint(0, 1), draw.randint(0, 2)
        raster = Raster(PIXELS, rows, cols, tail=tail, separator="\n" * gap)
        run.append(Medium(kind, [raster] * frames))  # type: ignore[arg-type]
        said.append((kind, frames, rows, cols, tail, gap))
    return [*run, "end"], said


@given(st.integers(0, 10_000))
def test_the_map_is_that_of_the_tokens(seed: int) -> None:
    """Walks over the ids, token by token, with nothing but the shapes of the media in hand."""
    run, said = conversation(seed)
    ids, placed = lay_out(run, encode, 0)
    shuffled = items(placed)
    random.Random(seed).shuffle(shuffled)
    got = map_from_mm_inputs(SimpleNamespace(mm_items=shuffled), len(ids), PlacedReader())

    cells = {"frame": [-1] * len(ids), "row": [-1] * len(ids)}
    modality = ["text"] * len(ids)
    at = 0
    for kind, frames, rows, cols, tail, gap in said:
        while ids[at] != 0:
            at += 1
        first = at
        for _ in range(frames):
            for cell in range(rows * cols):
                assert ids[at] == 0
                cells["frame"][at], cells["row"][at] = cell, cell % cols
                at += 1
            assert ids[at : at + tail] == [0] * tail
            at += tail
            last = at
            at += gap
        modality[first:last] = [kind] * (last - first)
    for stride in ("frame", "row"):
        assert got.cells(stride).tolist() == cells[stride]
    for kind in (Modality.IMAGE, Modality.VIDEO):
        assert got.members(kind).tolist() == [name == kind for name in modality]
    assert sum(segment.grid is not None for segment in got.segments) == len(said)


def test_items_that_do_not_fit_run_dense() -> None:
    run: list[str | Medium] = ["a", Medium("video", [Raster(PIXELS, 2, 2)] * 3), "b"]
    ids, placed = lay_out(run, encode, 0)

    def reason(found: list[Any]) -> str:
        with pytest.raises(GeometryError) as error:
            map_from_mm_inputs(SimpleNamespace(mm_items=found), len(ids), PlacedReader())
        return error.value.reason

    def changed(index: int, **data: Any) -> list[Any]:
        found = items(placed)
        place = Place(*found[index].model_specific_data[KEY][0])
        found[index].model_specific_data[KEY] = [place._replace(**data)]
        return found

    assert reason(items(placed)[1:]) == "grid_mismatch"
    assert reason(items(placed)[:2]) == "grid_mismatch"
    assert reason(changed(1, frame=2)) == "grid_mismatch"
    assert reason(changed(1, rows=1, cols=4)) == "grid_mismatch"
    assert reason(changed(0, tail=1)) == "grid_mismatch"
    assert reason(changed(0, cols=0)) == "grid_mismatch"
    assert reason(changed(0, frames=0)) == "zero_frames"
    assert reason(changed(0, rows=None)) == "grid_mismatch"
    found = items(placed)
    found[1].offsets = None
    assert reason(found) == "no_offsets"


def test_the_families_are_found_by_their_own_type() -> None:
    for name in ("llava_video", "longvila"):
        assert reader_of(SimpleNamespace(model_type=name)) == PlacedReader()


# ---- sampling ----------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.floats(0.2, 120), st.integers(1, 64), st.booleans())
def test_samples_are_frames_of_the_file(total: int, rate: float, most: int, forced: bool) -> None:
    for sampled in (
        every_second(total, rate, fps=1, most=most, forced=forced),
        first_seconds(total, rate, fps=2, most=most),
        evenly(total, rate, count=most),
    ):
        assert 1 <= len(sampled.indices) <= most
        assert sampled.indices == sorted(sampled.indices)
        assert min(sampled.indices) >= 0 and max(sampled.indices) < total
        assert len(sampled.seconds) == len(sampled.indices)


def test_sampling_by_hand() -> None:
    assert every_second(24, 8.0, fps=1, most=64, forced=False).indices == [0, 8, 16]
    assert every_second(24, 8.0, fps=1, most=64, forced=False).seconds == [0.0, 1.0, 2.0]
    assert every_second(24, 8.0, fps=1, most=2, forced=False).indices == [0, 23]
    assert every_second(2, 8.0, fps=1, most=4, forced=True).indices == [0, 0, 0, 1]
    assert first_seconds(24, 8.0, fps=2, most=4).indices == [0, 4, 8, 12]
    assert evenly(24, 8.0, count=3).indices == [0, 12, 23]
    for rate in (0.0, float("nan"), -1.0):  # files of one frame
        assert every_second(1, rate, fps=1, most=4, forced=False).indices == [0]
        assert first_seconds(1, rate, fps=1, most=4).indices == [0]


def test_a_video_without_frames_is_an_error() -> None:
    for sample in (
        lambda: every_second(0, 8.0, fps=1, most=4, forced=True),
        lambda: first_seconds(0, 8.0, fps=1, most=4),
        lambda: evenly(0, 8.0, count=4),
    ):
        with pytest.raises(ValueError, match=r"expected at least one frame, found none"):
            sample()


# ---- frames ------------------------------------------------------------------------------------------------


def test_a_repeated_frame_is_decoded_once() -> None:
    frames = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    first, again, last = decode(frames, [0, 0, 2], 4, 4)
    assert first is again
    assert torch.equal(last, torch.from_numpy(frames[2]).permute(2, 0, 1))


def test_a_file_that_breaks_off_is_the_clients_error() -> None:
    class Broken:
        avg_fps = 1.0

        def __len__(self) -> int:
            return 9

        def get_frames_at(self, indices: list[int]) -> Any:
            raise RuntimeError("end of file")

    with pytest.raises(ValueError, match=r"video: frames 1 to 5 of 9 cannot be decoded: end of file"):
        decode(Broken(), [5, 1], 4, 4)
    with pytest.raises(ValueError, match=r"expected frames of 3 channels in uint8, got float64 \(4, 4, 3\)"):
        decode(np.zeros((1, 4, 4, 3)), [0], 4, 4)
