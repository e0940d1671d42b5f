"""A KV cache of fp8: what is read of it is exactly what it holds, and the scales of a checkpoint are obeyed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import observed
from observed import HEADS, KV_HEADS, LAYERS, LENGTH, SLOTS, D
from sglang_mminfer.serving import audit
from sglang_mminfer.serving.kv_scales import KVScales
from sglang_mminfer.serving.sparse_prefill import SparsePrefill

CONFIGS = ["test_a_shape", "test_grid_frame", "test_mixed_heads", "test_vertical_slash", "test_adaptive", "test_pooled"]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
K_SCALE, V_SCALE = 0.37, 2.6
SCALES = {
    "k_scale": torch.tensor(K_SCALE),
    "v_scale": torch.tensor(V_SCALE),
    "k_scale_float": K_SCALE,
    "v_scale_float": V_SCALE,
}
"""What SGLang's loader makes of the scales of a checkpoint, on each layer."""


def answers(prefill: SparsePrefill, batch: Any, **layer: Any) -> list[torch.Tensor]:
    watch = observed.Keeps()
    prefill.observers.add(watch)
    found = observed.run(prefill, batch, **layer)
    (record,) = watch.records
    assert record.dense_reason is None and record.sparse_layers == LAYERS
    return found


def with_pool(prefill: SparsePrefill, layers: torch.Tensor) -> SparsePrefill:
    prefill.kv_pool.layers = layers
    return prefill


@pytest.mark.parametrize("kv_dtype", FP8)
@pytest.mark.parametrize("config", CONFIGS)
def test_answers_are_those_over_the_same_numbers_in_the_dtype_of_the_model(
    monkeypatch: pytest.MonkeyPatch, config: str, kv_dtype: torch.dtype
) -> None:
    """Bit for bit, so what heads choose is the same too."""
    monkeypatch.setattr(observed, "KV_DTYPE", kv_dtype)
    stored = observed.Pool().layers.to(kv_dtype)
    for batch in (observed.batch(), observed.batch(prefix=300)):
        wide = answers(with_pool(observed.prefill(config, monkeypatch), stored.float()), batch)
        narrow = answers(with_pool(observed.prefill(config, monkeypatch), stored), batch)
        assert all(torch.equal(a, b) for a, b in zip(narrow, wide))


def audited(view: Any) -> torch.Tensor:
    """float32 [2, Hq]: error and recall of some rows."""
    found = audit.examine(view, view.requests[0], np.arange(200, LENGTH, 50))
    return torch.stack([found.error, found.recall])


@pytest.mark.parametrize("config", CONFIGS)
def test_scales_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    """Stored numbers times their scales are the model's; the audit, which computes densely again, knows it too."""
    stored = observed.Pool().layers.to(torch.float8_e4m3fn)
    scales = torch.tensor([K_SCALE, V_SCALE])[None, :, None, None, None]
    watches = observed.Keeps(), observed.Keeps()
    wide = with_pool(observed.prefill(config, monkeypatch, watches[0]), stored.float() * scales)
    narrow = with_pool(observed.prefill(config, monkeypatch, watches[1]), stored)
    narrow.dense_backend = "triton"
    expected, got = answers(wide, observed.batch()), answers(narrow, observed.batch(), **SCALES)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(watches[0].views) == LAYERS
    for views in zip(watches[1].views, watches[0].views, strict=True):
        torch.testing.assert_close(*map(audited, views), rtol=1e-3, atol=1e-5)


def test_what_is_stored_is_what_the_dense_backend_would_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the scales of a layer, in SGLang's own pool, and without a change of the batch's keys and values."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    prefill = observed.prefill("test_a_shape", monkeypatch)
    pool = MHATokenToKVPool(SLOTS, 1, torch.float8_e4m3fn, KV_HEADS, D, LAYERS, "cpu", enable_memory_saver=False)
    prefill.kv_pool, prefill.dense_backend = pool, "triton"
    k, v = (torch.randn(50, KV_HEADS, D) for _ in range(2))
    before = k.clone(), v.clone()
    batch = SimpleNamespace(out_cache_loc=torch.arange(10, 60), out_cache_loc_is_physical=False)
    prefill.save_kv(k.repeat(1, HEADS // KV_HEADS, 1), k, v, observed.layer(1, **SCALES), batch)
    k_cache, v_cache = pool.get_kv_buffer(1)
    assert k_cache.dtype == torch.float8_e4m3fn
    assert torch.equal(k_cache[10:60].float(), (k / K_SCALE).to(torch.float8_e4m3fn).float())
    assert torch.equal(v_cache[10:60].float(), (v / V_SCALE).to(torch.float8_e4m3fn).float())
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])


def test_scales_count_where_the_dense_backend_uses_them() -> None:
    with_scales = observed.layer(0, **SCALES)
    assert KVScales.of(observed.layer(0), "triton") == KVScales()
    assert KVScales.of(with_scales, "torch_native") == KVScales()
    for name in ("fa3", "fa4", "flashinfer", "triton", "trtllm_mha"):
        found = KVScales.of(with_scales, name)
        assert found is not None and (found.k, found.v) == (K_SCALE, V_SCALE)
        assert found.stored == (with_scales.k_scale, with_scales.v_scale)
    assert KVScales.of(with_scales, "somebody's own") is None
    assert KVScales.of(observed.layer(0, **(SCALES | {"v_scale_float": None})), "triton") is None


def test_scales_that_nobody_understands_make_a_layer_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = observed.Keeps()
    prefill = with_pool(
        observed.prefill("test_a_shape", monkeypatch, watch), observed.Pool().layers.to(torch.float8_e5m2)
    )
    prefill.dense_backend = "somebody's own"
    observed.run(prefill, observed.batch(), **SCALES)
    assert [record.dense_reason for record in watch.records] == ["kv_cache_dtype"]
    assert watch.views == []
