"""What the search tries for every head: the paper's space (MMInference table 4) and ladders of sizes around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.spec import (
    AShape,
    Boundary2D,
    Dense,
    Grid,
    HeadPattern,
    TriShape,
    VerticalSlash,
)

DENSE = "dense"  # the first candidate's name
TEXT, VIDEO, VISION = Modality.TEXT, Modality.VIDEO, Modality.VISION
LOCALS = (64, 256, 1024, 4096)
PAPER_VERTICAL_SLASH = ((1000, 1024), (1000, 2048), (1000, 6096), (3500, 100))
VERTICAL_SLASH = ((64, 64), (256, 64), (64, 256), (256, 256), (1000, 100), (100, 800), (500, 700))
LINES = {"v": (True, False, False), "h": (False, True, False), "s": (False, False, True)}
COMBINATIONS = ("v", "h", "s", "vh", "vs", "vhs")

# For one head: the phases that its attention suggests, by stride.
Phases = dict[str, list[int]]
Stride = Literal["frame", "row"]


def candidates(modality_map: ModalityMap, phases: Sequence[Sequence[Phases]]) -> Iterator[tuple[str, list[list]]]:
    """(name, [layers][heads] patterns); the first is dense.

    Args:
        phases: [layers][heads].
    """
    tokens = modality_map.length
    locals_ = [n for n in LOCALS if 2 * n <= tokens] or [LOCALS[0]]

    def everywhere(pattern: HeadPattern) -> list[list[HeadPattern]]:
        return [[pattern] * len(row) for row in phases]

    yield DENSE, everywhere(Dense())
    for local in locals_:
        for sink in (64, 1024) if local >= 1024 and tokens > 8192 else (64,):
            yield f"a_shape {sink} {local}", everywhere(AShape(sink, local))
        yield f"tri_shape 64 {local}", everywhere(TriShape(64, local, 0))
    for v, s in (*VERTICAL_SLASH, *PAPER_VERTICAL_SLASH):
        if v < tokens and s < tokens // 2:
            yield f"vertical_slash {v} {s}", everywhere(VerticalSlash(v, s))
    grids = [segment.grid for segment in modality_map.segments if segment.grid is not None]
    both: tuple[Stride, ...] = ("frame", "row")
    if strides := [stride for stride in both if any(grid.has_cells(stride) for grid in grids)]:
        yield from _grids(strides, locals_, phases)
        yield from _boundaries(strides, locals_, phases)


def _grids(
    strides: Sequence[Stride], locals_: Sequence[int], phases: Sequence[Sequence[Phases]]
) -> Iterator[tuple[str, list[list]]]:
    for stride in strides:
        for lines in COMBINATIONS:
            v, h, s = (any(flags) for flags in zip(*(LINES[line] for line in lines)))
            ranks = range(2 if v or h else 1)  # the head's best phase, and its second
            for rank in ranks:
                for local in locals_[:2] if rank == 0 else locals_[:1]:
                    heads = [
                        [Grid(stride, v, h, s, _phase(own, stride, rank), 64, local) for own in row] for row in phases
                    ]
                    yield f"grid {stride} {lines} {local} phase #{rank + 1}", heads


def _phase(own: Phases, stride: str, rank: int) -> int:
    known = own.get(stride) or [0]
    return known[min(rank, len(known) - 1)]


def _boundaries(
    strides: Sequence[Stride], locals_: Sequence[int], phases: Sequence[Sequence[Phases]]
) -> Iterator[tuple[str, list[list]]]:
    """2D-Boundary: vision rows see vision through a raster, and text in another way; and the other way round."""
    small = locals_[0]
    for stride in strides:
        for text_name, to_text in (("dense", Dense()), ("a_shape", AShape(64, small))):
            heads = [
                [
                    Boundary2D(
                        {
                            (VISION, VISION): Grid(stride, True, False, True, _phase(own, stride, 0), 64, small),
                            (VISION, TEXT): to_text,
                        }
                    )
                    for own in row
                ]
                for row in phases
            ]
            yield f"2d vision grid {stride}, text {text_name}", heads
    for name, to_vision in (("a_shape", AShape(64, small)), ("vertical_slash", VerticalSlash(256, 64))):
        heads = [[Boundary2D({(VISION, VISION): to_vision, (VISION, TEXT): Dense()})] * len(row) for row in phases]
        yield f"2d vision {name}, text dense", heads
        heads = [[Boundary2D({(TEXT, VISION): to_vision})] * len(row) for row in phases]
        yield f"2d text to vision {name}", heads
