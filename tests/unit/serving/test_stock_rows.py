"""Rows that see everything run on a second instance of the stock backend, beside a plan for the others."""

from __future__ import annotations

from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import observed
from observed import LENGTH, D, Pool
from sglang_mminfer.kernels.reference import masked_attention
from sglang_mminfer.serving import prompts
from sglang_mminfer.serving.backend import create_backend
from sglang_mminfer.serving.stock_rows import RowRange, StockRows, part_of, second_instance
from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl
from support import INTERPRETED

# Four requests that share one prefix tree: a prompt whose chunk goes on with generated tokens, a text-only request, a
# request that decodes, and a later chunk of a prompt.
CHUNKS = {"prompt": (0, LENGTH), "text": (0, 90), "decoding": (LENGTH - 1, LENGTH), "later": (300, LENGTH)}
PROMPT = LENGTH - 60


def forward_batch() -> Any:
    """A batch as SGLang makes it, over the pool of `observed`."""
    starts, stops = zip(*CHUNKS.values())
    lengths = [stop - start for start, stop in CHUNKS.values()]
    one = observed.batch()
    video = one.mm_inputs[0]
    prompts.keep({"prompt": PROMPT, "text": 90, "decoding": LENGTH - 30, "later": LENGTH})
    rows = sum(lengths)
    return SimpleNamespace(
        forward_mode=one.forward_mode,
        batch_size=len(CHUNKS),
        input_ids=torch.arange(rows),
        positions=torch.cat([torch.arange(*chunk) for chunk in CHUNKS.values()]),
        out_cache_loc=torch.arange(rows) + 5,
        req_pool_indices=torch.zeros(len(CHUNKS), dtype=torch.int64),
        req_pool_indices_cpu=None,
        seq_lens=torch.tensor(stops),
        seq_lens_cpu=torch.tensor(stops),
        seq_lens_sum=sum(stops),
        extend_num_tokens=rows,
        extend_seq_lens=torch.tensor(lengths, dtype=torch.int32),
        extend_seq_lens_cpu=lengths,
        extend_prefix_lens=torch.tensor(starts, dtype=torch.int32),
        extend_prefix_lens_cpu=list(starts),
        extend_start_loc=torch.tensor([0, *accumulate(lengths)][:-1], dtype=torch.int32),
        encoder_lens=None,
        rids=list(CHUNKS),
        mm_inputs=[video, None, video, video],
    )


def torch_native(prefill: Any) -> Any:
    """SGLang's own backend over the pool of a SparsePrefill."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    tables = SimpleNamespace(req_to_token=prefill.req_to_token)
    runner = SimpleNamespace(device="cpu", req_to_token_pool=tables, token_to_kv_pool=prefill.kv_pool)
    return second_instance(ATTENTION_BACKENDS["torch_native"], "torch_native", runner)


def run(monkeypatch: pytest.MonkeyPatch, stock: bool) -> tuple[torch.Tensor, Any]:
    """The answers of one layer, and the batch as it ran."""
    prefill = observed.prefill("test_grid_frame", monkeypatch)
    if stock:
        monkeypatch.setattr(prefill, "second_instance", torch_native(prefill))
        monkeypatch.setattr(prefill.served.choice.comparison, "own_dense_is_faster", lambda start, stop: False)
    pool = prefill.kv_pool
    q = torch.cat([pool.q[0, start:stop] for start, stop in CHUNKS.values()])
    batch = forward_batch()
    prefill.begin(batch)
    ran = prefill.batch
    k = torch.zeros(len(q), observed.KV_HEADS, D)  # the pool has them
    out = prefill.run_layer(q, k, k, observed.layer(0), lambda some, view: some)
    assert out is not None and prefill.failures == 0
    return out.view(len(q), observed.HEADS, D), ran


def test_the_backend_of_a_server_has_a_second_instance_that_is_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = run(monkeypatch, stock=True)
    monkeypatch.setattr("sglang_mminfer.serving.head_config_choice.announce_once", lambda runner: None)
    backend = create_backend(observed.runner("test_grid_frame", monkeypatch))
    assert isinstance(backend, type(backend.mminfer.second_instance)) and backend is not backend.mminfer.second_instance
    monkeypatch.setattr(backend.mminfer.served.choice.comparison, "own_dense_is_faster", lambda start, stop: False)
    batch, pool = forward_batch(), backend.mminfer.kv_pool
    q = torch.cat([pool.q[0, start:stop] for start, stop in CHUNKS.values()])
    backend.init_forward_metadata(batch)
    out = backend.forward_extend(q, None, None, observed.layer(0), batch, save_kv_cache=False)
    assert backend.mminfer.batch.sparse_layers == 1
    assert torch.equal(out.view(expected.shape), expected)


def dense_answers(rows: list[int]) -> torch.Tensor:
    """Plain attention of the positions `rows` of the shared tree."""
    pool, group = Pool(), observed.HEADS // observed.KV_HEADS
    q = pool.q[0, rows].view(-1, observed.HEADS, D)
    k, v = (cache[pool.slots] for cache in pool.get_kv_buffer(0))
    causal = torch.arange(LENGTH) <= torch.tensor(rows)[:, None]
    heads = [
        masked_attention(q[:, h], k[:, h // group], v[:, h // group], causal, observed.SCALE)[0]
        for h in range(observed.HEADS)
    ]
    return torch.stack(heads, dim=1).float()


def test_dense_rows_of_a_sparse_batch_run_on_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    own, before = run(monkeypatch, stock=False)
    out, ran = run(monkeypatch, stock=True)
    assert before.stock_rows is None and len(before.planner.requests) == 5
    assert [(chunk.q_start, chunk.kv_len) for chunk in ran.planner.requests] == [(0, PROMPT), CHUNKS["later"]]
    assert [request.dense_reason for request in ran.requests] == [None, "no_media", "decode", None]
    row = dict(zip(CHUNKS, accumulate([0, LENGTH, 90, 1])))
    dense = [*range(PROMPT, LENGTH), *range(row["text"], row["later"])]
    positions = [*range(PROMPT, LENGTH), *range(90), LENGTH - 1]
    torch.testing.assert_close(out[dense], dense_answers(positions), rtol=1e-4, atol=1e-5)
    sparse = sorted(set(range(len(out))) - set(dense))
    assert torch.equal(out[sparse], own[sparse]), "the plan's rows do not depend on who computes the others"
    assert not torch.allclose(out[200:PROMPT], dense_answers(list(range(200, PROMPT))), atol=1e-3)


def test_on_torch_native_only_rows_without_a_prefix_go_to_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would compute the whole prefix again for them."""
    prefill = observed.prefill("test_grid_frame", monkeypatch)
    monkeypatch.setattr(prefill, "second_instance", torch_native(prefill))
    prefill.begin(forward_batch())
    chunks = [(chunk.q_start, chunk.kv_len) for chunk in prefill.batch.planner.requests]
    assert chunks == [(0, PROMPT), (PROMPT, LENGTH), CHUNKS["decoding"], CHUNKS["later"]]
    assert prefill.batch.stock_rows is not None


def test_a_part_of_a_batch_is_a_batch() -> None:
    whole = forward_batch()
    before = dict(vars(whole))
    ranges = [RowRange(0, PROMPT, LENGTH, PROMPT), RowRange(2, LENGTH - 1, LENGTH, LENGTH + 90)]
    rows, part = part_of(whole, ranges)
    assert all(vars(whole)[name] is value for name, value in before.items())
    assert rows.tolist() == [*range(PROMPT, LENGTH), LENGTH + 90]
    assert (part.batch_size, part.extend_num_tokens, part.seq_lens_sum) == (2, 61, 2 * LENGTH)
    assert part.seq_lens.tolist() == part.seq_lens_cpu.tolist() == [LENGTH, LENGTH]
    assert part.extend_seq_lens.tolist() == part.extend_seq_lens_cpu == [60, 1]
    assert part.extend_prefix_lens.tolist() == part.extend_prefix_lens_cpu == [PROMPT, LENGTH - 1]
    assert part.extend_start_loc.tolist() == [0, 60] and part.rids == ["prompt", "decoding"]
    assert part.out_cache_loc.tolist() == (rows + 5).tolist()
    assert part.positions.tolist() == [*range(PROMPT, LENGTH), LENGTH - 1]
    for name in ("seq_lens", "extend_seq_lens", "extend_prefix_lens", "extend_start_loc", "req_pool_indices"):
        assert getattr(part, name).dtype == getattr(whole, name).dtype, name


@pytest.mark.skipif(not INTERPRETED, reason="SGLang's Triton kernels: in Triton's interpreter")
def test_sglangs_triton_backend_runs_a_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The metadata that it makes of a part, with SGLang's own page tables, and its kernel."""
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.layers.attention import triton_backend
    from sglang.srt.layers.radix_attention import AttentionType
    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
    from sglang.srt.runtime_context import publish, restore_context, snapshot_context
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=str(make_tiny_qwen2_5_vl(tmp_path / "model")), device="cpu")
    server_args.resolve_once()
    pool, tables = Pool(), SimpleNamespace(size=8, req_to_token=Pool().slots[None].int())
    model = SimpleNamespace(
        hf_config=model_config_of(server_args).hf_config,
        attention_arch=None,
        get_max_num_attention_heads=lambda: observed.HEADS,
        get_num_kv_heads=lambda *ranks: observed.KV_HEADS,
        head_dim=D,
        v_head_dim=D,
        swa_v_head_dim=D,
        context_len=LENGTH,
        is_encoder_decoder=False,
        is_hybrid_swa=False,
        linear_attn_registry_result=None,
    )
    runner = SimpleNamespace(
        model_config=model,
        req_to_token_pool=tables,
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=None,
        kv_index_translator=KVIndexTranslator(
            req_to_token=tables.req_to_token,
            token_to_kv_pool_allocator=None,
            token_to_kv_pool=pool,
            page_size=1,
            device="cpu",
        ),
        sliding_window_size=None,
        decode_num_tokens_per_req=lambda: 1,
        is_draft_worker=False,
        device="cpu",
        gpu_id=0,
        kv_cache_dtype=torch.float32,
        dtype=torch.float32,
    )
    monkeypatch.setattr(triton_backend, "get_device_core_count", lambda *_: 8)
    layer = observed.layer(0, attn_type=AttentionType.DECODER, logit_capping_method="tanh", k_scale=None, v_scale=None)
    batch = forward_batch()
    vars(batch).update(spec_info=None, kv_loc_plan=None, mha_one_shot=False)
    start = dict(zip(CHUNKS, accumulate([0, LENGTH, 90, 1])))
    ranges = [
        RowRange(0, PROMPT, LENGTH, PROMPT),
        RowRange(1, 0, 90, start["text"]),
        RowRange(2, LENGTH - 1, LENGTH, start["decoding"]),
    ]
    q = torch.cat([pool.q[0, first:stop] for first, stop in CHUNKS.values()])
    k, v = (torch.cat([x[pool.slots[slice(*chunk)]] for chunk in CHUNKS.values()]) for x in pool.get_kv_buffer(0))
    out = torch.full((len(q), observed.HEADS, D), torch.nan)
    before = snapshot_context()
    publish(server_args, role="scheduler")
    try:
        backend = second_instance(triton_backend.TritonAttnBackend, "triton", runner)
        StockRows(backend, batch, ranges).run(q, k, v, layer, out)
    finally:
        restore_context(before)
    rows = [row for part in ranges for row in range(part.row_start, part.row_start + part.stop - part.start)]
    expected = dense_answers([*range(PROMPT, LENGTH), *range(90), LENGTH - 1])
    torch.testing.assert_close(out[rows], expected, rtol=1e-4, atol=1e-5)
    assert bool(out[: rows[0]].isnan().all()), "a row of the plan was written"


def test_part_of_sets_what_sglang_splits() -> None:
    """The fields with a value for each request or row, by SGLang's own split of a batch for two-batch overlap."""
    import inspect

    from sglang.srt.batch_overlap.two_batch_overlap import TboForwardBatchPreparer
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    text = inspect.getsource(TboForwardBatchPreparer.filter_batch)
    lists = text[: text.index("spec_info = ")]
    split = {name for name in vars(forward_batch()) if f'"{name}"' in lists}
    assert {"req_pool_indices", "seq_lens", "extend_prefix_lens", "out_cache_loc", "rids"} < split
    whole = forward_batch()
    _, part = part_of(whole, [RowRange(1, 0, 90, LENGTH)])
    assert vars(part).keys() <= {field.name for field in fields(ForwardBatch)}
    for name in split - {"req_pool_indices_cpu"}:
        assert len(getattr(part, name)) != len(getattr(whole, name)), name


@pytest.mark.parametrize("name, window", [("aiter", None), ("fa3", 128)])
def test_other_backends_and_windows_have_no_second_instance(name: str, window: int | None) -> None:
    assert (
        second_instance(lambda runner: pytest.fail("made"), name, SimpleNamespace(sliding_window_size=window)) is None
    )
    assert second_instance(lambda runner: "made", "fa3", SimpleNamespace(sliding_window_size=-1)) == "made"
