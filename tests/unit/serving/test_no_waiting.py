"""The backend never waits for the GPU. The tests run in torch's fake mode and need no GPU.

A fake tensor has a device and no data, so every read of the GPU by the host raises. Kernels are not launched, and all
that happens around them does.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import observed
from absent_card import absent_card
from observed import LENGTH
from sglang_mminfer.planning.cost import Comparison
from sglang_mminfer.planning.planner import is_static
from sglang_mminfer.serving import audit, observe, prompts
from sglang_mminfer.serving.choice import Choice
from sglang_mminfer.serving.guard import Guard
from sglang_mminfer.serving.moments import Moments
from sglang_mminfer.serving.served_heads import MixedHeads, of_request

ALL = ("a_shape", "grid_frame", "grid_row", "tri_shape", "q_boundary", "2d_boundary", "vertical_slash", "pooled")
ALL += ("mixed_heads", "adaptive")


def test_the_check_below_notices_a_host_that_waits() -> None:
    with absent_card():
        rows = torch.ones(3, 5, device="cuda")
        with pytest.raises(DataDependentOutputException):
            rows[torch.zeros(1, dtype=torch.long, device="cuda")[0], :2]  # how a request's slots were read in the past
        with pytest.raises(DynamicOutputShapeException):
            rows[rows > 0]


def one_request() -> Any:
    """A later chunk of a video's prompt."""
    return observed.batch(100)


def several_requests() -> Any:
    """A prompt whose chunk goes on with generated tokens, a later chunk of another prompt, and a text-only request."""
    batch = observed.batch()
    vars(batch).update(
        extend_seq_lens_cpu=[LENGTH, LENGTH - 300, 64],
        extend_prefix_lens_cpu=[0, 300, 0],
        rids=["with generated tokens", "later chunk", "text"],
        input_ids=None,
        positions=None,
        out_cache_loc=None,
        mm_inputs=[*batch.mm_inputs, observed.batch().mm_inputs[0], None],
    )
    prompts.keep({"with generated tokens": LENGTH - 20, "later chunk": LENGTH, "text": 64})
    return batch


def guarded_requests() -> Any:
    """The same, of which the guard made a head dense after the later chunk's request had begun."""
    return several_requests()


class Stock:
    """The stock backend's second instance; what it does is SGLang's."""

    def init_forward_metadata(self, batch: Any) -> None:
        assert batch.seq_lens.is_cuda and not batch.seq_lens_cpu.is_cuda and batch.batch_size == len(batch.seq_lens)

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool) -> Any:
        assert q.is_cuda and len(q) == batch.extend_num_tokens and not save_kv_cache
        return torch.empty_like(q)


@pytest.mark.parametrize("make", [one_request, several_requests, guarded_requests])
@pytest.mark.parametrize("name", ALL)
def test_a_batch_with_metrics(monkeypatch: pytest.MonkeyPatch, name: str, make: Any) -> None:
    monkeypatch.setattr(observed, "D", 64)  # the kernels are built for this head dim
    prefill: Any = observed.prefill(f"test_{name}", monkeypatch)
    told: list[Any] = []
    monkeypatch.setattr(prefill, "metrics", SimpleNamespace(add=told.append))
    monkeypatch.setattr(prefill, "device", torch.device("cuda"))
    monkeypatch.setattr(prefill, "waits", False)  # as on a GPU without a trace
    monkeypatch.setattr(prefill, "executor", "triton")
    config = prefill.served.head_config
    comparison = Comparison(config.layers, "triton", "fa3", config.defaults.dense_below, observed.D)
    monkeypatch.setattr(prefill.served, "choice", Choice(config, comparison))
    monkeypatch.setattr(prefill, "second_instance", Stock())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("triton.runtime.jit.KernelInterface.__getitem__", lambda kernel, grid: lambda *a, **k: None)
    copies: list[bool] = []
    unfinished = SimpleNamespace(record=lambda: copies.append(False), query=lambda: copies[-1])
    monkeypatch.setattr(torch.cuda, "Event", lambda: unfinished)
    batch = make()
    if make is guarded_requests:
        prefill.guard = Guard(0.1, prefill.served)
        of_request(batch.mm_inputs[1], batch.rids[1], prefill.served)
        prefill.guard.served = prefill.served.with_dense([(0, 0), (1, 1)])
    for media in filter(None, batch.mm_inputs):
        media.mm_items[0].model_specific_data["video_grid_thw"] = [[24, 8, 8]]  # on the host
    with absent_card():
        pool = prefill.kv_pool
        for name in ("layers", "slots"):
            setattr(pool, name, torch.empty(getattr(pool, name).shape, dtype=getattr(pool, name).dtype, device="cuda"))
        prefill.req_to_token = torch.empty(4, 2 * LENGTH, dtype=torch.int32, device="cuda")
        batch.req_pool_indices = torch.zeros(len(batch.rids), dtype=torch.int64, device="cuda")
        rows = sum(batch.extend_seq_lens_cpu)
        prefill.begin(batch)
        assert (prefill.batch.stock_rows is not None) == (make is not one_request)
        assert isinstance(prefill.batch.heads, MixedHeads) == (make is guarded_requests)
        for number in range(observed.LAYERS):
            q, layer = torch.empty(rows, pool.q.shape[-1], device="cuda"), observed.layer(number)
            start = prefill.clock()
            assert prefill.takes(q, layer, {})
            out = prefill.run_layer(q, None, None, layer, lambda some, view: some)
            assert out is not None and out.shape == q.shape
            prefill.layer_done(q, layer, {}, out, start)
        assert prefill.failures == 0 and prefill.batch is None
    if not all(is_static(head) for layer in range(observed.LAYERS) for head in config.patterns(layer)):
        assert told == [], "the GPU has yet to say what it visited"
        assert copies == [False]
        return
    ((record, *others),) = told
    assert (record.dense_reason, record.sparse_layers) == (None, observed.LAYERS)
    assert (record.attn_ms, record.forward_ms) == (0.0, 0.0)
    assert record.density is not None and not copies
    assert [other.dense_reason for other in others] == [None, "no_media"][: len(others)]


@pytest.mark.parametrize("by_head", [False, True])
def test_moments_of_the_clip_are_summed_up_on_the_device(by_head: bool) -> None:
    with absent_card():
        q, cache = torch.ones(700, 8, 64, device="cuda"), torch.ones(1000, 2, 64, device="cuda")
        slots = torch.zeros(1500, dtype=torch.long, device="cuda")
        request = observe.RequestView("clip", 800, 700, 0, 1500, None, "no_basis", slots)
        moments = Moments(by_head)
        for layer in (0, 1, 0):
            moments.add(observe.LayerView(layer, 0, q, cache, cache, 0.1, (request,), (), (), q), request)
        assert all(part.is_cuda for layer in moments.layers.values() for part in (layer.q, layer.k))
        assert [layer.rows for layer in moments.layers.values()] == [1400, 700]


def test_a_layer_is_audited_on_the_device() -> None:
    with absent_card():
        q, cache = torch.ones(700, 8, 64, device="cuda"), torch.ones(1000, 2, 64, device="cuda")
        slots, lse = torch.zeros(1500, dtype=torch.long, device="cuda"), torch.zeros(700, 8, device="cuda")
        request = observe.RequestView("asked", 800, 700, 0, 1500, None, None, slots)
        view = observe.LayerView(0, 0, q, cache, cache, 0.1, (request,), (), (2, 7), q, lse=lse)
        found = audit.examine(view, request, np.array([900, 1499]))
        assert found.error.is_cuda and found.recall.is_cuda
