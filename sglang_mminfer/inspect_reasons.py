"""Why rows of a head saw everything: by rules of its pattern, of the config, or for want of something to leave out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.plan import BLOCK_K, BLOCK_Q
from sglang_mminfer.patterns.spec import AShape, Dense, Grid, HeadPattern, TriShape

SPARSE = "sparse"
ALL_DENSE = "the whole layer or request ran dense"
BELOW = "below dense_below"
HEAD = "dense by config"
START = "early: within sink, window and their tiles"
TEXT = "text after vision"
PHASE = "grid row on the phase (h)"
NO_RASTER = "no raster known"
TAIL = "tail of tri_shape"
TILES = "rounded up to whole tiles, or all of its pairs"

REASONS = (BELOW, HEAD, ALL_DENSE, START, TEXT, PHASE, NO_RASTER, TAIL, TILES)
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
    text = modality_map.members(Modality.TEXT).numpy()[position]
    after_vision = text & (position > modality_map.first_vision)
    never = np.zeros(len(visited), dtype=bool)
    holds = {
        BELOW: position < dense_below,
        HEAD: ~never if isinstance(head, Dense) else never,
        ALL_DENSE: ~never if ran_dense else never,
        START: never,
        TEXT: after_vision if isinstance(head, Grid | TriShape) else never,
        PHASE: never,
        NO_RASTER: never,
        TAIL: position >= modality_map.length - head.tail if isinstance(head, TriShape) else never,
        TILES: ~never,
    }
    if isinstance(head, AShape | TriShape | Grid):
        holds[START] = position < head.sink + head.local + BLOCK_K + BLOCK_Q
    if isinstance(head, Grid):
        cells = modality_map.cells(head.stride).numpy()[position]
        holds[PHASE] = (cells == head.phase) if head.h else never
        holds[NO_RASTER] = ~text & (cells < 0)
    order = REASONS
    found = np.select([holds[reason] for reason in order], list(order), default=TILES)
    return np.where(everything, found, SPARSE)


def account(reasons: np.ndarray, visited: np.ndarray) -> list[Why]:
    """By reason, dearest first; the rows that ran sparse are among them."""
    total = max(int(visited.sum()), 1)
    found = [
        Why(str(reason), int((reasons == reason).sum()), float(visited[reasons == reason].sum() / total))
        for reason in np.unique(reasons)
    ]
    return sorted(found, key=lambda why: -why.pairs)
