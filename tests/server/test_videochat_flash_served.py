"""VideoChat-Flash in real servers: both towers, answers as its oracle gives them, whatever the chunks and the cache."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import ROUNDING, Served, assistant, image, text, user, video

from sglang_mminfer import ModalityMap, Segment, VisionGrid, head_configs
from sglang_mminfer.evaluation.families import videochat_flash
from sglang_mminfer.evaluation.hf_oracle import Message, OracleAnswer, compare
from sglang_mminfer.evaluation.media import make_image, make_video
from sglang_mminfer.evaluation.server import Server
from sglang_mminfer.trace import ENVIRONMENT as TRACE
from sglang_mminfer.trace import map_of_entries

VIDEO = {"min_frames": 4, "max_frames": 16}
CLIP = 64

# A clip is cut by the chunks of both. The second server has no cached prefixes, all patterns that cover everything,
# and the model type of the one released checkpoint that has another.
SERVERS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "umt-large": ({}, ("--mminfer-config", "test_covering", "--chunked-prefill-size", "72", "--log-level", "debug")),
    "internvideo2": (
        {"model_type": "qwen2"},
        ("--mminfer-config", "{mixed}", "--chunked-prefill-size", "200", "--disable-radix-cache"),
    ),
}

Dialogue = list[tuple[list[Message], OracleAnswer]]


@pytest.fixture(scope="module", params=SERVERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields: dict[str, Any] = SERVERS[kind][0]
    return videochat_flash.make(tmp_path_factory.mktemp("videochat") / kind, mm_vision_tower=kind, **fields)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("media")
    (root / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    return {
        "long": make_video(root / "long.mp4", 100, 112, 84, 8, seed=1),  # 12.5 s: three clips
        "short": make_video(root / "short.mp4", 24, 64, 96, 8, seed=2),  # 3 s, portrait: one clip
        "still": make_video(root / "still.mp4", 1, 96, 64, 8, seed=3),
        "broken": root / "broken.mp4",
        "wide": make_image(root / "wide.png", 300, 120, seed=4),
        "small": make_image(root / "small.png", 200, 250, seed=5),
    }


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> videochat_flash.VideoChatFlashOracle:
    return videochat_flash.VideoChatFlashOracle(checkpoint, VIDEO)


@pytest.fixture(scope="module")
def dialogue(oracle: videochat_flash.VideoChatFlashOracle, files: dict[str, Path]) -> Dialogue:
    """Four turns of two videos and two pictures, each with the oracle's answers before it."""
    messages: list[Message] = []
    held = []
    for turn in (
        user(video(files["long"]), text("What do you see in the video?")),
        user(text("And now?")),
        user(image(files["wide"]), text("Compare both."), image(files["small"])),
        user(text("Tell me more."), video(files["short"]), text("Where did it go?")),
    ):
        messages = [*messages, turn]
        answer = oracle.answer(messages)
        held.append((messages, answer))
        messages = [*messages, assistant(answer.text)]
    return held


@pytest.fixture(scope="module")
def server(kind: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("server")
    mixed = json.loads((Path(head_configs.__file__).parent / "test_covering_mixed.json").read_text())
    (root / "mixed.json").write_text(json.dumps(mixed).replace('"row"', '"frame"'))
    flags = [flag.format(mixed=root / "mixed.json") for flag in SERVERS[kind][1]]
    options = ["--attention-backend", "mminfer", "--sleep-on-idle", "--mm-process-config", json.dumps({"video": VIDEO})]
    env = {TRACE: str(root / "trace.jsonl")}
    with Server(checkpoint, *options, *flags, env=env, log=root / "log", timeout=400) as started:
        yield Served(started, root / "trace.jsonl")


def assert_equal(expected: OracleAnswer, got: OracleAnswer) -> None:
    result = compare(expected, got)
    assert result.prompt_equal and result.tokens_equal and result.max_difference < ROUNDING, str(result)
    assert result.compared_positions == len(expected.token_ids)


def test_four_turns(
    kind: str, server: Served, dialogue: Dialogue, oracle: videochat_flash.VideoChatFlashOracle
) -> None:
    known, fill = 0, oracle.fill
    for turn, (prompt, expected) in enumerate(dialogue):
        rid = f"turn-{turn}"
        got = server.ask(prompt, rid=rid)
        assert_equal(expected, got)
        records = server.records(rid)
        assert {(r.sparse_layers, r.dense_reason) for r in records} == {(2, None)}
        assert sum(r.chunk_len for r in records) == len(got.prompt_ids) - (got.cached_tokens or 0)
        assert max(r.chunk_len for r in records) <= int(SERVERS[kind][1][3])
        if kind == "umt-large":
            assert (got.cached_tokens or 0) >= known
        assert map_of_entries(records[-1].map or ()) == map_from_ids(prompt, got.prompt_ids, fill)
        known = len(got.prompt_ids)
    if kind == "umt-large":  # clips of both videos, and of each picture the whole and its tiles
        assert (
            sum(map(int, re.findall(r"mminfer: (\d+) items go through the vision tower", server.server.log())))
            == 3 + 2 + 2 + 1
        )


def test_all_turns_at_once(server: Served, dialogue: Dialogue) -> None:
    server.server.flush_cache()
    answers = server.ask_all([prompt for prompt, _ in dialogue])
    for (_, expected), got in zip(dialogue, answers):
        assert_equal(expected, got)


def test_odd_files(
    server: Served, oracle: videochat_flash.VideoChatFlashOracle, files: dict[str, Path], dialogue: Dialogue
) -> None:
    """A video of one frame is a clip of it four times; a file that is none is the client's error and nobody else's."""
    still = [user(video(files["still"]), text("Who?"))]
    assert_equal(oracle.answer(still), server.ask(still))
    for broken in (video(files["broken"]), image(files["broken"])):
        with pytest.raises(openai.BadRequestError):
            server.ask([user(broken, text("What is this?"))])
    assert_equal(dialogue[0][1], server.ask(dialogue[0][0]))


def map_from_ids(prompt: Sequence[Message], ids: list[int], fill: int) -> ModalityMap:
    """The map as the runs of one repeated id and the kinds of media in the messages say it."""
    kinds = [part["type"] for m in prompt if not isinstance(m["content"], str) for part in m["content"]]
    media = iter(kind for kind in kinds if kind != "text")
    segments = []
    for run in re.finditer(r"(f+)|(t+)", "".join("f" if i == fill else "t" for i in ids)):
        start, stop = run.span()
        if run.group(2):
            segments.append(Segment("text", start, stop))
        elif next(media) == "video_url":
            starts = tuple(range(start, stop, CLIP))
            segments.append(Segment("video", start, stop, VisionGrid(len(starts), 1, CLIP, starts, raster=False)))
        else:
            for a, b in ((start, start + CLIP), (start + CLIP, stop)):
                segments.append(Segment("image", a, b, VisionGrid(1, 1, b - a, (a,), raster=False)))
    assert next(media, None) is None
    return ModalityMap(segments)
