"""The wheel in an environment of its own, without the extras: the doctor, the commands, and a server.

The environment has links to what is installed here, as far as the wheel requires it. With MMINFER_FRESH=1 pip installs
all of it anew, which takes minutes and 11 GB.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import urllib.request
from pathlib import Path

import pytest

import wheels
from config_files import config_file
from sglang_mminfer import cli, settings
from sglang_mminfer.serving.trace import read_trace
from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl
from sglang_mminfer.tools.media import make_image
from sglang_mminfer.tools.server import Server

FRESH = os.environ.get("MMINFER_FRESH", "") not in ("", "0")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    return wheels.install(wheels.build(folder), folder / "environment", fresh=FRESH)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2_5_vl(tmp_path_factory.mktemp("model") / "tiny")


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command outside the checkout, in an environment that does not lead to it."""
    return subprocess.run(
        [str(word) for word in command],
        cwd="/",
        env=wheels.environment(HF_HUB_OFFLINE="1", **variables),
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_package_is_the_installed_one_and_the_extras_are_not_there(python: Path) -> None:
    program = f"""
import json
from importlib.util import find_spec
import sglang_mminfer
extras = {(*cli.TOOLS, "pytest", "hypothesis", "av")!r}
print(json.dumps([sglang_mminfer.__file__, [name for name in extras if find_spec(name)]]))
"""
    done = run(python, "-c", program)
    assert done.returncode == 0, done.stderr
    home, there = json.loads(done.stdout)
    assert Path(home).is_relative_to(python.parents[1])
    # SGLang itself brings some of them.
    assert not {"matplotlib", "imageio_ffmpeg", "pytest", "hypothesis"} & set(there)


def test_the_doctor(python: Path, model: Path) -> None:
    done = run(python.with_name("mminfer"), "doctor", "--model-path", model, "--json")
    found = json.loads(done.stdout)
    wrong = [finding for finding in found["findings"] if finding["status"] == "error"]
    assert (done.returncode, wrong) == (0, []), done.stderr[-3000:]
    by_name = {(finding["section"], finding["name"]): finding["text"] for finding in found["findings"]}
    assert "targets are there" in by_name["plugin", "hooks"]


def test_the_doctor_without_colour(python: Path) -> None:
    """`rich` is of the extra, but comes with SGLang as well, today."""
    done = run(
        python,
        "-c",
        "import sys; sys.modules['rich'] = None\nfrom sglang_mminfer import cli\nsys.exit(cli.main(['doctor']))",
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-1] == "All that is needed is fine." and any("targets are there" in line for line in lines)


def test_a_command_of_the_extra_says_what_to_install(python: Path) -> None:
    assert run(python.with_name("mminfer"), "inspect", "--help").returncode == 0
    done = run(python.with_name("mminfer"), "inspect", "--trace", "x")
    assert done.returncode == 1 and done.stderr == (
        "mminfer inspect: error: needs imageio_ffmpeg, matplotlib, not installed here: "
        "pip install 'sglang-mminfer[tools]'\n"
    )


def test_a_server_answers_a_question_about_a_picture(python: Path, model: Path, tmp_path: Path) -> None:
    picture = make_image(tmp_path / "picture.png", 224, 168, seed=1)
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    trace = tmp_path / "trace.jsonl"
    environment: dict[str, str | None] = {name: None for name in os.environ}
    environment |= wheels.environment(**{settings.TRACE.variable: str(trace), settings.SPARSE.variable: "always"})
    server = Server(
        model,
        *("--attention-backend", "mminfer", "--mminfer-config", config_file("test_grid_frame")),
        env=environment,
        log=tmp_path / "server.log",
    )
    server.command[0] = str(python)
    with server:
        request = urllib.request.Request(
            f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as answer:
            (choice,) = json.load(answer)["choices"]
    assert choice["finish_reason"] in ("length", "stop") and choice["message"]["content"] is not None
    records = list(read_trace(trace))
    assert any(record.sparse_layers and record.dense_reason is None for record in records), records
