"""Speculative decoding on a CPU: each operator against a plain definition, and its attention against whole prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_mminfer.serving import cpu_speculative as speculative

HEADS, KV_HEADS, D, SLOTS = 4, 2, 8, 64


def sglangs(*args: Any, **kwargs: Any) -> Any:
    pytest.fail("this is Triton's")


lengths = st.lists(st.integers(0, 12), min_size=1, max_size=4)


@given(lengths, st.integers(1, 5))
def test_slots_of_the_tokens_behind_each_request(prefixes: list[int], width: int) -> None:
    table = torch.randperm(9 * 20, generator=torch.Generator().manual_seed(1)).view(9, 20).int()
    requests, starts = torch.arange(len(prefixes)) * 2, torch.tensor(prefixes)
    expected = [int(table[2 * i, start + j]) for i, start in enumerate(prefixes) for j in range(width)]
    found = speculative.slots(
        req_pool_indices=requests,
        req_to_token=table,
        start_offset=starts,
        end_offset=starts + width,
        batch_size=len(prefixes),
        draft_token_num=width,
        device="cpu",
    )
    assert found.tolist() == expected and found.dtype == torch.int64
    out = torch.zeros(len(expected), dtype=torch.int64)
    speculative.draft_slots(sglangs, requests, table, starts, out, 1, width, positions=None, mrope=None)
    assert out.tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 6)), min_size=1, max_size=4))
def test_slots_are_noted_where_they_belong(parts: list[tuple[int, int]]) -> None:
    table = torch.full((4, 16), -1, dtype=torch.int32)
    starts = torch.tensor([start for start, _ in parts])
    ends = starts + torch.tensor([count for _, count in parts])
    given_slots = torch.arange(100, 100 + int((ends - starts).sum()))
    speculative.note_slots(sglangs, torch.arange(len(parts)), table, starts, ends, given_slots, len(parts))
    read = [table[i, start : start + count].tolist() for i, (start, count) in enumerate(parts)]
    assert [slot for part in read for slot in part] == given_slots.tolist()
    assert int((table >= 0).sum()) == len(given_slots)


@given(lengths)
def test_the_last_slot_of_each_request(counts: list[int]) -> None:
    table = torch.randperm(4 * 12, generator=torch.Generator().manual_seed(2)).view(4, 12).int()
    found = speculative.last_slots(sglangs, table, torch.arange(len(counts)), torch.tensor(counts))
    assert found.tolist() == [int(table[i, count - 1]) if count else -1 for i, count in enumerate(counts)]


@given(lengths, st.integers(2, 6))
def test_a_chain_has_one_token_after_the_other(seq_lens: list[int], width: int) -> None:
    n = len(seq_lens)
    positions = torch.empty(n * width, dtype=torch.long)
    index, following, sibling = torch.full((3, n, width), -1)
    parents, order = torch.arange(-1, width - 2).expand(n, -1), torch.arange(width - 1).expand(n, -1)
    speculative.build_chain(
        *(sglangs, parents, order, torch.tensor(seq_lens), torch.ones(1), positions),
        *(index, following, sibling, 1, width - 1, width, 0),
    )
    assert positions.tolist() == [length + i for length in seq_lens for i in range(width)]
    assert index.flatten().tolist() == list(range(n * width))
    assert following.tolist() == [[*range(1, width), -1]] * n
    assert sibling.tolist() == [[-1] * width] * n


@given(st.data(), st.integers(1, 4), st.integers(2, 5))
def test_accepted_are_the_tokens_that_the_target_predicts(data: st.DataObject, n: int, width: int) -> None:
    """Against the walk from token to token; a vocabulary of two makes hits frequent."""
    draw = st.lists(st.integers(0, 1), min_size=n * width, max_size=n * width)
    candidates, target = (torch.tensor(data.draw(draw)).view(n, width) for _ in range(2))
    index = torch.arange(n * width).view(n, width)
    predicts = torch.zeros(n * width, dtype=torch.int32)
    accepted = torch.full((n, width), -1, dtype=torch.int32)
    count = torch.empty(n, dtype=torch.int32)
    speculative.verify_chain(sglangs, predicts, accepted, count, candidates, index, index, index, target_predict=target)
    tokens = predicts.view(n, width)
    for i in range(n):
        walk = [int(target[i, 0])]
        while len(walk) < width and candidates[i, len(walk)] == walk[-1]:
            walk.append(int(target[i, len(walk)]))
        assert int(count[i]) == len(walk) - 1
        assert accepted[i].tolist() == [i * width + j if j < len(walk) else -1 for j in range(width)]
        assert tokens[i].tolist() == walk + [0] * (width - len(walk))
    last = torch.empty(n, dtype=torch.int32)
    speculative.last_accepted(sglangs, predicts, count + 1, last, width, n)
    assert last.tolist() == [int(tokens[i, count[i]]) for i in range(n)]


@pytest.fixture
def runner() -> Any:
    draw = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, SLOTS, KV_HEADS, D, generator=draw)
    table = torch.randperm(SLOTS, generator=draw).view(2, SLOTS // 2)
    pool = SimpleNamespace(get_key_buffer=lambda layer: keys, get_value_buffer=lambda layer: values)
    return SimpleNamespace(device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=pool)


def attended(runner: Any, q: torch.Tensor, request: int, stop: int) -> torch.Tensor:
    """One row's attention over the first `stop` tokens of a request, by its definition."""
    slots = runner.req_to_token_pool.req_to_token[request, :stop]
    keys, values = (
        read(0)[slots].repeat_interleave(HEADS // KV_HEADS, dim=1)
        for read in (runner.token_to_kv_pool.get_key_buffer, runner.token_to_kv_pool.get_value_buffer)
    )
    scores = torch.einsum("hd,khd->hk", q.view(HEADS, D), keys) * D**-0.5
    return torch.einsum("hk,khd->hd", scores.softmax(-1), values).flatten()


LAYER = SimpleNamespace(
    layer_id=0,
    tp_q_head_num=HEADS,
    tp_k_head_num=KV_HEADS,
    qk_head_dim=D,
    v_head_dim=D,
    scaling=D**-0.5,
    is_cross_attention=False,
    attn_type=None,
    sliding_window_size=-1,
)


def of_mode(name: str, seq_lens: list[int], **more: Any) -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return SimpleNamespace(
        forward_mode=ForwardMode[name],
        seq_lens=torch.tensor(seq_lens),
        req_pool_indices=torch.arange(len(seq_lens)),
        out_cache_loc=None,
        encoder_lens=None,
        extend_prefix_lens=None,
        extend_seq_lens=None,
        **more,
    )


def test_rows_of_a_verify_batch_see_the_request_and_the_rows_before_them(runner: Any) -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    seq_lens, width = [9, 14], 4
    q = torch.randn(len(seq_lens) * width, HEADS * D, generator=torch.Generator().manual_seed(4))
    batch = of_mode("TARGET_VERIFY", seq_lens, spec_info=SimpleNamespace(draft_token_num=width))
    forward = getattr(TorchNativeAttnBackend.forward_extend, "__wrapped__", TorchNativeAttnBackend.forward_extend)
    out = speculative.attend(forward, TorchNativeAttnBackend(runner), q, None, None, LAYER, batch)
    expected = [
        attended(runner, q[i * width + j], i, length + j + 1) for i, length in enumerate(seq_lens) for j in range(width)
    ]
    assert torch.allclose(out, torch.stack(expected), atol=1e-5)
    assert batch.seq_lens.tolist() == seq_lens and batch.extend_seq_lens is None  # it is SGLang's


def test_each_step_of_a_draft_sees_one_token_more(runner: Any) -> None:
    seq_lens = [9, 14]
    batch = of_mode("DECODE", seq_lens)
    steps = speculative.DraftSteps(runner, 2)
    steps.init_forward_metadata(batch)
    q = torch.randn(len(seq_lens), HEADS * D, generator=torch.Generator().manual_seed(5))
    for step, backend in enumerate(steps.attn_backends):
        out = backend.forward_decode(q, None, None, LAYER, batch)
        expected = [attended(runner, q[i], i, length + step + 1) for i, length in enumerate(seq_lens)]
        assert torch.allclose(out, torch.stack(expected), atol=1e-5)


def test_drafts_of_an_accelerator_are_left_to_sglang() -> None:
    factory = SimpleNamespace(draft_model_runner=SimpleNamespace(device="cuda"), speculative_num_steps=3)
    assert speculative.draft_steps(lambda factory: "theirs", factory) == "theirs"
    assert speculative.draft_extend(lambda factory: "theirs", factory) == "theirs"


def test_a_draft_of_one_token_takes_no_step_of_its_own(runner: Any) -> None:
    factory = SimpleNamespace(draft_model_runner=runner, speculative_num_steps=1)
    assert speculative.draft_steps(sglangs, factory) is None
    assert speculative.draft_extend(sglangs, factory) is None
