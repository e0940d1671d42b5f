"""The GPU executors on a real GPU (`make test-gpu`): the dtypes and sizes that nothing else can check."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from sglang_mminfer import (
    Adaptive,
    AShape,
    Basis,
    Boundary2D,
    Dense,
    Grid,
    Modality,
    QBoundary,
    SparsePrefillWithPagedKVCacheWrapper,
    TriShape,
    VerticalSlash,
    pattern_mask,
)
from sglang_mminfer.kernels import fa4, reference, torch_gather
from sglang_mminfer.kernels.block_plan import BlockPlan, KeyTable
from sglang_mminfer.kernels.triton import launch
from sglang_mminfer.patterns.basis import basis_of, second_moments
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import conversation

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TEXT, IMAGE, VIDEO, VISION = Modality.TEXT, Modality.IMAGE, Modality.VIDEO, Modality.VISION
CHATS = [
    conversation(40, (9, 6, 7), 50, (1, 6, 7), 30, ("video", 60)),
    conversation(9, (11, 5, 7, 3), (1, 9, 9), 100),
    conversation(700),
]
STARTS = [0, CHATS[1].length // 3, CHATS[2].length - 130]  # a whole prompt, one from the middle of a frame, text
PATTERNS = {
    "dense": Dense(),
    "a_shape": AShape(70, 90),
    "tri_shape": TriShape(30, 64, 5),
    "vertical_slash": VerticalSlash(60, 40),
    "grid_frame": Grid("frame", True, True, True, 3, 16, 64),
    "grid_row": Grid("row", False, False, True, 1, 16, 64),
    "grid_lines_of_a_phase": Grid("row", True, True, False, 2, 4, 70),
    "q_boundary": QBoundary(
        {TEXT: AShape(8, 80), VIDEO: Grid("frame", True, False, True, 0, 8, 30), IMAGE: AShape(9, 9)}
    ),
    "q_boundary_estimated": QBoundary({TEXT: VerticalSlash(20, 30), VISION: VerticalSlash(40, 20, 16)}),
    "2d_boundary": Boundary2D(
        {(VIDEO, VISION): Grid("frame", False, True, True, 2, 8, 30), (IMAGE, IMAGE): AShape(1, 70)}
    ),
    "2d_boundary_estimated": Boundary2D({(VIDEO, VISION): VerticalSlash(30, 40), (TEXT, TEXT): AShape(4, 60)}),
}
HEADS = [PATTERNS[name] for name in PATTERNS if name not in ("grid_lines_of_a_phase", "q_boundary_estimated", "dense")]
assert len(HEADS) == 8  # so that 1, 2 and 8 KV heads divide them
WITHIN = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = [torch.bfloat16, torch.float16]


NO_FA4 = fa4.why_unavailable(torch.device(DEVICE), 128, 64, torch.bfloat16)


def run_fa4(*arguments: Any, **forms: Any) -> None:
    from sglang_mminfer.kernels.fa4.launch import run

    run(*arguments, **forms)


if_fa4 = pytest.mark.skipif(NO_FA4 is not None, reason=str(NO_FA4))
FA4 = [
    pytest.param(run_fa4, id="fa4", marks=if_fa4),
    pytest.param(partial(run_fa4, gathered=True), id="fa4-gathered", marks=if_fa4),
]
every_executor = pytest.mark.parametrize("execute", [pytest.param(launch.run, id="triton"), *FA4])


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def chunks(device: str, chats=CHATS, starts=STARTS) -> tuple[list[RequestChunk], int]:
    """The requests of one batch over a shuffled pool, and its rows."""
    lengths = [chat.length for chat in chats]
    pool = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(9)).split(lengths)
    batch, row = [], 0
    for chat, start, slots in zip(chats, starts, pool):
        batch.append(RequestChunk(chat, start, chat.length, row, slots.to(device)))
        row += chat.length - start
    return batch, row


def inputs(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k and v of the batch, on the GPU."""
    rows, tokens = sum(chat.length - start for chat, start in zip(CHATS, STARTS)), sum(c.length for c in CHATS)
    shapes = [(rows, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, head_dim)]
    return [random(*shape, dtype=dtype, seed=seed).to(DEVICE) for seed, shape in enumerate(shapes)]


def planned(heads: list, q: torch.Tensor, k: torch.Tensor) -> BlockPlan:
    batch, rows = chunks(q.device.type)
    return BatchPlanner(batch, rows).plan(heads, q, k, q.shape[2] ** -0.5)


def ran(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, execute: Any = launch.run
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of an executor, in tensors that held NaN before."""
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], torch.nan, device=q.device)
    execute(q, k, v, plan, q.shape[2] ** -0.5, out, lse)
    return out, lse


def on_cpu(plan: BlockPlan) -> BlockPlan:
    """The same plan for an executor on the host. Estimates are not made again."""
    tensors = {name: x.cpu() for name, x in vars(plan).items() if isinstance(x, torch.Tensor)}
    fields = {name: x for name, x in tensors.items() if name in BlockPlan.__dataclass_fields__}
    return replace(plan, **fields, keys=KeyTable(plan.keys.kv_pos.cpu(), plan.keys.kv_slots.cpu()))


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of the plan in float64, on the host."""
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    wide = (x.float().cpu() for x in (q, k, v))
    reference.run(*wide, on_cpu(plan), q.shape[2] ** -0.5, out, lse)
    return out, lse


def assert_close(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    within = WITHIN[got[0].dtype]
    torch.testing.assert_close(got[0].float().cpu(), expected[0], rtol=within, atol=within)
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=1e-3, atol=5e-3)


# ---- right answers -------------------------------------------------------------------------------------------


@every_executor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_over_prefixes_in_one_batch(name, dtype, execute):
    given = inputs(4, 2, 128, dtype)
    plan = planned([PATTERNS[name]] * 4, *given[:2])
    assert_close(ran(*given, plan, execute), exact(*given, plan))


@pytest.mark.parametrize("execute", FA4)
def test_key_tiles_of_128_keys(execute):
    given = inputs(len(HEADS), 2, 128, torch.bfloat16)
    batch, rows = chunks(DEVICE)
    plan = BatchPlanner(batch, rows, block_k=128).plan(HEADS, *given[:2], 128**-0.5)
    assert_close(ran(*given, plan, execute), exact(*given, plan))


@every_executor
def test_fifty_runs_are_the_same_bit_by_bit(execute):
    given = inputs(len(HEADS), 2, 128, torch.bfloat16)
    plan = planned(HEADS, *given[:2])
    first = ran(*given, plan, execute)
    for _ in range(49):
        assert all(map(torch.equal, first, ran(*given, plan, execute))), "two runs differ"


@every_executor
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_patterns_in_one_layer(dtype, head_dim, kv_heads, execute):
    given = inputs(len(HEADS), kv_heads, head_dim, dtype)
    plan = planned(HEADS, *given[:2])
    first, second = ran(*given, plan, execute), ran(*given, plan, execute)
    assert all(map(torch.equal, first, second)), "two runs differ"
    assert_close(first, exact(*given, plan))


@every_executor
@pytest.mark.parametrize("most_visits", [1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_lists_in_parts(kv_heads, most_visits, execute):
    given = inputs(len(HEADS), kv_heads, 128, torch.bfloat16)
    plan = planned(HEADS, *given[:2])
    out, lse = torch.full_like(given[0], torch.nan), torch.full(given[0].shape[:2], torch.nan, device=DEVICE)
    expected = exact(*given, plan)
    for _ in range(20):
        execute(*given, plan, 128**-0.5, out, lse, most_visits=most_visits)
        assert_close((out, lse), expected)


@pytest.mark.parametrize("name", [name for name in PATTERNS if not name.endswith(("estimated", "slash"))])
def test_static_plans_are_those_of_the_host(name):
    given = inputs(2, 1, 64, torch.bfloat16)
    here, there = (planned([PATTERNS[name]] * 2, *(x.to(device) for x in given[:2])) for device in (DEVICE, "cpu"))
    own = on_cpu(here)
    for field in ("q_rows", "q_stop", "q_indptr", "q_heads", "block_indptr", "num_full", "num_gathered"):
        assert torch.equal(getattr(own, field), getattr(there, field)), field
    visits = int(own.block_indptr[-1])
    assert torch.equal(own.block_indices[:visits], there.block_indices[:visits])
    assert torch.equal(own.keys.kv_pos, there.keys.kv_pos) and torch.equal(own.keys.kv_slots, there.keys.kv_slots)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name.endswith(("estimated", "slash"))])
def test_estimates_see_what_those_of_the_host_see(name):
    """Nearly all pairs are the same; ties and rounding decide the others."""
    given = inputs(2, 1, 64, torch.float16)
    plans = [planned([PATTERNS[name]] * 2, *(x.to(device) for x in given[:2])) for device in (DEVICE, "cpu")]
    row = 0
    for chat, start in zip(CHATS, STARTS):
        rows = slice(row, row + chat.length - start)
        row = rows.stop
        here, there = (reference.visited_mask(on_cpu(plan), 0, rows, chat.length) for plan in plans)
        assert float((here & there).sum()) >= 0.9 * float((here | there).sum())


@every_executor
def test_strided_queries_and_caches(execute):
    """Views into a fused projection and a fused cache give the same bits as contiguous copies."""
    heads, kv_heads, head_dim = len(HEADS), 2, 128
    rows, tokens = chunks("cpu")[1], sum(chat.length for chat in CHATS)
    fused = random(rows, (heads + 2 * kv_heads) * head_dim, dtype=torch.float16, seed=1).to(DEVICE)
    cache = random(tokens, 2, kv_heads, head_dim + 32, dtype=torch.float16, seed=2).to(DEVICE)
    q = fused[:, : heads * head_dim].view(rows, heads, head_dim)
    k, v = (cache[:, i, :, :head_dim] for i in (0, 1))
    assert not (q.is_contiguous() or k.is_contiguous())
    plan = planned(HEADS, q, k)
    copies = [x.contiguous() for x in (q, k, v)]
    assert all(map(torch.equal, ran(q, k, v, plan, execute), ran(*copies, plan, execute)))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_pages_through_the_wrapper(page_size, layout):
    kv_heads, head_dim, dtype = 2, 128, torch.float16
    lengths = [chat.length for chat in CHATS]
    used = [-(-length // page_size) for length in lengths]
    pages = torch.randperm(sum(used) + 5, generator=torch.Generator().manual_seed(3))[: sum(used)].int()
    q_lens = [length - start for length, start in zip(lengths, STARTS)]
    qo, kv = (torch.tensor([0, *counts]).cumsum(0).int() for counts in (q_lens, used))
    last = torch.tensor([(length - 1) % page_size + 1 for length in lengths]).int()
    shape = (page_size, kv_heads) if layout == "NHD" else (kv_heads, page_size)
    cache = random(sum(used) + 5, 2, *shape, head_dim, dtype=dtype, seed=4)
    q = random(sum(q_lens), len(HEADS), head_dim, dtype=dtype, seed=5)
    static = [PATTERNS["a_shape"] if "estimated" in str(h) or isinstance(h, VerticalSlash) else h for h in HEADS]
    found = []
    for backend, device, kind in (("triton", DEVICE, dtype), ("reference", "cpu", torch.float32)):
        wrapper = SparsePrefillWithPagedKVCacheWrapper(None, layout, backend)
        wrapper.plan(
            qo,
            kv,
            pages.to(device),
            last,
            len(HEADS),
            kv_heads,
            head_dim,
            page_size,
            modality_maps=CHATS,
            head_patterns=static,
            q_data_type=kind,
        )
        found.append(wrapper.run(q.to(device, kind), cache.to(device, kind), return_lse=True))
    assert_close(*found)


# ---- heads that choose their keys ----------------------------------------------------------------------------

CHOOSING = [
    Adaptive(8, 64, 8, 0.02),
    Adaptive(8, 64, 8, 0.02, text="chosen"),
    QBoundary({TEXT: Dense(), VISION: Adaptive(8, 30, 4, 0.1)}),
    Boundary2D({(VIDEO, VISION): Adaptive(8, 30, 8, 0.1), (TEXT, TEXT): AShape(4, 60)}),
]
by_choice = pytest.mark.parametrize("head", CHOOSING, ids=["alone", "text too", "q-boundary", "2d-boundary"])


def chosen(
    head: HeadPattern, q: torch.Tensor, k: torch.Tensor, forms: int = 2
) -> tuple[BlockPlan, Basis, list[RequestChunk]]:
    """The plan of heads that choose by low-rank scores, which fit q . k."""
    batch, rows = chunks(q.device.type)
    own = [second_moments(x.cpu()) for x in (q, k)]
    basis = basis_of(*own, 8, shared=forms == k.shape[1])
    basis = Basis(basis.queries.to(q.device), basis.keys.to(q.device))
    return BatchPlanner(batch, rows).plan([head] * q.shape[1], q, k, q.shape[2] ** -0.5, basis), basis, batch


@by_choice
@pytest.mark.parametrize("forms", [2, 14], ids=["of KV heads", "of heads"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_rows_ask_for_is_visited_and_little_else(dtype, head_dim, forms, head):
    """All that the exact rule asks for; and beyond it what another way of rounding decides otherwise, on the host."""
    q, k, v = inputs(14, 2, head_dim, dtype)
    plan, basis, batch = chosen(head, q, k, forms)
    other, _, _ = chosen(head, q.cpu().float(), k.cpu().float(), forms)
    own = on_cpu(plan)
    for number, (chat, start) in enumerate(zip(CHATS, STARTS)):
        first = batch[number].row_start
        rows = slice(first, first + chat.length - start)
        slots = batch[number].slots.cpu()
        for h in (0, 5, 13):
            here, there = (reference.visited_mask(p, h, rows, chat.length) for p in (own, other))
            exact_mask = pattern_mask(
                chat,
                head,
                start,
                chat.length,
                chat.length,
                q[rows, h].cpu().float(),
                k.cpu()[slots, h // 7].float(),
                basis=tuple(part.cpu() for part in basis.of_head(h, 14)),
            )
            assert not (exact_mask & ~here).any()
            assert float((here ^ there).sum()) <= 0.01 * float(there.sum())
    assert_close(ran(q, k, v, plan), exact(q, k, v, plan))


@by_choice
def test_choosing_waits_for_nothing_and_is_the_same_every_time(head):
    q, k, _ = inputs(14, 2, 128, torch.bfloat16)
    batch, rows = chunks(DEVICE)
    forms = Basis(*torch.randn(2, 2, 8, 128, device=DEVICE))

    def planned_by_choice() -> BlockPlan:
        return BatchPlanner(batch, rows).plan([head] * 14, q, k, 128**-0.5, forms)

    first = planned_by_choice()  # compiles, and may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [planned_by_choice() for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for plan in again:
        assert torch.equal(plan.block_indptr, first.block_indptr)
        assert torch.equal(plan.keys.kv_slots, first.keys.kv_slots) and torch.equal(plan.keys.kv_pos, first.keys.kv_pos)


# ---- no waiting, no chance, no overflow ----------------------------------------------------------------------


@every_executor
@pytest.mark.parametrize("name", PATTERNS)
def test_planning_and_running_wait_for_nothing(name, execute):
    """The host runs ahead of the GPU: no copy back, and no size that only the GPU knows."""
    given = inputs(4, 2, 128, torch.bfloat16)
    heads, batch = [PATTERNS[name]] * 4, chunks(DEVICE)
    out, lse = torch.empty_like(given[0]), torch.empty(given[0].shape[:2], device=DEVICE)

    def forward() -> None:
        plan = BatchPlanner(*batch).plan(heads, *given[:2], 128**-0.5)
        execute(*given, plan, 128**-0.5, out, lse)

    forward()  # the first run compiles, and may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_executor
def test_runs_over_a_long_prefix_are_the_same_bit_by_bit(execute):
    tokens, rows, dim = 1 << 17, 2048, 128
    chat = conversation(64, (511, 16, 16), 192)
    k, v = (torch.randn(tokens, 4, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(rows, 28, dim, device=DEVICE, dtype=torch.bfloat16)
    slots = torch.randperm(tokens, device=DEVICE)
    heads = [(HEADS * 4)[i] for i in range(28)]
    found = []
    for _ in range(4):
        plan = BatchPlanner([RequestChunk(chat, tokens - rows, tokens, 0, slots)], rows).plan(heads, q, k, dim**-0.5)
        found.append(ran(q, k, v, plan, execute))
    for again in found[1:]:
        assert all(map(torch.equal, found[0], again)), "plan and run differ from one time to the next"


@pytest.mark.xdist_group("much memory")  # one after the other, where processes share the card
@every_executor
@pytest.mark.parametrize(
    "heads",
    [
        [Grid("frame", True, True, True, 0, 128, 1024), AShape(128, 4096)],
        [Grid("row", False, False, True, 5, 128, 1024), TriShape(128, 2048, 64)],
        [QBoundary({VIDEO: Grid("frame", True, False, True, 0, 8, 300), TEXT: AShape(8, 4096)}), Dense()],
        [
            Boundary2D({(VIDEO, VISION): Grid("row", False, True, True, 2, 8, 300), (TEXT, VISION): AShape(8, 900)}),
            Dense(),
        ],
    ],
    ids=["frame", "row", "q-boundary", "2d-boundary"],
)
def test_a_million_keys_in_a_pool_whose_offsets_pass_32_bits(heads, execute):
    tokens, rows, kv_heads, dim, pool = 1 << 20, 256, 8, 128, 2_200_000
    chat = conversation(64, (4095, 16, 16), 192)
    assert chat.length == tokens and pool * kv_heads * dim > 1 << 31
    k, v = (torch.randn(pool, kv_heads, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(rows, 2 * kv_heads, dim, device=DEVICE, dtype=torch.bfloat16)
    slots = torch.randperm(pool, device=DEVICE)[:tokens]
    plan = BatchPlanner([RequestChunk(chat, tokens - rows, tokens, 0, slots)], rows).plan(heads * kv_heads)
    expected = torch.empty_like(q), torch.empty(q.shape[:2], device=DEVICE)
    torch_gather.run(q, k, v, plan, dim**-0.5, *expected)
    torch.testing.assert_close(ran(q, k, v, plan, execute), expected, rtol=1e-2, atol=1e-2)


def test_an_estimate_over_a_million_keys():
    """The estimate finds a planted column and a planted diagonal, and the answer equals the oracle's on that plan."""
    tokens, rows, dim = 1 << 20, 128, 128
    chat = conversation(64, (4095, 16, 16), 192)
    k, v = (torch.randn(tokens, 1, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(rows, 2, dim, device=DEVICE, dtype=torch.bfloat16)
    slots, column, distance = torch.randperm(tokens, device=DEVICE), 123_457, 700_001
    k[slots[column]] = 4 * q[-64:].float().mean(dim=(0, 1)).to(k.dtype) * dim**0.5
    for row in range(rows):
        k[slots[tokens - rows + row - distance], 0] = 1.2 * q[row].float().sum(dim=0).to(k.dtype)
    plan = BatchPlanner([RequestChunk(chat, tokens - rows, tokens, 0, slots)], rows).plan(
        [VerticalSlash(100, 200)] * 2, q, k, dim**-0.5
    )
    host = on_cpu(plan)
    seen = reference.visited_mask(host, 0, slice(0, rows), tokens)
    assert bool(seen[:, column].all())
    assert bool(seen[torch.arange(rows), tokens - rows + torch.arange(rows) - distance].all())
    expected = torch.empty_like(q), torch.empty(q.shape[:2], device=DEVICE)
    torch_gather.run(q, k, v, plan, dim**-0.5, *expected)
    torch.testing.assert_close(ran(q, k, v, plan), expected, rtol=1e-2, atol=1e-2)
