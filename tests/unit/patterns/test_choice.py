"""The two ways of choosing keys and of packing them, for a CPU and for another device, against what is written out."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mminfer.patterns import choice


@settings(max_examples=60)
@given(
    heads=st.integers(1, 3),
    rows=st.integers(1, 9),
    dimensions=st.sampled_from([8, 16, 24]),
    keys=st.integers(1, 700),
    ends=st.sets(st.integers(0, 699), min_size=2, max_size=2),
    slab=st.sampled_from([1, 64, 1 << 18]),
    seed=st.integers(0, 99),
)
def test_a_key_is_asked_for_if_any_row_scores_it_above_its_bound(heads, rows, dimensions, keys, ends, slab, seed):
    random = torch.Generator().manual_seed(seed)
    low, queries = (
        torch.randn(dimensions, keys, generator=random),
        torch.randn(heads, rows, dimensions, generator=random),
    )
    bound = 2 + 2 * torch.rand(heads, rows, generator=random) * dimensions**0.5
    key, stop = (end * keys // 700 for end in sorted(ends))
    stop = max(stop, key + 1)
    above = (queries.double() @ low.double() - bound[..., None].double()).amax(dim=1)[:, key:stop]
    decided = above.abs() > 1e-4  # nearer ones may fall out either way
    for scan in (choice.scan_on_host, choice.scan_on_device):
        saved, choice.SLAB = choice.SLAB, slab
        try:
            asked = scan(low, queries, bound, key, stop)
        finally:
            choice.SLAB = saved
        assert torch.equal(asked[decided], (above > 0)[decided])


@settings(max_examples=60)
@given(
    heads=st.integers(1, 3),
    rows=st.integers(1, 70),
    sink=st.integers(0, 5),
    before=st.integers(0, 20),
    local=st.integers(1, 30),
    size=st.sampled_from([0.0, 1.0, 30.0, 3000.0]),
    seed=st.integers(0, 99),
)
def test_the_mass_of_sink_and_window_whatever_the_size_of_scores(heads, rows, sink, before, local, size, seed):
    random = torch.Generator().manual_seed(seed)
    q, keys = size * torch.randn(heads, rows, 8, generator=random), torch.randn(before + rows, 8, generator=random)
    sink_keys, keys_of_row = torch.randn(sink, 8, generator=random), torch.arange(before + 1, before + rows + 1)
    in_window = (torch.arange(len(keys)) < keys_of_row[:, None]) & (
        torch.arange(len(keys)) >= keys_of_row[:, None] - local
    )
    seen = torch.cat([torch.ones(rows, sink, dtype=torch.bool), in_window], dim=1)
    scores = q.double() @ torch.cat([sink_keys, keys]).double().T
    expected = scores.masked_fill(~seen, -torch.inf).logsumexp(dim=2)
    for log_mass in (choice.log_mass_on_host, choice.log_mass_on_device):
        mass = log_mass(q, sink_keys, keys, local, keys_of_row.int())
        torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60)
@given(
    heads=st.integers(1, 3),
    tiles=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_chosen_keys_of_a_query_tile_stand_side_by_side(heads, tiles, share, seed):
    block, draw = 8, np.random.default_rng(seed)
    between = choice.Between(*(np.array(column) for column in zip(*tiles)), block)
    chosen = torch.from_numpy(draw.random((heads, int(between.num_keys.sum()))) < share)
    parts = [part.nonzero().flatten() for row in chosen for part in row.split(between.num_keys.tolist())]
    count = torch.tensor([len(part) for part in parts]).view(heads, -1)
    count[torch.from_numpy(draw.random(count.shape) < 0.3)] = 0  # they asked for too much
    key_tiles = -(-count.flatten() // block)
    first = (key_tiles.cumsum(0) - key_tiles).view(heads, -1)
    expected = torch.full((int(key_tiles.sum()) * block + 1,), -1)
    for part, number, tile, own in zip(parts, count.flatten(), first.flatten(), between.first.tolist() * heads):
        if number:
            expected[tile * block : tile * block + number] = part + own * block
    on_host, on_device = torch.full_like(expected, -1), torch.full_like(expected, -1)
    choice.pack_on_host(chosen, count, first, between, on_host)
    choice.pack_on_device(chosen, count, first, between, on_device, int(between.num_keys.sum()))
    assert on_host.tolist() == on_device.tolist() == expected.tolist()
