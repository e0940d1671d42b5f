"""The backend never waits for the device: in torch's fake mode, for a card that is not there.

A tensor says there which device it is on and holds nothing, so whatever the host would have to ask a card for raises.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import observed
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sglang_mminfer import executors


class Event:
    """Of a card that is done with nothing yet."""

    waited = False

    def record(self) -> None: ...

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        Event.waited = True


def test_the_check_below_notices_a_host_that_waits() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        rows = torch.ones(3, 5, device="cuda")
        rows[torch.zeros(1, dtype=torch.long, device="cuda")[0], :2]  # as a request's slots were read once


@pytest.mark.parametrize("config", ["test_a_shape", "test_mixed_heads"])
def test_a_batch_with_metrics(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    prefill: Any = observed.prefill(config, monkeypatch)
    told: list[Any] = []
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    monkeypatch.setitem(executors.EXECUTORS, prefill._executor, lambda *arguments: None)
    monkeypatch.setattr(prefill, "metrics", SimpleNamespace(add=told.append))
    monkeypatch.setattr(prefill, "device", torch.device("cuda"))
    monkeypatch.setattr(Event, "waited", False)
    with FakeTensorMode():
        pool = prefill.kv_pool
        for name in ("layers", "slots", "q"):
            setattr(pool, name, torch.empty(getattr(pool, name).shape, dtype=getattr(pool, name).dtype, device="cuda"))
        prefill.req_to_token = torch.empty(4, 2 * observed.LENGTH, dtype=torch.int32, device="cuda")
        batch = observed.batch(100)
        batch.mm_inputs[0].mm_items[0].model_specific_data["video_grid_thw"] = [[24, 8, 8]]  # of the host
        batch.req_pool_indices = torch.zeros(1, dtype=torch.int64, device="cuda")
        observed.run(prefill, batch)
        assert prefill._failures == 0 and not Event.waited
        assert not told, "densities that no card has computed cannot be known"
        (pending,) = prefill._pending
        assert [record.sparse_layers for record in pending.records] == [observed.LAYERS]
        assert (pending.records[0].attn_ms, pending.records[0].forward_ms) == (0.0, 0.0)


def test_what_is_pending_is_told_with_a_later_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the oldest is waited for where too many are."""
    from sglang_mminfer import backend

    prefill: Any = observed.prefill("test_a_shape", monkeypatch)
    told: list[Any] = []
    monkeypatch.setattr(prefill, "metrics", SimpleNamespace(add=told.append))
    monkeypatch.setattr(backend, "MOST_PENDING", 2)
    monkeypatch.setattr(Event, "waited", False)

    def pending(event: Event | None) -> Any:
        record = SimpleNamespace(density=None)
        return backend._Pending([record], [record], torch.tensor([0.25]), event)

    prefill._pending.extend([pending(Event()), pending(None)])
    prefill._give_account(wait=False)
    assert not told  # in the order of the batches
    prefill._pending.append(pending(Event()))
    prefill._give_account(wait=False)
    assert Event.waited and [records[0].density for records in told] == [0.25, 0.25]
