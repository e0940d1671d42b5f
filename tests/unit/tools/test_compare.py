"""`mminfer compare` with a stand-in for the server: what it asks, what it writes, and what it does not ask twice."""

import json
from pathlib import Path

import pytest

from fake_openai import FakeOpenAI
from sglang_mminfer import cli
from sglang_mminfer.tools import compare
from sglang_mminfer.tools.server import ServerError

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "needle_vlm"


class StandIn:
    """Takes the place of Server: answers "3" to every question, and traces every request with a density of a third."""

    started: list[str] = []  # noqa: RUF012
    density = 1 / 3
    dies_at: str | None = None

    def __init__(self, model, *flags, log, env, progress):
        self.model, self.flags, self.trace = model, flags, Path(env["SGLANG_MMINFER_TRACE"])
        self.config = Path(flags[flags.index("--mminfer-config") + 1]).stem
        self.fake = FakeOpenAI(self.reply)

    def reply(self, messages):
        record = {"rid": f"request-{len(self.fake.prompts)}", "prefix_len": 0, "chunk_len": 100, "seq_len": 100}
        record |= {"segments": 3, "sparse_layers": 3, "density": self.density, "dense_reason": None}
        record |= {"plan_ms": 1.0, "attn_ms": 2.0, "forward_ms": 40.0}
        with self.trace.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return "3"

    def __enter__(self):
        if self.config == self.dies_at:
            raise ServerError("the server died")
        self.started.append(self.config)
        self.fake.__enter__()
        return self

    def __exit__(self, *error):
        self.fake.__exit__()

    def client(self, timeout):
        import openai

        return openai.OpenAI(base_url=f"{self.fake.url}/v1", api_key="none", max_retries=0)

    def flush_cache(self):
        pass


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(compare, "Server", StandIn)
    monkeypatch.setattr(StandIn, "started", [])
    return StandIn


def _compare(out, *arguments):
    small = ("--lengths", "512", "--depths", "2", "--seeds", "1", "--no-relays", "--out", str(out))
    return cli.main(["compare", "--model-path", str(EXAMPLES / "video"), *small, *arguments])


def test_it_goes_on_where_it_was_stopped(stand_in, monkeypatch, tmp_path, capsys):
    configs = ("--mminfer-config", "dense", "a_shape", "swin")
    monkeypatch.setattr(stand_in, "dies_at", "baseline_swin")
    assert _compare(tmp_path, *configs) == 1
    assert "the server died" in capsys.readouterr().err
    monkeypatch.setattr(stand_in, "dies_at", None)
    assert _compare(tmp_path, *configs) == 0
    assert stand_in.started == ["dense", "baseline_a_shape", "baseline_swin"]
    result = json.loads((tmp_path / "compare.json").read_text())
    assert list(result["configs"]) == ["dense", "a_shape", "swin"]
    found = result["configs"]["swin"]
    assert found["config"]["heads"]["all"]["pattern"] == {"kind": "a_shape", "sink": 0, "local": 4096}
    assert found["by_length"]["512"] == {
        **{"density": 0.3333, "dense_reasons": [], "prompt_tokens": 100.0},
        **{"forward_ms": 40.0, "attn_ms": 2.0},
    }
    table = (tmp_path / "compare.md").read_text().splitlines()
    assert table[0] == "| config | density, 512 | V-NIAH, 512 | prefill ms, 512 | errors |"
    assert len(table) == 5 and table[2].startswith("| dense | 0.333 | ")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert _compare(tmp_path, *configs, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == result and "dense: in " in said.err
    # Other questions need another result file.
    assert _compare(tmp_path, *configs, "--seed", "9") == 2
    assert "was made with other settings; name another --out" in " ".join(capsys.readouterr().err.split())


def test_an_estimated_baseline_is_fitted_by_what_a_server_visits(stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr(stand_in, "density", 0.1)
    assert _compare(tmp_path, "--mminfer-config", "minference", "tri_shape", "--density", "0.3") == 0
    assert stand_in.started == ["baseline_minference"] * compare.FITS + ["baseline_tri_shape"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mminfer-config", "wrong_phase"), "wrong_phase has no published sizes; give --density"),
        (("--mminfer-config", "swan"), "no built-in config has this name"),
        (("--density", "2"), "--density: expected a number between 0 and 1, got 2"),
        (("--concurrency", "0"), "--concurrency: expected a number greater than or equal to 1"),
        (("--seeds", "0"), "--seeds: expected a number greater than or equal to 1"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(arguments, words, stand_in, tmp_path, capsys):
    assert _compare(tmp_path, *arguments) == 2
    captured = capsys.readouterr()
    assert words in " ".join(captured.err.split()) and not captured.out
    assert not stand_in.started


def test_a_file_that_is_something_else_is_left_alone(stand_in, tmp_path):
    (tmp_path / "compare.json").write_text("[1]")
    assert _compare(tmp_path, "--mminfer-config", "dense") == 2
    assert (tmp_path / "compare.json").read_text() == "[1]" and not stand_in.started


def test_by_default_the_table_has_every_baseline():
    names = [entry.name for entry in compare.entries_of(None, [], 0.25)]
    assert names[:2] == ["dense", "default"] and set(compare.baselines.NAMES) <= set(names)
    assert "wrong_phase" not in [entry.name for entry in compare.entries_of(None, [], None)]
