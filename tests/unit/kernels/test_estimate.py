"""The estimate of vertical_slash: masses of columns and diagonals, and which key tiles the chosen diagonals cross."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mminfer.kernels.triton import estimate
from sglang_mminfer.patterns import vertical_slash
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import INTERPRETED, conversation, examples


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written_out(q, k, heads, frontier, scale):
    """MInference algorithm 1, one row and one key at a time."""
    group, num_keys = q.shape[1] // k.shape[1], len(k)
    columns, diagonals = torch.zeros(2, len(heads), num_keys, dtype=torch.float64)
    for h, head in enumerate(heads):
        for i, visible in enumerate(frontier):
            weights = torch.softmax(k[:visible, head // group].double() @ q[i, head].double() * scale, dim=0)
            for key, weight in enumerate(weights):
                columns[h, key] += weight
                diagonals[h, visible - 1 - key] += weight
    return columns, diagonals


@st.composite
def inputs(draw):
    group, kv_heads = draw(st.sampled_from([(1, 1), (3, 2), (2, 2)]))
    heads = draw(st.lists(st.integers(0, group * kv_heads - 1), min_size=1, unique=True).map(sorted))
    rows, before = draw(st.integers(1, 64)), draw(st.integers(0, 150))
    seed, dim = draw(st.integers(0, 99)), draw(st.sampled_from([8, 16, 24]))
    q, k = randn(rows, group * kv_heads, dim, seed=seed), randn(rows + before, kv_heads, dim, seed=seed + 1)
    return q, k, heads, list(range(before + 1, before + rows + 1))


@settings(max_examples=examples(40))
@given(inputs())
def test_masses_are_the_sums_over_the_last_queries(case):
    q, k, heads, frontier = case
    got = vertical_slash.masses_of(q, k, heads, torch.tensor(frontier) - 1, frontier, 0.4)
    for ours, expected in zip(got, written_out(q, k, heads, frontier, 0.4)):
        torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="the GPU kernel: in Triton's interpreter (make test-interpreted)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@settings(max_examples=examples(120))
@given(case=inputs(), programs=st.sampled_from([1, 4, 1024]), seed=st.integers(0, 9))
def test_the_triton_kernels_sum_the_same_over_a_scattered_cache(dtype, case, programs, seed):
    q, k, heads, frontier = case
    q, k = q.to(dtype), k.to(dtype)
    slots = torch.randperm(len(k) + 40, generator=torch.Generator().manual_seed(seed))[: len(k)]
    pool = torch.full((len(k) + 40, *k.shape[1:]), torch.nan, dtype=dtype)
    pool[slots] = k
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "PROGRAMS", programs)  # how the keys are split into parts
        head_ids = torch.tensor(heads, dtype=torch.int32)
        got = estimate.estimate(q, pool, slots.int(), head_ids, frontier[0], 0.4)
    expected = vertical_slash.masses_of(q.float(), k.float(), heads, torch.tensor(frontier) - 1, frontier, 0.4)
    torch.testing.assert_close(got, expected, rtol=1e-4 if dtype is torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="the GPU kernel: in Triton's interpreter (make test-interpreted)")
def test_the_triton_estimate_refuses_more_rows_than_a_tile_has():
    q, k = randn(65, 1, 8, seed=0), randn(65, 1, 8, seed=1)
    with pytest.raises(ValueError, match="q: expected at most 64 rows, got 65"):
        estimate.estimate(q, k, torch.arange(65).int(), torch.zeros(1, dtype=torch.int32), 1, 1.0)


@settings(max_examples=examples(100))
@given(st.data(), st.sampled_from([1, 4, 8]))
def test_diagonals_cross_what_they_cross(data, block_k):
    """Both forms, ranges and single tiles, against every (row, diagonal) by itself."""
    near = data.draw(st.integers(1, 60))
    far = near + data.draw(st.integers(0, 12))
    distances = data.draw(st.lists(st.integers(0, 80), min_size=1, max_size=12, unique=True).map(sorted))
    tiles = -(-far // block_k)
    below = data.draw(st.integers(0, tiles))
    # The existing keys that a diagonal crosses between the tile's first row and its last row.
    crossed = {
        key // block_k
        for d in distances
        for key in range(max(0, (near - 1 - d) // block_k * block_k), far - d)
        if far - 1 - d >= 0
    }
    diagonals = vertical_slash.Diagonals(torch.tensor([distances]), torch.tensor([near]), torch.tensor([far]), block_k)
    start, count = (x[0, 0].tolist() for x in diagonals.ranges(torch.tensor([below])))
    listed = [block for first, n in zip(start, count) for block in range(first, first + n)]
    assert listed == sorted(block for block in crossed if block < below), "ranges ascend and do not overlap"
    answers = diagonals.cross(torch.arange(tiles)[None, None])[0, 0].tolist()
    assert [block for block, yes in enumerate(answers) if yes] == sorted(crossed)


@pytest.mark.skipif(not INTERPRETED, reason="the GPU kernel: in Triton's interpreter (make test-interpreted)")
def test_the_triton_estimate_of_a_few_heads_at_a_time_picks_the_same(monkeypatch):
    """A million keys have masses of half a gigabyte if all heads are estimated at once."""
    rows, tokens, heads = 40, 300, 6
    q, k = randn(rows, heads, 16, seed=0), randn(tokens, 2, 16, seed=1)
    chunk = RequestChunk(conversation(tokens), tokens - rows, tokens, 0, torch.arange(tokens))

    def planned():
        return BatchPlanner([chunk], rows, block_k=16).plan([vertical_slash.VerticalSlash(20, 30)] * heads, q, k, 0.4)

    calls, masses = [], estimate.estimate
    monkeypatch.setattr(estimate, "estimate", lambda *arguments: calls.append(len(arguments[3])) or masses(*arguments))
    at_once = planned()
    monkeypatch.setattr(vertical_slash, "MASS_BYTES", 2 * 8 * tokens)
    a_few = planned()
    assert calls == [6, 2, 2, 2]
    for name in ("block_indptr", "num_full", "num_gathered", "excluded_lanes"):
        assert torch.equal(getattr(at_once, name), getattr(a_few, name)), name
    assert torch.equal(at_once.visited_by_row, a_few.visited_by_row)
