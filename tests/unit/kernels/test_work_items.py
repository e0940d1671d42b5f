"""Work items: every pair meets every visit once, and no program is much longer than its share."""

import gc
from weakref import ref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raw_plans import raw_plans
from sglang_mminfer import HeadConfig
from sglang_mminfer.kernels import work_items as module
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.fa4.arguments import call_arguments
from sglang_mminfer.kernels.work_items import (
    DIRECT,
    FIRST_HEAD,
    FIRST_PAIR,
    NUM_HEADS,
    NUM_PAIRS,
    NUM_PARTS,
    PART,
    SLOT,
    TILE,
    WorkItems,
    work_items,
)
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import conversation

limits = st.sampled_from([1, 3, None])


def work_of(items: WorkItems) -> list[tuple[int, int, int]]:
    """(index of a row in q_rows, query head, number of a visit) of everything that the items compute."""
    plan, out = items.plan, []
    for item in items.table.tolist():
        first, stop = plan.block_indptr[item[TILE] : item[TILE] + 2].tolist()
        visits = stop - first
        numbers = range(visits * item[PART] // item[NUM_PARTS], visits * (item[PART] + 1) // item[NUM_PARTS])
        for pair in range(item[FIRST_PAIR], item[FIRST_PAIR] + item[NUM_PAIRS]):
            row = int(plan.q_indptr[item[TILE]]) + pair // item[NUM_HEADS]
            head = int(items.heads[item[FIRST_HEAD] + pair % item[NUM_HEADS]])
            out += [(row, head, first + number) for number in numbers]
    return out


@settings(max_examples=80)
@given(raw_plans(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 4, 16]), limits)
def test_every_pair_meets_every_visit_once(plan, group, pairs, limit):
    items = work_items(plan, group, pairs, limit)
    expected = []
    for tile in range(plan.num_tiles):
        first, stop = plan.q_indptr[tile : tile + 2].tolist()
        for head in plan.head_groups[plan.q_heads[tile]]:
            for row in range(first, stop):
                expected += [(row, head, visit) for visit in range(*plan.block_indptr[tile : tile + 2].tolist())]
    assert sorted(work_of(items)) == sorted(expected)


@settings(max_examples=80)
@given(raw_plans(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 4, 16]), limits)
def test_an_item_has_one_kv_head_and_keeps_to_its_size(plan, group, pairs, limit):
    items = work_items(plan, group, pairs, limit)
    for item in items.table.tolist():
        heads = items.heads[item[FIRST_HEAD] : item[FIRST_HEAD] + item[NUM_HEADS]]
        assert len(set(heads // group)) == 1 and 1 <= item[NUM_PAIRS] <= pairs
    assert limit is None or int(items.visits.max(initial=0)) <= limit
    lengths = [int(v).bit_length() for v in items.visits]
    assert lengths == sorted(lengths, reverse=True)


@settings(max_examples=80)
@given(raw_plans(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 4, 16]), limits)
def test_slots_are_found_again(plan, group, pairs, limit):
    """What an item writes into the scratch, and only that, is found for its (row, head), part after part."""
    items = work_items(plan, group, pairs, limit)
    written, direct = {}, set()
    for item in items.table.tolist():
        for lane in range(item[NUM_PAIRS]):
            pair = item[FIRST_PAIR] + lane
            row = int(plan.q_rows[int(plan.q_indptr[item[TILE]]) + pair // item[NUM_HEADS]])
            place = row * plan.num_heads + int(items.heads[item[FIRST_HEAD] + pair % item[NUM_HEADS]])
            if item[SLOT] < 0:
                assert place not in direct
                direct.add(place)
            else:
                slot = item[SLOT] * pairs + lane
                assert slot not in written
                written[slot] = place
    found, said_direct = {}, set()
    for of_pass in items.first_slot.tolist():
        for place, first in enumerate(of_pass):
            if first == DIRECT:
                said_direct.add(place)
            elif first >= 0:
                for part in range(int(items.parts[first // pairs])):
                    assert found.setdefault(first + part * pairs, place) == place
    assert found == written and said_direct == direct
    assert not direct & set(written.values())


@pytest.mark.parametrize("gathered", [False, True])
def test_what_a_plan_keeps_for_executors_of_a_gpu_does_not_keep_the_plan(gathered):
    """Else the plan of every layer would stay on the GPU until Python looks for cycles."""
    gc.collect()
    gc.disable()
    try:
        plan = last_chunk("grid_static", 20_000, 64)
        arguments = call_arguments(plan, 7, 4, 128, gathered)
        assert len(arguments.padded_lists) == 4 and len(arguments.items.first_slot)
        held = ref(plan), ref(work_items(plan, 7, 128)), ref(arguments)
        del plan, arguments
        assert [x() for x in held] == [None, None, None]
    finally:
        gc.enable()


# ---- how much of the machine works ---------------------------------------------------------------------------


def last_chunk(config: str, tokens: int, rows: int) -> BlockPlan:
    """The last chunk of a chat about one video, with the patterns of a built-in config's first layer."""
    frames = (tokens - 256) // 256
    chat = conversation(64, (frames, 16, 16), tokens - 64 - frames * 256)
    heads = HeadConfig.load(config)
    patterns = (heads.patterns(0) * 28)[:28]
    chunk = RequestChunk(chat, tokens - rows, tokens, 0, torch.arange(tokens))
    return BatchPlanner([chunk], rows, dense_below=heads.defaults.dense_below).plan(patterns)


def rows_used(items: WorkItems) -> float:
    """The share of matrix rows that are pairs, weighted by the key tiles that they meet."""
    return float(items.table[:, NUM_PAIRS] @ items.visits) / float(items.pairs * items.visits.sum())


@pytest.mark.parametrize("rows", [8192, 16384])
@pytest.mark.parametrize("tokens", [1 << 15, 1 << 17, 1 << 20])
def test_rows_are_used_and_no_item_is_long(tokens, rows):
    items = work_items(last_chunk("grid_static", tokens, rows), 7, 128)
    makespan = items.visits.sum() / module.PROCESSORS
    assert rows_used(items) >= 0.85
    assert int(items.visits.max()) <= max(module.LEAST_VISITS, np.ceil(makespan / 4))


# ---- passes --------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(raw_plans())
def test_passes_say_together_what_the_plan_says(plan):
    """Each visit of a pass is a visit of the plan: its rows, its key tile, and the lanes that count."""

    def said(part: BlockPlan) -> list[tuple]:
        tile, number = part.visits()
        positions = part.visited_positions(tile, number).tolist()
        out = []
        for t, block, seen in zip(tile.tolist(), part.visited_blocks(tile, number).tolist(), positions):
            rows = slice(*part.q_indptr[t : t + 2].tolist())
            heads = part.head_groups[int(part.q_heads[t])]
            out.append((part.q_rows[rows].tolist(), part.q_stop[rows].tolist(), heads, block, seen))
        return out

    assert [visit for part in plan.passes for visit in said(part)] == said(plan)
    assert sum(part.num_tiles for part in plan.passes) == plan.num_tiles
