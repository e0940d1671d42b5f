"""A server whose heads choose by a basis needs nothing: it makes one before its first request, and keeps it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving import LAYERS, Media, Served, scripted, text, user
from sglang_mminfer import Adaptive, HeadConfig, cli, settings
from sglang_mminfer.head_config import ModelBasis, Provenance
from sglang_mminfer.serving import clip
from sglang_mminfer.serving.clip_sender import CLIP_RID, NO_CLIP_RID
from sglang_mminfer.serving.trace import PrefillRecord, read_trace
from sglang_mminfer.testing.oracle import OracleAnswer
from sglang_mminfer.tools.server import Server

RANK = 4
FLAGS = ("--attention-backend", "mminfer", "--sleep-on-idle", "--chunked-prefill-size", "512")


@dataclass(frozen=True)
class Start:
    """What one start of a server showed."""

    log: str
    records: list[PrefillRecord]
    answers: dict[str, OracleAnswer]

    def reasons(self, beginning: str) -> list[str | None]:
        return [record.dense_reason for record in self.records if record.rid.startswith(beginning)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "adaptive.json"
    pattern = Adaptive(sink=8, local=16, rank=RANK, alpha=0.5)
    path.write_text(HeadConfig("x", Provenance("handwritten", "of a test"), "all", ((pattern,),)).to_json())
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def starts(
    model: Path, media: Media, config: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Start, Start]]:
    """One on two ranks, which has nothing, and one on one rank after it."""

    def started(ranks: int) -> Start:
        flags = ("--mminfer-config", str(config))
        return start(model, media, tmp_path_factory.mktemp("start"), cache, ranks, "always", *flags)

    yield started(ranks=2), started(ranks=1)


def start(model: Path, media: Media, folder: Path, cache: Path, ranks: int, sparse: str | None, *flags: str) -> Start:
    """Starts a server, and asks it something."""
    trace = folder / "trace.jsonl"
    env = {
        **{settings.TRACE.variable: str(trace), settings.SPARSE.variable: sparse, "SGLANG_PLATFORM": None},
        **{"XDG_CACHE_HOME": str(cache), "SGLANG_CPU_OMP_THREADS_BIND": "0|1" if ranks == 2 else None},
    }
    all_flags = (*FLAGS, "--tp-size", str(ranks), *flags)
    with Server(model, *all_flags, env=env, log=folder / "server.log", timeout=550) as server:
        served = Served(server, trace)
        answers = {
            "user": served.ask(scripted(media.six_turns())[-1], rid="user"),
            "words": served.ask([user(text("Why?"))], rid="words"),
            "same": served.ask(clip.messages(clip.SIZES[0]), rid="same"),
        }
        return Start(server.log(), served.records(), answers)


def test_the_first_start_makes_the_basis(starts: tuple[Start, Start]) -> None:
    first, _ = starts
    assert "the built-in clip gives the basis, before the first request" in first.log
    assert f"mminfer: heads choose keys by a basis of rank {RANK} from the built-in clip." in first.log
    assert first.records[0].rid == f"{CLIP_RID}-0-0" and set(first.reasons(CLIP_RID)) == {"no_basis"}
    assert first.records[-1].rid == "same" and not first.reasons(NO_CLIP_RID)
    others = [record.dense_reason for record in first.records if not record.rid.startswith(CLIP_RID)]
    assert set(others) <= {None, "no_media"}


@pytest.mark.parametrize("number", [0, 1])
def test_users_are_served_sparsely(starts: tuple[Start, Start], number: int) -> None:
    start = starts[number]
    for rid in ("user", "same"):
        assert set(start.reasons(rid)) == {None}
    own = [record for record in start.records if record.rid == "user"]
    assert all(record.sparse_layers == LAYERS for record in own)
    assert own[-1].density is not None and min(record.density or 1 for record in own) < 0.95


def test_the_second_start_has_it_at_once(starts: tuple[Start, Start], cache: Path) -> None:
    """One rank reads what two have put together."""
    _, second = starts
    assert f"keys are chosen by a basis of rank {RANK}" in second.log
    assert not second.reasons(CLIP_RID) and "no_basis" not in [record.dense_reason for record in second.records]
    (path,) = (cache / "sglang_mminfer" / "basis").iterdir()
    basis = ModelBasis.load(path)
    assert basis.provenance.how == "calibration" and basis.queries.abs().amax(dim=(2, 3)).min() > 0


def test_nothing_of_the_clip_is_cached_for_users(starts: tuple[Start, Start]) -> None:
    """A user may even send the clip itself: the first server has computed it once, the second never, and both find the
    same beginning of the chat template in the cache."""
    first, second = (start.answers["same"] for start in starts)
    assert first.prompt_ids == second.prompt_ids
    assert (first.cached_tokens or 0) == (second.cached_tokens or 0) < 20


def test_later_starts_know_at_once_how_many_keys_heads_choose(model: Path, media: Media, tmp_path: Path) -> None:
    """With the built-in config, on two ranks, of which each has measured its own heads, and on one rank after that. The
    same is decided for the same requests."""
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
    first, second = (start(model, media, tmp_path / str(ranks), tmp_path, ranks, None) for ranks in (2, 1))
    of_first, of_second = (
        re.findall(r"mminfer: heads that choose visit (\d+)% of the keys", s.log) for s in (first, second)
    )
    assert len(of_first) == 1 and of_first == of_second
    assert CLIP_RID in first.records[0].rid and not second.reasons(CLIP_RID)
    for rid in ("user", "same"):
        assert first.reasons(rid) == second.reasons(rid)
    (path,) = (tmp_path / "sglang_mminfer" / "basis").iterdir()
    basis = ModelBasis.load(path)
    assert basis.rule == HeadConfig.load("default").rule and basis.shares is not None
    assert basis.shares.amin() > 0, "of all heads of both ranks"


PROGRAM = """
import json, sys
import sglang

def main():
    model, config, media = sys.argv[1:]
    engine = sglang.Engine(
        model_path=model, attention_backend="mminfer", device="cpu", context_length=200, log_level="warning",
        json_model_override_args=json.dumps({"mminfer_config": config}),
    )
    try:
        engine.generate(
            prompt="<|vision_start|><|image_pad|><|vision_end|>Where did it go?", image_data=[media], rid="user",
            sampling_params={"temperature": 0, "max_new_tokens": 2},
        )
    finally:
        engine.shutdown()

if __name__ == "__main__":
    main()
"""


def test_an_engine_that_cannot_take_the_clip_chooses_by_products(
    model: Path, media: Media, config: Path, tmp_path: Path
) -> None:
    """No size of the clip fits into so short a context."""
    trace, program = tmp_path / "trace.jsonl", tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), str(model), str(config), str(media.images[3])],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **{name: value for name, value in os.environ.items() if name != "SGLANG_PLATFORM"},
            **{settings.TRACE.variable: str(trace), settings.SPARSE.variable: "always"},
            **{"XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("mminfer: the built-in clip could not be computed") == 1
    by_rid = {record.rid: record for record in read_trace(trace)}
    assert f"{NO_CLIP_RID}-0" in by_rid and not [rid for rid in by_rid if rid.startswith(CLIP_RID)]
    assert by_rid["user"].dense_reason is None and by_rid["user"].sparse_layers == LAYERS
    assert not (tmp_path / "sglang_mminfer").exists()


def test_the_command_makes_a_file_that_a_config_takes(
    model: Path, media: Media, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation, out = tmp_path / "talk.json", tmp_path / "mine.basis.npz"
    conversation.write_text(json.dumps(scripted(media.six_turns())[-1]))
    command = ["basis", "--model-path", str(model), "--conversation", str(conversation), "--out", str(out)]
    assert cli.main([*command, "--rank", "6", "--json"]) == 0
    result, said = capsys.readouterr()
    assert json.loads(result) | {"tokens": 0, "calibration": []} == {
        **{"basis": str(out), "rank": 6, "tokens": 0, "calibration": []},
    }
    assert (
        re.search(r"^ +1 ( +\d+\.\d% +\d+\.\d%){4}$", said, re.MULTILINE) and "It tells nothing of single keys" in said
    )
    basis = ModelBasis.load(out)
    assert basis.rank == 6 and basis.provenance.calibration and basis.provenance.calibration.startswith("talk-")
    assert basis.queries.abs().amax(dim=(2, 3)).min() > 0
    assert basis.shares is None, "the rule of `default` asks for a higher rank"
    (tmp_path / "mine.json").write_text(config.read_text())
    assert HeadConfig.load(tmp_path / "mine.json").basis is not None
