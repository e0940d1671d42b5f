"""The two ways of scanning keys, for a CPU and for another device, against scores that are written out."""

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
