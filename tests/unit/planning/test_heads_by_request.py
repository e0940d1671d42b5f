"""A request of a batch may have heads of its own: it visits what it visits where all requests have them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import support
from sglang_mminfer.kernels import executors, reference
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.planning.planner import worker
from support import any_pattern, batches, planner_of


def output_of(plan: BlockPlan, batch: support.Batch, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out, lse = torch.full_like(batch.q, torch.nan), torch.full(batch.q.shape[:2], torch.nan)
    executors.EXECUTORS["torch"](batch.q, k, v, plan, batch.scale, out, lse)
    return out


@settings(max_examples=60)
@given(st.data())
def test_each_request_visits_what_its_own_heads_ask_for(data: st.DataObject) -> None:
    batch = data.draw(batches(any_pattern))
    count = len(batch.heads)
    others = data.draw(st.lists(support.heads(any_pattern), min_size=count, max_size=count))
    settings_ = tuple(batch.heads), tuple(others)
    with_rows = [i for i, rows in enumerate(batch.q_lens) if rows]
    chosen = data.draw(st.lists(st.integers(0, 1), min_size=len(with_rows), max_size=len(with_rows)))
    heads = tuple(tuple(settings_[own][head] for own in chosen) for head in range(count))
    random = torch.Generator().manual_seed(batch.seed)
    k, v = torch.randn(2, batch.num_pages * batch.page_size, batch.num_kv_heads, support.D, generator=random)
    planner = planner_of(batch)
    if data.draw(st.booleans()):
        planner.prepare([heads], worker())
    plan = planner.plan(heads, batch.q, k, batch.scale, batch.basis)
    out = output_of(plan, batch, k, v)
    for own in set(chosen):
        uniform = planner_of(batch).plan(settings_[own], batch.q, k, batch.scale, batch.basis)
        expected = output_of(uniform, batch, k, v)
        for request in (i for i, theirs in zip(with_rows, chosen) if theirs == own):
            rows, kv_len = batch.rows(request), batch.kv_lens[request]
            torch.testing.assert_close(out[rows], expected[rows], rtol=2e-5, atol=5e-6)
            for head in range(count):
                visited = reference.visited_mask(plan, head, rows, kv_len)
                assert torch.equal(visited, reference.visited_mask(uniform, head, rows, kv_len))
