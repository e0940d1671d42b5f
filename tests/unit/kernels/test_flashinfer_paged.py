"""The FlashInfer executor without a GPU: what its arguments mean, read literally, and what it refuses.

The tests replace FlashInfer's kernels by their documented meaning in float64. The rest of FlashInfer's wrapper is real.
"""

import inspect
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raw_plans import SLOTS, counted_slots, raw_plans
from sglang_mminfer import AShape, Grid, Modality, QBoundary, VerticalSlash
from sglang_mminfer.kernels import flashinfer_paged, reference, torch_gather
from sglang_mminfer.kernels.block_plan import BlockPlan, KeyTable, nothing, pack_lanes
from sglang_mminfer.kernels.flashinfer_paged import KeyPages, PagedVisits, paged_visits
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import conversation, halves

CHAT = conversation(20, (6, 4, 5), 30, (1, 4, 5), 40)  # 230 tokens
HEADS = [
    AShape(16, 40),
    Grid("frame", True, True, True, 3, 8, 24),
    VerticalSlash(20, 30),
    QBoundary({Modality.VIDEO: Grid("row", False, True, True, 1, 8, 8), Modality.TEXT: AShape(4, 50)}),
]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in modules that FlashInfer imports
LAYOUTS = ("contiguous", "packed", "by head", "padded")
KNOWN_VERSION = "0.7.2"  # its wrapper passes arguments to its kernels in the order of `Kernels.paged_run`


def installed() -> str:
    try:
        return version("flashinfer-python")
    except PackageNotFoundError:
        return "none"


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def caches(layout: str, slots: int, heads: int, dim: int, seed: int = 0, dtype=torch.float32) -> list[torch.Tensor]:
    """k and v [slots, heads, dim] with equal strides, laid out as caches. All memory around them is NaN."""
    shape = {
        "contiguous": (slots, heads, dim),
        "packed": (slots, 2, heads, dim),
        "by head": (heads, slots, dim),
        "padded": (slots, heads + 1, dim + 8),
    }[layout]
    if layout == "packed":
        both = torch.full(shape, torch.nan, dtype=dtype)
        out = [both[:, 0], both[:, 1]]
    else:
        out = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
        if layout == "by head":
            out = [cache.transpose(0, 1) for cache in out]
        elif layout == "padded":
            out = [cache[:, :heads, :dim] for cache in out]
    for i, cache in enumerate(out):
        cache.copy_(randn(slots, heads, dim, seed=seed + i))
    return out


# ---- FlashInfer's meaning, word by word ---------------------------------------------------------------------


def attention_of_requests(q, k_pages, v_pages, qo_indptr, kv_indptr, kv_indices, last_page_len, masks, scale):
    """q [rows, 1, D] over pages [pages, 1, 1, D]: float64 [rows, 1, D] and the base-2 LSE [rows, 1].

    `masks` yields bool [rows, keys] of each request; None: all keys.
    """
    out = torch.full(q.shape, torch.nan, dtype=torch.float64)
    lse = torch.full(q.shape[:2], torch.nan, dtype=torch.float64)
    for i in range(len(qo_indptr) - 1):
        rows, pages = slice(*qo_indptr[i : i + 2].tolist()), kv_indices[kv_indptr[i] : kv_indptr[i + 1]].long()
        assert last_page_len[i] == 1 and rows.stop > rows.start and len(pages)
        k, v = k_pages[pages, 0, 0], v_pages[pages, 0, 0]
        mask = torch.ones(rows.stop - rows.start, len(pages), dtype=torch.bool) if masks is None else masks[i]
        assert bool(mask.any(dim=1).all()), "a row without a key"
        o, s = reference.masked_attention(q[rows, 0], k, v, mask, scale)
        out[rows, 0], lse[rows, 0] = o, s
    return out, lse


def masks_of(visits: PagedVisits) -> list[torch.Tensor] | None:
    """The flat mask, cut into [rows, keys] of each request as in FlashInfer's mask layout."""
    flat = visits.custom_mask()
    if flat is None:
        return None
    shapes = list(zip(visits.qo_indptr.diff().tolist(), visits.kv_indptr.diff().tolist()))
    assert flat.dtype == torch.bool and len(flat) == sum(m * n for m, n in shapes)
    return [part.view(shape) for part, shape in zip(flat.split([m * n for m, n in shapes]), shapes)]


def executed(q, k, v, plan: BlockPlan, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE that the arguments of all batches of a plan mean, in float64."""
    pages = KeyPages.of(k, v)
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    rows_out, rows_lse = out.view(-1, q.shape[2]), lse.view(-1)
    for block_plan in plan.passes:
        for visits in paged_visits(block_plan, q.shape[1], k.shape[1], pages.per_slot, pages.per_head):
            for part in visits.cut():
                check_batch(part)
                index = part.q_index
                arrays = (part.qo_indptr, part.kv_indptr, part.kv_indices, part.last_page_len, masks_of(part))
                o, s = attention_of_requests(q.view(-1, 1, q.shape[2])[index], pages.k, pages.v, *arrays, scale)
                joined = torch_gather.merge_state(rows_out[index], rows_lse[index], o[:, 0], s[:, 0])
                rows_out[index], rows_lse[index] = joined
    return out, lse


def check_batch(visits: PagedVisits) -> None:
    for name in ("qo_indptr", "kv_indptr", "kv_indices", "last_page_len"):
        assert getattr(visits, name).dtype == torch.int32, name
    assert visits.qo_indptr[0] == visits.kv_indptr[0] == 0
    assert int(visits.qo_indptr[-1]) == len(visits.q_index) and int(visits.kv_indptr[-1]) == len(visits.kv_indices)
    assert len(visits.q_index.unique()) == len(visits.q_index), "a row of q is there twice"


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@settings(max_examples=60)
@given(plan=raw_plans(), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99))
def test_the_arguments_mean_what_the_plan_says(num_kv_heads, plan, layout, seed):
    q = randn(plan.num_rows, 4, 8, seed=seed)
    k, v = caches(layout, SLOTS, num_kv_heads, 8, seed + 1)
    out, lse = executed(q, k, v, plan, 0.4)
    for row in range(plan.num_rows):
        for head in range(4):
            slots, kv = counted_slots(plan, row, head), head // (4 // num_kv_heads)
            everything = torch.ones(1, len(slots), dtype=torch.bool)
            expected = reference.masked_attention(q[row, head][None], k[slots, kv], v[slots, kv], everything, 0.4)
            torch.testing.assert_close(out[row, head], expected[0][0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(lse[row, head], expected[1][0], rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(
    plan=raw_plans(), most=st.sampled_from(["MAX_REQUESTS", "MAX_ROWS", "MAX_MASK_AT_ONCE"]), limit=st.integers(1, 9)
)
def test_batches_cut_in_several_mean_the_same(plan, most, limit):
    q, (k, v) = randn(plan.num_rows, 4, 8), caches("contiguous", SLOTS, 2, 8)
    whole = executed(q, k, v, plan, 0.4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer_paged, most, limit)
        torch.testing.assert_close(executed(q, k, v, plan, 0.4), whole, rtol=1e-9, atol=1e-9)
        for block_plan in plan.passes:
            for visits in paged_visits(block_plan, 4, 2, 2, 1):
                parts = list(visits.cut())
                assert sum(part.num_requests for part in parts) == visits.num_requests
                for part in parts:
                    mask = part.custom_mask()
                    sizes = {
                        "MAX_REQUESTS": part.num_requests,
                        "MAX_ROWS": len(part.q_index),
                        "MAX_MASK_AT_ONCE": 0 if mask is None else len(mask),
                    }
                    assert part.num_requests == 1 or sizes[most] <= limit


@settings(max_examples=40)
@given(plan=raw_plans(), seed=st.integers(0, 99))
def test_halves_of_a_plan_join_to_the_whole(plan, seed):
    q, k, v = randn(plan.num_rows, 4, 8), randn(SLOTS, 2, 8, seed=1), randn(SLOTS, 2, 8, seed=2)
    parts = []
    for part in (plan, *halves(plan, seed)):
        parts.append((torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)))
        torch_gather.run(q, k, v, part, 0.4, *parts[-1])
    whole, *rest = parts
    torch.testing.assert_close(torch_gather.merge_state(*rest[0], *rest[1]), whole, rtol=2e-5, atol=2e-6)


def real_plan(q, k, scale: float) -> BlockPlan:
    n = CHAT.length
    chunk = RequestChunk(CHAT, n - len(q), n, 0, torch.randperm(n, generator=torch.Generator().manual_seed(3)))
    return BatchPlanner([chunk], len(q), block_q=32, block_k=16).plan(HEADS, q, k, scale)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", [230, 75])
def test_the_arguments_of_real_patterns_mean_what_the_oracle_computes(rows, num_kv_heads):
    q, (k, v) = randn(rows, 4, 8), caches("contiguous", CHAT.length, num_kv_heads, 8, 1)
    plan = real_plan(q, k, 0.3)
    expected, expected_lse = torch.empty(q.shape).double(), torch.empty(q.shape[:2]).double()
    reference.run(q, k, v, plan, 0.3, expected, expected_lse)
    out, lse = executed(q, k, v, plan, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)


# ---- through FlashInfer's own wrapper -----------------------------------------------------------------------

needs_flashinfer = pytest.mark.skipif(installed() == "none", reason="FlashInfer is not installed")
needs_known_flashinfer = pytest.mark.skipif(
    installed() != KNOWN_VERSION, reason=f"written for FlashInfer {KNOWN_VERSION}, found {installed()}"
)


@needs_flashinfer
def test_flashinfer_takes_what_it_is_given():
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    calls = []

    class Recorder:
        def __init__(self, *args, **kwargs):
            inspect.signature(wrapper.__init__).bind(self, *args, **kwargs)

        def plan(self, *args, **kwargs):
            calls.append(inspect.signature(wrapper.plan).bind(self, *args, **kwargs).arguments)

        def run(self, *args, **kwargs):
            bound = inspect.signature(wrapper.run).bind(self, *args, **kwargs)
            bound.apply_defaults()
            calls.append(bound.arguments)
            q = bound.arguments["q"]
            return torch.zeros_like(q), torch.zeros(q.shape[:2])

    q, (k, v) = randn(32, 4, 64).half(), caches("contiguous", CHAT.length, 2, 64, dtype=torch.float16)
    plan, out = real_plan(q, k, 0.125), torch.empty_like(q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper", Recorder)
        patch.setattr(flashinfer, "merge_state", lambda o, s, *_: (o, s))
        patch.setattr(flashinfer_paged, "kernel_of", lambda *_: "fa2")
        flashinfer_paged.run(q, k, v, plan, 0.125, out, torch.empty(q.shape[:2]))
    planned, runs = [c for c in calls if "page_size" in c], [c for c in calls if "q" in c]
    assert len(planned) == len(runs) >= 2
    for arguments in planned:
        assert (arguments["page_size"], arguments["num_qo_heads"], arguments["num_kv_heads"]) == (1, 1, 1)
        assert arguments["causal"] is False and arguments["sm_scale"] == 0.125
    for arguments in runs:
        assert (arguments["lse_base"], arguments["lse_layout"], arguments["return_lse"]) == ("log2", "NH", True)
    merged = list(inspect.signature(flashinfer.merge_state).parameters)
    assert merged[:4] == ["v_a", "s_a", "v_b", "s_b"]


class Kernels:
    """A stand-in for FlashInfer's compiled prefill module: what its kernels mean, on the arrays of the wrapper."""

    def __init__(self, backend: str, log: list) -> None:
        self.backend, self.log = backend, log

    def plan(self, *arguments):
        self.log.append(("plan", self.backend))
        return [0]

    def paged_run(self, *arguments):
        _, _, _, q, k, v, qo_indptr, kv_indptr, kv_indices, last_page_len, out, lse, mode, layout = arguments[:14]
        packed, mask_indptr, sm_scale = arguments[16], arguments[17], arguments[23]
        assert layout == 0 and arguments[14] == -1 and arguments[22] == 0  # NHD, no window, no soft cap
        masks = None
        if mode == 2:  # custom
            assert self.backend == "fa2" and packed.dtype == torch.uint8
            masks = []
            for i in range(len(qo_indptr) - 1):
                shape = (int(qo_indptr[i + 1] - qo_indptr[i]), int(kv_indptr[i + 1] - kv_indptr[i]))
                begin, bits = int(mask_indptr[i]), torch.arange(shape[0] * shape[1])
                masks.append((packed[begin + bits // 8] >> (bits % 8) & 1).bool().view(shape))
        else:
            assert mode == 0 and packed is None
        arrays = (qo_indptr, kv_indptr, kv_indices, last_page_len, masks)
        o, s = attention_of_requests(q, k, v, *arrays, sm_scale)
        out.copy_(o)
        lse.copy_(s)


def packed_segments(mask, indptr, bitorder):
    """segment_packbits: "for each segment the semantics of numpy.packbits"."""
    parts = [np.packbits(mask[a:b].numpy(), bitorder=bitorder) for a, b in zip(indptr.tolist(), indptr[1:].tolist())]
    ends = np.cumsum([0] + [len(part) for part in parts])
    return torch.from_numpy(np.concatenate(parts)), torch.tensor(ends, dtype=torch.int32)


def merged(v_a, s_a, v_b, s_b):
    """The meaning of flashinfer.merge_state: an output of v's dtype; one of the two states may be empty."""
    assert v_a.dtype == v_b.dtype and v_a.dim() == 3 and s_a.dim() == 2 and not bool(s_b.isneginf().any())
    most = torch.maximum(s_a, s_b).double()
    a, b = ((torch.exp2(s - most) / (torch.exp2(s_a - most) + torch.exp2(s_b - most)))[..., None] for s in (s_a, s_b))
    return (a * v_a + b * v_b).to(v_a.dtype), torch.logaddexp2(s_a, s_b)


@pytest.fixture
def kernels(monkeypatch):
    """The real wrapper on the CPU, with its compiled modules replaced. Yields the list of the calls that planned."""
    import flashinfer
    import flashinfer.prefill

    log, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more))
    monkeypatch.setattr(flashinfer.prefill, "get_batch_prefill_module", lambda backend, *_: Kernels(backend, log))
    monkeypatch.setattr(flashinfer.prefill, "segment_packbits", packed_segments)
    monkeypatch.setattr(flashinfer, "merge_state", merged)
    monkeypatch.setattr(flashinfer_paged, "WORKSPACE_BYTES", 1 << 10)
    monkeypatch.setattr(flashinfer_paged, "kernel_of", lambda *_: "fa3")
    return log


@needs_known_flashinfer
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("at_once", [1 << 27, 1000])
def test_the_executor_through_flashinfers_wrapper(kernels, monkeypatch, layout, num_kv_heads, at_once):
    monkeypatch.setattr(flashinfer_paged, "MAX_MASK_AT_ONCE", at_once)
    q, (k, v) = randn(90, 4, 64).half(), caches(layout, CHAT.length, num_kv_heads, 64, 1, torch.float16)
    plan = real_plan(q, k, 0.125)
    expected, expected_lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    reference.run(q, k, v, plan, 0.125, expected, expected_lse)
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
    flashinfer_paged.run(q, k, v, plan, 0.125, out, lse)
    torch.testing.assert_close(out.float(), expected, rtol=3e-3, atol=3e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)

    planned = len(kernels)
    again, lse_again = torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)
    flashinfer_paged.run(q, k, v, plan, 0.125, again, lse_again)
    assert len(kernels) == planned, "another layer planned again"
    assert torch.equal(again, out) and torch.equal(lse_again, lse)
    flashinfer_paged.run(q, k, v, plan, 0.25, again, lse_again)
    assert len(kernels) == 2 * planned, "another scale did not plan again"
    assert {backend for _, backend in kernels} == {"fa2", "fa3"}


@needs_known_flashinfer
def test_rows_that_no_pass_visits_are_written_too(kernels):
    q, (k, v) = randn(3, 4, 64).half(), caches("contiguous", 5, 2, 64, dtype=torch.float16)
    for plan in (nothing(3, 4, 1, 4, torch.device("cpu")), tiny_plan(q_stop=[0], num_rows=3)):
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        flashinfer_paged.run(q, k, v, plan, 0.125, out, lse)
        assert not out.any() and bool(lse.isneginf().all())
    assert not kernels


# ---- what it refuses ----------------------------------------------------------------------------------------


def tiny_plan(**changes) -> BlockPlan:
    """One tile of row 1 over four keys, of which the third is excluded, so that no row is right by chance."""
    fields = {
        "keys": KeyTable(torch.arange(4).int(), torch.arange(4).int()),
        "q_rows": [1],
        "q_stop": [4],
        "q_indptr": [0, 1],
        "q_heads": [0],
        "block_indptr": [0, 1],
        "block_indices": [0],
        "num_full": [0],
        "num_gathered": [1],
        "excluded_lanes": pack_lanes(torch.tensor([[False, False, True, False]])),
        "head_groups": ((0, 1, 2, 3),),
        "num_rows": 2,
        "num_heads": 4,
        "block_q": 1,
        "block_k": 4,
        **changes,
    }
    ints = {name: torch.tensor(x, dtype=torch.int32) for name, x in fields.items() if isinstance(x, list)}
    return BlockPlan(**{**fields, **ints})


def test_a_key_that_all_rows_see_needs_no_mask():
    shared, masked = paged_visits(tiny_plan(), 4, 2, 2, 1)
    assert masked.num_requests == 0 and shared.custom_mask() is None
    assert shared.q_index.tolist() == [4, 5, 6, 7] and shared.qo_indptr.tolist() == [0, 2, 4]
    assert shared.kv_indices.tolist() == [0, 2, 6, 1, 3, 7] and shared.kv_indptr.tolist() == [0, 3, 6]


def test_rows_that_see_no_masked_key_are_not_asked():
    shared, masked = paged_visits(
        tiny_plan(q_rows=[0, 1, 2], q_stop=[1, 4, 2], q_indptr=[0, 3], head_groups=((3,),)), 4, 2, 2, 1
    )
    assert shared.kv_indices.tolist() == [1] and shared.q_index.tolist() == [3, 7, 11]
    assert masked.kv_indices.tolist() == [3, 7] and masked.q_index.tolist() == [7, 11]
    assert masked.custom_mask().view(2, 2).tolist() == [[True, True], [True, False]]


def run_with(monkeypatch, q, k, v, plan=None, **more):
    monkeypatch.setattr(flashinfer_paged, "kernel_of", more.pop("kernel_of", lambda *_: "fa2"))
    plan = replace(plan or tiny_plan(), num_rows=len(q))
    flashinfer_paged.run(q, k, v, plan, 1.0, torch.empty_like(q), torch.empty(q.shape[:2]), **more)


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float16)


REFUSED = {
    "float32": (
        torch.zeros(3, 4, 64),
        half(5, 2, 64),
        half(5, 2, 64),
        "q: .*float16, torch.bfloat16, got torch.float32",
    ),
    "mixed": (
        half(3, 4, 64),
        half(5, 2, 64).bfloat16(),
        half(5, 2, 64),
        "k_cache: .*float16 of q, or both of one fp8 dtype, got torch.bfloat16",
    ),
    "head dim": (half(3, 4, 96), half(5, 2, 96), half(5, 2, 96), r"q: .*head dims \(64, 128, 256\), got 96"),
    "shapes": (half(3, 4, 64), half(5, 2, 64), half(6, 2, 64), r"v_cache: .*shape \(5, 2, 64\).*got \(6, 2, 64\)"),
    "strides": (
        half(3, 4, 64),
        half(5, 2, 64),
        half(2, 5, 64).transpose(0, 1),
        r"v_cache: .*strides \(128, 64, 1\) of k, got \(64, 320, 1\)",
    ),
    "columns": (
        half(3, 4, 64),
        half(5, 64, 2).transpose(1, 2),
        half(5, 64, 2).transpose(1, 2),
        "k_cache: .*last stride of 1",
    ),
    "alignment": (half(3, 4, 64), half(5, 2, 68)[..., :64], half(5, 2, 68)[..., :64], "k_cache: .*every 16 bytes"),
    "beginning": (
        half(3, 4, 64),
        half(5, 2, 64),
        half(5 * 128 + 4)[4:].view(5, 2, 64),
        "v_cache: .*multiple of 16 bytes, got 8 beyond",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_flashinfer_cannot_express_is_refused_by_name(monkeypatch, case):
    q, k, v, message = REFUSED[case]
    with pytest.raises(ValueError, match="flashinfer executor: " + message):
        run_with(monkeypatch, q, k, v)


def test_more_keys_than_32_bits_number_are_refused():
    many = torch.empty(1 << 30, 2, 64, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match=r"k_cache: .*at most 2147483647 \(slot, KV head\) pairs.*got 2147483648"):
        KeyPages.of(many, many)
    assert len(KeyPages.of(many[1:], many[1:]).k) == 2 * ((1 << 30) - 1)


def test_an_index_or_mask_beyond_the_limits_is_refused(monkeypatch):
    q, k = half(3, 4, 64), half(5, 2, 64)
    monkeypatch.setattr(flashinfer_paged, "MAX_INDEX", 7)
    with pytest.raises(ValueError, match=r"plan: expected at most 7 visited keys .*, got 8"):
        run_with(monkeypatch, q, k, k)
    monkeypatch.setattr(flashinfer_paged, "MAX_INDEX", 1 << 28)
    monkeypatch.setattr(flashinfer_paged, "MAX_MASK", 15)
    several = tiny_plan(q_rows=[0, 1], q_stop=[1, 4], q_indptr=[0, 2])
    _, masked = paged_visits(several, 4, 2, 2, 1)
    assert len(masked.custom_mask()) == 8
    monkeypatch.setattr(flashinfer_paged, "MAX_MASK", 7)
    with pytest.raises(ValueError, match=r"plan: expected at most 7 \(row, key\) pairs under a mask .*, got 8"):
        list(masked.cut())


def test_backends_are_checked(monkeypatch):
    kernel_of, card = flashinfer_paged.kernel_of, torch.device("cuda", 0)
    q, k = half(3, 4, 64), half(5, 2, 64)
    with pytest.raises(ValueError, match="q: expected a tensor on a GPU, got cpu"):
        run_with(monkeypatch, q, k, k, kernel_of=kernel_of)
    with pytest.raises(ValueError, match="backend: expected one of auto, fa2, fa3, got 'fa4'"):
        run_with(monkeypatch, q, k, k, kernel_of=kernel_of, backend="fa4")
    chosen = {}
    for capability in ((8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        chosen[capability] = [kernel_of(backend, card) for backend in ("auto", "fa2")]
    assert chosen == {(8, 0): ["fa2", "fa2"], (9, 0): ["fa3", "fa2"], (10, 0): ["fa2", "fa2"]}
    with pytest.raises(
        ValueError, match=r"backend: expected fa2 or auto on a card that is no Hopper.*got 'fa3' on 10.0"
    ):
        kernel_of("fa3", card)
