"""What a search tells a pattern of the prompt that it calibrates on, so that the pattern can say what to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Stride = Literal["frame", "row"]

STRIDES: tuple[Stride, ...] = ("frame", "row")
WINDOWS = (64, 256, 1024, 4096)
SINK = 64
RANKS = (8, 16)


@dataclass(frozen=True)
class Prompt:
    """tokens: its length. strides: those that give some of its vision tokens a cell. phases: the cells that one head's
    attention suggests, by stride, best first. ranks: of low-rank forms of q . k; none if the model has no basis."""

    tokens: int
    strides: tuple[Stride, ...]
    phases: Mapping[str, Sequence[int]]
    ranks: tuple[int, ...] = ()

    @property
    def windows(self) -> tuple[int, ...]:
        """Sizes of local windows, ascending: at most half of the prompt."""
        return tuple(size for size in WINDOWS if 2 * size <= self.tokens) or WINDOWS[:1]

    def phase(self, stride: str, rank: int) -> int:
        """The head's best phase (rank 0), its second, ...; its last where it has fewer."""
        known = self.phases.get(stride) or [0]
        return known[min(rank, len(known) - 1)]
