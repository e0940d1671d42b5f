"""Which rank records a batch, in which file, and how often a process counts it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import observed
from sglang_mminfer import settings
from sglang_mminfer.serving import metrics, trace
from sglang_mminfer.serving.batch import PrefillBatch


def leads(monkeypatch: pytest.MonkeyPatch, **ranks: int) -> Any:
    observed.prefill("test_a_shape", monkeypatch)  # sets everything except the ranks
    monkeypatch.setattr(observed, "RANKS", observed.RANKS | ranks)
    return observed.prefill("test_a_shape", monkeypatch)


@pytest.mark.parametrize(
    "ranks, file",
    [
        ({}, "trace"),
        ({"attn_tp_rank": 1, "attn_tp_size": 2, "tp_rank": 1, "tp_size": 2}, None),  # has the same requests as rank 0
        ({"attn_dp_rank": 1, "tp_rank": 1, "tp_size": 2}, "trace.dp1"),  # has requests of its own
        ({"attn_dp_rank": 1, "attn_tp_rank": 1, "tp_rank": 3, "tp_size": 4}, None),
        ({"pp_rank": 1}, None),  # a later pipeline stage of the same requests
    ],
)
def test_each_request_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, ranks: dict[str, int], file: str | None
) -> None:
    monkeypatch.setenv(settings.TRACE.variable, str(tmp_path / "trace"))
    prefill = leads(monkeypatch, **ranks)
    assert prefill.leads == (file is not None)
    observed.run(prefill, observed.batch())
    assert [path.name for path in tmp_path.iterdir()] == ([file] if file else [])


def test_groups_of_data_parallel_attention_are_read_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(settings.TRACE.variable, str(tmp_path / "trace"))
    for number in range(3):
        observed.run(leads(monkeypatch, attn_dp_rank=number), observed.batch(rid=f"of-{number}"))
    assert [record.rid for record in trace.read_trace(tmp_path / "trace")] == ["of-0", "of-1", "of-2"]


def test_three_backends_of_a_process_share_its_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two-batch overlap makes three backends; Prometheus allows a name only once."""
    backends = [observed.prefill("test_a_shape", monkeypatch, metrics=True) for _ in range(3)]
    assert len({id(found.metrics) for found in backends}) == 1
    assert metrics.audit_metrics() is metrics.audit_metrics()


def test_the_parts_of_an_overlapped_batch_give_account_and_the_whole_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = observed.prefill("test_a_shape", monkeypatch)
    whole = observed.batch()
    whole.tbo_children = [SimpleNamespace()]
    prefill.begin(whole)
    assert prefill.batch is None
    part = observed.batch()
    part.tbo_parent_token_range = (0, 10)
    prefill.begin(part)
    assert isinstance(prefill.batch, PrefillBatch) and prefill.batch.requests[0].dense_reason == "two_batch_overlap"
