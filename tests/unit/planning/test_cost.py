"""Sparse attention is chosen where it is faster, by counts that are close to what plans visit."""

from __future__ import annotations

import pytest
import torch

from sglang_mminfer import (
    Adaptive,
    AShape,
    Boundary2D,
    Dense,
    Grid,
    Modality,
    ModalityMap,
    QBoundary,
    TriShape,
    VerticalSlash,
)
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.patterns.dilated import Dilated
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.cost import ChunkRows, Comparison, dense_pairs
from sglang_mminfer.planning.planner import BatchPlanner
from support import conversation

TEXT, VIDEO, VISION = Modality.TEXT, Modality.VIDEO, Modality.VISION
GRID = Grid("frame", True, True, True, 0, 128, 1024)
GRID_DENSE_BELOW = 4608

HEADS: dict[str, HeadPattern] = {
    "grid_static": GRID,
    "lines only": Grid("frame", False, False, True, 3, 128, 256),
    "columns of rows": Grid("row", True, True, True, 3, 128, 1024),
    "a_shape": AShape(128, 4096),
    "tri_shape": TriShape(128, 1024, 0),
    "dilated": Dilated(64, 512, 16),
    "q": QBoundary({VIDEO: GRID}),
    "2d": Boundary2D({(VIDEO, VIDEO): Grid("frame", True, False, True, 7, 64, 512), (VIDEO, TEXT): AShape(8, 64)}),
}

CHATS = {
    "8K": conversation(20, (41, 14, 14), 30),
    "with timestamps": conversation(20, (60, 14, 14, 6), 100),
    "images": conversation(*[part for _ in range(50) for part in (20, (1, 16, 16))]),
    "photos": conversation(*[part for _ in range(12) for part in (20, (1, 25, 40))]),
    "turns": conversation(20, (40, 14, 14), 300, (1, 20, 20), 100, (20, 14, 14), 500),
}


def video(tokens: int) -> ModalityMap:
    """About so many tokens in frames of 8 x 8, between a little text."""
    return conversation(14, ((tokens - 34) // 64, 8, 8), 20)


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", HEADS)
def test_the_estimate_is_close_to_what_a_plan_visits(name: str, chat: ModalityMap) -> None:
    below = GRID_DENSE_BELOW if name == "grid_static" else 0
    for start in (0, chat.length - 3000):
        chunk = RequestChunk(chat, start, chat.length, 0, torch.arange(chat.length))
        plan = BatchPlanner([chunk], chunk.num_rows, dense_below=below).plan([HEADS[name]])
        visited = int(plan.visited_by_row.sum())
        assert ChunkRows(chat, start, chat.length, below).visited_pairs(HEADS[name]) == pytest.approx(visited, rel=0.12)


def test_the_estimate_of_an_estimated_pattern_counts_its_picks() -> None:
    """What is picked is known on the device only: as many keys as it may pick, and the tiles at their ends."""
    chat, few, many = video(16384), VerticalSlash(256, 256), VerticalSlash(8192, 8192)
    rows = ChunkRows(chat, 12000, chat.length)
    assert 0.03 < rows.visited_pairs(few) / dense_pairs(12000, chat.length, "") < 0.1
    assert rows.visited_pairs(many) == pytest.approx(dense_pairs(12000, chat.length, ""), rel=0.01)


@pytest.mark.parametrize(
    "executor, dense_backend, dense_at, sparse_at",
    # What was measured on a CPU (0.93x at 5,120 tokens, 1.08x at 6,144), and what is modelled for an H100.
    [("torch", "torch_native", 5120, 6144), ("triton", "fa3", 6144, 7168), ("fa4", "fa3", 4640, 6144)],
)
def test_grid_static_is_sparse_from_the_length_on_where_it_wins(
    executor: str, dense_backend: str, dense_at: int, sparse_at: int
) -> None:
    comparison = Comparison([[GRID] * 4] * 2, executor, dense_backend, GRID_DENSE_BELOW)
    faster = [comparison.sparse_is_faster(video(n), 0, video(n).length) for n in range(dense_at, 32768, 1024)]
    assert not faster[0] and comparison.sparse_is_faster(video(sparse_at), 0, video(sparse_at).length)
    assert faster == sorted(faster), "longer prompts stay sparse"


def test_rows_that_see_everything_are_dense_at_any_length() -> None:
    """A question after a video: no head of `grid_static` leaves anything out of its rows."""
    chat = conversation(20, (160, 14, 14), 3000)
    comparison = Comparison([[GRID] * 4], "triton", "fa3", GRID_DENSE_BELOW)
    assert not comparison.sparse_is_faster(chat, chat.length - 2048, chat.length)
    assert comparison.sparse_is_faster(chat, chat.length - 5000, chat.length)
    wide = Comparison([[AShape(0, 1 << 30)]], "triton", "fa3", 0)
    assert not wide.sparse_is_faster(chat, 0, chat.length)


def test_all_heads_decide_together_and_dense_ones_not_at_all() -> None:
    chat = video(16384)
    for wide, expected in ((2, True), (6, False)):
        heads = [AShape(0, 1 << 30)] * wide + [AShape(64, 256)] * (8 - wide)
        assert Comparison([heads] * 4, "triton", "fa3", 0).sparse_is_faster(chat, 0, chat.length) == expected
        with_dense = [[*heads, *[Dense()] * 20]] * 4
        assert Comparison(with_dense, "triton", "fa3", 0).sparse_is_faster(chat, 0, chat.length) == expected


def test_torch_native_computes_the_prefix_again_and_so_sparse_wins_there_earlier() -> None:
    assert dense_pairs(0, 100, "fa3") == dense_pairs(0, 100, "torch_native") == 5050
    assert (dense_pairs(90, 100, "fa3"), dense_pairs(90, 100, "torch_native")) == (955, 5050)
    chat, wide = video(8192), [[AShape(0, 1 << 30)]]
    start = chat.length - 1000
    assert Comparison(wide, "torch", "torch_native", 0).sparse_is_faster(chat, start, chat.length)
    assert not Comparison(wide, "triton", "triton", 0).sparse_is_faster(chat, start, chat.length)
    own = Comparison(wide, "torch", "torch_native", 0).own_dense_is_faster
    assert own(1000, 1001) and own(500, 1000) and not own(0, 1000)
    assert not Comparison(wide, "triton", "fa3", 0).own_dense_is_faster(1000, 1001)


CHOOSES = Adaptive(64, 256, 8, 0.01)
KINDS = ("torch", "torch_native", 0, 128)


@pytest.mark.parametrize(
    ("tokens", "share", "without", "with_it"),
    # Diffuse heads, heads as they are expected where nobody has measured them, and peaked heads in a shorter prompt.
    [(8192, 0.9, True, False), (8192, 0.12, True, True), (4096, 0.0, False, True)],
)
def test_what_was_measured_decides(tokens: int, share: float, without: bool, with_it: bool) -> None:
    chat, heads = video(tokens), [[CHOOSES] * 4] * 2
    assert Comparison(heads, *KINDS).sparse_is_faster(chat, 0, chat.length) is without
    assert Comparison(heads, *KINDS, {CHOOSES: share}).sparse_is_faster(chat, 0, chat.length) is with_it
    other = {Adaptive(64, 256, 8, 0.1): share}
    assert Comparison(heads, *KINDS, other).sparse_is_faster(chat, 0, chat.length) is without


def test_a_share_counts_between_sink_and_window() -> None:
    chat = video(8192)
    rows = ChunkRows(chat, 4096, 8000)  # without the question, whose rows see all
    pairs = dense_pairs(4096, 8000, "")
    beside, half, all_keys = (rows.visited_pairs(CHOOSES, share) / pairs for share in (0.0, 0.5, 1.0))
    # The tiles of `a_shape` have more rows.
    assert beside == pytest.approx(rows.visited_pairs(AShape(64, 256)) / pairs, rel=0.1)
    assert all_keys == pytest.approx(1, abs=0.01)
    assert half == pytest.approx((beside + all_keys) / 2)


def test_dense_heads_count_where_the_executor_runs_them() -> None:
    """They are slower beside sparse heads than in a dense chunk, and faster where that computes the prefix again."""
    chat, heads = video(8192), [[AShape(64, 256)] * 2 + [Dense()] * 22]
    on_stock = Comparison(heads, *KINDS).sparse_is_faster
    own = Comparison(heads, *KINDS, dense_on_stock=False).sparse_is_faster
    assert on_stock(chat, 0, chat.length) and not own(chat, 0, chat.length)
    assert own(chat, 6000, chat.length)
