"""The real SparsePrefill produces every dense_reason, and the answers are then the stock backend's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import observed
from observed import LENGTH, VIDEO, D
from sglang_mminfer.planning.budget import PlanBudget
from sglang_mminfer.serving import basis_choice, prompts
from sglang_mminfer.serving.reasons import REASONS

Change = Callable[[Any, Any, pytest.MonkeyPatch], None]
"""A change of a SparsePrefill and a forward batch before the batch runs."""


def item(batch: Any) -> Any:
    return batch.mm_inputs[0].mm_items[0]


def offsets(value: Any) -> Change:
    return lambda prefill, batch, patch: setattr(item(batch), "offsets", value)


def data(**values: Any) -> Change:
    return lambda prefill, batch, patch: item(batch).model_specific_data.update(values)


def of_batch(**values: Any) -> Change:
    return lambda prefill, batch, patch: vars(batch).update(values)


def mode(name: str) -> Change:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return of_batch(forward_mode=ForwardMode[name])


def nothing(prefill: Any, batch: Any, patch: pytest.MonkeyPatch) -> None:
    pass


def no_length(prefill: Any, batch: Any, patch: pytest.MonkeyPatch) -> None:
    prompts.keep({})


def odd_modality(prefill: Any, batch: Any, patch: pytest.MonkeyPatch) -> None:
    item(batch).modality = SimpleNamespace(name="SMELL")


def behind_a_gridless_video(prefill: Any, batch: Any, patch: pytest.MonkeyPatch) -> None:
    """Moves the chunk after the video, because rows before it would follow the config's window."""
    without_raster(prefill, batch, patch)
    vars(batch).update(vars(observed.batch(VIDEO[0])), mm_inputs=batch.mm_inputs)


def without_raster(prefill: Any, batch: Any, patch: pytest.MonkeyPatch) -> None:
    del item(batch).model_specific_data["video_grid_thw"]


def short(prefill: Any, batch: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prefill.served.choice, "dense_below", LENGTH)


def failing(prefill: Any, batch: Any, patch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("a test")

    patch.setattr("sglang_mminfer.kernels.executors.EXECUTORS", {prefill.executor: fail})


def failed(prefill: Any, batch: Any, patch: pytest.MonkeyPatch) -> None:
    failing(prefill, batch, patch)
    with patch.context() as inner:
        failing(prefill, batch, inner)
        for _ in range(2):
            observed.run(prefill, observed.batch(rid="before"))


def of_layer(**values: Any) -> dict[str, Any]:
    return values


REQUESTS: dict[str, tuple[str, Change]] = {
    # reason: (config, change)
    "no_media": ("test_a_shape", of_batch(mm_inputs=None)),
    "short": ("test_a_shape", short),
    "dense_config": ("dense", nothing),
    "no_raster": ("test_grid_frame", behind_a_gridless_video),
    "plan_budget": ("test_a_shape", lambda p, b, m: m.setattr(PlanBudget, "allows", lambda *arguments: False)),
    "not_faster": ("test_covering", lambda p, b, m: m.setattr(p.served.choice, "only_if_faster", True)),
    "no_prompt_length": ("test_a_shape", no_length),
    "no_offsets": ("test_a_shape", offsets(None)),
    "bad_offsets": ("test_a_shape", offsets([3])),
    "empty_span": ("test_a_shape", offsets([(9, 5)])),
    "out_of_range_offsets": ("test_a_shape", offsets([(LENGTH - 383, LENGTH)])),
    "overlapping_offsets": ("test_a_shape", lambda p, b, m: b.mm_inputs[0].mm_items.append(item(b))),
    "moving_offsets": ("test_a_shape", data(pre_chunked_input_ids=[1])),
    "grid_mismatch": ("test_a_shape", data(video_grid_thw=torch.tensor([[3, 8, 8]]))),
    "zero_frames": ("test_a_shape", data(video_grid_thw=torch.tensor([[0, 8, 8]]))),
    "unreadable": ("test_a_shape", lambda p, b, m: setattr(item(b), "model_specific_data", [1])),
    "unknown_modality": ("test_a_shape", odd_modality),
    "mode_*": ("test_a_shape", mode("SPLIT_PREFILL")),
    "two_batch_overlap": ("test_a_shape", of_batch(tbo_parent_token_range=(0, LENGTH))),
    "executor_failed": ("test_a_shape", failed),
    "internal_error": ("test_a_shape", failing),
}

LAYERS: dict[str, dict[str, Any]] = {
    # reason: change of every layer
    "layer_not_causal": {"is_cross_attention": True},
    "layer_sliding_window": {"sliding_window_size": 128},
    "layer_modified_softmax": {"logit_cap": 30.0},
    "layer_unequal_head_dims": {"v_head_dim": D + 1},
    "layer_unknown": {"layer_id": observed.LAYERS},
}

ELSEWHERE = {
    "no_basis": "test_before_the_basis_is_there",
    "decode": "test_a_retracted_request_is_dense_from_its_prompts_end_on",
    "layer_dense_config": "test_a_dense_layer_beside_sparse_ones",
    "layer_custom_mask": "test_a_mask_of_the_model_is_obeyed",
    "padded_rows": "test_rows_that_nobody_owns",
    "no_layer": "test_a_batch_without_attention",
    "kv_cache_dtype": "test_a_cache_that_no_executor_reads_is_said_at_start",
}


def test_every_reason_is_produced() -> None:
    assert {*REQUESTS, *LAYERS, *ELSEWHERE} == set(REASONS)
    assert all(name in globals() for name in ELSEWHERE.values())


def records_of(prefill: Any, batch: Any, **layer: Any) -> tuple[list[Any], list[torch.Tensor]]:
    watch = observed.Keeps()
    prefill.observers.add(watch)
    answers = observed.run(prefill, batch, **layer)
    prefill.end()
    return watch.records, answers


def stock_answers(monkeypatch: pytest.MonkeyPatch, batch: Any) -> list[torch.Tensor]:
    return observed.run(observed.prefill("dense", monkeypatch), batch)


def same(answers: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(answers, expected, strict=True))


@pytest.mark.parametrize("reason", REQUESTS)
def test_of_a_request(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    config, change = REQUESTS[reason]
    prefill, batch = observed.prefill(config, monkeypatch), observed.batch()
    change(prefill, batch, monkeypatch)
    (record,), answers = records_of(prefill, batch)
    assert record.dense_reason == ("mode_split_prefill" if reason == "mode_*" else reason)
    assert record.sparse_layers == 0 and record.density is None
    assert same(answers, stock_answers(monkeypatch, observed.batch(batch.extend_prefix_lens_cpu[0])))


@pytest.mark.parametrize("reason", LAYERS)
def test_of_a_layer(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    prefill = observed.prefill("test_a_shape", monkeypatch)
    if reason == "layer_unknown":
        monkeypatch.setattr(prefill, "num_layers", 0)
        (record,), _ = records_of(prefill, observed.batch())
    else:
        (record,), _ = records_of(prefill, observed.batch(), **LAYERS[reason])
    assert (record.dense_reason, record.sparse_layers) == (reason, 0)


def test_a_layer_that_sees_the_prompt_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 and Muse Spark have such layers, and name no window for them."""
    (record,), _ = records_of(observed.prefill("test_a_shape", monkeypatch), observed.batch(), use_irope=True)
    assert (record.dense_reason, record.sparse_layers) == ("layer_sliding_window", 0)


def test_before_the_basis_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a server starts: the built-in clip has not given it yet."""
    awaited = {basis_choice.BASIS_ATTRIBUTE: basis_choice.AWAITED}
    (record,), answers = records_of(observed.prefill("test_covering_mixed", monkeypatch, **awaited), observed.batch())
    assert (record.dense_reason, record.sparse_layers) == ("no_basis", 0)
    assert same(answers, stock_answers(monkeypatch, observed.batch()))


def test_a_retracted_request_is_dense_from_its_prompts_end_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither M-RoPE positions nor the mode, which is EXTEND, tell where the prompt ends."""
    prompt = LENGTH - 60
    prefill = observed.prefill("test_a_shape", monkeypatch)
    prefill.begin(observed.batch(prompt=prompt))
    assert [(c.map is not None, c.q_start, c.kv_len) for c in prefill.batch.planner.requests] == [
        (True, 0, prompt),
        (False, prompt, LENGTH),
    ]
    prefill = observed.prefill("test_a_shape", monkeypatch)
    (record,), answers = records_of(prefill, observed.batch(prompt=prompt))
    assert record.dense_reason is None and record.map[-1].stop == prompt
    dense = stock_answers(monkeypatch, observed.batch())
    assert all(torch.allclose(a[prompt:], b[prompt:], atol=1e-5) for a, b in zip(answers, dense))
    assert not any(
        torch.allclose(a[VIDEO[1] : prompt], b[VIDEO[1] : prompt], atol=1e-3) for a, b in zip(answers, dense)
    )
    (record,), answers = records_of(
        observed.prefill("test_a_shape", monkeypatch), observed.batch(prompt, prompt=prompt)
    )
    assert record.dense_reason == "decode"
    assert same(answers, stock_answers(monkeypatch, observed.batch(prompt)))


def test_a_text_turn_of_a_session_is_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shares the media of the turn before; their M-RoPE positions end with that turn's prompt."""
    batch = observed.batch(600)
    batch.mm_inputs[0].mrope_positions = torch.zeros(3, 600, dtype=torch.long)
    (record,), _ = records_of(observed.prefill("test_a_shape", monkeypatch), batch)
    assert record.dense_reason is None and record.map[-1].stop == LENGTH


def test_a_dense_layer_beside_sparse_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = observed.prefill("test_a_shape", monkeypatch)
    is_dense = type(prefill.served.head_config).is_dense
    monkeypatch.setattr(type(prefill.served.head_config), "is_dense", lambda self, layer: True)
    (record,), _ = records_of(prefill, observed.batch())
    assert record.dense_reason == "layer_dense_config"
    monkeypatch.setattr(type(prefill.served.head_config), "is_dense", is_dense)


def test_a_mask_of_the_model_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's mask is in the metadata of the Triton backend, and only that backend can apply it."""
    monkeypatch.setattr(observed.Stock, "forward_metadata", SimpleNamespace(custom_mask=torch.ones(1)), raising=False)
    (record,), answers = records_of(observed.prefill("test_a_shape", monkeypatch), observed.batch())
    assert record.dense_reason == "layer_custom_mask"
    assert same(answers, stock_answers(monkeypatch, observed.batch()))


def test_rows_that_nobody_owns(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = observed.prefill("test_a_shape", monkeypatch)
    prefill.begin(observed.batch(stop=LENGTH - 10))
    prefill.batch.num_rows += 1
    layer = observed.layer(0)
    assert not prefill.takes(prefill.kv_pool.q[0, : LENGTH - 10], layer, {})
    assert set(prefill.batch.layer_reasons) == {"padded_rows"}


def test_a_batch_without_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = observed.Keeps()
    prefill = observed.prefill("test_a_shape", monkeypatch, watch)
    prefill.begin(observed.batch())
    prefill.end()
    assert [record.dense_reason for record in watch.records] == ["no_layer"]


@pytest.mark.parametrize("at_start", [True, False])
def test_a_cache_that_no_executor_reads_is_said_at_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at_start: bool
) -> None:
    """No plan is made then. If only the pool's dtype differs, the first layer shows it."""
    if at_start:
        monkeypatch.setattr(observed, "KV_DTYPE", torch.float8_e4m3fnuz)
    prefill = observed.prefill("test_a_shape", monkeypatch)
    assert ("every request runs dense" in caplog.text) == at_start
    if not at_start:
        monkeypatch.setattr(
            prefill.kv_pool, "get_key_buffer", lambda layer: torch.empty(1, dtype=torch.float8_e4m3fnuz)
        )
    prefill.begin(observed.batch())
    assert (prefill.batch.planner is None) == at_start
    prefill.batch = None
    (record,), answers = records_of(prefill, observed.batch())
    assert record.dense_reason == "kv_cache_dtype"
    assert same(answers, stock_answers(monkeypatch, observed.batch()))


@pytest.mark.parametrize("config, prefix", [("test_a_shape", 150), ("test_grid_frame", 0), ("test_mixed_heads", 150)])
def test_a_map_without_raster_that_leaves_something_out_is_sparse(
    monkeypatch: pytest.MonkeyPatch, config: str, prefix: int
) -> None:
    """A pattern may need no raster, and a grid leaves keys out in the text before the medium."""
    batch = observed.batch(prefix)
    without_raster(None, batch, monkeypatch)
    (record,), _ = records_of(observed.prefill(config, monkeypatch), batch)
    assert record.dense_reason is None and record.sparse_layers == observed.LAYERS


def test_failures_turn_the_executor_off_with_one_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefill = observed.prefill("test_a_shape", monkeypatch)
    failing(prefill, None, monkeypatch)
    for number in range(5):
        observed.run(prefill, observed.batch(rid=f"request-{number}"))
    assert sum(record.exc_info is not None for record in caplog.records) == 1
    (said,) = [r.getMessage() for r in caplog.records if "everything runs dense now" in r.getMessage()]
    assert "3 failures" in said
    assert prefill.unfit == "executor_failed"
