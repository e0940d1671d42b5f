"""GLM's videos in SGLang's own processing: cell by cell against ids and positions, and what a request may ask."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sglang.srt.utils import VideoData

from families import glm4v
from families.glm4v import IMAGE, VIDEO
from processing import Processed, Processing, cells_of
from sglang_mminfer.families.glm4v import collapsed
from sglang_mminfer.mends import verbatim
from sglang_mminfer.mends.token_ids import Piece
from sglang_mminfer.mends.words import pattern_of
from sglang_mminfer.tools.media import make_image, make_video

BETWEEN = {
    "glm4v": re.compile(r"<\|end_of_image\|>\d+\.\d seconds<\|begin_of_image\|>"),
    "glm4v_moe": re.compile(r"<\|end_of_image\|>\d+<\|begin_of_image\|>"),
}
MAKERS = {"glm4v": glm4v.make, "glm4v_moe": glm4v.make_moe}


@pytest.fixture(scope="module", params=MAKERS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def processing(checkpoint: tuple[str, Path]) -> Processing:
    return Processing(checkpoint[1], "glm4v")


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Processing:
    """GLM-4.5V's processor, which takes 2 frames a second."""
    return Processing(glm4v.make_moe(tmp_path_factory.mktemp("flash") / "model"), "glm4v")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two videos and a picture."""
    root = tmp_path_factory.mktemp("media")
    return (
        make_video(root / "a.mp4", 12, 128, 96, 4, seed=1),
        make_video(root / "b.mp4", 5, 64, 160, 1, seed=2),
        make_image(root / "a.png", 160, 130, seed=3),
    )


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> str:
    """20 seconds at 4 frames a second."""
    return str(make_video(tmp_path_factory.mktemp("film") / "film.mp4", 80, 96, 64, 4, seed=3))


def test_cells_agree_with_token_ids_and_positions(
    checkpoint: tuple[str, Path], processing: Processing, media: tuple[Path, Path, Path]
) -> None:
    one, other, picture = media
    got = processing(f"{VIDEO}What?{IMAGE}{VIDEO}{IMAGE}Who?", images=[picture, picture], videos=[one, other])
    runs = iter(got.runs(processing.token("<|image|>")))
    expected: list[tuple[str, int | None, tuple[int, int, int] | None]] = [("text", None, None)] * len(got.ids)
    frames = [int(item.model_specific_data["video_grid_thw"][0, 0]) for item in got.items if item.is_video()]
    assert min(frames) > 1
    for medium, (name, count) in enumerate([("video", frames[0]), ("image", 1), ("video", frames[1]), ("image", 1)]):
        spans = [next(runs) for _ in range(count)]
        for token in range(spans[0][0], spans[-1][1]):
            expected[token] = (name, medium, None)  # a second and what stands around it, if nothing better comes
        for before, after in pairwise(spans):
            between = processing.tokenizer.decode(got.ids[before[1] : after[0]])
            assert BETWEEN[checkpoint[0]].fullmatch(between), between
        for frame, (start, stop) in enumerate(spans):
            t, h, w = got.output.mrope_positions[:, start:stop] - got.output.mrope_positions[:, start : start + 1]
            assert not t.any()
            for token in range(start, stop):
                expected[token] = (name, medium, (frame, int(h[token - start]), int(w[token - start])))
    assert next(runs, None) is None
    assert cells_of(got.map) == expected


def test_positions_are_those_of_transformers(
    checkpoint: tuple[str, Path], processing: Processing, media: tuple[Path, Path, Path]
) -> None:
    """The positions of the oracle, whose positions are written out, of transformers and of SGLang."""
    oracle = glm4v.Oracle(checkpoint[1], {})
    parts = [
        {"type": "video_url", "video_url": {"url": str(media[0])}},
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": str(media[2])}},
    ]
    inputs = oracle.inputs([{"role": "user", "content": parts}])
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    theirs, _ = oracle.model.model.get_rope_index(**{name: inputs[name] for name in names})
    assert torch.equal(theirs, inputs["position_ids"])
    got = processing(inputs["input_ids"][0].tolist(), images=[media[2]], videos=[media[0]])
    assert got.ids == inputs["input_ids"][0].tolist()
    assert torch.equal(got.output.mrope_positions, theirs[:, 0])


@pytest.mark.parametrize("word", ["<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_video|>"])
def test_its_own_tokens_in_a_question_are_words(
    processing: Processing, media: tuple[Path, Path, Path], word: str
) -> None:
    said = f"What does {word} mean?{word}"
    guarded = pattern_of(processing.processor).sub(lambda found: verbatim.words(found[0]), said)
    one, _, picture = media
    got = processing(f"{VIDEO}{IMAGE}{guarded}", images=[picture], videos=[one])
    quiet = processing(f"{VIDEO}{IMAGE}What?", images=[picture], videos=[one])
    assert [item.offsets for item in got.items] == [item.offsets for item in quiet.items]
    assert processing.tokenizer.decode(got.ids).endswith(said)
    assert got.ids.count(processing.token(word)) == quiet.ids.count(processing.token(word))


def frames_of(got: Processed) -> int:
    (item,) = got.items
    return 2 * int(item.model_specific_data["video_grid_thw"][0, 0])


def test_a_request_says_how_many_frames(flash: Processing, film: str) -> None:
    asked = {
        40: film,
        20: {"url": film, "fps": 1},
        8: {"url": film, "max_frames": 8},
        12: VideoData(film, preprocess_kwargs={"fps": 1, "max_frames": 12}),
    }
    assert {count: frames_of(flash(f"{VIDEO}What?", videos=[video])) for count, video in asked.items()} == {
        count: count for count in asked
    }


def test_a_request_says_how_large(flash: Processing, film: str) -> None:
    def grid(**asked: int) -> list[int]:
        (item,) = flash(f"{VIDEO}What?", videos=[{"url": film, **asked} if asked else film]).items
        return item.model_specific_data["video_grid_thw"][0].tolist()

    assert grid() == [20, 4, 6]
    assert grid(max_long_side_pixel=64) == [20, 4, 4]
    assert grid(max_long_side_pixel=64, max_frames=8) == [4, 4, 4]


def test_frames_have_the_rate_that_they_come_with(flash: Processing) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (8, 64, 96, 3), np.uint8)
    slow, usual = ({"url": list(frames), "fps": 0.5}, list(frames))
    ids = [flash(f"{VIDEO}What?", videos=[video]).ids for video in (slow, usual)]
    seconds = [re.findall(r"<\|end_of_image\|>(\d+)", flash.tokenizer.decode(one)) for one in ids]
    assert seconds == [["0", "4", "8", "12"], ["0", "2", "4", "6"]]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"num_frames": 8}, "video: num_frames: this model takes .*max_frames"),
        ({"min_pixels": 8}, "video: min_pixels: this model takes "),
        ({"fps": 0}, "video: fps: expected a number above 0, got 0"),
    ],
)
def test_what_this_family_cannot_do_is_refused(
    flash: Processing, film: str, asked: dict[str, float], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        flash(f"{VIDEO}What?", videos=[{"url": film, **asked}])


def test_only_whole_frames_become_a_video(flash: Processing) -> None:
    """What looks like a video of an answer and is none stays as it came."""
    begin, image, end, begin_video, end_video, video = (
        Piece(name=f"<|{name}|>")
        for name in ("begin_of_image", "image", "end_of_image", "begin_of_video", "end_of_video", "video")
    )
    second, words = (Piece(tuple(flash.tokenizer.encode(words))) for words in ("12", "in 12 seconds"))
    frame = [begin, image, image, end]
    for given, expected in (
        ([begin_video, *frame, second, *frame, second, end_video], [begin_video, video, end_video]),
        (frame, [begin, image, end]),
        ([begin_video, *frame, second], [begin_video, begin, image, end, second]),
        ([begin_video, *frame, words, end_video], [begin_video, begin, image, end, words, end_video]),
        ([begin_video, begin, end, second, end_video], [begin_video, begin, end, second, end_video]),
        ([*frame, second, end_video], [begin, image, end, second, end_video]),
        ([begin_video, video, end_video], [begin_video, video, end_video]),
    ):
        assert collapsed(given, flash.tokenizer) == expected
