"""A head whose audited error is too large runs dense for requests that begin afterwards, and for no others."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import Qwen2_5_VLConfig

import observed
from config_files import config_file
from observed import LENGTH
from sglang_mminfer import Dense, settings
from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.serving import audit
from sglang_mminfer.serving import guard as guard_module
from sglang_mminfer.serving.guard import REQUESTS, Guard
from sglang_mminfer.serving.served_heads import Placement, ServedHeads
from sglang_mminfer.serving.trace import GuardedHead, PrefillRecord, read_trace

BOUND = 0.2
LAYERS = observed.LAYERS
WRONG = (0, 0)
"""The layer and the head that see too little in `test_one_wrong_head`."""


# ---- the decision ------------------------------------------------------------------------------------------


def served(config: str = "test_a_shape") -> ServedHeads:
    hf_config = Qwen2_5_VLConfig(
        text_config={"num_hidden_layers": LAYERS, "num_attention_heads": observed.HEADS, "num_key_value_heads": 2}
    )
    head_config = HeadConfig.load(config_file(config)).bind(hf_config)
    return ServedHeads(head_config, Placement(0, torch.device("cpu"), 64, "torch", "torch_native"))


def judged(guard: Guard, *errors: float, layer: int = 0, first_head: int = 0, rid: str = "a") -> list[tuple[int, int]]:
    """What becomes dense when a request of one chunk had these errors, by head."""
    guard.add(rid, layer, first_head, errors, rows=64)
    return [(head.layer, head.head) for head in guard.prompt_done(rid)]


def dense_heads(guard: Guard) -> list[tuple[int, int]]:
    config = guard.served.head_config
    return [(i, h) for i in range(LAYERS) for h, pattern in enumerate(config.patterns(i)) if pattern == Dense()]


def test_a_head_becomes_dense_after_some_requests_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(BOUND, served())
    before = guard.served
    for _ in range(REQUESTS - 1):
        assert judged(guard, 0.1, 0.3) == []
    assert guard.served is before and not caplog.records
    assert judged(guard, 0.1, 0.3) == [(0, 1)]
    assert dense_heads(guard) == [(0, 1)] and guard.served.guarded == 1
    for _ in range(2 * REQUESTS):
        assert judged(guard, 0.1, 0.3) == []  # of requests that began before
    (said,) = (line.getMessage() for line in caplog.records)
    assert "layer 0 head 1 (0.3) exceeded 0.2 in 3 audited requests in a row" in said
    assert dense_heads(Guard(BOUND, before)) == [], "requests that began before keep what they began with"


def test_a_request_within_the_bound_begins_the_count_anew() -> None:
    guard = Guard(BOUND, served())
    errors = [0.3] * (REQUESTS - 1) + [BOUND] + [0.3] * (REQUESTS - 1)
    assert [judged(guard, error) for error in errors] == [[]] * len(errors)
    assert judged(guard, 0.3) == [(0, 0)]


def test_what_a_request_does_not_run_sparse_tells_nothing() -> None:
    """Neither a layer that ran dense in it nor a request without audits."""
    guard = Guard(BOUND, served())
    for _ in range(REQUESTS - 1):
        judged(guard, 0.3)
    assert judged(guard, 0.0, layer=1) == [] and guard.prompt_done("another") == []
    assert judged(guard, 0.3) == [(0, 0)]


@pytest.mark.parametrize("second, over", [(0.1, False), (0.2, True)])
def test_the_error_of_a_request_is_that_of_all_its_audited_rows(second: float, over: bool) -> None:
    guard = Guard(BOUND, served())
    for number in range(REQUESTS):
        guard.add(f"{number}", 0, 0, [0.5], rows=10)
        guard.add(f"{number}", 0, 0, [second], rows=30)  # 0.2 or 0.275 of all 40 rows
        assert bool(guard.prompt_done(f"{number}")) == (over and number == REQUESTS - 1)


def test_requests_are_judged_when_their_prompts_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their chunks may be mixed; those that never end are forgotten, the oldest first."""
    monkeypatch.setattr(guard_module, "MOST_UNFINISHED", 4)
    guard = Guard(BOUND, served())
    for number in range(4 * REQUESTS):
        guard.add(f"aborted-{number}", 0, 0, [0.9], 64)
    assert not dense_heads(guard)
    assert guard.prompt_done("aborted-0") == [] and dense_heads(guard) == []
    for number in range(REQUESTS):
        guard.add(f"{number}", 0, 0, [0.9], 32)
    for number in range(REQUESTS):
        guard.add(f"{number}", 0, 0, [0.9], 32)
    assert [len(guard.prompt_done(f"{number}")) for number in range(REQUESTS)] == [0] * (REQUESTS - 1) + [1]


def test_heads_of_a_later_rank_have_the_numbers_of_the_model() -> None:
    guard = Guard(BOUND, served())
    for _ in range(REQUESTS - 1):
        judged(guard, 0.0, 0.3, layer=1, first_head=4)
    assert judged(guard, 0.0, 0.3, layer=1, first_head=4) == [(1, 5)]
    assert dense_heads(guard) == [(1, 5)]


def test_heads_that_go_together_are_one_change(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(BOUND, served())
    assert [judged(guard, 0.3, 0.1, 0.4) for _ in range(REQUESTS)][-1] == [(0, 0), (0, 2)]
    assert len(caplog.records) == 1 and guard.served.guarded == 2
    assert [judged(guard, 0.3, 0.5, 0.4) for _ in range(REQUESTS)][-1] == [(0, 1)]
    assert len(caplog.records) == 2 and dense_heads(guard) == [(0, 0), (0, 1), (0, 2)]


def test_an_error_that_is_no_number_is_too_large() -> None:
    guard = Guard(BOUND, served())
    for _ in range(REQUESTS):
        guard.add("a", 0, 0, [float("nan")], 64)
        changes = guard.prompt_done("a")
    assert changes == [GuardedHead(layer=0, head=0, error=None)]


def test_a_head_that_is_dense_already_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(BOUND, served("dense"))
    assert [judged(guard, 0.9) for _ in range(2 * REQUESTS)] == [[]] * (2 * REQUESTS)
    assert guard.served.guarded == 0 and not caplog.records


def test_what_runs_sparse_is_decided_with_the_heads_that_are_left() -> None:
    heads = [(layer, head) for layer in range(LAYERS) for head in range(observed.HEADS)]
    some, every = served().with_dense(heads[:-1]), served().with_dense(heads)
    assert not served().all_dense and not some.all_dense and every.all_dense
    assert some.is_dense(0) and not some.is_dense(1) and every.is_dense(1)
    assert every.guarded == len(heads)
    assert some.head_config.form == "layers" and some.head_config.model is None


# ---- in the backend ----------------------------------------------------------------------------------------


def prefill_of(monkeypatch: pytest.MonkeyPatch, *observers: Any, **fields: Any) -> Any:
    flags = {"_mminfer_audit": 1.0, "_mminfer_guard": BOUND, **fields}
    return observed.prefill("test_one_wrong_head", monkeypatch, *observers, **flags)


def answers_of(config: str, monkeypatch: pytest.MonkeyPatch, batch: Any = None) -> list[torch.Tensor]:
    return observed.run(observed.prefill(config, monkeypatch), batch or observed.batch())


def close(answers: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(answers, expected, strict=True))


def test_later_requests_run_the_head_dense(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    watch = observed.Keeps()
    prefill = prefill_of(monkeypatch, watch)
    wrong, right = answers_of("test_one_wrong_head", monkeypatch), answers_of("test_covering", monkeypatch)
    answers = [observed.run(prefill, observed.batch(rid=f"{number}")) for number in range(REQUESTS + 2)]
    assert not close(wrong, right)
    assert [close(answer, wrong) for answer in answers] == [True] * REQUESTS + [False] * 2
    assert [close(answer, right) for answer in answers] == [False] * REQUESTS + [True] * 2
    assert [record.guarded_heads for record in watch.records] == [0] * REQUESTS + [1] * 2
    changes = [[(head.layer, head.head) for head in record.guard or []] for record in watch.records]
    assert changes == [[]] * (REQUESTS - 1) + [[WRONG]] + [[]] * 2
    for record in watch.records:
        errors = {found.layer: found.error_max for found in record.audit or []}
        assert (errors[0] > BOUND) == (record.guarded_heads == 0) and errors[1] < 1e-5
        assert record.guarded_heads == 0 or errors[0] < 1e-5
    decided = watch.records[REQUESTS - 1]
    assert decided.guard is not None and decided.audit is not None
    assert decided.guard[0].error == pytest.approx(decided.audit[0].error_max, rel=0.3)  # other rows of each request
    assert sum("mminfer: guard: the output error of" in line.getMessage() for line in caplog.records) == 1
    assert not prefill.observers.failures


@pytest.mark.parametrize("stock", ["own", "stock"])
def test_a_request_that_has_begun_keeps_its_heads(monkeypatch: pytest.MonkeyPatch, stock: str) -> None:
    """In a batch with one that begins, where each has its own, and alone; wherever dense heads run."""
    monkeypatch.setenv(settings.DENSE_HEADS.variable, stock)
    watch = observed.Keeps()
    prefill = prefill_of(monkeypatch, watch)
    first = observed.batch(0, 300, rid="begun")
    observed.run(prefill, first)
    for number in range(REQUESTS):
        observed.run(prefill, observed.batch(rid=f"{number}"))
    assert prefill.guard.served.guarded == 1
    second, new = observed.batch(300, 500, rid="begun"), observed.batch(100, rid="new")
    second.mm_inputs = first.mm_inputs  # as in SGLang
    both = observed.run(prefill, observed.together(second, new))
    answers = [[o[:200] for o in both], [o[200:] for o in both]]
    third = observed.batch(500, LENGTH, rid="begun")
    third.mm_inputs = first.mm_inputs
    answers.append(observed.run(prefill, third))
    again = observed.batch(0, 300, rid="the next turn")
    again.mm_inputs = first.mm_inputs  # as in a session
    answers.append(observed.run(prefill, again))
    wrong, right = answers_of("test_one_wrong_head", monkeypatch), answers_of("test_covering", monkeypatch)
    assert close(answers[0], [o[300:500] for o in wrong]) and not close(answers[0], [o[300:500] for o in right])
    assert close(answers[1], [o[100:] for o in right])
    assert close(answers[2], [o[500:] for o in wrong])
    assert close(answers[3], [o[:300] for o in right])
    assert {record.guarded_heads for record in watch.records if record.rid == "begun"} == {0}
    assert {record.guarded_heads for record in watch.records if record.rid == "new"} == {1}
    assert not prefill.failures


def test_a_head_that_becomes_dense_is_taken_to_the_stock_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.DENSE_HEADS.variable, "stock")
    watch = observed.Keeps()
    prefill = prefill_of(monkeypatch, watch)
    for number in range(REQUESTS + 1):
        observed.run(prefill, observed.batch(rid=f"{number}"))
    assert 0 not in watch.views[0].stock_heads and 0 in watch.views[-LAYERS].stock_heads
    assert watch.views[-LAYERS].patterns[0] == Dense() != watch.views[0].patterns[0]


@pytest.mark.parametrize("rank, guarded", [(0, 1), (1, 0)])
def test_each_rank_guards_its_own_heads(monkeypatch: pytest.MonkeyPatch, rank: int, guarded: int) -> None:
    """Rank 0 has head 0 of the model. Each rank has half of the heads, and one of the pool's two KV heads."""
    prefill, half = prefill_of(monkeypatch, rank=rank, ranks=2), observed.HEADS // 2
    pool = prefill.kv_pool
    pool.layers, pool.q = pool.layers[..., rank : rank + 1, :], pool.q[..., : half * observed.D]
    for number in range(REQUESTS):
        observed.run(prefill, observed.batch(rid=f"{number}"), tp_q_head_num=half, tp_k_head_num=1)
    assert prefill.guard.served.guarded == guarded and not prefill.failures


def test_a_guard_audits_some_requests_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = prefill_of(monkeypatch, _mminfer_audit=None)
    names = [f"{number}" for number in range(200)]
    chosen = [name for name in names if audit.chosen(name, settings.GUARD_AUDIT_RATE)][:REQUESTS]
    for rids, guarded in (([name for name in names if name not in chosen][:REQUESTS], 0), (chosen, 1)):
        for rid in rids:
            observed.run(prefill, observed.batch(rid=rid))
        assert len(rids) == REQUESTS and prefill.guard.served.guarded == guarded


def test_without_the_flag_there_is_no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.GUARD.variable, raising=False)
    watch = observed.Keeps()
    prefill = prefill_of(monkeypatch, watch, _mminfer_guard=None)
    assert prefill.guard is None
    batch = observed.batch()
    answers = [observed.run(prefill, observed.batch(rid=f"{number}")) for number in range(REQUESTS + 1)]
    observed.run(prefill, batch)
    assert not any("served" in name for name in vars(batch.mm_inputs[0]))
    assert close(answers[-1], answers[0])
    assert all(record.guard is None and record.guarded_heads == 0 for record in watch.records)


def test_guarded_heads_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from prometheus_client import REGISTRY

    def count() -> float:
        return REGISTRY.get_sample_value("sglang:mminfer_guarded_heads_total", {"layer": "0"}) or 0.0

    prefill = prefill_of(monkeypatch, metrics=True)
    before = count()
    for number in range(REQUESTS + 1):
        observed.run(prefill, observed.batch(rid=f"{number}"))
    assert count() == before + 1


# ---- trace and settings ------------------------------------------------------------------------------------


def test_what_the_ranks_guard_is_read_as_one(tmp_path: Path) -> None:
    """Also of a chunk that no rank audited: the last one of a prompt, where what was audited before is judged."""
    record = PrefillRecord(
        **{"rid": "a", "prefix_len": 0, "chunk_len": 9, "seq_len": 9, "segments": 1, "sparse_layers": 0},
        **{"density": None, "dense_reason": "not_faster", "plan_ms": 0.0, "attn_ms": 0.0, "forward_ms": 0.0},
    )
    for name, guard in (("trace", None), ("trace.rank1", [GuardedHead(layer=1, head=5, error=0.5)])):
        changed = msgspec.structs.replace(record, guard=guard)
        (tmp_path / name).write_bytes(msgspec.json.encode(changed) + b"\n")
    (joined,) = read_trace(tmp_path / "trace")
    assert joined.guard == [GuardedHead(layer=1, head=5, error=0.5)]
    assert "guard" not in json.loads((tmp_path / "trace").read_text())


@pytest.mark.parametrize("text", ["-0.1", "1.01", "5", "nan", "small", ""])
def test_a_bad_bound_is_a_usage_error(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected a relative output error from 0 .* to 1, got"):
        settings.output_error(text)
