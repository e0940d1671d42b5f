"""The audit's figures are right: no loss if everything is visited, else the real loss."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import observed
from sglang_mminfer import Modality, ModalityMap, Segment, settings
from sglang_mminfer.kernels import reference
from sglang_mminfer.kernels.rows import dense_rows
from sglang_mminfer.serving import audit, observe
from sglang_mminfer.serving.trace import PrefillRecord, TraceFile, read_trace


def records_of(
    name: str, monkeypatch: pytest.MonkeyPatch, rate: float = 1.0, rid: str = "request-0", start: int = 0
) -> tuple[list[PrefillRecord], list[observe.LayerView]]:
    watch = observed.Keeps()
    prefill = observed.prefill(name, monkeypatch, audit.Audit(rate), watch)
    observed.run(prefill, observed.batch(prefix=start, rid=rid))
    return watch.records, watch.views


@pytest.mark.parametrize("start", [0, 290])
@pytest.mark.parametrize("name", ["test_covering", "test_covering_mixed"])
def test_a_config_that_covers_everything_loses_nothing(name: str, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ((record,), _) = records_of(name, monkeypatch, start=start)
    assert record.audit is not None and [found.layer for found in record.audit] == [0, 1]
    for found in record.audit:
        assert 32 <= found.rows <= audit.ROWS
        assert found.error_max < 1e-5 and found.error_mean < 1e-5
        assert found.recall_min > 1 - 1e-5


@pytest.mark.parametrize("start", [0, 290])
@pytest.mark.parametrize("name", ["test_a_shape", "test_mixed_heads"])
def test_error_and_recall_are_those_of_the_definition(name: str, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with float64 softmax under the mask of the visited pairs."""
    ((record,), views) = records_of(name, monkeypatch, start=start)
    assert record.audit is not None
    for found, view in zip(record.audit, views, strict=True):
        (request,) = view.requests
        rows = audit.sample_rows(request)
        k, v = view.k_cache[request.slots], view.v_cache[request.slots]
        causal = torch.arange(request.seq_len) <= torch.from_numpy(rows)[:, None]
        errors, recalls = [], []
        for head in range(view.num_heads):
            kv = head // (observed.HEADS // observed.KV_HEADS)
            assert view.plan is not None
            visited = reference.visited_mask(view.plan, head, request.rows, request.seq_len)[rows - start] & causal
            q = view.q[rows - start, head]
            dense, _ = reference.masked_attention(q, k[:, kv], v[:, kv], causal, view.sm_scale)
            sparse, _ = reference.masked_attention(q, k[:, kv], v[:, kv], visited, view.sm_scale)
            errors.append(float((sparse - dense).norm() / dense.norm()))
            scores = ((q.double() @ k[:, kv].double().T) * view.sm_scale).masked_fill(~causal, -torch.inf)
            recalls.append(float((torch.softmax(scores, dim=1) * visited).sum(dim=1).mean()))
        assert found.error_mean == pytest.approx(np.mean(errors), abs=1e-5)
        assert found.error_max == pytest.approx(max(errors), abs=1e-5)
        assert found.worst_head == int(np.argmax(errors)) or max(errors) - errors[found.worst_head] < 1e-5
        assert found.recall_mean == pytest.approx(np.mean(recalls), abs=1e-5)
        assert found.recall_min == pytest.approx(min(recalls), abs=1e-5)
        assert found.error_max > 0.1 and found.recall_min < 0.9  # this config loses much, and the audit shows it


def test_dense_heads_on_the_stock_backend_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.DENSE_HEADS.variable, "stock")
    _, views = records_of("test_mixed_heads", monkeypatch)
    assert any(view.stock_heads for view in views)
    for view in views:
        finding = audit.examine(view, view.requests[0], audit.sample_rows(view.requests[0]))
        for head in view.stock_heads:
            assert float(finding.recall[head]) == 1.0 and float(finding.error[head]) < 1e-5


@pytest.mark.parametrize("slab", [1, 1000, 100_000])
def test_slabs_change_nothing(slab: int) -> None:
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(5, 6, 16, generator=draw) * 3
    k, v = torch.randn(2, 300, 2, 16, generator=draw)
    positions, slots = torch.tensor([0, 63, 64, 200, 249]), torch.randperm(300, generator=draw)[:250]
    o, lse = dense_rows(q, positions, k, v, slots, 0.25, slab_scores=slab)
    for head in range(6):
        keys, values = k[slots, head // 3], v[slots, head // 3]
        causal = torch.arange(250) <= positions[:, None]
        expected, its_lse = reference.masked_attention(q[:, head], keys, values, causal, 0.25)
        assert torch.allclose(o[:, head], expected.float(), atol=1e-5)
        assert torch.allclose(lse[:, head], its_lse.float(), atol=1e-5)


# Which requests and rows

VIEW = observe.RequestView(
    rid="a",
    prefix_len=1000,
    chunk_len=2000,
    row_start=0,
    prompt_stop=2990,
    map=ModalityMap(
        [
            Segment(Modality.VIDEO, 0, 1500),
            Segment(Modality.TEXT, 1500, 1510),
            Segment(Modality.IMAGE, 1510, 2000),
            Segment(Modality.VIDEO, 2000, 2990),
        ]
    ),
    dense_reason=None,
    slots=torch.arange(3000),
)


def test_rows_are_of_all_modalities_and_places() -> None:
    rows = audit.sample_rows(VIEW)
    assert len(rows) == len(set(rows.tolist())) and audit.ROWS - 1 <= len(rows) <= audit.ROWS
    assert rows.min() >= 1000 and rows.max() == 2989  # tokens generated after the prompt are dense
    text, image = (rows >= 1500) & (rows < 1510), (rows >= 1510) & (rows < 2000)
    assert text.sum() == 10  # the whole text
    assert image.sum() == 26
    first, second = (rows < 1500).sum(), (rows >= 2000).sum()
    assert first >= 7 and second >= 14  # in proportion to their parts of the video
    assert np.array_equal(rows, audit.sample_rows(VIEW))
    assert not np.array_equal(rows, audit.sample_rows(replace(VIEW, rid="b")))


@pytest.mark.parametrize("change", [{"prompt_stop": 1000}, {"map": None}, {"chunk_len": 0}])
def test_no_rows_where_nothing_is_sparse(change: dict[str, Any]) -> None:
    assert len(audit.sample_rows(replace(VIEW, **change))) == 0


def test_the_share_of_requests_is_as_asked() -> None:
    names = [f"{number:032x}" for number in range(4000)]
    for rate in (0.0, 0.1, 0.5, 1.0):
        share = np.mean([audit.chosen(name, rate) for name in names])
        assert share == pytest.approx(rate, abs=0.02 if 0 < rate < 1 else 0)
    assert {n for n in names if audit.chosen(n, 0.1)} <= {n for n in names if audit.chosen(n, 0.5)}


def test_requests_that_are_not_chosen_are_not_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    rid = next(name for name in map(str, range(100)) if not audit.chosen(name, 0.5))
    monkeypatch.setattr(audit, "examine", lambda *_: pytest.fail("audited"))
    ((record,), _) = records_of("test_a_shape", monkeypatch, 0.5, rid)
    assert record.audit is None


# When it fails, and when it is off


def test_a_failure_is_counted_and_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("a full card")

    monkeypatch.setattr(audit, "examine", fails)
    with caplog.at_level(logging.ERROR):
        ((record,), views) = records_of("test_a_shape", monkeypatch)
    assert (record.audit, record.audit_failures, len(views)) == (None, 2, 2)
    assert sum("the audit failed" in line.getMessage() for line in caplog.records) == 1


def test_off_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.AUDIT.variable, raising=False)
    assert not observed.prefill("test_a_shape", monkeypatch).observers
    assert observed.prefill("test_a_shape", monkeypatch, _mminfer_audit=0.25).observers
    monkeypatch.setenv(settings.AUDIT.variable, "0.5")
    assert observed.prefill("test_a_shape", monkeypatch).observers
    assert not observed.prefill("test_a_shape", monkeypatch, _mminfer_audit=0.0).observers  # the flag wins


@pytest.mark.parametrize("text", ["-0.1", "1.01", "nan", "half", ""])
def test_a_bad_share_is_a_usage_error(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a share of requests from 0 to 1, got"):
        settings.share_of_requests(text)


def test_audits_of_two_ranks_are_read_as_one_of_all_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank audits half of the heads; together they read like the audit of one rank with all heads."""
    (whole,), (view, *_) = records_of("test_mixed_heads", monkeypatch)
    assert whole.audit is not None
    (request,) = view.requests
    found = audit.examine(view, request, audit.sample_rows(request))
    half = observed.HEADS // 2
    trace = tmp_path / "trace.jsonl"
    monkeypatch.setenv(settings.TRACE.variable, str(trace))
    for rank, heads in enumerate((slice(0, half), slice(half, None))):
        own = audit.AuditedRows(0, rank * half, found.rows, found.error[heads], found.recall[heads]).summary()
        file = TraceFile.from_environment(rank)
        file.append([msgspec.structs.replace(whole, audit=[own])])
        if rank == 0:  # rank 1 records no dense request; the last record repeats the first
            file.append([msgspec.structs.replace(whole, rid="dense", audit=None)])
            file.append([msgspec.structs.replace(whole, audit=[own])])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.jsonl", "trace.jsonl.rank1"]
    joined, dense, unmatched = read_trace(trace)
    assert joined.audit is not None and unmatched.audit is not None and dense.audit is None
    assert msgspec.to_builtins(joined.audit[0]) == pytest.approx(msgspec.to_builtins(whole.audit[0]))
    assert (joined.audit[0].first_head, joined.audit[0].num_heads) == (0, observed.HEADS)
    assert (unmatched.audit[0].first_head, unmatched.audit[0].num_heads) == (0, half), "what is missing is not made up"
