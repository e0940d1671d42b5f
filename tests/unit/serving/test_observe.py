"""What observers see, on the CPU without a server: a real stock backend under our class, and a real KV pool."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import observed
from sglang_mminfer import settings
from sglang_mminfer.kernels import reference
from sglang_mminfer.serving import observe


@pytest.mark.parametrize("config", ["test_a_shape", "dense"])
def test_every_layer_is_shown_as_it_ran(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = observed.Keeps()
    prefill = observed.prefill(config, monkeypatch, watch)
    out = observed.run(prefill, observed.batch())
    assert [view.layer_id for view in watch.views] == [0, 1]
    for view, own in zip(watch.views, out):
        (request,) = view.requests
        assert request.map is not None and request.map.has_vision
        assert (request.rid, request.rows) == ("request-0", slice(0, observed.LENGTH))
        assert request.dense_reason == (None if config == "test_a_shape" else "dense_config")
        assert torch.equal(view.out.flatten(1), own)
        k, v = view.k_cache[request.slots], view.v_cache[request.slots]
        for head in range(view.num_heads):
            kv = head // (view.num_heads // view.k_cache.shape[1])
            mask = torch.ones(observed.LENGTH, observed.LENGTH).tril().bool()
            if view.plan is not None:
                mask &= reference.visited_mask(view.plan, head, request.rows, request.seq_len)
            o, lse = reference.masked_attention(view.q[:, head], k[:, kv], v[:, kv], mask, view.sm_scale)
            assert torch.allclose(o.float(), view.out[:, head], atol=1e-5)
            if view.lse is not None:
                assert torch.allclose(lse.float(), view.lse[:, head], atol=1e-4)
    assert len(watch.records) == 1


class Untouchable:
    """The slots of requests that nobody may look up."""

    def __getitem__(self, index: Any) -> None:
        pytest.fail("looked up for nobody")


def test_without_an_observer_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = observed.prefill("dense", monkeypatch)
    monkeypatch.setattr(observe, "LayerView", lambda **_: pytest.fail("shown to nobody"))
    monkeypatch.setattr(prefill, "req_to_token", Untouchable())
    observed.run(prefill, observed.batch())
    assert not prefill.observers


class Fails:
    def layer(self, view: observe.LayerView) -> None:
        raise RuntimeError("an observer's defect")

    def batch_done(self, records: Any) -> None:
        raise RuntimeError("another")


def test_a_failing_observer_is_logged_once_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    good = observed.run(observed.prefill("test_a_shape", monkeypatch), observed.batch())
    prefill = observed.prefill("test_a_shape", monkeypatch, Fails())
    with caplog.at_level(logging.ERROR):
        out = observed.run(prefill, observed.batch())
    assert all(torch.equal(a, b) for a, b in zip(good, out))
    assert prefill.observers.failures == 3  # two layers and the batch
    assert sum("Fails failed" in r.getMessage() for r in caplog.records) == 1


def test_a_view_that_cannot_be_made_costs_no_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch = observed.Keeps()
    prefill = observed.prefill("test_a_shape", monkeypatch, watch)
    monkeypatch.setattr(observe, "LayerView", lambda **_: 1 / 0)
    assert len(observed.run(prefill, observed.batch())) == prefill.observers.failures == 2
    assert not watch.views and len(watch.records) == 1
    assert "the look into a layer failed" in caplog.text


def test_observer_that_cannot_be_made_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    line, name = "sglang_mminfer.serving.observe:nothing=1", settings.OBSERVERS.variable
    rank = observe.RankInfo(0, 1, 2, None)
    assert not observe.from_environment(rank, {name: line})
    assert f"{name}: {line}" in caplog.text
    assert not observe.from_environment(rank, {})
