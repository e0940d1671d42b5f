"""FlashInfer and our own kernel on a real GPU (`make test-gpu`): each checks the other.

FlashInfer compiles its kernels on first use (nvcc, some minutes in all), so these tests cover few dtypes and head dims,
the usual ones first.
"""

import importlib

import pytest
import torch

import support
from sglang_mminfer import (
    AShape,
    Boundary2D,
    Dense,
    Grid,
    Modality,
    QBoundary,
    SparsePrefillWithPagedKVCacheWrapper,
    TriShape,
    VerticalSlash,
)
from sglang_mminfer.kernels import flashinfer_paged, reference, torch_gather
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import conversation, halves


def why_not() -> str:
    """Why these tests cannot run; empty if they can."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    try:
        importlib.import_module("flashinfer")
    except Exception as error:  # a tree without its dependencies fails in many ways
        return f"FlashInfer cannot be imported: {type(error).__name__}: {error}"
    return ""


REASON = why_not()
pytestmark = [
    pytest.mark.skipif(bool(REASON), reason=REASON or "runs"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

DEVICE = "cuda"
TEXT, IMAGE, VIDEO, VISION = Modality.TEXT, Modality.IMAGE, Modality.VIDEO, Modality.VISION
CHATS = [
    conversation(40, (9, 6, 7), 50, (1, 6, 7), 30, ("video", 60)),
    conversation(9, (11, 5, 7, 3), (1, 9, 9), 100),
    conversation(700),
]
LENGTHS = [chat.length for chat in CHATS]
STARTS = [0, LENGTHS[1] // 3, LENGTHS[2] - 130]
HEADS = [
    Dense(),
    AShape(70, 90),
    TriShape(30, 64, 5),
    VerticalSlash(60, 40),
    Grid("frame", True, True, True, 3, 16, 64),
    Grid("row", False, False, True, 1, 16, 64),
    QBoundary({TEXT: AShape(8, 80), VIDEO: Grid("frame", True, False, True, 0, 8, 30), IMAGE: AShape(9, 9)}),
    Boundary2D({(VIDEO, VISION): Grid("frame", False, True, True, 2, 8, 30), (IMAGE, IMAGE): AShape(1, 70)}),
]
KINDS = [(torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 256)]
LSE = {"rtol": 1e-3, "atol": 5e-3}


def within(dtype: torch.dtype) -> dict:
    """Assert that two kernels differ by no more than a few roundings of an output of order 1."""
    return dict.fromkeys(("rtol", "atol"), 2e-2 if dtype is torch.bfloat16 else 4e-3)


def inputs(dtype: torch.dtype, dim: int, kv_heads: int) -> list[torch.Tensor]:
    """q for the rows of all chats, k and v for all their tokens, on the CPU."""
    random = torch.Generator().manual_seed(1)
    rows = sum(LENGTHS) - sum(STARTS)
    shapes = [(rows, len(HEADS), dim), (sum(LENGTHS), kv_heads, dim), (sum(LENGTHS), kv_heads, dim)]
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def planned(q: torch.Tensor, k: torch.Tensor):
    """The plan of a batch of all chats with every pattern, on q's device."""
    pool = torch.randperm(sum(LENGTHS), generator=torch.Generator().manual_seed(9)).split(LENGTHS)
    chunks, row = [], 0
    for chat, start, slots in zip(CHATS, STARTS, pool):
        chunks.append(RequestChunk(chat, start, chat.length, row, slots.to(q.device)))
        row += chat.length - start
    return BatchPlanner(chunks, row).plan(HEADS, q, k, q.shape[2] ** -0.5)


def executed(execute, q, k, v, plan, **more) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan, device=q.device)
    execute(q, k, v, plan, q.shape[2] ** -0.5, out, lse, **more)
    return out, lse


def triton_run(*arguments, **more) -> None:
    from sglang_mminfer.kernels.triton.launch import run

    run(*arguments, **more)


@pytest.mark.parametrize(("dtype", "dim"), KINDS)
@pytest.mark.parametrize("kv_heads", [2, 1, 8])
@pytest.mark.parametrize("backend", ["fa2", "auto"])
def test_the_executor_computes_every_pattern_over_prefixes_in_one_batch(backend, kv_heads, dtype, dim):
    on_host = inputs(dtype, dim, kv_heads)
    q, k, v = (x.to(DEVICE) for x in on_host)
    plan = planned(q, k)
    out, lse = executed(flashinfer_paged.run, q, k, v, plan, backend=backend)

    # First the same plan in float32 with plain torch operations, then the oracle with a plan of its own.
    near, near_lse = executed(torch_gather.run, q.float(), k.float(), v.float(), plan)
    torch.testing.assert_close(out.float(), near, **within(dtype))
    torch.testing.assert_close(lse, near_lse, **LSE)
    on_host = [x.float() for x in on_host]
    exact, exact_lse = executed(reference.run, *on_host, planned(*on_host[:2]))
    # vertical_slash is not compared here: its estimate may choose differently between equally heavy columns.
    kept = [i for i, head in enumerate(HEADS) if not isinstance(head, VerticalSlash)]
    torch.testing.assert_close(out.float().cpu()[:, kept], exact[:, kept], **within(dtype))
    torch.testing.assert_close(lse.cpu()[:, kept], exact_lse[:, kept], **LSE)

    again = executed(flashinfer_paged.run, q, k, v, plan, backend=backend)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1]), "two runs differ"


@pytest.mark.parametrize(("dtype", "dim"), KINDS[:2])
def test_the_two_kernels_agree_on_every_pattern(dtype, dim):
    q, k, v = (x.to(DEVICE) for x in inputs(dtype, dim, 2))
    plan = planned(q, k)
    ours, theirs = (executed(execute, q, k, v, plan) for execute in (triton_run, flashinfer_paged.run))
    torch.testing.assert_close(ours[0], theirs[0], **within(dtype))
    torch.testing.assert_close(ours[1], theirs[1], **LSE)


@pytest.mark.parametrize("backend", ["fa2", "auto"])
def test_caches_may_lie_in_memory_as_they_like(backend):
    q, k, v = (x.to(DEVICE) for x in inputs(torch.bfloat16, 128, 2))
    plan = planned(q, k)
    expected = executed(flashinfer_paged.run, q, k, v, plan, backend=backend)
    both = torch.stack([k, v], dim=1)
    layouts = {
        "packed": (both[:, 0], both[:, 1]),
        "by head": tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)),
        "padded": tuple(torch.nn.functional.pad(x, (0, 8, 0, 1))[:, :2, :128] for x in (k, v)),
    }
    for name, caches in layouts.items():
        got = executed(flashinfer_paged.run, q, *caches, plan, backend=backend)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]), name


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize(("dtype", "dim"), KINDS[:2])
def test_an_all_covering_plan_is_flashinfers_causal_attention(dtype, dim, kv_heads, page_size):
    """Both wrappers get the same arguments: a batch with prefixes, causal at the bottom right."""
    import flashinfer

    batch = support.Batch(
        CHATS,
        [n - s for n, s in zip(LENGTHS, STARTS)],
        LENGTHS,
        [Dense()] * 8,
        kv_heads,
        page_size,
    )
    random = torch.Generator().manual_seed(2)
    shape = (batch.num_pages, page_size, kv_heads, dim)
    caches = tuple(torch.randn(shape, generator=random).to(DEVICE, dtype) for _ in range(2))
    q = torch.randn(sum(batch.q_lens), 8, dim, generator=random).to(DEVICE, dtype)
    arrays = [x.to(DEVICE) for x in (batch.qo_indptr, batch.kv_indptr, batch.page_table, batch.last_page_len)]
    shapes = (8, kv_heads, dim, page_size)

    ours = SparsePrefillWithPagedKVCacheWrapper(None, "NHD", "triton")
    ours.plan(*arrays, *shapes, modality_maps=CHATS, head_patterns=Dense(), q_data_type=dtype)
    out, lse = ours.run(q, caches, return_lse=True)
    for backend in ("fa2", "auto"):
        workspace = torch.empty(flashinfer_paged.WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)
        theirs = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        theirs.plan(*arrays, *shapes, causal=True, q_data_type=dtype, kv_data_type=dtype)
        expected, expected_lse = theirs.run(q, caches, return_lse=True)
        torch.testing.assert_close(out, expected, **within(dtype))
        torch.testing.assert_close(lse, expected_lse, **LSE)


@pytest.mark.parametrize(("dtype", "dim"), KINDS[:2])
@pytest.mark.parametrize("execute", [triton_run, flashinfer_paged.run], ids=["triton", "flashinfer"])
def test_flashinfer_merges_a_split_plan_into_the_whole(execute, dtype, dim):
    import flashinfer

    q, k, v = (x.to(DEVICE) for x in inputs(dtype, dim, 2))
    plan = planned(q, k)
    whole = executed(execute, q, k, v, plan)
    first, second = (executed(execute, q, k, v, half) for half in halves(plan))
    out, lse = flashinfer.merge_state(*first, *second)
    torch.testing.assert_close(out, whole[0], **within(dtype))
    torch.testing.assert_close(lse, whole[1], **LSE)


def test_a_row_without_keys_in_either_half_stays_empty():
    import flashinfer

    q = torch.randn(5, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    nothing = torch.zeros_like(q), torch.full((5, 8), -torch.inf, device=DEVICE)
    something = q, torch.zeros(5, 8, device=DEVICE)
    out, lse = flashinfer.merge_state(*nothing, *nothing)
    assert not out.any() and bool(lse.isneginf().all())
    for halves_ in ((*nothing, *something), (*something, *nothing)):
        out, lse = flashinfer.merge_state(*halves_)
        assert torch.equal(out, q) and not lse.any()


@pytest.mark.parametrize("backend", ["fa2", "auto"])
def test_a_million_keys_in_a_pool_whose_offsets_pass_32_bits(backend):
    tokens, rows, kv_heads, dim, pool = 1 << 20, 256, 8, 128, 2_200_000
    free, needed = torch.cuda.mem_get_info()[0], 5 * pool * kv_heads * dim
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, found {free >> 30}")
    chat = conversation(64, (4095, 16, 16), 192)
    assert chat.length == tokens and pool * kv_heads * dim > 1 << 31
    k, v = (torch.randn(pool, kv_heads, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(rows, 2 * kv_heads, dim, device=DEVICE, dtype=torch.bfloat16)
    slots = torch.randperm(pool, device=DEVICE)[:tokens]
    heads = [Grid("frame", True, True, True, 0, 128, 1024), AShape(128, 4096)] * kv_heads
    plan = BatchPlanner([RequestChunk(chat, tokens - rows, tokens, 0, slots)], rows).plan(heads)
    got = executed(flashinfer_paged.run, q, k, v, plan, backend=backend)
    expected = executed(torch_gather.run, q, k, v, plan)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def test_float32_is_refused():
    q = torch.zeros(3, 8, 128, device=DEVICE)
    with pytest.raises(ValueError, match="flashinfer executor: q: expected one of the dtypes"):
        executed(flashinfer_paged.run, q, q, q, None)
