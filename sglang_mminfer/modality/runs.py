"""Sets of token positions as runs: the cost of planning grows with the number of runs, not the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
        return self._combined(other, np.logical_and)

    def __or__(self, other: Runs) -> Runs:
        return self._combined(other, np.logical_or)

    def __sub__(self, other: Runs) -> Runs:
        return self._combined(other, np.greater)

    def _combined(self, other: Runs, keep: Callable[[Bools, Bools], Bools]) -> Runs:
        """The positions for which `keep`(is in self, is in other) holds.

        Membership changes only at the ends of runs, so `keep` decides at each end for all positions up to the next end.
        """
        ends = np.sort(np.concatenate([self.starts, self.stops, other.starts, other.stops]), kind="stable")
        is_member = keep(self.has(ends), other.has(ends))
        starts = is_member & ~np.concatenate([[False], is_member[:-1]])
        stops = ~is_member & np.concatenate([[False], is_member[:-1]])
        return Runs(ends[starts], ends[stops])


def expand(starts: Ints, counts: Ints) -> Ints:
    """The ranges from starts[i] to starts[i] + counts[i] - 1, one after another. int64 [sum of counts]."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total)
