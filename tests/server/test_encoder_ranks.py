"""A DP vision encoder: every rank encodes its share of one long video, and answers are those of transformers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import encoder_probe
from families_served import FAMILY_SERVERS, family_server
from serving import ROUNDING, Message, Served, assistant, image, same, serve, text, user, video
from sglang_mminfer import settings
from sglang_mminfer.tools.media import make_image, make_video

FRAMES, HEIGHT, WIDTH = 20, 64, 96

Start = Callable[[str, str], tuple[Served, Path]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a family's server of two ranks, with the mends of a setting. Returns it and what its encoders tell."""
    started: list[Served] = []

    def started_with(family: str, mends: str) -> tuple[Served, Path]:
        told = tmp_path / "encoders.jsonl"
        model, flags = family_server(f"{family}_2_ranks", tmp_path)
        environment = {
            "PYTHONPATH": encoder_probe.install(tmp_path / "probe"),
            **{encoder_probe.FILE: str(told), settings.MENDS.variable: mends},
        }
        served = serve(tmp_path, model, (*flags, "--mm-enable-dp-encoder"), environment)
        started.append(served)
        served.server.start()
        told.unlink(missing_ok=True)  # what SGLang encodes to warm up
        return served, told

    yield started_with
    for served in started:
        served.server.stop()


def conversation(folder: Path) -> list[Message]:
    film = make_video(folder / "long.mp4", FRAMES, WIDTH, HEIGHT, 2, seed=1)
    picture = make_image(folder / "a.png", WIDTH, HEIGHT, seed=2)
    return [user(video(film), image(picture), text("What do you see?"))]


def patches_of(told: Path) -> Counter[int]:
    """Patches that each rank encoded."""
    seen: Counter[int] = Counter()
    for line in told.read_text().splitlines():
        one = json.loads(line)
        seen[one["rank"]] += one["patches"]
    return seen


@pytest.mark.parametrize("family", ["qwen3_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.wide)])
def test_a_video_is_encoded_on_all_ranks(start: Start, tmp_path: Path, family: str) -> None:
    served, told = start(family, "all")
    kind, _ = FAMILY_SERVERS[family]
    oracle = kind.oracle(tmp_path / "model", dict(kind.video_options))
    messages = conversation(tmp_path)
    expected = oracle.answer(messages)
    same(expected, served.ask(messages, len(expected.token_ids)), ROUNDING)
    seen = patches_of(told)
    assert set(seen) == {0, 1} and max(seen.values()) < 0.7 * seen.total(), seen
    messages = [*messages, assistant(expected.text), user(text("And then?"))]
    expected = oracle.answer(messages)
    same(expected, served.ask(messages, len(expected.token_ids)), ROUNDING)


@pytest.mark.wide
def test_without_the_mend_one_rank_encodes_it(start: Start, tmp_path: Path) -> None:
    served, told = start("qwen3_vl", "-video_over_ranks")
    served.ask(conversation(tmp_path), 1)
    seen = patches_of(told)
    assert max(seen.values()) > 0.9 * seen.total(), seen
