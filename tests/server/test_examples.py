"""The programs in examples/ as a user runs them: their errors, and a real run of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving import Media
from sglang_mminfer.tools.server import Server

EXAMPLES = Path(__file__).parents[2] / "examples"
NOWHERE = "http://127.0.0.1:9/v1"  # the discard port, where nobody listens


def run(program: str, *arguments: str, keyboard: str = "", timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / program), *arguments],
        input=keyboard,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
    )


@pytest.mark.parametrize("program", ["video_chat.py", "engine_offline.py", "frontend_program.py"])
def test_help(program: str) -> None:
    done = run(program, "--help")
    assert done.returncode == 0
    assert "--video" in done.stdout


def test_chat_says_that_no_server_is_there() -> None:
    done = run("video_chat.py", "--url", NOWHERE, "--question", "And now?")
    assert done.returncode == 1
    assert done.stderr == f"error: no server at {NOWHERE}; start one with `sglang serve`, or name it with --url\n"


def test_program_says_that_no_server_is_there() -> None:
    url = NOWHERE.removesuffix("/v1")
    done = run("frontend_program.py", "--url", url, "--video", "a.mp4", "--image", "a.png")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no answer from {url}: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--video", "--image"])
def test_chat_looks_for_files_before_it_looks_for_a_server(option: str) -> None:
    done = run("video_chat.py", "--url", NOWHERE, option, "/nope", "--question", "hi")
    assert done.returncode == 2 and done.stderr.endswith(f"video_chat.py: error: {option}: /nope: no such file\n")


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--video", "text.mp4", "text.mp4: not a video that FFmpeg can decode"),
        ("--image", "text.mp4", "text.mp4: not an image that can be read"),
    ],
)
def test_chat_names_a_bad_file(option: str, name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("this is no video")
    arguments = (option, str(tmp_path / name), "--question", "What is this?")
    done = run("video_chat.py", "--url", NOWHERE, "--model", "any", *arguments)
    assert done.returncode == 1
    assert done.stderr.endswith(f"error: {tmp_path}/{message}\n")  # decoders print their own messages before it
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--video", "nothing.mp4"), "--video: nothing.mp4: no such file"),
        (("--head-config", "nothing.json"), "--head-config: nothing.json: no such file"),
    ],
)
def test_engine_refuses_before_it_starts(arguments: tuple[str, ...], message: str) -> None:
    done = run("engine_offline.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_engine_runs_sparse() -> None:
    done = run("engine_offline.py", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert "answer: " in done.stdout
    assert "4 layers sparse" in done.stdout


def test_chat_with_a_server(model: Path, media: Media) -> None:
    video, image = str(media.videos[0]), str(media.images[0])
    with Server(model, "--attention-backend", "mminfer", "--enable-cache-report") as server:
        common = ("--url", f"{server.url}/v1", "--max-tokens", "4")
        asked = ("--video", video, "--question", "What is this?", "--image", image, "--question", "And now?")
        done = run("video_chat.py", *common, *asked)
        assert done.returncode == 0, done.stderr
        assert "[a.mp4: 24 frames, 3.0 s, 112 x 112," in done.stdout
        costs = [line for line in done.stdout.splitlines() if "prompt tokens" in line]
        assert len(costs) == 2
        assert "; first token after " in costs[0]
        # The cache holds the first prompt except its last token, which SGLang always computes again.
        first, cached = (int(costs[turn].split()[at].strip("[,").replace(",", "")) for turn, at in ((0, 0), (1, 3)))
        assert cached >= first - 1

        typed = run("video_chat.py", *common, keyboard=f"/video nothing.mp4\n/video {video}\nWhat is this?\n/quit\n")
        assert typed.returncode == 0, typed.stderr
        assert "error: nothing.mp4: cannot be read" in typed.stdout
        assert typed.stdout.count("prompt tokens") == 1

        asked_by_program = ("--url", server.url, "--max-tokens", "4", "--image", image, "--video")
        program = run("frontend_program.py", *asked_by_program, video)
        assert program.returncode == 0, program.stderr
        costs = [line for line in program.stdout.splitlines() if "prompt tokens" in line]
        first, cached = (int(costs[turn].split()[at].strip("[").replace(",", "")) for turn, at in ((0, 0), (1, 3)))
        assert cached >= first - 1 and program.stdout.count("?") == 2
        wrong = run("frontend_program.py", *asked_by_program, "nothing.mp4")
        assert wrong.returncode == 1
        assert wrong.stderr.endswith("error: nothing.mp4: cannot be read: No such file or directory\n")

        missing = run("video_chat.py", *common, "--model", "no-such", "--video", video, "--question", "Why?")
        assert missing.returncode in (0, 1)  # SGLang may answer whatever model is named
        assert "Traceback" not in missing.stderr


def test_the_demo_tells_a_good_config_from_a_bad_one(tmp_path: Path) -> None:
    # Two of its four servers, which start side by side: all four would add nothing but time.
    done = run("demo/demo.py", "--servers", "searched", "a_shape", "--out", str(tmp_path), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    asked = len(figures["turns"])
    assert figures["right"]["searched"] == asked > figures["right"]["a_shape"]
    wrong = asked - figures["right"]["a_shape"]
    assert done.stdout.count("WRONG") == 2 * wrong  # a line as soon as it is known, and a cell of the table
    assert "FAILED" not in done.stdout
    last = figures["turns"][-1]["answers"]["searched"]
    assert last["prompt_tokens"] > 8000 and last["cached_tokens"] > 0.9 * last["prompt_tokens"]
    assert all(0 < turn["answers"][name]["density"] < 0.9 for turn in figures["turns"] for name in figures["servers"])
    conversation = json.loads((tmp_path / "conversation.json").read_text())
    assert len(conversation) == 2 * asked and conversation[-1]["content"] == figures["turns"][-1]["right"]
    assert (tmp_path / "conversation.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_names_what_it_does_not_know(tmp_path: Path) -> None:
    done = run("demo/demo.py", "--servers", "fast", "--out", str(tmp_path))
    assert done.returncode == 2 and "--servers" in done.stderr and "a_shape" in done.stderr
    done = run("demo/demo.py", "--tokens", "100", "--out", str(tmp_path))
    assert done.returncode == 1 and "lengths: expected 512 to" in done.stdout and "Traceback" not in done.stderr
