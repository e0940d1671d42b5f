"""Chunks whose planning would cost too much run dense, counted as such, on all ranks alike."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import observed
from sglang_mminfer import settings
from sglang_mminfer.planning.budget import count_work, estimate

MILLISECONDS, MEGABYTES = settings.PLAN_BUDGET_MS.variable, settings.PLAN_BUDGET_MB.variable


def stock_answers(prefill: Any, forward_batch: Any) -> list[torch.Tensor]:
    """Dense answers over the same pool."""
    stock: Any = observed.Stock()
    stock.pool = prefill.kv_pool
    answers = []
    for number in range(observed.LAYERS):
        layer = SimpleNamespace(layer_id=number, tp_q_head_num=observed.HEADS)
        q = prefill.kv_pool.q[number, forward_batch.extend_prefix_lens_cpu[0] : forward_batch.seq_len]
        answers.append(stock.forward_extend(q, None, None, layer, forward_batch))
    return answers


def ran(prefill: Any, watch: observed.Keeps, prefix: int, stop: int) -> tuple[str | None, list[torch.Tensor]]:
    """Why one chunk ran dense, and its answers."""
    answers = observed.run(prefill, observed.batch(prefix, stop))
    return watch.records[-1].dense_reason, answers


@pytest.mark.parametrize(("name", "budget"), [(MILLISECONDS, "1e-6"), (MEGABYTES, "1e-6")])
def test_a_chunk_beyond_the_budget_is_dense_and_counted(
    name: str, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = observed.Keeps()
    monkeypatch.setenv(name, budget)
    prefill = observed.prefill("test_grid_frame", monkeypatch, watch)
    reason, answers = ran(prefill, watch, 0, observed.LENGTH)
    assert reason == "plan_budget"
    for answer, expected in zip(answers, stock_answers(prefill, observed.batch())):
        assert torch.equal(answer, expected)


def test_within_the_budget_a_chunk_is_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = observed.Keeps()
    prefill = observed.prefill("test_grid_frame", monkeypatch, watch)
    reason, answers = ran(prefill, watch, 0, observed.LENGTH)
    assert reason is None and watch.records[-1].sparse_layers == observed.LAYERS
    assert not torch.allclose(answers[0], stock_answers(prefill, observed.batch())[0])


def test_each_chunk_is_decided_by_itself_and_always_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three chunks is the largest: it alone is dense, whoever asks and however often."""
    chunks = ((0, 150), (150, 600), (600, observed.LENGTH))
    watch = observed.Keeps()
    prefill = observed.prefill("test_grid_frame", monkeypatch, watch)
    free = [ran(prefill, watch, *chunk) for chunk in chunks]
    chat = watch.views[0].requests[0].map
    costs = [estimate(count_work(chat, *chunk, "frame"))[0] for chunk in chunks]
    monkeypatch.setenv(MILLISECONDS, str((costs[1] + max(costs[0], costs[2])) / 2))
    limited = observed.prefill("test_grid_frame", monkeypatch, watch)
    for _ in range(2):
        for chunk, (reason, expected) in zip(chunks, free):
            assert reason is None
            reason, answers = ran(limited, watch, *chunk)
            assert reason == ("plan_budget" if chunk == chunks[1] else None)
            if chunk == chunks[1]:
                expected = stock_answers(limited, observed.batch(*chunk))
            assert all(torch.equal(answer, other) for answer, other in zip(answers, expected))


def test_ranks_whose_heads_differ_decide_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One rank holds heads with lines, which cost more, the other has none; a budget between the two."""
    a_shape = {"boundary": "none", "pattern": {"kind": "a_shape", "sink": 16, "local": 48}}
    lines = {"kind": "grid", "stride": "frame", "v": False, "h": False, "s": True, "phase": 0, "sink": 16, "local": 48}
    row = [a_shape] * (observed.HEADS // 2) + [{"boundary": "none", "pattern": lines}] * (observed.HEADS // 2)
    document = {
        "schema": 1,
        "model": None,
        "provenance": {"how": "handwritten", "note": "for a test"},
        "defaults": {"dense_below": 0},
        "heads": [row] * observed.LAYERS,
    }
    path = tmp_path / "halves.json"
    path.write_text(json.dumps(document))

    def reasons(budget: float) -> list[str | None]:
        monkeypatch.setenv(MILLISECONDS, str(budget))
        found = []
        for rank in range(2):
            prefill = observed.prefill(str(path), monkeypatch, watch, rank=rank, ranks=2)
            prefill.begin(observed.batch())
            found.append(prefill.batch.requests[0].dense_reason)
            prefill.end()
        return found

    watch = observed.Keeps()
    observed.run(observed.prefill("test_grid_frame", monkeypatch, watch), observed.batch())
    chat = watch.views[0].requests[0].map
    without, along = (estimate(count_work(chat, 0, observed.LENGTH, stride))[0] for stride in (None, "frame"))
    assert without < along
    assert reasons((without + along) / 2) == ["plan_budget", "plan_budget"]
    assert reasons(along * 1.01) == [None, None]


def test_the_budget_comes_from_the_environment() -> None:
    assert settings.plan_budget({}) == (200, 256)
    assert settings.plan_budget({MILLISECONDS: "", MEGABYTES: "12.5"}) == (200, 12.5)
    assert settings.plan_budget({MILLISECONDS: "inf"})[0] == float("inf")
    for bad in ("0", "-3", "nan", "soon"):
        with pytest.raises(ValueError, match=f"{MEGABYTES}: expected a number above 0"):
            settings.plan_budget({MEGABYTES: bad})
