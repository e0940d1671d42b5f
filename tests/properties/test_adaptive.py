"""Each row of an adaptive head asks for the same keys however its prompt is cut and whatever else is in the batch; what
a plan visits holds all of them, and beyond them only what other rows of a query tile ask for."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mminfer import Adaptive, ModalityMap
from sglang_mminfer.patterns import choice
from sglang_mminfer.patterns.choice import MARGIN
from sglang_mminfer.patterns.estimated import Evidence
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import (
    Batch,
    alone,
    bases,
    batches,
    boundary_2d,
    conversation,
    cut,
    growing,
    maps,
    patterns_of_kind,
    q_boundary,
    tile_sizes,
    visited,
    whole_prompts,
)

# A small sink, a small window and no budget, so that keys are left out and nothing but rows decides which.
CHOOSING = patterns_of_kind(
    Adaptive, sink=st.integers(0, 5), local=st.integers(1, 7), alpha=st.floats(0.2, 1), budget=st.just(1.0)
)
MIXED = st.one_of(CHOOSING, CHOOSING, growing)
HEADS = {"alone": CHOOSING, "q": q_boundary(MIXED), "2d": boundary_2d(MIXED)}
every_head = pytest.mark.parametrize("kind", HEADS)


prompts = partial(whole_prompts, sm_scales=(None, 0.1, 1.0), with_basis=True)


class Whole:
    """What the rows of one piece ask for, and what is visited."""

    def __init__(self, batch: Batch) -> None:
        self.asked = [batch.exact_mask(0, h) for h in range(len(batch.heads))]
        self.visited = visited(batch, 0)

    def assert_holds(self, part: Batch, request: int, start: int, stop: int) -> None:
        """Rows [start, stop) of the conversation, prefilled as `request` of another batch: they ask for the same, they
        get it, and they visit no more than in one piece."""
        for h, seen in enumerate(visited(part, request)):
            asked = self.asked[h][start:stop, :stop]
            assert torch.equal(part.exact_mask(request, h), asked)
            assert not (asked & ~seen).any()
            assert not (seen & ~self.visited[h][start:stop, :stop]).any()


@every_head
@settings(max_examples=25)
@given(st.data())
def test_chunks_ask_for_the_same(kind, data):
    batch = data.draw(prompts(HEADS[kind]))
    n, whole = batch.kv_lens[0], Whole(batch)
    bounds = sorted({0, n, *data.draw(st.lists(st.integers(0, n), min_size=1, max_size=4))})
    for start, stop in pairwise(bounds):
        whole.assert_holds(cut(batch, start, stop), 0, start, stop)


@every_head
@settings(max_examples=20)
@given(st.data())
def test_a_cached_prefix_may_end_anywhere_and_a_turn_may_follow(kind, data):
    batch = data.draw(prompts(HEADS[kind]))
    chat, whole, cached = batch.maps[0], Whole(batch), 0
    turns = sorted({*data.draw(st.sets(st.integers(1, len(chat.segments)), max_size=2)), len(chat.segments)})
    for turn in turns:
        so_far = ModalityMap(chat.segments[:turn])
        start = data.draw(st.integers(0, cached))
        whole.assert_holds(cut(batch, start, so_far.length, maps=[so_far]), 0, start, so_far.length)
        cached = so_far.length - 1


@every_head
@settings(max_examples=15)
@given(st.data())
def test_what_else_is_in_the_batch_changes_nothing(kind, data):
    batch = data.draw(prompts(HEADS[kind], max_length=70))
    n, whole = batch.kv_lens[0], Whole(batch)
    start = data.draw(st.integers(0, n - 1))
    mine = cut(batch, start, n)
    others = data.draw(st.lists(maps(max_length=50), min_size=1, max_size=3))
    request = data.draw(st.integers(0, len(others)))
    everyone = [*others[:request], batch.maps[0], *others[request:]]
    kv_lens = [n if i == request else data.draw(st.integers(1, m.length)) for i, m in enumerate(everyone)]
    q_lens = [n - start if i == request else data.draw(st.integers(0, k)) for i, k in enumerate(kv_lens)]
    sizes = {
        "maps": everyone,
        "q_lens": q_lens,
        "kv_lens": kv_lens,
        "page_size": data.draw(st.sampled_from([1, 4, 16])),
    }
    full = replace(batch, **sizes, seed=batch.seed + 7, qs=[], ks=[], vs=[])
    full.qs[request], full.ks[request], full.vs[request] = mine.qs[0], mine.ks[0], mine.vs[0]
    whole.assert_holds(full, request, start, n)


def scores_and_bounds(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [n, n]: low-rank scores of the only head; and [n]: the bounds that they have to exceed, key by key."""
    (head,), q, k = batch.heads, batch.qs[0][:, 0].double(), batch.ks[0][:, 0].double()
    exact, n = q @ k.T * batch.scale, len(q)
    low = exact
    if batch.basis is not None:
        a, b = (part.double()[: head.rank] for part in batch.basis.of_head(0, 1))
        low = q @ (a.T @ b) @ k.T * batch.scale
    bounds = torch.zeros(n, dtype=torch.float64)
    for row in range(n):
        always = [key for key in range(row + 1) if key < head.sink or row - key < head.local]
        bounds[row] = exact[row, always].exp().sum().log() + torch.tensor(head.alpha).log()
    return low, bounds


@settings(max_examples=40)
@given(st.integers(1, 90), CHOOSING, tile_sizes, st.data())
def test_a_tile_visits_what_its_rows_ask_for_and_whole_tiles_of_sink_and_window(n, head, tiles, data):
    """One video, so that tiles are cut by position; close calls may fall out either way."""
    block_q, block_k = tiles
    batch = replace(alone(conversation((n, 1, 1)), head, tiles=tiles), basis=data.draw(bases(1, 1)))
    (seen,) = visited(batch, 0)
    scores, bounds = scores_and_bounds(batch)
    position, causal = torch.arange(n), torch.ones(n, n, dtype=torch.bool).tril()
    first_row = position // block_q * block_q
    window = (first_row + 1 - head.local).clamp_min(0) // block_k * block_k
    sink = -(-head.sink // block_k) * block_k
    always = (position[None] < sink) | (position[None] >= window[:, None])

    def union(margin: float) -> torch.Tensor:
        asked = (scores > bounds[:, None] - margin) & causal
        by_tile = torch.stack([asked[first : first + block_q].any(0) for first in range(0, n, block_q)])
        return (by_tile[position // block_q] | always) & causal

    assert not (union(MARGIN / 2) & ~seen).any() and not (seen & ~union(2 * MARGIN)).any()


@settings(max_examples=40)
@given(batches(st.one_of(patterns_of_kind(Adaptive), growing)), st.sampled_from([1, 100, 2000]))
def test_another_device_and_less_memory_change_nothing(batch, at_a_time):
    """Elsewhere the host knows bounds in place of sizes, and scores are stored: all of it by torch, here on a CPU."""
    wrapper = batch.planned()
    expected = batch.run(wrapper)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evidence, "on_host", False)
        patch.setattr(choice, "AT_A_TIME", at_a_time)
        other = batch.planned()
        got = batch.run(other)
    for i in range(len(batch.maps)):
        for h in range(len(batch.heads)):
            assert torch.equal(other.visited_mask(i, h), wrapper.visited_mask(i, h))
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=5e-6)


def test_a_tile_that_asks_for_more_than_the_budget_sees_everything_and_is_counted():
    chat = conversation((60, 2, 4))
    n, slots = chat.length, torch.arange(chat.length)
    random = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, n, 1, 16, generator=random)
    q[..., 0], k[..., 0] = 0, 0
    q[384:448, :, 0], k[40:200, :, 0] = 6, 6  # one tile of rows looks at nearly half of what lies before its window

    def planned(budget: float) -> tuple[torch.Tensor, int]:
        planner = BatchPlanner([RequestChunk(chat, 0, n, 0, slots)], n, block_q=64, block_k=16)
        plan = planner.plan([Adaptive(16, 32, 4, 1.0, budget)], q, k, 0.25)
        return plan.visited_by_row[:, 0], int(sum(planner.overflow))

    free, none = planned(1.0)
    everything, tile = torch.arange(n) + 1, torch.arange(n) // 64
    assert none == 0 and bool((free[64:] < everything[64:]).all())
    for budget, overflowing in ((0.6, []), (0.3, [6])):
        counts, number = planned(budget)
        beyond = torch.isin(tile, torch.tensor(overflowing))
        assert number == len(overflowing)
        assert torch.equal(counts[~beyond], free[~beyond]) and torch.equal(counts[beyond], everything[beyond])


def test_rows_that_choose_share_small_tiles_and_those_that_see_all_share_large_ones():
    chat = conversation((16, 8, 8), 300)
    n, random = chat.length, torch.Generator().manual_seed(3)
    q, k = torch.randn(2, n, 1, 16, generator=random)
    planner = BatchPlanner([RequestChunk(chat, 0, n, 0, torch.arange(n))], n)
    plan = planner.plan([Adaptive(16, 32, 4, 1.0)], q, k, 0.25)
    rows = plan.q_indptr.diff().tolist()
    first = plan.q_rows[plan.q_indptr[:-1].long()].tolist()
    by_first = dict(zip(first, rows))
    video = {row: size for row, size in by_first.items() if row < 1024}
    text = {row: size for row, size in by_first.items() if row >= 1024}
    assert set(video.values()) == {64} and len(video) == 16
    assert sorted(text.values()) == [44, 128, 128]
