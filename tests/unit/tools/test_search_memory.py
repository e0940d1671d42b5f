"""Measuring in bounded memory: the same scores, and a process that stays below the limit."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

import search_in_process as process
from sglang_mminfer import AShape, VerticalSlash, cli
from sglang_mminfer.tools.search import command, memory
from sglang_mminfer.tools.search import job as jobs

MIB = 1 << 20
LIMIT = 80 * MIB


def measured(folder: Path, limit: int) -> tuple[int, dict]:
    """The peak memory of measuring, in bytes, and the measured scores."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, process.__file__, str(folder), str(limit)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["peak"], answer["found"]


def test_a_limit_is_kept_and_changes_no_score(tmp_path: Path) -> None:
    free, everything = measured(tmp_path / "free", 1 << 40)
    bound, pieces = measured(tmp_path / "bound", LIMIT)
    print(f"{free / MIB:.0f} MiB, with a limit of {LIMIT / MIB:.0f}: {bound / MIB:.0f}")
    assert bound < LIMIT < free
    assert pieces["phases"] == everything["phases"] and pieces["causal"] == everything["causal"]
    assert pieces["visited"] == everything["visited"]
    error, expected = (np.array(found["error"], dtype=float) for found in (pieces, everything))
    assert error.shape == (len(process.CANDIDATES), process.HEADS, 3)
    assert np.isfinite(expected[:, :, 2]).all() and expected[:, :, 2].max() > 0.1
    np.testing.assert_allclose(error, expected, rtol=1e-4, atol=1e-6)


def footprint(tokens: int = 4000, picked: int = 2000) -> memory.Footprint:
    return memory.Footprint(tokens, 128, 2, 4, picked)


@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (28, 4), (12, 12), (7, 1)])
def test_pieces_fit_and_are_all_heads_in_order(heads: int, kv_heads: int) -> None:
    group = heads // kv_heads
    counts = set()
    for limit in np.geomspace(footprint().bytes(1, 1), footprint().bytes(heads, kv_heads), 12).astype(int) + 1:
        found = memory.pieces(heads, kv_heads, footprint(), int(limit))
        counts.add(len(found))
        for piece in found:
            own, kv = (s.stop - s.start for s in (piece.heads, piece.kv_heads))
            assert footprint().bytes(own, kv) <= limit
            assert {h // group for h in range(piece.heads.start, piece.heads.stop)} == set(
                range(piece.kv_heads.start, piece.kv_heads.stop)
            )
            assert kv == 1 or own == kv * group, "a kernel wants whole groups"
        assert list(chain(*(range(p.heads.start, p.heads.stop) for p in found))) == list(range(heads))
    assert 1 in counts and max(counts) == heads


def test_what_picks_most_is_what_counts() -> None:
    assert memory.most_picked([AShape(1, 1)], 1000) == 0
    assert memory.most_picked([AShape(1, 1), VerticalSlash(100, 300), VerticalSlash(5000, 10)], 1000) == 1010


def test_a_limit_for_less_than_one_head_is_refused_in_words(tmp_path: Path) -> None:
    found = process.run(tmp_path, 500, 1 << 20)
    ranks = jobs.load(tmp_path, "measure", [0])
    why = jobs.refused(tmp_path, "measure", ranks)
    assert why == found[jobs.REFUSED] and not jobs.load(tmp_path, "measure", [0])[0], "it would be taken for a result"
    assert why.startswith("--max-memory: expected at least 0.0") and "500 tokens, got 0.00" in why


@pytest.mark.parametrize("text", ["0", "-1", "much", "nan", "inf"])
def test_a_limit_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "model", "--max-memory", text]) == 2
    assert f"--max-memory: expected a number of GiB above 0, got '{text}'" in capsys.readouterr().err


def test_a_limit_is_in_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (conversation := tmp_path / "talk.json").write_text("[]")
    monkeypatch.setattr(command, "run", lambda options: options.max_memory)
    assert cli.main(["search", "model", "--conversation", str(conversation), "--max-memory", "1.5"]) == 3 * 2**29
