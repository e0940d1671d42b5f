"""Why rows of a head saw everything: by rules of its pattern, of the config, or for want of something to leave out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.spec import AShape, Boundary2D, Dense, Grid, HeadPattern, Pattern, QBoundary, TriShape
from sglang_mminfer.planning.planner import BLOCK_K, BLOCK_Q

SPARSE = "no reason: these left keys out"
ALL_DENSE = "the whole layer or request ran dense"
BELOW = "below dense_below"
HEAD = "dense by config"
MODALITY = "rows of this modality are dense"
START = "early: within sink, window and their tiles"
TEXT = "text after vision"
PHASE = "grid row on the phase (h)"
NO_RASTER = "no raster known"
TAIL = "tail of tri_shape"
TILES = "rounded up to whole tiles, or all pairs together"

REASONS = (BELOW, HEAD, MODALITY, ALL_DENSE, START, TEXT, PHASE, NO_RASTER, TAIL, TILES)
"""In the order in which they are looked for: a row counts under the first that holds."""


@dataclass(frozen=True)
class Why:
    """One reason: how many rows saw everything for it, and the share of the visited pairs that they cost."""

    reason: str
    rows: int
    pairs: float


def reasons_by_row(
    modality_map: ModalityMap, head: HeadPattern, dense_below: int, visited: np.ndarray, first_row: int, ran_dense: bool
) -> np.ndarray:
    """str [rows]: for each row the reason why it saw all keys, or SPARSE.

    Args:
        visited: int64 [rows], how many keys each row visited, from position `first_row` on.
        ran_dense: nothing ran sparse here.
    """
    position = first_row + np.arange(len(visited))
    everything = visited >= position + 1
    holds = {reason: np.zeros(len(visited), dtype=bool) for reason in REASONS}
    holds[BELOW] = position < dense_below
    holds[ALL_DENSE][:] = ran_dense
    holds[TILES][:] = True
    for modality in (Modality.TEXT, Modality.IMAGE, Modality.VIDEO):
        mine = modality_map.members(modality).numpy()[position]
        patterns = _patterns_of(head, modality)
        if all(isinstance(pattern, Dense) for pattern in patterns):
            holds[HEAD if isinstance(head, Dense) else MODALITY] |= mine
        for pattern in patterns:
            for reason, rows in _rules(modality_map, pattern, position, modality, pattern is head):
                holds[reason] |= mine & rows
    found = np.select([holds[reason] for reason in REASONS], list(REASONS), default=TILES)
    return np.where(everything, found, SPARSE)


def _patterns_of(head: HeadPattern, modality: Modality) -> list[Pattern]:
    """What rows of a modality run; of a boundary that does not name it nothing, which is dense."""
    if isinstance(head, QBoundary):
        return [pattern for rows, pattern in head.patterns.items() if rows.covers(modality)]
    if isinstance(head, Boundary2D):
        return [pattern for (rows, _), pattern in head.patterns.items() if rows.covers(modality)]
    return [head]


def _rules(
    modality_map: ModalityMap, pattern: Pattern, position: np.ndarray, modality: Modality, alone: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Rules of a pattern by which rows see everything; `alone`: no boundary speaks before them."""
    if isinstance(pattern, AShape | TriShape | Grid):
        yield START, position < pattern.sink + pattern.local + BLOCK_K + BLOCK_Q
    if isinstance(pattern, TriShape):
        yield TAIL, position >= modality_map.length - pattern.tail
    if isinstance(pattern, TriShape | Grid) and alone and modality is Modality.TEXT:
        yield TEXT, position > modality_map.first_vision
    if isinstance(pattern, Grid) and modality is not Modality.TEXT:
        cells = modality_map.cells(pattern.stride).numpy()[position]
        yield NO_RASTER, cells < 0
        if pattern.h:
            yield PHASE, cells == pattern.phase


def account(reasons: np.ndarray, visited: np.ndarray) -> list[Why]:
    """By reason, dearest first; the rows that ran sparse are among them."""
    total = max(int(visited.sum()), 1)
    found = [
        Why(str(reason), int((reasons == reason).sum()), float(visited[reasons == reason].sum() / total))
        for reason in np.unique(reasons)
    ]
    return sorted(found, key=lambda why: -why.pairs)
