"""LLaVA-Video and LongVILA through the real server: answers are an oracle's, each frame is encoded once."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import openai
import pytest
from serving import ROUNDING, Message, Served, assistant, image, text, user, video

from sglang_mminfer.evaluation.families import llava_video, longvila
from sglang_mminfer.evaluation.hf_oracle import OracleAnswer, compare
from sglang_mminfer.evaluation.media import make_image, make_video
from sglang_mminfer.evaluation.server import Server
from sglang_mminfer.trace import ENVIRONMENT as TRACE

LAYERS = 2
CHUNK = 251
"""No multiple of a frame, a row or a tile."""

ENCODED = re.compile(r"mminfer: (\d+) items go through the vision tower")
FRAMES = 5


@dataclass(frozen=True)
class Case:
    """A family, its server and its oracle."""

    served: Served
    oracle: Any
    views: int
    """Items of a picture: LLaVA-Video sees it whole and in tiles."""

    def encoded(self) -> int:
        """Items that the vision tower has seen so far."""
        return sum(map(int, ENCODED.findall(self.served.server.log())))


def start(model: Path, config: str, options: dict[str, Any], root: Path, *flags: str) -> Served:
    trace = root / "trace.jsonl"
    server = Server(
        model,
        *("--attention-backend", "mminfer", "--mminfer-config", config, "--sleep-on-idle"),
        *("--chunked-prefill-size", str(CHUNK), "--mm-process-config", json.dumps({"video": options})),
        *flags,
        env={TRACE: str(trace)},
        log=root / "server.log",
        timeout=600,
    )
    return Served(server.start(), trace)


@pytest.fixture(scope="module", params=["longvila", "llava_video"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Covering patterns on the sparse path: the answers are dense ones."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "llava_video":
        options = {"max_frames": FRAMES}
        model = llava_video.make(root / "model", mm_spatial_pool_mode="average")
        oracle: Any = llava_video.LlavaVideoOracle(model, options)
        served = start(model, "test_covering", options, root, "--log-level", "debug")
        found = Case(served, oracle, views=2)
    else:
        options = {"num_frames": FRAMES}
        model = longvila.make(root / "model", "1M")
        oracle = longvila.LongVilaOracle(model, options)
        served = start(model, "test_covering_mixed", options, root, "--log-level", "debug")
        found = Case(served, oracle, views=1)
    try:
        yield found
    finally:
        served.server.stop()


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("media")
    steady = make_video(root / "steady.mp4", 24, 96, 64, 8, seed=1)
    uneven = root / "uneven.mp4"
    subprocess.run(
        [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(steady)),
            *("-vf", "select='lt(n,8)+not(mod(n,4))'", "-fps_mode", "vfr", str(uneven)),
        ],
        check=True,
    )
    broken = root / "broken.mp4"
    broken.write_bytes(steady.read_bytes()[:1500])
    words = root / "words.mp4"
    words.write_text("This is no video.")
    return {
        "steady": steady,
        "uneven": uneven,
        "one_frame": make_video(root / "one.mp4", 1, 64, 64, 8, seed=2),
        "portrait": make_video(root / "portrait.mp4", 9, 96, 160, 3, seed=3),
        "long": make_video(root / "long.mp4", 10_000, 64, 64, 25, seed=4),
        "image": make_image(root / "image.png", 300, 200, seed=5),
        "broken": broken,
        "words": words,
    }


def equal(expected: OracleAnswer, got: OracleAnswer) -> None:
    result = compare(expected, got)
    assert result.prompt_equal and result.tokens_equal and result.max_difference < ROUNDING, str(result)
    assert result.compared_positions == len(expected.token_ids)


def test_four_turns(case: Case, media: dict[str, Path]) -> None:
    turns = [
        user(video(media["steady"]), text("What do you see in the video?")),
        user(text("And now?")),
        user(image(media["image"]), text("Compare both.")),
        user(text("Which one came first?")),
    ]
    messages: list[Message] = []
    known = 0
    before = case.encoded()
    for number, turn in enumerate(turns):
        messages = [*messages, turn]
        expected = case.oracle.answer(messages)
        got = case.served.ask(messages, rid=f"turn-{number}")
        equal(expected, got)
        assert got.cached_tokens >= known
        records = case.served.records(f"turn-{number}")
        assert sum(r.chunk_len for r in records) == len(got.prompt_ids) - got.cached_tokens
        assert {(r.sparse_layers, r.dense_reason) for r in records} == {(LAYERS, None)}
        assert max(r.chunk_len for r in records) <= CHUNK
        known = len(got.prompt_ids)
        messages = [*messages, assistant(expected.text)]
    assert case.encoded() - before == FRAMES + case.views


@pytest.mark.parametrize("name", ["uneven", "one_frame", "portrait", "long"])
def test_odd_videos(case: Case, media: dict[str, Path], name: str) -> None:
    messages = [user(text("Who?"), video(media[name]))]
    equal(case.oracle.answer(messages, 2), case.served.ask(messages, 2))


def test_two_videos_in_a_turn(case: Case, media: dict[str, Path]) -> None:
    messages = [user(video(media["portrait"]), text("And"), video(media["steady"]), text("Compare both."))]
    expected = case.oracle.answer(messages, 2)
    equal(expected, case.served.ask(messages, 2, rid="two"))
    # Text, video, text, video, text: the last chunk has seen them all.
    assert case.served.records("two")[-1].segments == 5


@pytest.mark.parametrize(
    ("name", "said"), [("broken", r"video"), ("words", r"(?i)video"), ("missing", r"missing\.mp4")]
)
def test_what_is_no_video_is_said_to_the_client(case: Case, media: dict[str, Path], name: str, said: str) -> None:
    path = media.get(name, Path("/nowhere/missing.mp4"))
    with pytest.raises(openai.APIStatusError, match=said) as failure:
        case.served.ask([user(video(path), text("What?"))], 1)
    assert failure.value.status_code in (400, 500)
    messages = [user(text("Thank you."))]
    equal(case.oracle.answer(messages, 2), case.served.ask(messages, 2))


def test_a_placeholder_in_the_words_is_said_to_the_client(case: Case, media: dict[str, Path]) -> None:
    with pytest.raises(openai.BadRequestError, match=r"expected one <image> for each of the 0 given, found 1"):
        case.served.ask([user(video(media["one_frame"]), text("What is <image>?"))], 1)


@pytest.mark.parametrize("family", ["llava_video", "longvila"])
def test_a_grid_is_sparse(family: str, media: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """And its answers do not depend on the chunks: what is cached was computed in others."""
    if family == "llava_video":
        model, options = llava_video.make(tmp_path / "model"), {"max_frames": 8}
    else:
        model, options = longvila.make(tmp_path / "model"), {"num_frames": 8}
    served = start(model, "test_grid_frame", options, tmp_path)
    try:
        messages = [user(video(media["steady"]), text("What do you see in the video?"))]
        whole = served.ask(messages, rid="whole")
        records = served.records("whole")
        assert records[-1].seq_len == len(whole.prompt_ids)
        assert {(r.sparse_layers, r.dense_reason) for r in records} == {(LAYERS, None)}
        assert min(r.density for r in records) < 0.8
        again = served.ask(messages, rid="again")
        assert again.cached_tokens > 8 * 196
        assert compare(whole, again).max_difference < ROUNDING
    finally:
        served.server.stop()
