"""Which rank records a batch, in which file, and how often a process counts it."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

import observed
from sglang_mminfer import settings
from sglang_mminfer.serving import metrics, prompts, telemetry, trace
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


def schedule_batch(mode: str, rows: int, *rids: str) -> Any:
    """What the scheduler makes a forward batch of."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    requests = [SimpleNamespace(rid=rid, origin_input_ids=[0] * 7) for rid in rids]
    return SimpleNamespace(forward_mode=ForwardMode[mode], reqs=requests, input_ids=torch.zeros(rows))


def metered_tokens() -> float:
    labels = {"ran": "mode_target_verify"}
    return REGISTRY.get_sample_value("sglang:mminfer_prefill_tokens_total", labels) or 0.0


def test_verified_drafts_are_counted_without_a_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Where a CUDA graph replays them, too: they are counted where SGLang makes the batch."""
    monkeypatch.setenv(settings.TRACE.variable, str(tmp_path / "trace"))
    monkeypatch.setattr(telemetry, "of_process", cache(telemetry.Telemetry))
    prefill = observed.prefill("test_a_shape", monkeypatch, metrics=True)
    before = metered_tokens()
    prompts.note(None, object, schedule_batch("EXTEND", 14, "a", "b"))
    prompts.note(None, object, schedule_batch("TARGET_VERIFY", 8, "a", "b"))
    prompts.note(None, object, schedule_batch("DECODE", 2, "a", "b"))
    prompts.note(None, object, schedule_batch("TARGET_VERIFY", 4, "a"))
    counters = prefill.telemetry.answer("").counters
    assert counters.requests == {"mode_target_verify": 3} and counters.tokens == {"mode_target_verify": 12}
    assert metered_tokens() - before == 12
    assert not (tmp_path / "trace").exists()
    assert prompts.length_of("b") == 7


def test_another_rank_counts_no_verified_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert leads(monkeypatch, attn_tp_rank=1, attn_tp_size=2, tp_rank=1, tp_size=2).telemetry is None
    prompts.note(None, object, schedule_batch("TARGET_VERIFY", 8, "a", "b"))  # raises nothing
