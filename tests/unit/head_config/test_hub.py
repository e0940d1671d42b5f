"""Head configs on the hub, against a stand-in of its HTTP interface and the real client with its real cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fake_hub import TOKEN, FakeHub
from sglang_mminfer import HeadConfig, cli, settings
from sglang_mminfer.head_config import HeadConfigError, ModelBasis, ModelFingerprint, Provenance
from sglang_mminfer.serving import flags, head_config_choice

HANDWRITTEN = {"provenance": {"how": "handwritten", "note": "For a test."}, "defaults": {"dense_below": 0}}


def config_text(local: int) -> bytes:
    heads = {"all": {"boundary": "none", "pattern": {"kind": "a_shape", "sink": 64, "local": local}}}
    return json.dumps({"schema": 1, "model": None, **HANDWRITTEN, "heads": heads}).encode()


def basis_bytes(tmp_path: Path) -> bytes:
    import torch

    model = ModelFingerprint("X", 1, 2, 1, 4, 8, 1e4)
    moments = torch.eye(4, dtype=torch.float64).expand(1, 2, 4, 4)
    how = Provenance("calibration", "For a test.", calibration="none", date="2026-11-26")
    ModelBasis.of_moments(model, how, moments, moments[:, :1], 2).save(path := tmp_path / "x.basis.npz")
    return path.read_bytes()


LOADS = """
import json, sys
from sglang_mminfer.head_config import HeadConfig, HeadConfigError
for name in sys.argv[1:]:
    try:
        config = HeadConfig.load(name)
        print(json.dumps([config.path, config.rows[0][0].local, config.basis is not None, config.describe()]))
    except HeadConfigError as error:
        print(json.dumps(str(error)))
"""


def loaded(environment: dict[str, str], *names: str) -> list:
    """What a fresh process loads: path, window, whether there is a basis, description; or the error."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *names], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", '"'))]


def test_a_config_of_the_hub_and_what_is_wrong_with_others(tmp_path: Path) -> None:
    with FakeHub() as hub:
        first = hub.commit("me/heads", {"mine.json": config_text(128), "deep/er/a b.json": config_text(1)})
        second = hub.commit("me/heads", {"mine.json": config_text(256), "mine.basis.npz": basis_bytes(tmp_path)})
        hub.commit(
            "me/broken", {"broken.json": b'{"heads": {"all": {"boundary": "none", "pattern": {"kind": "gird"}}}}'}
        )
        online = hub.environment(str(tmp_path / "cache"))
        last, old, deep, *errors = loaded(
            online,
            *("hf://me/heads/mine.json", f"hf://me/heads@{first}/mine.json", "hf://me/heads/deep/er/a b.json"),
            *("hf://me/broken/broken.json", "hf://me/heads/none.json", "hf://me/none/mine.json"),
            *("hf://me/heads@v9/mine.json", "hf://mine.json", "hf://me/heads/../mine.json"),
        )
        asked = len(hub.requests)
        # A commit in the cache is asked of nobody, not even whether it is there.
        assert loaded(online, f"hf://me/heads@{second}/mine.json") == [last] and len(hub.requests) == asked
    assert last[:3] == [f"hf://me/heads@{second}/mine.json", 256, True]
    assert f"mine from hf://me/heads@{second}/mine.json (any model, handwritten)" in last[3]  # as in the server's log
    assert old[:3] == [f"hf://me/heads@{first}/mine.json", 128, False] and deep[1] == 1
    for error, words in zip(errors, [
        "hf://me/broken@", "the repository has no file none.json", "the hub has no such repository",
        "the repository has no revision v9", "expected hf://owner/repo", "expected hf://owner/repo",
    ], strict=True):  # fmt: skip
        assert words in error
    # The hub is gone: the cache serves the branch as it was, with its basis, and says what it does not have.
    for offline in (online, {**online, "HF_HUB_OFFLINE": "1"}):
        same, unknown = loaded(offline, "hf://me/heads/mine.json", "hf://me/other/mine.json")
        assert same == last
        assert "not in the cache, and the hub cannot be reached or asked" in unknown


def test_ranks_load_the_commit_that_the_launcher_saw() -> None:
    server_args = SimpleNamespace()
    config = HeadConfig.from_json(config_text(128).decode())
    head_config_choice.pin(server_args, config)
    assert not hasattr(server_args, flags.CONFIG_ATTRIBUTE)
    pinned = "hf://me/heads@0123/mine.json"
    object.__setattr__(config, "path", pinned)
    head_config_choice.pin(server_args, config)
    assert head_config_choice.resolve(server_args).name == pinned


def test_a_name_that_is_none_is_wrong_before_anything_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HeadConfigError, match="expected hf://owner/repo"):
        HeadConfig.load("hf://x.json")
    assert cli.main(["niah", "--model-path", "m", settings.CONFIG.flag, "hf://x.json"]) == 2
    assert "--mminfer-config: hf://x.json: expected hf://owner/repo[@revision]/path" in capsys.readouterr().err


PUSHES = """
import sys
from pathlib import Path
import pushed
from sglang_mminfer.tools.search import publish
publish.check_login("me/found")
folder = Path(sys.argv[1])
result = pushed.result()
result.config.save(folder / "found.json")
(folder / "found.html").write_text("<p>pictures</p>")
print(publish.push(result, folder / "found.json", folder / "found.html", "me/found"))
"""


def test_a_searched_config_goes_up_with_a_card_and_comes_down_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUSHES, str(tmp_path)]
    with FakeHub() as hub:
        helpers = str(Path(__file__).parents[2] / "helpers")
        online = {**os.environ, **hub.environment(str(tmp_path / "cache"), HF_TOKEN=TOKEN, PYTHONPATH=helpers)}
        done = subprocess.run(command, capture_output=True, text=True, env=online)
        assert done.returncode == 0, done.stderr
        name = done.stdout.splitlines()[-1]
        [(commit, files)] = hub.repos["me/found"]
        assert name == f"hf://me/found@{commit}/found.json"
        assert set(files) == {"found.json", "found.html", "README.md"}
        assert loaded(online, "hf://me/found/found.json")[0][:3] == [name, 128, False]
        refused = subprocess.run(command, capture_output=True, text=True, env={**online, "HF_TOKEN": "hf_wrong"})
        assert refused.returncode == 1 and "the hub does not know us" in refused.stderr
        assert len(hub.repos["me/found"]) == 1
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "library_name: sglang-mminfer" in card and "- mminfer:layers=1" in card
    assert "--mminfer-config hf://me/found/found.json" in card
    assert "| calibration | film |" in card and "| `architecture` | X |" in card and "| searched | 25.0% | " in card
    assert "* Mind: one prompt is few" in card and "[the report](found.html)" in card
