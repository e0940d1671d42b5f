"""The backend never waits for the GPU. The tests run in torch's fake mode and need no GPU.

A fake tensor has a device and no data, so every read of the GPU by the host raises.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import observed
from sglang_mminfer.kernels import executors


def test_the_check_below_notices_a_host_that_waits() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        rows = torch.ones(3, 5, device="cuda")
        rows[torch.zeros(1, dtype=torch.long, device="cuda")[0], :2]  # how a request's slots were read in the past


@pytest.mark.parametrize("config", ["test_a_shape", "test_mixed_heads"])
def test_a_batch_with_metrics(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    prefill: Any = observed.prefill(config, monkeypatch)
    told: list[Any] = []
    monkeypatch.setitem(executors.EXECUTORS, prefill.executor, lambda *arguments: None)
    monkeypatch.setattr(prefill, "metrics", SimpleNamespace(add=told.append))
    monkeypatch.setattr(prefill, "device", torch.device("cuda"))
    monkeypatch.setattr(prefill, "waits", False)  # as on a GPU without a trace
    with FakeTensorMode():
        pool = prefill.kv_pool
        for name in ("layers", "slots", "q"):
            setattr(pool, name, torch.empty(getattr(pool, name).shape, dtype=getattr(pool, name).dtype, device="cuda"))
        prefill.req_to_token = torch.empty(4, 2 * observed.LENGTH, dtype=torch.int32, device="cuda")
        batch = observed.batch(100)
        batch.mm_inputs[0].mm_items[0].model_specific_data["video_grid_thw"] = [[24, 8, 8]]  # on the host
        batch.req_pool_indices = torch.zeros(1, dtype=torch.int64, device="cuda")
        observed.run(prefill, batch)
        assert prefill.failures == 0
    ((record,),) = told
    assert (record.dense_reason, record.sparse_layers) == (None, observed.LAYERS)
    assert (record.density, record.attn_ms, record.forward_ms) == (None, 0.0, 0.0)
