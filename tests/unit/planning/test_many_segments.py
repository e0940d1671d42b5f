"""Hundreds and thousands of small images: planned by arithmetic, in packs that no later segment moves."""

from __future__ import annotations

import cProfile
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mminfer import Boundary2D, Dense, Grid, ModalityMap, QBoundary, Segment, VisionGrid
from sglang_mminfer.kernels.block_plan import PAD_POSITION
from sglang_mminfer.planning.budget import PlanBudget, count_work, line_strides
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.lines import LineOrder
from sglang_mminfer.planning.planner import BatchPlanner
from support import IMAGE, TEXT, VIDEO, VISION, Batch, alone, conversation, cut_out, maps

DEFAULT = Grid("frame", v=True, h=True, s=True, phase=0, sink=128, local=1024)


def small_images(count: int, side: int = 2, text: int = 3, medium=IMAGE) -> ModalityMap:
    segments, position = [], 0
    for _ in range(count):
        segments.append(Segment(TEXT, position, position + text))
        position += text
        segments.append(Segment(medium, position, position + side**2, VisionGrid(1, side, side, (position,))))
        position += side**2
    return ModalityMap([*segments, Segment(TEXT, position, position + 5)])


def plan_last_chunk(chat: ModalityMap, head=DEFAULT, rows: int = 8192):
    start = max(0, chat.length - rows)
    chunk = RequestChunk(chat, start, chat.length, 0, torch.arange(chat.length))
    return BatchPlanner([chunk], chat.length - start, dense_below=4608).plan([head])


def num_visits(plan) -> int:
    return int(plan.block_indptr[-1])


# ---- what is visited ---------------------------------------------------------------------------------------


@st.composite
def many(draw) -> ModalityMap:
    """Up to 40 small media of few shapes, some of which share packs, large ones of the same shapes among them."""
    parts: list = []
    for _ in range(draw(st.integers(5, 40))):
        if draw(st.integers(0, 2)) == 0:
            parts.append(draw(st.integers(1, 3)))
        frames = draw(st.sampled_from([1, 1, 1, 2, 3, 12]))
        gap = draw(st.integers(0, 1)) if frames > 1 else 0
        parts.append((frames, *draw(st.sampled_from([(2, 2), (1, 3), (1, 1)])), gap))
        if sum(x if isinstance(x, int) else x[0] * (x[1] * x[2] + x[3]) for x in parts) > 160:
            break
    return conversation(*parts)


@st.composite
def line_heads(draw):
    """A grid head with lines, alone or under a boundary that parts images from videos."""
    stride, flag = st.sampled_from(["frame", "row"]), st.booleans()
    grid = st.builds(Grid, stride, flag, flag, st.just(True), st.integers(0, 3), st.integers(0, 6), st.integers(1, 9))
    form = draw(st.sampled_from(["none", "none", "q", "2d"]))
    if form == "none":
        return draw(grid)
    if form == "q":
        return QBoundary({IMAGE: draw(grid), VIDEO: draw(grid)})
    return Boundary2D(
        {(VISION, key): draw(grid) for key in draw(st.sampled_from([(IMAGE,), (VIDEO,), (IMAGE, VIDEO)]))}
    )


@settings(max_examples=60)
@given(many(), line_heads(), st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16]), st.data())
def test_packs_hold_what_the_pattern_asks_for_and_neither_chunks_nor_turns_change_it(
    chat, head, block_q, block_k, data
):
    batch = alone(chat, head, tiles=(block_q, block_k), dense_below=data.draw(st.sampled_from([0, 0, 12])))
    wrapper = batch.planned()
    visited = wrapper.visited_mask(0, 0)
    assert not (batch.exact_mask(0, 0) & ~visited).any()
    bounds = sorted({0, chat.length, *data.draw(st.lists(st.integers(0, chat.length), min_size=1, max_size=3))})
    for start, stop in pairwise(bounds):
        assert torch.equal(cut_out(batch, 0, start, stop).planned().visited_mask(0, 0), visited[start:stop, :stop])
    turn = ModalityMap(chat.segments[: data.draw(st.integers(1, len(chat.segments)))])
    start = data.draw(st.integers(0, turn.length - 1))
    earlier = cut_out(batch, 0, start, turn.length, maps=[turn])
    assert torch.equal(earlier.planned().visited_mask(0, 0), visited[start : turn.length, : turn.length])


@settings(max_examples=100)
@given(
    st.one_of(maps(), many()),
    st.sampled_from(["frame", "row"]),
    st.sampled_from([4, 8, 16]),
    st.sampled_from([4, 8, 16]),
    st.data(),
)
def test_an_order_holds_every_key_of_its_shapes_once_and_knows_its_tiles(chat, stride, block_q, block_k, data):
    kv_len = data.draw(st.integers(1, chat.length))
    q_start = data.draw(st.integers(0, kv_len - 1))
    order = LineOrder(chat.table, stride, q_start, kv_len, block_q, block_k)
    cells = chat.cells(stride)
    live = {
        s.grid.shape
        for s in chat.segments
        if s.grid and s.grid.has_cells(stride) and s.start < kv_len < s.stop + kv_len - q_start
    }
    expected = []
    for segment in chat.segments:
        grid = segment.grid
        if grid and grid.has_cells(stride) and segment.start < kv_len and grid.shape in live:
            expected += [start + cell for start in grid.frame_starts for cell in range(grid.cells)]
    positions = order.positions(torch.device("cpu")).view(-1, block_k)
    assert sorted(positions[positions < PAD_POSITION].tolist()) == sorted(expected)
    if not order.num_tiles:
        return
    nearest, farthest, ascend_to = order.tile_ends
    assert (positions.amin(1).numpy() == nearest).all()
    assert (positions.amax(1).numpy() == farthest).all()
    for tile, stop in enumerate(ascend_to):
        assert tile < stop and (np.diff(nearest[tile:stop]) >= 0).all() and (np.diff(farthest[tile:stop]) >= 0).all()
    packs, rows = order.packs, order.rows
    placed = [p for p in range(q_start, kv_len) if cells[p] >= 0]
    assert sorted(rows.position.tolist()) == placed
    assert (rows.line == cells[torch.from_numpy(rows.position)].numpy()).all()
    in_order = packs.first_tile[rows.pack] * block_k + rows.place
    assert (np.diff(in_order) > 0).all()
    assert torch.equal(positions.flatten()[torch.from_numpy(in_order)], torch.from_numpy(rows.position).int())
    real = positions.flatten() < PAD_POSITION
    pack = np.repeat(np.arange(len(packs.code)), np.diff(packs.first_tile) * block_k)[real]
    index = np.flatnonzero(real) - packs.first_tile[pack] * block_k
    assert (index // packs.length[pack] == cells[positions.flatten()[real].long()].numpy()).all()


# ---- what it costs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [DEFAULT, Grid("row", True, True, True, 0, 128, 1024)], ids=["frame", "row"])
def test_small_images_are_visited_less_often_than_dense_attention_would_visit_them(head):
    for count, side in ((4000, 2), (16000, 2), (2000, 8)):
        chat = small_images(count, side)
        assert num_visits(plan_last_chunk(chat, head)) < 1.2 * num_visits(plan_last_chunk(chat, Dense()))


def test_visits_grow_with_the_keys_and_not_faster():
    visits = [num_visits(plan_last_chunk(small_images(count))) for count in (2000, 4000, 8000, 16000)]
    assert all(b < 2.4 * a for a, b in pairwise(visits))


def calls_of_planning(chat: ModalityMap) -> int:
    plan_last_chunk(chat, rows=4096)  # the first one reads the map
    with cProfile.Profile() as profile:
        plan_last_chunk(chat, rows=4096)
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.parametrize(
    "several",
    [small_images, lambda n: small_images(n, medium=VIDEO), lambda n: conversation(3, (n, 1, 1, 2), 5)],
    ids=["images", "videos", "frames"],
)
def test_the_host_loops_over_neither_segments_nor_frames(several):
    few, lots = calls_of_planning(several(3000)), calls_of_planning(several(24000))
    assert lots < 1.1 * few


def test_many_shapes_are_planned_together():
    """Each image of a shape of its own, 1 x 4 to 1 x 60."""
    parts = [part for cols in range(4, 61) for part in (3, (1, 1, cols), 3, (1, cols, 1))]
    one_shape = [part for cols in range(4, 61) for part in (3, (1, 1, 30), 3, (1, 30, 1))]
    assert calls_of_planning(conversation(*parts)) < 1.1 * calls_of_planning(conversation(*one_shape))


@pytest.mark.parametrize(
    "chat",
    [small_images(16000), small_images(10000, 1, medium=VIDEO), conversation(3, (10000, 1, 1), 5)],
    ids=["16,000 images", "10,000 one-pixel videos", "10,000 one-pixel frames"],
)
def test_a_chunk_is_planned_in_a_moment(chat):
    """0.05 s and a few MB on a free machine; 7108de7 took a minute and 6 GB."""
    start = time.process_time()
    plan = plan_last_chunk(chat)
    assert time.process_time() - start < 2
    held = [x for holder in (plan, plan.keys) for x in vars(holder).values() if isinstance(x, torch.Tensor)]
    assert sum(x.nbytes for x in held) < 20e6


# ---- the budget --------------------------------------------------------------------------------------------

USUAL = {
    "small images": small_images(4000),
    "images": small_images(1000, 8, 10),
    "photos": conversation(*[part for _ in range(60) for part in (20, (1, 25, 40))]),
    "video": conversation(20, (256, 16, 16), 50),
    "timestamps": conversation(20, (5000, 2, 2, 5), 50),
}


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("stride", ["frame", "row"])
def test_the_estimate_counts_what_there_is_to_do(name, stride):
    chat = USUAL[name]
    plan = plan_last_chunk(chat, Grid(stride, True, True, True, 0, 128, 1024))
    count = count_work(chat, chat.length - 8192, chat.length, stride)
    first, lines = (int(part.sizes.visits.sum()) for part in plan.passes)
    assert first < 1.3 * count["base_visits"]
    assert lines / 1.3 < count["line_visits"] < 4 * lines + 100
    columns = len(chat.on_phase(stride, 0))  # gathered once more, and not counted
    assert count["keys"] >= len(plan.keys.kv_pos) - columns - 128
    assert count["line_visits"] > count_work(chat, chat.length - 8192, chat.length, None)["line_visits"] == 0


def test_what_people_send_is_within_the_default_budget_and_what_is_beyond_is_told_beforehand():
    budget = PlanBudget(200, 256)
    for chat in (*USUAL.values(), small_images(16000), conversation(20, (4000, 16, 16), 50)):
        assert budget.allows(chat, chat.length - 8192, chat.length, ("frame", "row"))
    hostile = small_images(6000, 17)  # 1.7M tokens of photos too large to share packs
    assert not budget.allows(hostile, hostile.length - 8192, hostile.length, ("frame",))
    assert budget.allows(hostile, hostile.length - 8192, hostile.length, ())
    assert budget.allows(hostile, 0, 8192, ("frame",))


def test_the_budget_grows_with_a_long_chunk_and_memory_has_one_of_its_own():
    chat = USUAL["video"]
    milliseconds = 30.0
    assert not PlanBudget(milliseconds / 10, 256).allows(chat, chat.length - 8192, chat.length, ("frame",))
    assert PlanBudget(milliseconds, 256).allows(chat, chat.length - 8192, chat.length, ("frame",))
    assert PlanBudget(milliseconds, 256).allows(chat, 0, chat.length, ("frame",))
    assert not PlanBudget(float("inf"), 1).allows(chat, chat.length - 8192, chat.length, ("frame",))


def test_only_heads_with_lines_are_counted_with_lines():
    no_lines = Grid("row", True, True, False, 0, 4, 4)
    assert line_strides([Dense(), no_lines]) == ()
    nested = Boundary2D({(IMAGE, VISION): Grid("row", False, False, True, 0, 4, 4)})
    assert line_strides([DEFAULT, no_lines, nested]) == ("frame", "row")


def test_executors_agree_on_packs():
    chat = small_images(60)
    batch = Batch([chat], [chat.length], [chat.length], [Grid("frame", True, True, True, 1, 4, 9)] * 2, tiles=(16, 8))
    wrapper = batch.planned()
    out, lse = batch.run(wrapper)
    expected, expected_lse = batch.run(batch.planned("reference"))
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=5e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-5, atol=5e-6)
