"""Every family of `evaluation.families`, served for real: answers as its oracle's, and sparse where the prompt is long.

One server and one head config for each: patterns and boundaries of every kind whose windows cover REACH tokens. A
prompt that is shorter is computed on the sparse path and answers as dense attention does; a longer one is sparse.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving import ROUNDING, Message, Served, assistant, image, text, user, video

from sglang_mminfer.evaluation.families import FAMILIES, Family
from sglang_mminfer.evaluation.hf_oracle import OracleAnswer, compare
from sglang_mminfer.evaluation.media import make_image, make_video
from sglang_mminfer.evaluation.server import Server
from sglang_mminfer.trace import ENVIRONMENT as TRACE

REACH = 2432
CHUNK = 117
LAYERS = 2
EVERYTHING = 1 << 30


@dataclass(frozen=True)
class Running:
    """A family's server, its oracle, and what both are shown."""

    family: Family
    served: Served
    oracle: Any
    images: tuple[Path, ...]
    videos: tuple[Path, ...]
    long_video: Path

    def ask(self, messages: list[Message], rid: str) -> OracleAnswer:
        """The server's answer, held against the oracle's and against its own account of it."""
        expected = self.oracle.answer(messages)
        got = self.served.ask(messages, rid=rid)
        assert len(got.prompt_ids) + len(got.token_ids) <= REACH, "longer than what the config covers"
        result = compare(expected, got)
        assert result.prompt_equal and result.tokens_equal and result.max_difference < ROUNDING, str(result)
        assert result.compared_positions == len(expected.token_ids)
        records = self.served.records(rid)
        assert {(r.sparse_layers, r.dense_reason) for r in records} == {(LAYERS, None)}
        assert sum(r.chunk_len for r in records) == len(got.prompt_ids) - (got.cached_tokens or 0)
        longest = max(r.chunk_len for r in records)
        assert longest <= CHUNK if self.family.chunked_prefill else len(records) == 1
        return got

    def rasters(self, rid: str) -> list[str]:
        """The modalities of the segments that have a raster."""
        # Without M-RoPE a chunk of text behind the last medium looks like the last one, so there may be several.
        found = [r.map for r in self.served.records(rid) if r.map]
        return [entry.modality for entry in found[-1] if entry.grid is not None]


def write_config(path: Path) -> Path:
    """The covering config of all patterns, with windows of REACH tokens."""
    from sglang_mminfer import head_configs

    covering = (Path(head_configs.__file__).parent / "test_covering_mixed.json").read_text()
    config = json.loads(covering.replace(str(EVERYTHING), str(REACH)))
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    family: Family = request.param
    root = tmp_path_factory.mktemp(family.name)
    path = family.make(root / "model")
    assert json.loads((path / "config.json").read_text())["architectures"] == [family.architecture]
    trace = root / "trace.jsonl"
    flags = [
        *("--attention-backend", "mminfer", "--mminfer-config", str(write_config(root / "heads.json"))),
        *("--sleep-on-idle", "--chunked-prefill-size", str(CHUNK), *family.flags),
    ]
    frames, width, height, fps = family.long_video
    server = Server(path, *flags, env={TRACE: str(trace)}, log=root / "server.log", timeout=400)
    with server:
        yield Running(
            family,
            Served(server, trace),
            family.make_oracle(path),
            images=(make_image(root / "a.png", 256, 64, seed=1), make_image(root / "b.png", 64, 256, seed=2)),
            videos=(
                make_video(root / "a.mp4", 12, 128, 96, 4, seed=1),
                make_video(root / "b.mp4", 8, 96, 128, 4, seed=2),
            ),
            long_video=make_video(root / "long.mp4", frames, width, height, fps, seed=3),
        )


def test_an_image(running: Running) -> None:
    running.ask([user(image(running.images[0]), text("What is this?"))], "image")
    assert running.rasters("image") == ["image"] * len(running.rasters("image")) != []


def test_a_video(running: Running) -> None:
    if not running.family.video:
        pytest.skip("this family is served without video")
    running.ask([user(video(running.videos[0]), text("What do you see in the video?"))], "video")
    assert running.rasters("video") == ["video"]


def test_several_videos_in_a_turn(running: Running) -> None:
    if not running.family.several_videos:
        pytest.skip("this family is served with one video in a prompt")
    first, second = running.videos
    running.ask([user(video(second), text("What?"), video(first), text("Compare both."))], "several")
    assert running.rasters("several") == ["video", "video"]


def test_every_turn_of_a_conversation(running: Running) -> None:
    family = running.family
    first, second = running.videos
    shown = video(first) if family.video else image(running.images[1])
    turns = [
        user(shown, text("What do you see in the video?")),
        user(text("And now?")),
        user(text("Is that so?"), image(running.images[0])),
        user(text("Tell me more."), *([video(second)] if family.several_videos else [image(running.images[1])])),
    ]
    messages: list[Message] = []
    known = 0
    for i, turn in enumerate(turns):
        messages = [*messages, turn]
        got = running.ask(messages, f"turn-{i}")
        if family.cached_turns:
            cached = got.cached_tokens or 0
            # The second image lays the first one out anew; what stands before it is found.
            assert 0 < cached < known if family.lone_image and i == 2 else cached >= known
            known = len(got.prompt_ids)
        else:
            assert not got.cached_tokens
        messages = [*messages, assistant(got.text)]


def test_a_long_prompt_is_sparse(running: Running) -> None:
    family = running.family
    media = [video(running.long_video)] * family.long_videos if family.video else [image(running.images[0])] * 8
    got = running.served.ask([user(*media, text("Where did it go?"))], rid="long")
    records = running.served.records("long")
    assert {(r.sparse_layers, r.dense_reason) for r in records} == {(LAYERS, None)}
    assert len(got.prompt_ids) > 1.2 * REACH
    assert records[-1].density is not None and records[-1].density < 0.9, records[-1]
    assert set(running.rasters("long")) == {"video" if family.video else "image"}


def test_nothing_failed_inside(running: Running) -> None:
    assert {r.dense_reason for r in running.served.records()} <= {None, "no_media"}
