"""`mminfer search` as a user runs it: a real server, a needle model, one small conversation, and the results."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sglang_mminfer import cli
from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.tools.needles import media_files, task
from sglang_mminfer.tools.needles.media_files import MM_PROCESS_CONFIG
from sglang_mminfer.tools.search.tile_times import KINDS
from sglang_mminfer.tools.server import Server

MODEL = Path(__file__).parents[2] / "examples" / "needle_vlm" / "video"


def conversation(folder: Path, seed: int) -> Path:
    """The file of a conversation of 800 tokens: 48 pairs of frames, and questions."""
    made = task.video_conversation(48, 4, np.random.default_rng(seed), videos=1)
    messages = media_files.messages(made, folder / str(seed))
    path = folder / f"{seed}.json"
    path.write_text(json.dumps(messages[:-1]))
    return path


@dataclass(frozen=True)
class Search:
    """A finished search: its exit status, the file of its config, and what it printed."""

    code: int
    out: Path
    said: str

    @property
    def work(self) -> Path:
        return self.out.with_suffix(".search")


def searched(folder: Path, *more: str, name: str = "found", server: tuple[str, ...] = ()) -> Search:
    out, said = folder / f"{name}.json", io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cli.main(
            [
                *("search", "--model-path", str(MODEL), "--out", str(out)),
                *("--conversation", str(conversation(folder, 1))),
                *("--held-out", str(conversation(folder, 2)), "--density", "0.7", *more),
                *("--server-flags", shlex.join(["--mm-process-config", json.dumps(MM_PROCESS_CONFIG), *server])),
            ]
        )
    return Search(code, out, said.getvalue())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Search:
    return searched(tmp_path_factory.mktemp("search"))


def test_a_config_and_a_report_come_out(first: Search) -> None:
    assert first.code == 0
    config = HeadConfig.load(first.out)
    assert config.form == "layers" and (len(config.rows), len(config.rows[0])) == (3, 4)
    assert config.provenance.how == "search" and config.provenance.budget == "mean density 0.7"
    assert config.model is not None and config.model.heads == 4
    rows = [line for line in first.said.splitlines() if "searched" in line or "a_shape" in line or "dense" in line]
    assert len(rows) == 2 * 5, first.said  # two tables; each has searched (at three densities), a_shape and dense
    assert "Mind: No calibration input has an image" in first.said
    assert "Mind: The longest calibration input" in first.said
    page = first.out.with_suffix(".html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page.split("<h1>")[0]
    details, times = config.provenance.details or {}, json.loads((first.work / "tile_times.json").read_text())
    assert details["cost"] == "time" and details["tile_us"] == times and min(times[kind] for kind in KINDS) > 0
    assert f"full {times['full']:g}" in first.said and f"full {times['full']:g}" in page


def test_a_second_run_measures_nothing_again(first: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = first.out.read_bytes(), first.out.parent
    measured = sorted(first.work.rglob("layer-*.json"))
    # Three layers: phases and candidates, and the finalists on both prompts.
    assert len(measured) == 3 * (1 + 1 + 1 + 1)
    times = {path: path.stat().st_mtime_ns for path in measured}
    monkeypatch.setattr(Server, "start", lambda server: pytest.fail("a server was started for nothing"))
    again = searched(folder, "--json")
    assert again.code == 0 and again.out.read_bytes() == config, "the same measurements gave another config"
    told = json.loads(again.said)
    assert told["config"] == str(again.out) and len(told["calibration"]) == len(told["held_out"]) == 5
    assert {path: path.stat().st_mtime_ns for path in measured} == times
    # The same tile times give the same config.
    kept = (first.work / "tile_times.json").rename(folder / "other.json")
    again = searched(folder, "--tile-times", str(kept))
    assert again.code == 0 and again.out.read_bytes() == config
    kept.rename(first.work / "tile_times.json")


def test_two_ranks_in_little_memory_find_the_same_config(first: Search) -> None:
    """Each rank measures its own heads; with little memory it measures them one after the other."""
    more = ("--tile-times", str(first.work / "tile_times.json"), "--max-memory", "0.03")
    found = searched(first.out.parent, *more, name="ranks", server=("--tp-size", "2"))
    assert found.code == 0
    assert len(sorted(found.work.rglob("layer-*-rank-01.json"))) == 3 * (1 + 1 + 1 + 1)
    one, two = HeadConfig.load(first.out), HeadConfig.load(found.out)
    assert two.rows == one.rows
    measured = [
        dict(sorted((path.parent.name, path) for path in s.work.rglob("layer-000-rank-00.json")))
        for s in (first, found)
    ]
    assert set(measured[0]) == set(measured[1])
    for name, path in measured[0].items():
        if "phases" in name:
            continue
        whole = json.loads(path.read_text())
        ranks = [json.loads(p.read_text()) for p in sorted((found.work / name).glob("layer-000-rank-*.json"))]
        joined = np.concatenate([np.array(rank["error"], dtype=float) for rank in ranks], axis=1)
        assert joined.shape[1] == 4 and np.array(ranks[0]["error"]).shape[1] == 2
        np.testing.assert_allclose(joined, np.array(whole["error"], dtype=float), rtol=1e-3, atol=1e-5)


def test_too_little_memory_is_said_and_leaves_no_result(first: Search, capsys: pytest.CaptureFixture[str]) -> None:
    found = searched(first.out.parent, "--max-memory", "0.0001", name="little")
    assert found.code == 1 and not found.out.exists() and not list(found.work.rglob("layer-*.json"))
    said = " ".join(capsys.readouterr().err.split())
    assert "--max-memory: expected at least 0.0" in said and "GiB for one head of 827 tokens, got 0.00" in said


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (["--video", "nowhere.mp4"], "--video: nowhere.mp4: no such file", 2),
        ([], "expected at least one --video or --conversation", 2),
        (["--conversation", "{broken}"], "expected a JSON file with a list of OpenAI messages", 1),
        (["--conversation", "{good}", "--tile-times", "{broken}"], "broken.json: expected times of tile visits", 1),
        (["--conversation", "{good}", "--tile-times", "nowhere.json"], "--tile-times: nowhere.json: no such file", 2),
    ],
)
def test_wrong_input_is_said_before_any_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str, status: int
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{not json")
    (good := tmp_path / "good.json").write_text("[]")
    code = cli.main(["search", "--model-path", str(MODEL), *(a.format(broken=broken, good=good) for a in arguments)])
    assert code == status and words in " ".join(capsys.readouterr().err.split())
