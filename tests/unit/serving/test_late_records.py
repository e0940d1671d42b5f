"""A server that does not wait for its device tells the same density as one that does, and tells it later."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import observed
from sglang_mminfer.serving.late_records import LateRecords
from sglang_mminfer.serving.trace import PrefillRecord


def told_by(config: str, monkeypatch: pytest.MonkeyPatch, waits: bool) -> list[PrefillRecord]:
    """What the telemetry is told of two chunks of a prompt."""
    prefill: Any = observed.prefill(config, monkeypatch)
    told: list[PrefillRecord] = []
    monkeypatch.setattr(prefill, "telemetry", SimpleNamespace(add=told.extend))
    monkeypatch.setattr(prefill, "waits", waits)
    for start, stop in ((0, 500), (500, observed.LENGTH)):
        observed.run(prefill, observed.batch(start, stop))
    return told


@pytest.mark.parametrize("config", ["test_adaptive", "test_vertical_slash", "test_mixed_heads", "test_a_shape"])
def test_the_density_is_that_of_who_waits(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waited, late = (told_by(config, monkeypatch, waits) for waits in (True, False))
    assert [record.sparse_layers for record in late] == [observed.LAYERS] * 2
    for one, other in zip(waited, late, strict=True):
        assert 0 < one.density <= 1 and other.density == pytest.approx(one.density, rel=1e-9)


def record(rid: str, density: float | None = None, sparse_layers: int = 2) -> PrefillRecord:
    return PrefillRecord(
        rid=rid, prefix_len=0, chunk_len=4, seq_len=4, segments=1, sparse_layers=sparse_layers, density=density,
        dense_reason=None if sparse_layers else "no_media", plan_ms=0.0, attn_ms=0.0, forward_ms=0.0,
    )  # fmt: skip


def test_batches_keep_their_order_until_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of dense requests waits for the sparse one before it."""
    done = []
    module = SimpleNamespace(Event=lambda: SimpleNamespace(record=lambda: None, query=lambda: bool(done)))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch, "stack", lambda scalars: torch.tensor([0.25, 0.5]))  # what the device will have made
    told: list[list[PrefillRecord]] = []
    late = LateRecords(told.append)
    on_device = [torch.empty((), device="meta") for _ in range(2)]
    late.put([record("a"), record("b", sparse_layers=0)], [on_device, []])
    late.put([record("c", sparse_layers=0)], [[]])
    late.tell_known()
    assert told == []
    done.append(True)
    late.tell_known()
    assert [[(r.rid, r.density) for r in batch] for batch in told] == [[("a", 0.375), ("b", None)], [("c", None)]]
    late.put([record("d")], [[0.5]])  # of two layers only one told
    assert told[-1][0].density is None
    late.tell_known()
    assert len(told) == 3, "each batch is told once"
