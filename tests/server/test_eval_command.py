"""`mminfer eval` from end to end: lmms-eval, needle videos, and a needle model on real servers.

Skipped where lmms-eval is not installed; `make test-eval` installs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_mminfer import cli, settings
from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.tools.evaluation import lmms
from sglang_mminfer.tools.needles.kits import GLYPHS
from sglang_mminfer.tools.niah.ask import mm_process_flags
from sglang_mminfer.tools.server import Server
from sglang_mminfer.tools.telemetry import Telemetry

try:
    lmms.find(None)
except lmms.LmmsError as error:
    pytest.skip(str(error), allow_module_level=True)

EXAMPLES = Path(__file__).parents[2] / "examples" / "needle_vlm"
VIDEO, SEARCHED = EXAMPLES / "video", EXAMPLES / "results" / "searched_video.json"


def evaluated(out: Path, *words: str) -> dict[str, Any]:
    assert cli.main(["eval", *words, "--needles", "glyphs", "--concurrency", "2", "--out", str(out)]) == 0
    return json.loads((out / "eval.json").read_text())


def a_shape(folder: Path, local: int) -> Path:
    """An A-shape whose window is small beside the videos of this test."""
    config = json.loads(HeadConfig.load("baseline_a_shape").to_json())
    config["heads"]["all"]["pattern"] = {"kind": "a_shape", "sink": 64, "local": local}
    path = folder / "a_shape.json"
    path.write_text(json.dumps(config))
    return path


def test_the_statistics_tell_a_shape_from_a_searched_config(tmp_path: Path) -> None:
    grid = ("--tasks", "v-niah", "v-relay", "--lengths", "2048", "--depths", "6", "--seeds", "8")
    configs = ("--mminfer-config", str(SEARCHED), str(a_shape(tmp_path, 256)))
    result = evaluated(tmp_path / "out", "--model-path", str(VIDEO), *configs, *grid)
    assert list(result["configs"]) == ["dense", "searched_video", "a_shape"]
    searched, window = (result["compared"]["configs"][name] for name in ("searched_video", "a_shape"))
    assert [found["questions"] for found in (*searched, *window)] == [48] * 4
    assert all(found["videos"] == 8 for found in searched)
    assert [found["verdict"] for found in window] == ["no", "no"]
    assert all(found["holm"] < 0.05 and found["high"] < -0.1 for found in window)
    assert all(found["verdict"] != "no" and found["low"] > -0.2 for found in searched)
    for name, config in result["configs"].items():
        figures = config["figures"]
        assert figures["requests"] == figures["sent"] == 96 and 2048 <= figures["prompt_tokens"] < 2200
        assert figures["cached_share"] > 0.5, "questions about a video share it"
        assert (figures["density"] == 1.0) == (name == "dense") and figures["forward_ms"] > 0
    page = (tmp_path / "out" / "eval.md").read_text()
    assert "Compared with dense:" in page and "| a_shape | V-NIAH, relays | 48 | 8 |" in page
    assert (tmp_path / "out" / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_a_conversation_resumes_without_a_request(tmp_path: Path) -> None:
    flags = ("--attention-backend", "mminfer", "--enable-cache-report", *mm_process_flags(GLYPHS))
    with Server(VIDEO, *flags, env={settings.SPARSE.variable: "always"}, log=tmp_path / "log") as server:
        words = ("--url", f"running={server.url}", "--tasks", "v-niah", "--conversation")
        words += ("--lengths", "1024", "--depths", "4", "--seeds", "2")
        first = evaluated(tmp_path / "out", *words)["configs"]["running"]
        assert first["figures"]["sent"] == 8
        by_turn = first["figures"]["cached_share_by_turn"]
        assert list(by_turn) == ["0", "1", "2", "3"] and by_turn["0"] < 0.1
        assert all(by_turn[turn] > 0.95 for turn in "123"), "later turns have the video in their history"
        assert sum(first["scores"]["mminfer_v_niah"]["score"].values()) >= 7
        counted = sum(Telemetry(server.url).server().counters.requests.values())
        (tmp_path / "out" / "eval.json").unlink()
        again = evaluated(tmp_path / "out", *words)["configs"]["running"]
        assert sum(Telemetry(server.url).server().counters.requests.values()) == counted
    assert again["scores"] == first["scores"]
    assert again["figures"] == {**first["figures"], "sent": 0}
