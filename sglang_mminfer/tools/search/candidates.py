"""What the search tries for every head: the ladders of all patterns, and those of the 2D-Boundary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.base import Pattern, kinds
from sglang_mminfer.patterns.boundary import Boundary2D
from sglang_mminfer.patterns.ladder import STRIDES, Prompt

DENSE = "dense"  # the first candidate's name

# For one head: the phases that its attention suggests, by stride.
Phases = dict[str, list[int]]


def candidates(
    modality_map: ModalityMap, phases: Sequence[Sequence[Phases]], ranks: tuple[int, ...] = ()
) -> Iterator[tuple[str, list[list]]]:
    """(name, [layers][heads] patterns); the first is dense.

    Args:
        phases: [layers][heads]. ranks: see `Prompt`.
    """
    grids = [segment.grid for segment in modality_map.segments if segment.grid is not None]
    strides = tuple(stride for stride in STRIDES if any(grid.has_cells(stride) for grid in grids))
    prompts = [[Prompt(modality_map.length, strides, own, ranks) for own in row] for row in phases]
    everything: tuple[type[Pattern] | type[Boundary2D], ...] = (*kinds().values(), Boundary2D)
    for tried in everything:
        ladders = [[list(tried.ladder(prompt)) for prompt in row] for row in prompts]
        for rung, (name, _) in enumerate(ladders[0][0]):
            yield name, [[ladder[rung][1] for ladder in row] for row in ladders]
