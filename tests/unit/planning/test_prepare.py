"""Plans that are prepared ahead are those that are made when they are asked for, and cost the host little."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import support
from sglang_mminfer import Grid, ModalityMap
from sglang_mminfer.benchmarks.searched import DISTINCT, LAYERS, searched_config
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner, worker
from sglang_mminfer.serving.self_check import compile_ahead
from support import any_pattern, batches, conversation, planner_of

DEFAULT = Grid("frame", v=True, h=True, s=True, phase=0, sink=128, local=1024)


def visits_of(plan: BlockPlan) -> list[tuple[int, bool, bool, list[int]]]:
    """Query tile, whether full, whether gathered, and positions of every visit, sorted."""
    tile, number = plan.visits()
    full = number < plan.num_full[tile]
    gathered = number >= (plan.block_indptr.diff() - plan.num_gathered)[tile]
    positions = plan.visited_positions(tile, number)
    return sorted(zip(tile.tolist(), full.tolist(), gathered.tolist(), positions.tolist()))


def assert_equal(plan: BlockPlan, expected: BlockPlan) -> None:
    """Key tiles may have other numbers and so another sequence, as the layers that come later had their orders placed
    already."""
    assert visits_of(plan) == visits_of(expected)
    for name in ("q_rows", "q_stop", "q_indptr", "q_heads", "num_full", "num_gathered", "gathered_start"):
        assert torch.equal(getattr(plan, name), getattr(expected, name)), name
    assert plan.head_groups == expected.head_groups and plan.pass_indptr == expected.pass_indptr


@settings(max_examples=40)
@given(batches(any_pattern), st.lists(support.heads(any_pattern), max_size=2), st.booleans())
def test_prepared_layers_have_the_same_plans(batch, others, on_thread):
    q, k = batch.q, torch.randn(batch.num_pages * batch.page_size, batch.num_kv_heads, support.D)
    layers = [batch.heads, *([other] * len(batch.heads) for other in others), batch.heads]
    planner = planner_of(batch)
    planner.prepare(layers, worker() if on_thread else None)
    for layer in layers:
        assert_equal(planner.plan(layer, q, k, batch.scale), planner_of(batch).plan(layer, q, k, batch.scale))


def chunk_of(chat: ModalityMap, rows: int = 8192) -> tuple[list[RequestChunk], int]:
    return [RequestChunk(chat, chat.length - rows, chat.length, 0, torch.arange(chat.length))], rows


def test_a_plan_is_kept_as_long_as_it_will_be_asked_for():
    planner = BatchPlanner(*chunk_of(conversation(20, (40, 4, 4), 5), 100))
    first, second = (DEFAULT,), (Grid("row", False, False, True, 0, 8, 8),)
    planner.prepare([first, second, first])
    plan = planner.plan(first)
    assert planner.plan(second) is not planner.plan(second)
    assert planner.plan(first) is plan
    assert planner.plan(first) is not plan


def test_a_layer_waits_for_its_own_tiles_only():
    planner, go_on = BatchPlanner(*chunk_of(conversation(20, (40, 4, 4), 5), 100)), threading.Event()
    later = (Grid("row", False, False, True, 0, 8, 8),)
    with ThreadPoolExecutor(1) as thread:
        planner.prepare([(DEFAULT,)], thread)
        thread.submit(go_on.wait)
        planner.prepare([later], thread)
        assert planner.plan((DEFAULT,)).num_tiles
        go_on.set()
        assert planner.plan(later).num_tiles


def test_what_goes_wrong_on_the_thread_is_raised_where_the_plan_is_asked_for():
    planner = BatchPlanner(*chunk_of(conversation(20, (40, 4, 4), 5), 100))
    layer: Any = (object(),)
    planner.prepare([layer], worker())
    with pytest.raises(AttributeError, match="index"):
        planner.plan(layer)


# ---- what it costs -----------------------------------------------------------------------------------------

VIDEOS = {"128K": conversation(20, (512, 16, 16), 5), "1M": conversation(20, (4095, 16, 16), 5)}


def test_the_searched_config_is_as_large_as_one_of_a_7b_model():
    layers = searched_config(VIDEOS["128K"])
    assert len(layers) == LAYERS and len({head for layer in layers for head in layer}) == DISTINCT
    assert 21 < sum(len(set(layer)) for layer in layers) / LAYERS < 25


def milliseconds(chat: ModalityMap, layers: list[tuple]) -> float:
    """Processor time of a thread for what the host does before it needs the device, at best."""
    times = []
    for _ in range(4):  # the first one also reads the map
        planner = BatchPlanner(*chunk_of(chat), dense_below=4608)
        gc.collect()
        start = time.thread_time()
        planner.prepare(layers)
        times.append(1e3 * (time.thread_time() - start))
    return min(times[1:])


@pytest.mark.parametrize("length", VIDEOS)
def test_a_chunk_is_prepared_in_a_moment(length: str) -> None:
    """5 and 50 ms on a free machine; a busy one takes up to four times as long."""
    compile_ahead()
    assert milliseconds(VIDEOS[length], [(DEFAULT,) * 28] * 28) < 4 * 5
    assert milliseconds(VIDEOS[length], searched_config(VIDEOS[length])) < 4 * 50
