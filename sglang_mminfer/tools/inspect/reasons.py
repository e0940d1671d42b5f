"""Why rows of a head saw every key: by a rule of its pattern or of the head config, or because nothing was left out.

Patterns name the reasons of their own rules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.base import kinds
from sglang_mminfer.patterns.boundary import UNNAMED, Boundary, HeadPattern, row_classes
from sglang_mminfer.patterns.dense import BY_CONFIG
from sglang_mminfer.patterns.index import Scope
from sglang_mminfer.planning.tiles import BLOCK_K, BLOCK_Q

SPARSE = "no reason: these left keys out"
ALL_DENSE = "the whole layer or request ran dense"
BELOW = "below dense_below"
MODALITY = "rows of this modality are dense"
START = "early: within sink, window and their tiles"
TILES = "rounded up to whole tiles, or all pairs together"

_FIRST = (BELOW, BY_CONFIG, MODALITY, ALL_DENSE, START)
PATTERN_REASONS = tuple(
    dict.fromkeys(reason for pattern in kinds().values() for reason in pattern.reasons if reason not in _FIRST)
)
REASONS = (*_FIRST, *PATTERN_REASONS, TILES)
"""All reasons, in order: a row counts under the first one that holds."""


@dataclass(frozen=True)
class Why:
    """One reason: how many rows have it, and the share of the visited pairs that these rows cost."""

    reason: str
    rows: int
    pairs: float


def reasons_by_row(
    modality_map: ModalityMap, head: HeadPattern, dense_below: int, visited: np.ndarray, first_row: int, ran_dense: bool
) -> np.ndarray:
    """str [rows]: for each row the reason why it saw all keys, or SPARSE.

    Args:
        visited: int64 [rows], how many keys each row visited, from position `first_row` on.
        ran_dense: whether the whole layer or request ran dense.
    """
    position = first_row + np.arange(len(visited))
    saw_all = visited >= position + 1
    holds = {reason: np.zeros(len(visited), dtype=bool) for reason in REASONS}
    holds[BELOW] = position < dense_below
    holds[ALL_DENSE][:] = ran_dense
    holds[TILES][:] = True
    for row_class in row_classes(head):
        scope = Scope(modality_map, first_row + len(visited), row_class.rows, text_rule=row_class.text_rule)
        in_class = scope.row_members.has(position)
        if all(pattern == UNNAMED for _, pattern in row_class.pairs):
            holds[MODALITY if isinstance(head, Boundary) else BY_CONFIG] |= in_class
            continue
        for keys, pattern in row_class.pairs:
            if pattern == UNNAMED:
                continue
            index = pattern.index(replace(scope, keys=keys))
            if index.local:
                holds[START] |= in_class & (position < index.sink + index.local + BLOCK_K + BLOCK_Q)
            for reason, rows in index.whole.items():
                holds[reason] |= in_class & rows.has(position)
    first_reason = np.select([holds[reason] for reason in REASONS], list(REASONS), default=TILES)
    return np.where(saw_all, first_reason, SPARSE)


def account(reasons: np.ndarray, visited: np.ndarray) -> list[Why]:
    """One entry for each reason, the one that cost most pairs first. Rows that left keys out have an entry, too.

    Args:
        reasons: str [rows], from `reasons_by_row`.
        visited: int64 [rows], how many keys each row visited.
    """
    total = max(int(visited.sum()), 1)
    entries = [
        Why(str(reason), int((reasons == reason).sum()), float(visited[reasons == reason].sum() / total))
        for reason in np.unique(reasons)
    ]
    return sorted(entries, key=lambda entry: -entry.pairs)
