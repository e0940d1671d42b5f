"""Plans are made on the device without waiting for it, and stay small however long the prompt is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import support
from absent_card import WaitsForCopy, absent_card
from sglang_mminfer import AShape, Basis, Boundary2D, Dense, Grid, Modality, QBoundary, TriShape, VisionGrid
from sglang_mminfer.kernels.fa4.arguments import call_arguments, keys_of, queries_of
from sglang_mminfer.kernels.triton import estimate, low_rank_scan, picked_keys
from sglang_mminfer.kernels.work_items import work_items
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import D, any_pattern, batches, chunks_of, conversation, planner_of

VIDEO, TEXT = Modality.VIDEO, Modality.TEXT


# ---- no waiting --------------------------------------------------------------------------------------------


def test_the_check_below_notices_a_host_that_waits():
    with absent_card():
        on_card = torch.ones(3, device="cuda")
        with pytest.raises(DataDependentOutputException):
            on_card.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            on_card.nonzero()
        with pytest.raises(RuntimeError, match="device"):
            on_card + torch.ones(3)
        on_host = torch.arange(3)
        index = on_host.to("cuda", non_blocking=True)
        on_card[index] = on_card
        on_card[1:] = 0
        for wait in (
            lambda: on_host.to("cuda"),
            lambda: torch.tensor([1, 2], device="cuda"),
            lambda: on_card.copy_(torch.ones(3)),
            lambda: on_card.__setitem__(0, 1.0),
            lambda: on_card.__setitem__(index, 1.0),
        ):
            with pytest.raises(WaitsForCopy):
                wait()


KERNELS = {
    estimate: ("row_lse", "masses"),
    low_rank_scan: ("low_rank_keys", "low_rank_queries", "any_row_above", "asked_side_by_side"),
    picked_keys: ("picked_keys",),
}
"""Those that plans are made by."""


class Unlaunched:
    """In the place of a kernel: there is no card to launch it on, but all that is done around it is done."""

    def __getitem__(self, grid):
        return lambda *tensors, **options: None


@settings(max_examples=60)
@given(batches(any_pattern))
def test_the_host_never_waits_for_the_device(batch):
    assume(any(batch.q_lens))  # a planner knows the device by its requests
    with pytest.MonkeyPatch.context() as patch:
        for module, kernels in KERNELS.items():
            for kernel in kernels:
                patch.setattr(module, kernel, Unlaunched())
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        plan_on_a_card_that_is_not_there(batch)


def plan_on_a_card_that_is_not_there(batch):
    q, chunks = batch.q, chunks_of(batch)
    with absent_card():
        on_card = [torch.empty(len(chunk.slots), dtype=torch.int64, device="cuda") for chunk in chunks]
        chunks = [replace(chunk, slots=slots) for chunk, slots in zip(chunks, on_card)]
        q = torch.empty(q.shape, device="cuda")
        k_cache = torch.empty(batch.num_pages * batch.page_size, batch.num_kv_heads, D, device="cuda")
        basis = batch.basis
        if basis is not None:
            basis = Basis(*(torch.empty(x.shape, device="cuda") for x in (basis.queries, basis.keys)))
        plan = planner_of(batch, chunks).plan(batch.heads, q, k_cache, batch.scale, basis)
        items = work_items(plan, batch.group, 16)
        tensors = [x for x in vars(plan).values() if isinstance(x, torch.Tensor)]
        tensors += [*items.on_device, items.first_slot, items.parts, plan.keys.kv_pos, plan.keys.kv_slots]
        for gathered in (False, True) if items.num_items else ():
            arguments = call_arguments(plan, batch.group, batch.num_kv_heads, 16, gathered)
            tensors += [*arguments.padded_lists, *(x for x in vars(arguments).values() if isinstance(x, torch.Tensor))]
            tensors += [queries_of(q, arguments), keys_of(k_cache, arguments, gathered)]
        assert {x.device.type for x in tensors} == {"cuda"}


# ---- what layers share -------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(batches(any_pattern), st.lists(support.heads(any_pattern), min_size=1, max_size=3), st.randoms())
def test_what_other_layers_asked_for_before_changes_nothing(batch, others, random):
    q = batch.q
    k = torch.randn(batch.num_pages * batch.page_size, batch.num_kv_heads, D)
    shared = planner_of(batch)
    for other in others:
        shared.plan([other] * len(batch.heads), q, k, batch.scale)
    alone, after = (p.plan(batch.heads, q, k, batch.scale) for p in (planner_of(batch), shared))
    assert torch.equal(alone.visited_by_row, after.visited_by_row)
    assert shared.plan(batch.heads, q, k, batch.scale).visited_by_row.equal(after.visited_by_row)


# ---- size --------------------------------------------------------------------------------------------------


def index_bytes(plan) -> int:
    tensors = {}
    for holder in (plan, plan.keys):
        tensors |= {x.data_ptr(): x for x in vars(holder).values() if isinstance(x, torch.Tensor)}
    return sum(x.nbytes for x in tensors.values())


def test_the_index_of_a_million_tokens_is_small_beside_their_keys_and_values():
    chat = conversation(64, (4095, 16, 16), 192)
    assert chat.length == 1 << 20
    heads = [
        *[Grid("frame", True, True, True, phase, 128, 1024) for phase in range(20)],
        AShape(128, 4096),
        TriShape(128, 4096, 64),
        Boundary2D({(VIDEO, VIDEO): Grid("frame", True, False, True, 7, 64, 512), (VIDEO, TEXT): AShape(8, 64)}),
        QBoundary({VIDEO: Grid("row", False, True, True, 3, 128, 1024)}),
        *[Dense()] * 4,
    ]
    slots, rows = torch.arange(chat.length), 8192
    plan = BatchPlanner([RequestChunk(chat, chat.length - rows, chat.length, 0, slots)], rows).plan(heads)
    kv_cache = 28 * 2 * chat.length * 4 * 128 * 2  # 28 layers of K and V, 4 heads of 128 in bf16
    assert index_bytes(plan) < 0.001 * kv_cache


def test_planning_costs_what_frames_cost_not_what_tokens_do():
    """The same frames with 64 times the tokens: what the host computes has the same size."""
    sizes = []
    for side in (4, 32):
        starts = tuple(range(0, 600 * side * side, side * side))
        grid = VisionGrid(600, side, side, starts)
        chat = support.ModalityMap([support.Segment(VIDEO, 0, 600 * side * side, grid)])
        sizes.append([len(chat.on_phase("frame", 3).starts), len(chat.runs(VIDEO).starts)])
    assert sizes == [[600, 1], [600, 1]]


def test_the_area_of_visited_tiles_is_a_little_more_than_what_rows_see():
    """It is the density that a server tells where it must not wait for the device."""
    chats = [conversation(64, (200, 14, 14), 192), conversation(500), conversation(64, (90, 10, 10, 3), 64)]
    starts, heads = [chats[0].length - 8192, 0, 4096], [Grid("frame", True, True, True, 0, 128, 1024), Dense()]
    chunks, row = [], 0
    for chat, start in zip(chats, starts):
        chunks.append(RequestChunk(chat, start, chat.length, row, torch.arange(chat.length)))
        row += chunks[-1].num_rows
    plan = BatchPlanner(chunks, row).plan(heads)
    for chunk, area in zip(chunks, plan.visited_area(len(chunks)).tolist()):
        exact = int(plan.visited_by_row[chunk.row_start : chunk.row_start + chunk.num_rows].sum())
        assert exact <= area <= 1.06 * exact or chunk.kv_len == 500
    assert plan.visited_area(5).tolist()[3:] == [0, 0]
    assert plan.counted_area(5).tolist() == plan.visited_area(5).tolist()
