"""However a prompt is cut into chunks, wherever a cached prefix ends, and whatever else is in the batch: the same.

Each case holds a whole conversation prefilled in one piece against the same tokens prefilled otherwise, in what is
visited (to the bit) and in the wrapper's output (to rounding), over another page table each time.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import support
from sglang_mminfer import (
    AShape,
    Boundary2D,
    Grid,
    ModalityMap,
    QBoundary,
    TriShape,
    VerticalSlash,
)
from support import (
    TEXT,
    VIDEO,
    VISION,
    Batch,
    D,
    alone,
    boundary_2d,
    conversation,
    cut,
    grid,
    growing,
    growing_of_kind,
    maps,
    patterns_of_kind,
    q_boundary,
    static,
    whole_prompts,
)

GROWING = {kind: growing_of_kind(cls) for kind, cls in support.STATIC.items() if cls is not Grid}
GROWING |= {"grid-frame": grid("frame"), "grid-row": grid("row")}
GROWING |= {"q": q_boundary(growing), "2d": boundary_2d(growing)}
LOOKING_AHEAD = {f"{kind}-ahead": patterns_of_kind(cls) for kind, cls in support.STATIC.items() if cls.looks_ahead}
STATIC = GROWING | LOOKING_AHEAD | {"q-ahead": q_boundary(static), "2d-ahead": boundary_2d(static)}

kinds = pytest.mark.parametrize("kind", STATIC)
growing_kinds = pytest.mark.parametrize("kind", GROWING)


class Whole:
    """What the one piece visits and gives."""

    def __init__(self, batch: Batch) -> None:
        wrapper = batch.planned()
        self.out, self.lse = batch.run(wrapper)
        self.visited = [wrapper.visited_mask(0, h) for h in range(len(batch.heads))]

    def assert_equals(self, part: Batch, request: int, start: int, stop: int) -> None:
        """Rows [start, stop) of the conversation, prefilled as `request` of another batch, are the same."""
        wrapper = part.planned()
        out, lse = part.run(wrapper)
        for h, visited in enumerate(self.visited):
            assert torch.equal(wrapper.visited_mask(request, h), visited[start:stop, :stop])
        rows = part.rows(request)
        torch.testing.assert_close(out[rows], self.out[start:stop], rtol=2e-5, atol=5e-6)
        torch.testing.assert_close(lse[rows], self.lse[start:stop], rtol=2e-5, atol=5e-6)


@kinds
@settings(max_examples=20)
@given(st.data())
def test_chunks_change_nothing(kind, data):
    batch = data.draw(whole_prompts(STATIC[kind]))
    n = batch.kv_lens[0]
    whole = Whole(batch)
    bounds = sorted({0, n, *data.draw(st.lists(st.integers(0, n), min_size=1, max_size=4))})
    for start, stop in pairwise(bounds):
        whole.assert_equals(cut(batch, start, stop), 0, start, stop)


@kinds
@settings(max_examples=6)
@given(st.data())
def test_chunks_of_one_size_change_nothing(kind, data):
    batch = data.draw(whole_prompts(STATIC[kind], max_length=70))
    n, size = batch.kv_lens[0], data.draw(st.integers(5, 24))
    whole = Whole(batch)
    for start in range(0, n, size):
        whole.assert_equals(cut(batch, start, min(n, start + size)), 0, start, min(n, start + size))


@growing_kinds
@settings(max_examples=20)
@given(st.data())
def test_a_cached_prefix_may_end_anywhere_and_a_turn_may_follow(kind, data):
    """The rows of each turn are what its prefix does not hold, under the map of the turns so far."""
    batch = data.draw(whole_prompts(GROWING[kind]))
    chat = batch.maps[0]
    whole, cached = Whole(batch), 0
    turns = sorted({*data.draw(st.sets(st.integers(1, len(chat.segments)), max_size=2)), len(chat.segments)})
    for turn in turns:
        so_far = ModalityMap(chat.segments[:turn])
        start = data.draw(st.integers(0, cached))  # the cache may have lost the end of what it held
        whole.assert_equals(cut(batch, start, so_far.length, maps=[so_far]), 0, start, so_far.length)
        cached = so_far.length - 1


@growing_kinds
@settings(max_examples=8)
@given(st.data())
def test_a_turn_cut_off_inside_a_segment_changes_nothing(kind, data):
    """A chunk of an earlier turn, prefilled under that turn's shorter map, is what the later turn would have made."""
    batch = data.draw(whole_prompts(GROWING[kind]))
    chat = batch.maps[0]
    so_far = ModalityMap(chat.segments[: data.draw(st.integers(1, len(chat.segments)))])
    stop = data.draw(st.integers(1, so_far.length))
    start = data.draw(st.integers(0, stop - 1))
    Whole(batch).assert_equals(cut(batch, start, stop, maps=[so_far]), 0, start, stop)


@kinds
@settings(max_examples=15)
@given(st.data())
def test_what_else_is_in_the_batch_changes_nothing(kind, data):
    batch = data.draw(whole_prompts(STATIC[kind], max_length=70))
    n = batch.kv_lens[0]
    whole = Whole(batch)
    start = data.draw(st.integers(0, n - 1))
    mine = cut(batch, start, n)
    others = data.draw(st.lists(maps(max_length=50), min_size=1, max_size=3))
    request = data.draw(st.integers(0, len(others)))
    everyone = [*others[:request], batch.maps[0], *others[request:]]
    kv_lens = [n if i == request else data.draw(st.integers(1, m.length)) for i, m in enumerate(everyone)]
    q_lens = [n - start if i == request else data.draw(st.integers(0, k)) for i, k in enumerate(kv_lens)]
    full = Batch(
        everyone,
        q_lens,
        kv_lens,
        batch.heads,
        page_size=data.draw(st.sampled_from([1, 4, 16])),
        tiles=batch.tiles,
        dense_below=batch.dense_below,
        seed=batch.seed + 7,
    )
    full.qs[request], full.ks[request], full.vs[request] = mine.qs[0], mine.ks[0], mine.vs[0]
    whole.assert_equals(full, request, start, n)


@settings(max_examples=15)
@given(whole_prompts(st.builds(TriShape, st.just(0), st.integers(1, 5), st.integers(1, 9))), st.data())
def test_the_tail_of_a_prompt_is_counted_from_its_end_not_from_the_chunks(batch, data):
    n = batch.kv_lens[0]
    stop = data.draw(st.integers(1, n))
    visited = cut(batch, 0, stop).planned().visited_mask(0, 0)
    causal = torch.ones(stop, stop, dtype=torch.bool).tril()
    for row in range(stop):
        if row >= n - batch.heads[0].tail:
            assert torch.equal(visited[row], causal[row])


REAL_SIZES = {
    "a_shape": AShape(70, 130),
    "tri_shape": TriShape(10, 100, 40),
    "grid-frame": Grid("frame", True, True, True, 3, 16, 64),
    "grid-row": Grid("row", False, False, True, 1, 16, 64),
    "q": QBoundary({VIDEO: Grid("frame", True, False, True, 0, 8, 30), TEXT: AShape(8, 80)}),
    "2d": Boundary2D({(VIDEO, VISION): Grid("frame", False, True, True, 2, 8, 30), (TEXT, VISION): AShape(20, 100)}),
}


@pytest.mark.parametrize("kind", REAL_SIZES)
def test_chunks_and_prefixes_with_real_tile_sizes(kind):
    chat = conversation(40, (8, 6, 7), 50, (1, 6, 7), (7, 6, 7, 2), 60)
    batch = replace(alone(chat, REAL_SIZES[kind], tiles=(128, 64)))
    whole = Whole(batch)
    for bounds in ([0, 256, 512, chat.length], [0, 97, 98, 385, chat.length]):
        for start, stop in pairwise(bounds):
            whole.assert_equals(cut(batch, start, stop, page_size=16), 0, start, stop)


# ---- the estimated pattern ---------------------------------------------------------------------------------


COLUMNS, DISTANCE = (5, 40, 75), 17
CHUNKS = [range(a, min(a + 48, 180)) for a in range(0, 180, 48)]


def planted_head(seed: int) -> Batch:
    """A prompt of one head whose rows look at three columns and at one distance back, beside noise.

    Three rotations by the position make q . k peak where the key lags by the distance; a fourth dimension lifts the
    columns.
    """
    n, random = 180, torch.Generator().manual_seed(seed)
    turns = torch.arange(n)[:, None] * torch.tensor([2.4, 1.1, 0.53])
    late = turns + DISTANCE * torch.tensor([2.4, 1.1, 0.53])
    q = torch.cat([turns.cos(), turns.sin(), torch.ones(n, 1), torch.zeros(n, 1)], dim=1)
    k = torch.cat([late.cos(), late.sin(), torch.zeros(n, 2)], dim=1)
    k[COLUMNS, :] = torch.tensor([0.0] * 6 + [3.0, 0.0])
    q, k = (x + 0.1 * torch.randn(n, D, generator=random) for x in (q, k))
    batch = alone(conversation(n), VerticalSlash(12, 6, 16), tiles=(4, 4))
    return replace(batch, sm_scale=3.0, qs=[q[:, None]], ks=[k[:, None]])


@pytest.mark.parametrize("seed", range(3))
def test_an_estimate_for_each_chunk_finds_what_one_estimate_for_the_whole_prompt_finds(seed):
    """Measured, not assumed: vertical_slash alone is not chunk-invariant."""
    batch = planted_head(seed)
    n = batch.kv_lens[0]
    at_once = batch.exact_mask(0, 0)
    by_chunk = torch.zeros_like(at_once)
    for chunk in CHUNKS:
        part = cut(batch, chunk.start, chunk.stop)
        wrapper = part.planned()
        part.run(wrapper)
        exact = part.exact_mask(0, 0)
        assert not (exact & ~wrapper.visited_mask(0, 0)).any()
        by_chunk[chunk.start : chunk.stop, : chunk.stop] = exact
    row, key = torch.arange(n)[:, None], torch.arange(n)[None, :]
    planted = (row >= key) & (torch.isin(key, torch.tensor(COLUMNS)) | (row - key == DISTANCE))
    # A chunk is estimated from its last rows, and the planted keys are the first that these show.
    assert not (planted & ~by_chunk).any() and not (planted & ~at_once).any()
    scores = (batch.qs[0][:, 0] @ batch.ks[0][:, 0].T) * batch.scale
    attention = torch.softmax(scores.masked_fill(row < key, -torch.inf), dim=1)
    mass_at_once, mass_by_chunk = (float((attention * mask).sum() / n) for mask in (at_once, by_chunk))
    recall = float((by_chunk & at_once).sum() / at_once.sum())
    assert recall > 0.85
    assert mass_by_chunk > 0.8 and mass_by_chunk > mass_at_once - 0.01
