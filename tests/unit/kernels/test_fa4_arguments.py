"""The arguments of FlashAttention-4's forward mean what the plan means: its lists, emulated, against the oracle."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import support
from fa4_emulated import Emulated, forward, join
from raw_plans import SLOTS, counted_slots, raw_plans
from sglang_mminfer import (
    Adaptive,
    AShape,
    Boundary2D,
    Dense,
    Dilated,
    Grid,
    Modality,
    QBoundary,
    TriShape,
    VerticalSlash,
)
from sglang_mminfer.kernels import fa4, reference
from sglang_mminfer.kernels.block_plan import nothing
from sglang_mminfer.kernels.fa4.arguments import call_arguments
from sglang_mminfer.kernels.work_items import work_items
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import D, any_pattern, batches, conversation

FORMS = {
    "sm_90": {"gathered": False, "padded": False},
    "sm_90 gathered": {"gathered": True, "padded": False},
    "sm_100": {"gathered": True, "padded": True},
}
forms = pytest.mark.parametrize("form", FORMS)
limits = st.sampled_from([1, 3, None])
interpreted = pytest.mark.skipif(
    not support.INTERPRETED, reason="a GPU kernel: in Triton's interpreter (make test-interpreted)"
)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def ran(execute, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE in tensors that held NaN."""
    q = arguments[0]
    out, lse = torch.full(q.shape, torch.nan), torch.full(q.shape[:2], torch.nan)
    execute(*arguments, out, lse)
    return out, lse


@forms
@settings(max_examples=60)
@given(
    plan=raw_plans(),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    pairs=st.sampled_from([4, 16]),
    limit=limits,
    seed=st.integers(0, 99),
)
def test_any_plan(form, plan, num_kv_heads, pairs, limit, seed):
    q = randn(plan.num_rows, 4, D, seed=seed)
    k, v = (randn(SLOTS, num_kv_heads, D, seed=seed + i) for i in (1, 2))
    out, lse = ran(Emulated(pairs, limit, **FORMS[form]), q, k, v, plan, 0.4)
    for row in range(plan.num_rows):
        for head in range(4):
            slots, kv = counted_slots(plan, row, head), head // (4 // num_kv_heads)
            everything = torch.ones(1, len(slots), dtype=torch.bool)
            expected = reference.masked_attention(q[row, head][None], k[slots, kv], v[slots, kv], everything, 0.4)
            assert_close((out[row, head], lse[row, head]), tuple(x[0].float() for x in expected))


@forms
@settings(max_examples=40)
@given(batch=batches(any_pattern), pairs=st.sampled_from([16, 128]), limit=limits)
def test_any_batch_over_a_cache_with_foreign_nans(form, batch, pairs, limit):
    chunks = [
        RequestChunk(batch.maps[i], batch.q_start(i), batch.kv_lens[i], batch.rows(i).start, batch.slots(i))
        for i in range(len(batch.maps))
        if batch.q_lens[i]
    ]
    block_q, block_k = batch.tiles
    planner = BatchPlanner(chunks, len(batch.q), dense_below=batch.dense_below, block_q=block_q, block_k=block_k)
    caches = batch.cache()
    k, v = caches.unbind(1) if batch.packed else caches
    k, v = ((x.transpose(1, 2) if batch.kv_layout == "HND" else x).reshape(-1, batch.num_kv_heads, D) for x in (k, v))
    plan = planner.plan(batch.heads, batch.q, k, batch.scale)
    given = batch.q.float(), k.float(), v.float(), plan, batch.scale
    assert_close(ran(Emulated(pairs, limit, **FORMS[form]), *given), ran(reference.run, *given))


TEXT, IMAGE, VIDEO, VISION = Modality.TEXT, Modality.IMAGE, Modality.VIDEO, Modality.VISION
CHAT = conversation(40, (5, 4, 5), 30, (1, 4, 5), 24)  # 214 tokens
PATTERNS = [
    Dense(),
    AShape(16, 40),
    TriShape(16, 40, 5),
    VerticalSlash(30, 20),
    Grid("frame", True, True, True, 3, 8, 24),
    Grid("row", False, True, True, 1, 8, 24),
    Dilated(8, 24, 5),
    QBoundary({TEXT: AShape(8, 40), VIDEO: Grid("row", True, False, True, 1, 8, 8)}),
    Boundary2D({(VIDEO, VISION): VerticalSlash(20, 20), (IMAGE, IMAGE): AShape(1, 30)}),
]


@forms
@pytest.mark.parametrize("group", range(1, 10))
def test_all_patterns_in_one_layer(form, group):
    """The patterns in turn on the heads, so that most KV heads have several; head dims and sizes of key tiles too."""
    limit = (1, 3, None)[(group + list(FORMS).index(form)) % 3]  # each of them with every group
    num_kv_heads, head_dim, start = (9 if group == 1 else 2), (64, 96, 128, 256)[group % 4], 60
    heads = [PATTERNS[head % len(PATTERNS)] for head in range(group * num_kv_heads)]
    slots = torch.randperm(CHAT.length + 20, generator=torch.Generator().manual_seed(0))[: CHAT.length]
    q = randn(CHAT.length - start, len(heads), head_dim, seed=1)
    k, v = (torch.full((CHAT.length + 20, num_kv_heads, head_dim), torch.nan) for _ in range(2))
    for seed, cache in enumerate((k, v)):
        cache[slots] = randn(CHAT.length, num_kv_heads, head_dim, seed=seed + 2)
    planner = BatchPlanner([RequestChunk(CHAT, start, CHAT.length, 0, slots)], len(q), block_k=(16, 64)[group % 2])
    given = q, k, v, planner.plan(heads, q, k, head_dim**-0.5), head_dim**-0.5
    assert_close(ran(Emulated(most_visits=limit, **FORMS[form]), *given), ran(reference.run, *given))


@forms
def test_plans_that_share_a_key_table_keep_their_own_key_tiles(form):
    """Each adds tiles to the table, which grows; those that ran before still find theirs."""
    slots = torch.randperm(CHAT.length, generator=torch.Generator().manual_seed(0))
    q, k, v = (randn(CHAT.length, heads, D, seed=seed) for seed, heads in enumerate((2, 1, 1)))
    planner = BatchPlanner([RequestChunk(CHAT, 0, CHAT.length, 0, slots)], len(q), block_k=16)
    plans = [planner.plan([Grid("frame", True, True, True, phase, 8, 24)] * 2) for phase in range(6)]
    plans = [replace(plan, keys=plans[-1].keys) for plan in plans]  # of all their orders
    assert all(len(plan.excluded_lanes) for plan in plans)
    for plan in (*plans, *plans):
        given = q, k, v, plan, 0.3
        assert_close(ran(Emulated(16, **FORMS[form]), *given), ran(reference.run, *given))


def test_keys_that_were_picked_are_not_copied():
    """A layer's heads may have picked gigabytes of them. Nothing is excluded from their key tiles, so the kernel reads
    them where the plan has them."""
    slots = torch.randperm(CHAT.length, generator=torch.Generator().manual_seed(0))
    q, k = (randn(CHAT.length, heads, D, seed=seed) for seed, heads in enumerate((2, 1)))
    planner = BatchPlanner([RequestChunk(CHAT, 0, CHAT.length, 0, slots)], len(q), block_k=16)
    plan = planner.plan([Adaptive(8, 24, 8, 0.1, 1.0)] * 2, q, k, 0.3)
    assert len(plan.keys.kv_slots) > CHAT.length + 16 and not len(plan.excluded_lanes)
    arguments = call_arguments(plan, 2, 1, 16, False)
    assert arguments.kv_slots.data_ptr() == plan.keys.kv_slots.data_ptr()
    assert arguments.kv_pos.data_ptr() == plan.keys.kv_pos.data_ptr()


@forms
def test_rows_of_one_key_and_rows_of_none(form):
    """A first row sees itself alone; with no pattern for a head, its rows see nothing."""
    chat, slots = conversation(3, (1, 2, 2), 2), torch.arange(9)
    q, k, v = (randn(9, heads, D, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    plan = BatchPlanner([RequestChunk(chat, 0, 9, 0, slots)], 9).plan([AShape(1, 1), None, None, AShape(2, 3)])
    out, lse = ran(Emulated(**FORMS[form]), q, k, v, plan, 0.3)
    assert_close((out, lse), ran(reference.run, q, k, v, plan, 0.3))
    assert_close((out[0, 0],), (v[0, 0],))
    assert not out[:, 1:3].any() and bool(lse[:, 1:3].isneginf().all())


@forms
def test_a_plan_without_tiles(form):
    plan = nothing(3, 2, 8, 8, torch.device("cpu"))
    out, lse = ran(Emulated(**FORMS[form]), randn(3, 2, D, seed=0), *[randn(5, 1, D, seed=1)] * 2, plan, 1.0)
    assert not out.any() and bool(lse.isneginf().all())


@interpreted
@settings(max_examples=support.examples(40))
@given(plan=raw_plans(), limit=limits)
def test_triton_joins_items_of_16_bits(plan, limit):
    """Every item of this executor goes through the kernel that joins parts, in the dtype of the queries."""
    from sglang_mminfer.kernels.triton.merge import merge

    if not work_items(plan, 2, 16, limit).num_items:
        return
    q, k, v = (randn(n, heads, D, seed=n) for n, heads in ((plan.num_rows, 4), (SLOTS, 2), (SLOTS, 2)))
    arguments = call_arguments(plan, 2, 2, 16, False, limit)
    slots_out, slots_lse = Emulated(16, limit).slots(q, k, v, arguments, 0.4)
    slots_out, slots_lse = slots_out.half(), slots_lse.float()
    results = []
    for execute in (merge, join):
        out, lse = torch.full(q.shape, torch.nan), torch.full(q.shape[:2], torch.nan)
        execute(arguments.items, slots_out, slots_lse, out, lse)
        results.append((out, lse))
    assert_close(*results)


@interpreted
@pytest.mark.skipif(fa4.why_not_installed() is not None, reason=str(fa4.why_not_installed()))
@pytest.mark.parametrize(
    "capability, kv_dtype",
    [((9, 0), torch.float16), ((10, 0), torch.float16), ((9, 0), torch.float8_e4m3fn), ((10, 0), torch.float8_e5m2)],
)
def test_all_of_a_run_but_the_kernel_with_triton_joining(monkeypatch, capability, kv_dtype):
    """The kernel needs a GPU, so its emulation takes its place. It gets keys and values of the dtype of q only."""
    from sglang_mminfer.kernels.fa4 import launch

    def call(kind, q, k, v, arguments, sm_scale, out, lse):
        assert k.dtype == v.dtype == q.dtype
        if not kind.gathered:
            k, v = (x[arguments.kv_slots.long(), 0][None] for x in (k, v))
        o, natural = forward(q, k[0], v[0], arguments, sm_scale, kind.blackwell)
        out.copy_(o.view(out.shape))
        lse.copy_(natural.view(lse.shape))

    monkeypatch.setattr(launch, "call", call)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    slots = torch.randperm(CHAT.length, generator=torch.Generator().manual_seed(0))
    q, k, v = (randn(CHAT.length, heads, 64, seed=seed).half() for seed, heads in enumerate((4, 2, 2)))
    k, v = k.to(kv_dtype), v.to(kv_dtype)
    planner = BatchPlanner([RequestChunk(CHAT, 0, CHAT.length, 0, slots)], len(q))
    plan = planner.plan([PATTERNS[i] for i in (1, 4, 5, 7)])
    for scale in (0.125, -0.125):
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        launch.run(q, k, v, plan, scale, out, lse)
        exact, exact_lse = ran(reference.run, q.float(), k.float(), v.float(), plan, scale)
        torch.testing.assert_close(out.float(), exact, rtol=3e-3, atol=3e-3)
        torch.testing.assert_close(lse, exact_lse, rtol=1e-3, atol=1e-3)
    nowhere = nothing(len(q), 4, 128, 64, q.device)
    launch.run(q, k, v, nowhere, 0.125, out, lse)
    assert not out.any() and bool(lse.isneginf().all())
    with pytest.raises(ValueError, match="q: expected float16 or bfloat16"):
        launch.run(q.float(), k, v, plan, 0.125, out, lse)
