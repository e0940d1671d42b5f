"""The executors by themselves: the literal meaning of a plan's arrays against what each executor computes."""

import gc
import math
from dataclasses import replace
from functools import partial
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import support
from raw_plans import SLOTS, counted_slots, raw_plans
from sglang_mminfer import AShape, Grid, QBoundary, VerticalSlash, prefill
from sglang_mminfer.kernels import host_tiles, reference, torch_gather
from sglang_mminfer.kernels.block_plan import (
    nothing,
    pack_lanes,
    pack_lanes_on_host,
    unpack_lanes,
)
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import D, any_pattern, batches, conversation

EXECUTORS = [pytest.param(prefill.EXECUTORS[name], id=name) for name in support.EXECUTORS]
if support.INTERPRETED:  # short lists, so by itself it cuts none of them
    from sglang_mminfer.kernels.triton import launch

    EXECUTORS += [pytest.param(partial(launch.run, most_visits=n), id=f"triton, parts of {n}") for n in (1, 3)]

CHAT = conversation(20, (6, 4, 5), 30, (1, 4, 5), 40)  # 230 tokens
HEADS = [
    AShape(16, 40),
    Grid("frame", True, False, True, 3, 8, 24),
    VerticalSlash(20, 30),
    QBoundary({"video": Grid("row", False, True, True, 1, 8, 8), "text": AShape(4, 50)}),
]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the oracle --------------------------------------------------------------------------------------------


def naive_attention(q, k, v, mask, scale):
    """One row and one key at a time, in Python numbers."""
    out, lse = [], []
    for i in range(len(q)):
        scores = {j: scale * sum(x * y for x, y in zip(q[i], k[j])) for j in range(len(k)) if mask[i][j]}
        if not scores:
            out.append([0.0] * len(q[0]))
            lse.append(-math.inf)
            continue
        total = sum(math.exp(s) for s in scores.values())
        out.append([sum(math.exp(s) / total * v[j][d] for j, s in scores.items()) for d in range(len(v[0]))])
        lse.append(math.log2(total))
    return torch.tensor(out, dtype=torch.float64), torch.tensor(lse, dtype=torch.float64)


def test_the_oracle_is_softmax_attention_written_out():
    q, k, v = randn(5, 4), randn(7, 4, seed=1), randn(7, 4, seed=2)
    mask = randn(5, 7, seed=3) > 0
    mask[2] = False
    out, lse = reference.masked_attention(q, k, v, mask, 0.7)
    expected, expected_lse = naive_attention(q.tolist(), k.tolist(), v.tolist(), mask.tolist(), 0.7)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_the_oracle_agrees_with_torch_in_float64():
    q, k, v = randn(40, 16).double(), randn(60, 16, seed=1).double(), randn(60, 16, seed=2).double()
    mask = torch.ones(40, 60, dtype=torch.bool).tril(20)
    out, _ = reference.masked_attention(q, k, v, mask, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=0.3)[0]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_row_that_sees_nothing_is_zero_with_an_lse_of_minus_infinity():
    out, lse = reference.masked_attention(randn(2, 4), randn(3, 4), randn(3, 4), torch.zeros(2, 3).bool(), 1.0)
    assert not out.any() and lse.tolist() == [-math.inf, -math.inf]


# ---- joining partial results -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(1, 6), st.floats(0.1, 40.0))
def test_partial_attentions_join_to_the_whole(seed, parts, scale):
    q, k, v = randn(6, 4, seed=seed), randn(12, 4, seed=seed + 1), randn(12, 4, seed=seed + 2)
    mask = torch.ones(6, 12).tril(4).bool()
    owner = torch.randint(0, parts, (12,), generator=torch.Generator().manual_seed(seed))
    out, lse = torch.zeros(6, 4, dtype=torch.float64), torch.full((6,), -torch.inf, dtype=torch.float64)
    for part in range(parts):
        piece = reference.masked_attention(q, k, v, mask & (owner == part), scale)
        out, lse = torch_gather.merge_state(out, lse, *piece)
    expected, expected_lse = reference.masked_attention(q, k, v, mask, scale)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)


def test_joining_two_empty_parts_gives_an_empty_part():
    nothing = (torch.zeros(3, 4), torch.full((3,), -torch.inf))
    out, lse = torch_gather.merge_state(*nothing, *nothing)
    assert not out.any() and bool(lse.isneginf().all())
    something = (randn(3, 4), torch.tensor([0.0, 900.0, -900.0]))
    for got in (torch_gather.merge_state(*something, *nothing), torch_gather.merge_state(*nothing, *something)):
        assert torch.equal(got[0], something[0]) and torch.equal(got[1], something[1])


# ---- what a plan's arrays mean -----------------------------------------------------------------------------


@pytest.mark.parametrize("execute", EXECUTORS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@settings(max_examples=support.examples(40))
@given(plan=raw_plans(), seed=st.integers(0, 99))
def test_an_executor_does_what_the_plan_says_and_writes_every_output(execute, num_kv_heads, plan, seed):
    q = randn(plan.num_rows, 4, D, seed=seed)
    k, v = randn(SLOTS, num_kv_heads, D, seed=seed + 1), randn(SLOTS, num_kv_heads, D, seed=seed + 2)
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
    execute(q, k, v, plan, 0.4, out, lse)
    for row in range(plan.num_rows):
        for head in range(4):
            slots, kv = counted_slots(plan, row, head), head // (4 // num_kv_heads)
            everything = torch.ones(1, len(slots), dtype=torch.bool)
            expected, expected_lse = reference.masked_attention(
                q[row, head][None], k[slots, kv], v[slots, kv], everything, 0.4
            )
            torch.testing.assert_close(out[row, head], expected[0].float(), rtol=2e-5, atol=2e-6)
            torch.testing.assert_close(lse[row, head], expected_lse[0].float(), rtol=2e-5, atol=2e-6)


@settings(max_examples=40)
@given(plan=raw_plans())
def test_rows_cut_into_strips_see_what_their_tiles_see(plan):
    """Tiles with many masked keys are cut into strips of rows: here, with more than one, into strips of two rows."""
    q, k, v = (randn(n, 4, D, seed=i) for i, n in enumerate((plan.num_rows, SLOTS, SLOTS)))
    results = []
    for strips in (False, True):
        cut = replace(plan)  # without what the first run kept with it
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        with pytest.MonkeyPatch.context() as patch:
            if strips:
                patch.setattr(host_tiles, "MAX_MASKED_KEYS", 1)
                patch.setattr(host_tiles, "ROWS_OF_A_STRIP", 2)
            torch_gather.run(q, k, v, cut, 0.4, out, lse)
            results.append((out, lse, cut.visited_by_row))
    torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("execute", EXECUTORS)
def test_a_plan_without_passes_writes_every_output(execute):
    q, cache = randn(3, 2, D), randn(5, 1, D)
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
    execute(q, cache, cache, nothing(3, 2, 8, 8, torch.device("cpu")), 1.0, out, lse)
    assert not out.any() and bool(lse.isneginf().all())


@pytest.mark.parametrize("execute", EXECUTORS)
@pytest.mark.parametrize("heads", [HEADS, HEADS[:1] * 4], ids=["several passes", "one pass"])
def test_a_plan_that_nobody_holds_is_freed_at_once(execute, heads):
    """The plan of a layer whose heads choose their keys may have a gigabyte on a GPU, which must not stay there until
    Python looks for cycles."""
    q, k = randn(CHAT.length, 4, D), randn(CHAT.length, 2, D, seed=1)

    def planned_and_run() -> list[ref]:
        plan = BatchPlanner([RequestChunk(CHAT, 0, len(q), 0, torch.arange(len(q)))], len(q)).plan(heads, q, k, 0.3)
        execute(q, k, k, plan, 0.3, torch.empty_like(q), torch.empty(q.shape[:2]))
        return [ref(x) for x in (plan, plan.block_indices, plan.keys.kv_slots)]

    planned_and_run()  # Triton's interpreter keeps what its first run was called with
    gc.collect()
    gc.disable()
    try:
        assert [x() for x in planned_and_run()] == [None] * 3
    finally:
        gc.enable()


@settings(max_examples=60)
@given(batches(any_pattern))
def test_a_plan_is_laid_out_as_its_docstring_says(batch):
    chunks = [
        RequestChunk(batch.maps[i], batch.q_start(i), batch.kv_lens[i], batch.rows(i).start, batch.slots(i))
        for i in range(len(batch.maps))
        if batch.q_lens[i]
    ]
    block_q, block_k = batch.tiles
    planner = BatchPlanner(chunks, len(batch.q), dense_below=batch.dense_below, block_q=block_q, block_k=block_k)
    k_cache = batch.cache()
    k = k_cache[:, 0] if batch.packed else k_cache[0]
    k = (k.transpose(1, 2) if batch.kv_layout == "HND" else k).reshape(-1, batch.num_kv_heads, D)
    plan = planner.plan(batch.heads, batch.q, k, batch.scale)
    of_row = {}
    for i in range(len(batch.maps)):
        of_row |= {row: i for row in range(batch.rows(i).start, batch.rows(i).stop)}
    for block_plan in plan.passes:
        keys = block_plan.keys
        pos, slots = (x.view(-1, block_k) for x in (keys.kv_pos, keys.kv_slots))
        for name in (
            "q_rows",
            "q_stop",
            "q_indptr",
            "q_heads",
            "block_indptr",
            "block_indices",
            "num_full",
            "num_gathered",
            "excluded_lanes",
        ):
            assert getattr(block_plan, name).dtype == torch.int32
        assert {x.dtype for x in (pos, slots)} == {torch.int32}
        rows_of_head = {head: [] for head in range(len(batch.heads))}
        for t in range(block_plan.num_tiles):
            first, last = block_plan.q_indptr[t : t + 2].tolist()
            rows, stop = block_plan.q_rows[first:last].tolist(), block_plan.q_stop[first:last]
            assert 1 <= len(rows) <= block_q
            for head in block_plan.head_groups[block_plan.q_heads[t]]:
                rows_of_head[head] += rows
            a, b = block_plan.block_indptr[t : t + 2].tolist()
            listed, num_full = block_plan.block_indices[a:b], int(block_plan.num_full[t])
            first_gathered = len(listed) - int(block_plan.num_gathered[t])
            group = block_plan.head_groups[block_plan.q_heads[t]]
            for part in (listed[:num_full], listed[num_full:first_gathered], listed[first_gathered:]):
                if not support.is_estimated(batch.heads[group[0]]):
                    assert bool((part.diff() > 0).all()), "key tiles do not ascend"
            assert len(set(listed.tolist())) == len(listed), "a key tile is listed twice"
            assert bool((pos[listed[:num_full].long()] < stop.min()).all()), (
                "a full tile has a key some row may not see"
            )
            assert bool((pos[listed.long()].amin(1) < stop.max()).all()), "a listed tile has no key any row may see"
            (request,) = {of_row[row] for row in rows}
            real = pos[listed.long()] < batch.kv_lens[request]
            assert torch.equal(
                slots[listed.long()][real].long(), batch.slots(request)[pos[listed.long()][real].long()]
            ), "a key's slot is not where the page table has it"
        for rows in rows_of_head.values():
            assert len(rows) == len(set(rows)), "a pass visits one (row, head) twice"


@given(st.integers(1, 80).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1)))
def test_lanes_packed_into_words_come_out_as_they_were(lanes):
    excluded = torch.tensor(lanes)
    words = pack_lanes(excluded)
    assert words.dtype == torch.int32 and words.shape == (len(lanes), -(-excluded.shape[1] // 32))
    assert torch.equal(unpack_lanes(words, excluded.shape[1]), excluded)
    assert words.tolist() == pack_lanes_on_host(excluded.numpy()).tolist()


def test_threads_change_nothing_but_rounding_and_repeat_to_the_bit():
    n = 230
    q, k, v = randn(n, 4, 16), randn(n, 2, 16, seed=1), randn(n, 2, 16, seed=2)

    def attention(threads: int) -> tuple[torch.Tensor, torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            chunk = RequestChunk(CHAT, 0, n, 0, torch.arange(n))
            plan = BatchPlanner([chunk], n, block_q=16, block_k=8).plan(HEADS, q, k, 0.25)
            out, lse = torch.full_like(q, torch.nan), torch.full((n, 4), torch.nan)
            torch_gather.run(q, k, v, plan, 0.25, out, lse)
            return out, lse
        finally:
            torch.set_num_threads(before)

    alone = attention(1)
    for threads in (2, 3):
        shared_out = attention(threads)
        torch.testing.assert_close(shared_out, alone, rtol=1e-5, atol=1e-6)
        assert all(map(torch.equal, attention(threads), shared_out))


# ---- precision ---------------------------------------------------------------------------------------------


def without_fused(monkeypatch) -> None:
    monkeypatch.setattr(torch_gather, "FUSED", None)


@pytest.mark.skipif(torch_gather.FUSED is None, reason="this torch has no fused CPU attention")
@pytest.mark.parametrize("masked", [False, True])
def test_the_generic_attention_equals_the_fused_one(monkeypatch, masked):
    q, k, v = randn(3, 2, 9, 16), randn(3, 2, 20, 16, seed=1), randn(3, 2, 20, 16, seed=2)
    mask = torch.zeros(3, 1, 9, 20).masked_fill(randn(3, 1, 9, 20, seed=3) > 0, -torch.inf) if masked else None
    fused = torch_gather.attend(q, k, v, mask, 0.5)
    without_fused(monkeypatch)
    generic = torch_gather.attend(q, k, v, mask, 0.5)
    torch.testing.assert_close(generic, fused, rtol=2e-6, atol=2e-6)


def eager(q, k, v, mask, scale):
    """Attention in plain low-precision code: every intermediate result has the dtype of the inputs."""
    weights = torch.softmax((q @ k.T * scale).masked_fill(~mask, -torch.inf), dim=-1)
    return weights @ v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["fused", "generic"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind)
def test_low_precision_loses_no_more_than_eager_attention_does(monkeypatch, head, path, dtype):
    if path == "generic":
        without_fused(monkeypatch)
    n, dim, scale = CHAT.length, 64, 64**-0.5
    q, k, v = (randn(n, 1, dim, seed=seed).to(dtype) for seed in range(3))
    chunk = RequestChunk(CHAT, 0, n, 0, torch.arange(n))
    plan = BatchPlanner([chunk], n, block_q=32, block_k=16).plan([head], q, k, scale)
    out, lse = torch.full_like(q, torch.nan), torch.full((n, 1), torch.nan)
    torch_gather.run(q, k, v, plan, scale, out, lse)
    mask = reference.visited_mask(plan, 0, slice(0, n), n)
    exact, exact_lse = reference.masked_attention(q[:, 0], k[:, 0], v[:, 0], mask, scale)
    error = (out[:, 0].double() - exact).abs()
    lost = (eager(q[:, 0], k[:, 0], v[:, 0], mask, scale).double() - exact).abs()
    budget = torch.finfo(dtype).eps
    assert error.max() <= lost.max() + budget
    assert error.mean() <= lost.mean() * 1.05 + budget / 100
    torch.testing.assert_close(lse[:, 0].double(), exact_lse, rtol=0, atol=4 * budget)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind)
def test_float32_is_exact_to_rounding_on_both_paths(monkeypatch, head):
    n = CHAT.length
    q, k, v = (randn(n, 1, 16, seed=seed) for seed in range(3))
    plan = BatchPlanner([RequestChunk(CHAT, 0, n, 0, torch.arange(n))], n, block_q=32, block_k=16).plan(
        [head], q, k, 0.3
    )
    mask = reference.visited_mask(plan, 0, slice(0, n), n)
    exact, exact_lse = reference.masked_attention(q[:, 0], k[:, 0], v[:, 0], mask, 0.3)
    for path in ("fused", "generic"):
        if path == "generic":
            without_fused(monkeypatch)
        out, lse = torch.full_like(q, torch.nan), torch.full((n, 1), torch.nan)
        torch_gather.run(q, k, v, plan, 0.3, out, lse)
        torch.testing.assert_close(out[:, 0].double(), exact, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(lse[:, 0].double(), exact_lse, rtol=1e-5, atol=2e-6)
