"""`mminfer search` as a user runs it: the real server, a needle model, one small conversation, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sglang_mminfer import cli
from sglang_mminfer.evaluation.needles import media_files, task
from sglang_mminfer.evaluation.needles.checkpoint import MM_PROCESS_CONFIG
from sglang_mminfer.evaluation.server import Server
from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.search.tile_times import KINDS

MODEL = Path(__file__).parents[2] / "examples" / "needle_vlm" / "video"


def conversation(folder: Path, seed: int) -> Path:
    """Two videos of 48 pairs of frames and questions: 800 tokens."""
    made = task.video_conversation(48, 4, np.random.default_rng(seed), videos=1)
    messages = media_files.messages(made, folder / str(seed))
    path = folder / f"{seed}.json"
    path.write_text(json.dumps(messages[:-1]))
    return path


def searched(folder: Path, *more: str) -> tuple[int, Path]:
    out = folder / "found.json"
    code = cli.main(
        [
            *("search", str(MODEL), "--conversation", str(conversation(folder, 1)), "--out", str(out)),
            *("--held-out", str(conversation(folder, 2)), "--density", "0.7", *more),
            *("--server-args", "--mm-process-config", json.dumps(MM_PROCESS_CONFIG)),
        ]
    )
    return code, out


def test_a_config_and_a_report_come_out_and_a_second_run_measures_nothing_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = searched(tmp_path)
    said = capsys.readouterr().out
    assert code == 0
    config = HeadConfig.load(out)
    assert config.form == "layers" and (len(config.rows), len(config.rows[0])) == (3, 4)
    assert config.provenance.how == "search" and config.provenance.budget == "mean density 0.7"
    assert config.model is not None and config.model.heads == 4
    rows = [line for line in said.splitlines() if "searched" in line or "a_shape" in line or "dense" in line]
    assert len(rows) == 2 * 5, said  # two tables: searched (also at two more densities), a_shape, dense
    assert "Mind: No calibration input has an image" in said and "Mind: The longest calibration input" in said
    page = out.with_suffix(".html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page.split("<h1>")[0]

    details, kept = (
        config.provenance.details or {},
        json.loads((tmp_path / "found.search" / "tile_times.json").read_text()),
    )
    assert details["cost"] == "time" and details["tile_us"] == kept and min(kept[kind] for kind in KINDS) > 0
    assert f"full {kept['full']:g}" in said and f"full {kept['full']:g}" in page

    first = out.read_bytes()
    measured = sorted((tmp_path / "found.search").rglob("layer-*.json"))
    # Phases and candidates of two prompts' three layers, and the finalists on both.
    assert len(measured) == 3 * (1 + 1 + 1 + 1)
    times = {path: path.stat().st_mtime_ns for path in measured}
    monkeypatch.setattr(Server, "start", lambda server: pytest.fail("a server was started for nothing"))
    code, _ = searched(tmp_path)
    assert code == 0 and out.read_bytes() == first, "the same measurements gave another config"
    assert {path: path.stat().st_mtime_ns for path in measured} == times
    # What times decided, the same times decide again.
    (tmp_path / "found.search" / "tile_times.json").rename(tmp_path / "other.json")
    code, _ = searched(tmp_path, "--tile-times", str(tmp_path / "other.json"))
    assert code == 0 and out.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--video", "nowhere.mp4"], "nowhere.mp4: no such file"),
        ([], "expected at least one --video or --conversation"),
        (["--conversation", "{broken}"], "expected a JSON file with a list of OpenAI messages"),
        (["--conversation", "{good}", "--tile-times", "{broken}"], "broken.json: expected times of tile visits"),
        (["--conversation", "{good}", "--tile-times", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
    ],
)
def test_wrong_input_is_said_before_any_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{not json")
    (good := tmp_path / "good.json").write_text("[]")
    code = cli.main(["search", str(MODEL), *(a.format(broken=broken, good=good) for a in arguments)])
    assert code == 1 and words in " ".join(capsys.readouterr().err.split())
