"""Sets of positions as runs do what sets do."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_mminfer.modality.runs import Runs

LENGTH = 30


@st.composite
def runs(draw) -> Runs:
    """Disjoint and ascending; neighbours may touch."""
    ends = sorted(draw(st.lists(st.integers(0, LENGTH), max_size=12).map(lambda x: x[: len(x) // 2 * 2])))
    pairs = [(start, stop) for start, stop in zip(ends[::2], ends[1::2]) if start < stop]
    return Runs([start for start, _ in pairs], [stop for _, stop in pairs])


@given(runs(), runs())
def test_they_combine_as_sets_do(a: Runs, b: Runs):
    first, second = set(a.members().tolist()), set(b.members().tolist())
    for combined, expected in ((a & b, first & second), (a | b, first | second), (a - b, first - second)):
        assert combined.members().tolist() == sorted(expected)
        assert (combined.starts < combined.stops).all()
        assert (combined.stops[:-1] < combined.starts[1:]).all()  # neighbours that touch are one


@given(runs())
def test_ranks_and_members_are_each_others_inverse(a: Runs):
    members = a.members()
    assert a.rank(members).tolist() == list(range(len(a)))
    assert a.select(np.arange(len(a))).tolist() == members.tolist()
    assert a.has(np.arange(LENGTH)).nonzero()[0].tolist() == members.tolist()
