"""Rows of patterns that pool choose group by group: a group that no cut runs through asks for the same however its
prompt is cut and whatever else is in the batch; what a plan visits holds what its rows ask for."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mminfer import Modality, ModalityMap, PooledBlocks, PooledQueries
from sglang_mminfer.patterns import pooled_blocks, pooled_queries
from sglang_mminfer.patterns.boundary import patterns_of
from sglang_mminfer.patterns.estimated import Evidence
from support import (
    Batch,
    alone,
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

POOLING = (PooledBlocks, PooledQueries)
# Small sinks, windows, groups and blocks, so that keys are left out and nothing but the rows decides which.
SMALL = {"sink": st.integers(0, 5), "local": st.integers(1, 7), "alpha": st.floats(0.2, 1), "group": st.integers(1, 12)}
CHOOSING = st.one_of(
    patterns_of_kind(PooledBlocks, **SMALL, block=st.integers(1, 6)),
    patterns_of_kind(PooledQueries, **SMALL, span=st.integers(1, 20)),
)
MIXED = st.one_of(CHOOSING, CHOOSING, growing)
HEADS = {"alone": CHOOSING, "q": q_boundary(MIXED), "2d": boundary_2d(MIXED)}
every_head = pytest.mark.parametrize("kind", HEADS)


def group_sizes(head) -> set[int]:
    return {pattern.group for pattern in patterns_of(head) if isinstance(pattern, POOLING)}


def uncut(head, start: int, stop: int, length: int) -> torch.Tensor:
    """bool [stop - start]: the rows whose groups lie in [start, stop) as far as the prompt reaches."""
    position, whole = torch.arange(start, stop), torch.ones(stop - start, dtype=torch.bool)
    for size in group_sizes(head):
        first = position // size * size
        whole &= (first >= start) & ((first + size).clamp_max(length) <= stop)
    return whole


prompts = partial(whole_prompts, sm_scales=(None, 0.1, 1.0))


class Whole:
    """What the rows of one piece ask for, and what is visited."""

    def __init__(self, batch: Batch) -> None:
        self.length = batch.kv_lens[0]
        self.asked = [batch.exact_mask(0, h) for h in range(len(batch.heads))]
        self.visited = visited(batch, 0)

    def assert_holds(self, part: Batch, request: int, start: int, stop: int) -> None:
        """Rows [start, stop) of the conversation, prefilled as `request` of another batch, get what they ask for. If no
        cut runs through their group they ask for the same, and where that is so of all rows, they visit no more."""
        for h, (head, seen) in enumerate(zip(part.heads, visited(part, request))):
            asked, same = part.exact_mask(request, h), uncut(head, start, stop, self.length)
            assert not (asked & ~seen).any()
            assert torch.equal(asked[same], self.asked[h][start:stop, :stop][same])
            if same.all():
                assert not (seen & ~self.visited[h][start:stop, :stop]).any()


@every_head
@settings(max_examples=25)
@given(st.data())
def test_chunks_change_only_groups_that_they_cut(kind, data):
    batch = data.draw(prompts(HEADS[kind]))
    n, whole = batch.kv_lens[0], Whole(batch)
    bounds = sorted({0, n, *data.draw(st.lists(st.integers(0, n), min_size=1, max_size=4))})
    for start, stop in pairwise(bounds):
        whole.assert_holds(cut(batch, start, stop), 0, start, stop)


@settings(max_examples=25)
@given(prompts(CHOOSING), st.data())
def test_chunks_between_groups_change_nothing(batch, data):
    batch = replace(batch, heads=batch.heads[:1], qs=[], ks=[], vs=[])
    (size,), n, whole = group_sizes(batch.heads[0]), batch.kv_lens[0], Whole(batch)
    ends = data.draw(st.sets(st.integers(0, n // size), max_size=3))
    for start, stop in pairwise(sorted({0, n, *(size * end for end in ends)})):
        assert uncut(batch.heads[0], start, stop, n).all()
        whole.assert_holds(cut(batch, start, stop), 0, start, stop)


@every_head
@settings(max_examples=20)
@given(st.data())
def test_a_cached_prefix_and_a_later_turn_change_only_groups_that_they_cut(kind, data):
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
    others = data.draw(st.lists(maps(max_length=50), min_size=1, max_size=3))
    request = data.draw(st.integers(0, len(others)))
    everyone = [*others[:request], batch.maps[0], *others[request:]]
    lengths = [chat.length for chat in everyone]
    page_size = data.draw(st.sampled_from([1, 4, 16]))
    full = replace(
        batch,
        maps=everyone,
        q_lens=lengths,
        kv_lens=lengths,
        page_size=page_size,
        seed=batch.seed + 7,
        qs=[],
        ks=[],
        vs=[],
    )
    full.qs[request], full.ks[request], full.vs[request] = batch.qs[0], batch.ks[0], batch.vs[0]
    whole.assert_holds(full, request, 0, n)


@settings(max_examples=40)
@given(st.integers(1, 90), CHOOSING, tile_sizes, st.integers(0, 99))
def test_a_tile_visits_what_its_groups_ask_for_and_whole_tiles_of_sink_and_window(n, head, tiles, seed):
    """One video, so that tiles are cut by position; close calls may fall out either way."""
    block_q, block_k = tiles
    batch = replace(alone(conversation((n, 1, 1)), head, tiles=tiles), seed=seed, qs=[], ks=[], vs=[])
    (seen,) = visited(batch, 0)
    position, causal = torch.arange(n), torch.ones(n, n, dtype=torch.bool).tril()
    first_row = position // block_q * block_q
    window = (first_row + 1 - head.local).clamp_min(0) // block_k * block_k
    sink = -(-head.sink // block_k) * block_k
    allowed = (position[None] < sink) | (position[None] >= window[:, None])
    # A little less is asked of a key, so that those a hair below the bound are among them.
    asked = replace(batch, heads=[replace(head, alpha=head.alpha * 0.997)]).exact_mask(0, 0)
    if isinstance(head, PooledBlocks):
        padded = torch.nn.functional.pad(asked, (0, -n % block_k)).unflatten(1, (-1, block_k))
        asked = padded.any(2, keepdim=True).expand_as(padded).flatten(1)[:, :n]
    for first in range(0, n, block_q):
        rows = slice(first, first + block_q)
        allowed[rows] |= asked[rows].any(0)
    assert not (seen & ~(allowed & causal)).any()


@settings(max_examples=40)
@given(batches(st.one_of(CHOOSING, growing)), st.sampled_from([1, 100, 2000]))
def test_another_device_and_less_memory_change_nothing(batch, at_a_time):
    """Elsewhere the host knows bounds in place of sizes: all of it by torch, here on a CPU."""
    wrapper = batch.planned()
    expected = batch.run(wrapper)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evidence, "on_host", False)
        patch.setattr(pooled_queries, "AT_A_TIME", at_a_time)
        for module in (pooled_blocks, pooled_queries):
            patch.setattr(module, "PROJECTED", 7)
        other = batch.planned()
        got = batch.run(other)
    for i in range(len(batch.maps)):
        for h in range(len(batch.heads)):
            assert torch.equal(other.visited_mask(i, h), wrapper.visited_mask(i, h))
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("cls", POOLING)
def test_text_after_vision_sees_all_and_does_not_blur_what_others_choose(cls):
    """Rows 24 to 31 share a group; those of the question after the video look elsewhere."""
    chat = conversation((28, 1, 1), 4, (8, 1, 1))
    small = {"group": 8} | ({"block": 4} if cls is PooledBlocks else {"span": 99})
    batch = alone(chat, cls(0, 1, 0.5, **small))
    q, k = batch.qs[0][:, 0], batch.ks[0][:, 0]
    q.zero_(), k.zero_()
    k[4:8, 0], k[8:12, 1] = 9, 9
    q[24:28, 0], q[28:32, 1] = 9, 90
    mask = batch.exact_mask(0, 0)
    assert mask[28:32].equal(torch.ones(4, 40, dtype=torch.bool).tril(28)) and chat.members(Modality.TEXT)[28:32].all()
    assert mask[27, :12].tolist() == [False] * 4 + [True] * 4 + [False] * 4
    (seen,) = visited(batch, 0)
    assert not (mask & ~seen).any()
