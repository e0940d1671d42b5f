"""A key that a row does not visit is not in its result at all, and a key that it visits is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from support import EXECUTORS, Batch, alone, any_pattern, batches, cut_out, heads, maps, static, tile_sizes

backends = pytest.mark.parametrize("backend", EXECUTORS)


def visited_by(batch: Batch, wrapper, request: int, kv_head: int) -> torch.Tensor:
    """bool [q_len, kv_len]: visited by any query head over one KV head."""
    group = range(kv_head * batch.group, (kv_head + 1) * batch.group)
    return torch.stack([wrapper.visited_mask(request, h) for h in group]).any(0)


def changed(tensors: list[torch.Tensor], request: int, positions: torch.Tensor, kv_head: int, value: float):
    """The same K or V with `value` at some positions of one KV head."""
    out = [t.clone() for t in tensors]
    out[request][positions, kv_head] = value
    return out


@backends
@settings(max_examples=25)
@given(data=st.data())
def test_the_rows_that_a_value_reaches_are_the_rows_that_visit_it(backend, data):
    batch = data.draw(batches(any_pattern, max_requests=2, max_length=60))
    request = data.draw(st.integers(0, len(batch.maps) - 1))
    assume(batch.q_lens[request])
    wrapper = batch.planned(backend)
    out, lse = batch.run(wrapper)
    kv_head = data.draw(st.integers(0, batch.num_kv_heads - 1))
    for position in data.draw(st.sets(st.integers(0, batch.kv_lens[request] - 1), min_size=1, max_size=3)):
        other = replace(batch, vs=changed(batch.vs, request, torch.tensor([position]), kv_head, 1e4))
        out_other, lse_other = other.run(other.planned(backend))
        reached = (out_other != out).any(-1)
        expected = torch.zeros_like(reached)
        for h in range(kv_head * batch.group, (kv_head + 1) * batch.group):
            expected[batch.rows(request), h] = wrapper.visited_mask(request, h)[:, position]
        weight_is_lost = torch.zeros_like(reached)  # where the weight itself is too small for float32
        if batch.scale >= 1:
            weight_is_lost = expected & ~reached
        assert torch.equal(reached | weight_is_lost, expected)
        assert torch.equal(lse_other, lse)


@backends
@pytest.mark.parametrize("value", [1e30, 0.0])
@settings(max_examples=12)
@given(data=st.data())
def test_any_number_at_what_a_row_does_not_visit_leaves_its_bits(backend, value, data):
    batch = data.draw(batches(static, max_requests=2, max_length=60))
    request = data.draw(st.integers(0, len(batch.maps) - 1))
    assume(batch.q_lens[request])
    wrapper = batch.planned(backend)
    out, lse = batch.run(wrapper)
    kv_head = data.draw(st.integers(0, batch.num_kv_heads - 1))
    mine = slice(kv_head * batch.group, (kv_head + 1) * batch.group)
    visited = visited_by(batch, wrapper, request, kv_head)
    for row in data.draw(st.sets(st.integers(0, batch.q_lens[request] - 1), min_size=1, max_size=3)):
        others = (~visited[row]).nonzero().flatten()
        other = replace(
            batch,
            ks=changed(batch.ks, request, others, kv_head, value),
            vs=changed(batch.vs, request, others, kv_head, value),
        )
        out_other, lse_other = other.run(other.planned(backend))
        at = batch.rows(request).start + row
        assert torch.equal(out_other[at, mine], out[at, mine]) and torch.equal(lse_other[at, mine], lse[at, mine])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@settings(max_examples=15)
@given(data=st.data())
def test_nan_and_infinity_at_what_a_row_does_not_visit_leave_the_reference(value, data):
    """Row by row: the reference gathers what a row visits and nothing else."""
    chat, head = data.draw(maps(max_length=50)), data.draw(heads(static))
    batch = alone(chat, head, tiles=data.draw(tile_sizes))
    wrapper = batch.planned("reference")
    out, lse = batch.run(wrapper)
    row = data.draw(st.integers(0, chat.length - 1))
    others = (~wrapper.visited_mask(0, 0)[row]).nonzero().flatten()
    other = replace(batch, ks=changed(batch.ks, 0, others, 0, value), vs=changed(batch.vs, 0, others, 0, value))
    out_other, lse_other = other.run(other.planned("reference"))
    assert torch.equal(out_other[row], out[row]) and torch.equal(lse_other[row], lse[row])


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@settings(max_examples=15)
@given(data=st.data())
def test_nan_and_infinity_in_tiles_that_no_row_visits_leave_all_bits(backend, value, data):
    """A chunk whose rows visit few tiles: NaN in every key tile that none of them touches, and in another request."""
    whole = data.draw(batches(static, max_requests=1))
    n = whole.kv_lens[0]
    whole = replace(whole, q_lens=[n], qs=[], ks=[], vs=[])
    start = data.draw(st.integers(0, n - 1))
    batch = cut_out(whole, 0, start, n)
    wrapper = batch.planned(backend)
    out, lse = batch.run(wrapper)
    ks, vs = batch.ks, batch.vs
    for kv_head in range(batch.num_kv_heads):
        touched = visited_by(batch, wrapper, 0, kv_head).any(0)
        others = (~touched).nonzero().flatten()
        ks, vs = changed(ks, 0, others, kv_head, value), changed(vs, 0, others, kv_head, value)
    other = replace(batch, ks=ks, vs=vs)
    assert all(map(torch.equal, other.run(other.planned(backend)), (out, lse)))
    stranger = alone(batch.maps[0], batch.heads[0])
    both = replace(
        batch,
        maps=[*batch.maps, stranger.maps[0]],
        q_lens=[*batch.q_lens, n],
        kv_lens=[*batch.kv_lens, n],
        qs=[*other.qs, whole.qs[0]],
        ks=[*other.ks, torch.full_like(ks[0], value)],
        vs=[*other.vs, torch.full_like(vs[0], value)],
    )
    together = both.run(both.planned(backend))
    torch.testing.assert_close(together[0][both.rows(0)], out, rtol=2e-5, atol=5e-6)
    torch.testing.assert_close(together[1][both.rows(0)], lse, rtol=2e-5, atol=5e-6)


@settings(max_examples=15)
@given(maps(max_length=60), heads(static), tile_sizes, st.data())
def test_a_key_that_is_visited_moves_the_lse_and_one_that_is_not_does_not(chat, head, tiles, data):
    batch = alone(chat, head, tiles=tiles)
    visited = batch.planned().visited_mask(0, 0)
    position = data.draw(st.integers(0, chat.length - 1))
    q = [torch.full_like(batch.qs[0], 0.5)]
    zero, big = (replace(batch, qs=q, ks=changed(batch.ks, 0, torch.tensor([position]), 0, x)) for x in (0.0, 3.0))
    _, lse_zero = zero.run(zero.planned())
    _, lse_big = big.run(big.planned())
    assert torch.equal((lse_zero != lse_big)[:, 0], visited[:, position])
