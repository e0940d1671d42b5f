"""Sets of token positions as runs: the cost of planning grows with the number of runs, not the number of tokens."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sglang_mminfer.kernels.compiled import compiled

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Runs:
    """A set of positions as half-open runs [starts[i], stops[i]), ascending, disjoint, none of them empty. int64."""

    def __init__(self, starts: ArrayLike, stops: ArrayLike) -> None:
        self.starts: Ints = np.asarray(starts, dtype=np.int64)
        self.stops: Ints = np.asarray(stops, dtype=np.int64)

    @classmethod
    def span(cls, start: int, stop: int) -> Runs:
        """The positions from `start` to `stop` - 1; empty if `start` >= `stop`."""
        return cls([start], [stop]) if start < stop else cls([], [])

    @classmethod
    def points(cls, positions: Ints) -> Runs:
        """The given positions, which ascend and are distinct, each in a run of its own."""
        return cls(positions, positions + 1)

    @cached_property
    def before(self) -> Ints:
        """int64 [runs + 1]: how many members lie before each run; the last value counts all members."""
        return np.concatenate([[0], np.cumsum(self.stops - self.starts)])

    def __len__(self) -> int:
        return int(self.before[-1])

    def rank(self, positions: ArrayLike) -> Ints:
        """int64, the shape of `positions`: how many members lie below each position."""
        positions = np.asarray(positions, dtype=np.int64)
        if not len(self.starts):
            return np.zeros_like(positions)
        run = np.searchsorted(self.starts, positions, side="right") - 1
        inside = np.minimum(positions, self.stops[run]) - self.starts[run]
        return np.where(run < 0, 0, self.before[run] + inside)

    def select(self, index: ArrayLike) -> Ints:
        """int64, the shape of `index`: the members with these ranks, counted from 0."""
        index = np.asarray(index, dtype=np.int64)
        run = np.searchsorted(self.before, index, side="right") - 1
        return self.starts[run] + index - self.before[run]

    def has(self, positions: Ints) -> Bools:
        """bool [positions]: which of the positions are members."""
        if not len(self.starts):
            return np.zeros(len(positions), dtype=np.bool_)
        run = np.searchsorted(self.starts, positions, side="right") - 1
        return (run >= 0) & (positions < self.stops[run])

    def members(self) -> Ints:
        """int64 [members]: all members, ascending."""
        return expand(self.starts, self.stops - self.starts)

    def clip(self, start: int, stop: int) -> Runs:
        """The members from `start` to `stop` - 1."""
        starts, stops = np.maximum(self.starts, start), np.minimum(self.stops, stop)
        nonempty = starts < stops
        return Runs(starts[nonempty], stops[nonempty])

    def __and__(self, other: Runs) -> Runs:
        return Runs(*_combined(self.starts, self.stops, other.starts, other.stops, False, False, True))

    def __or__(self, other: Runs) -> Runs:
        return Runs(*_combined(self.starts, self.stops, other.starts, other.stops, True, True, True))

    def __sub__(self, other: Runs) -> Runs:
        return Runs(*_combined(self.starts, self.stops, other.starts, other.stops, True, False, False))


@compiled
def _combined(
    starts: Ints, stops: Ints, other_starts: Ints, other_stops: Ints, in_first: bool, in_second: bool, in_both: bool
) -> tuple[Ints, Ints]:
    """Starts and stops of the positions that are in the first set only, in the second only, or in both, as asked for.

    Membership changes only at the ends of runs: it is decided at each end for all positions up to the next end.
    """
    out_starts = np.empty(len(starts) + len(other_starts), dtype=np.int64)
    out_stops = np.empty(len(starts) + len(other_starts), dtype=np.int64)
    n = i = j = 0  # i and j count ends, two for each run
    inside = False
    while i < 2 * len(starts) or j < 2 * len(other_starts):
        end = other_end = np.int64(np.iinfo(np.int64).max)
        if i < 2 * len(starts):
            end = stops[i // 2] if i % 2 else starts[i // 2]
        if j < 2 * len(other_starts):
            other_end = other_stops[j // 2] if j % 2 else other_starts[j // 2]
        position = min(end, other_end)
        i, j = i + (end == position), j + (other_end == position)
        if i < 2 * len(starts) and i % 2 == 0 and i > 0 and starts[i // 2] == position:
            i += 1  # the next run begins where this one stops
        if j < 2 * len(other_starts) and j % 2 == 0 and j > 0 and other_starts[j // 2] == position:
            j += 1
        wanted = (in_both if j % 2 else in_first) if i % 2 else (in_second if j % 2 else False)
        if wanted and not inside:
            out_starts[n] = position
        elif inside and not wanted:
            out_stops[n] = position
            n += 1
        inside = wanted
    return out_starts[:n].copy(), out_stops[:n].copy()


def expand(starts: Ints, counts: Ints) -> Ints:
    """The ranges from starts[i] to starts[i] + counts[i] - 1, one after another. int64 [sum of counts]."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total)
