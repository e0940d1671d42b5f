"""What a head's boundary makes of its patterns: for each class of rows, the pairs it runs and their patterns."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.patterns.spec import Boundary2D, Dense, HeadPattern, Pattern, QBoundary

REAL = (Modality.TEXT, Modality.IMAGE, Modality.VIDEO)


@dataclass(frozen=True)
class RowClass:
    """Rows of one modality (None: all) and their pairs. The key classes (None: all) part the keys."""

    rows: Modality | None
    pairs: tuple[tuple[Modality | None, Pattern], ...]
    text_rule: bool


def row_classes(head: HeadPattern) -> tuple[RowClass, ...]:
    """The row classes of one head's pattern; they part the rows."""
    if isinstance(head, QBoundary):
        return tuple(RowClass(m, ((None, _for_rows(head, m)),), text_rule=True) for m in REAL)
    if isinstance(head, Boundary2D):
        return tuple(RowClass(m, _key_pairs(head, m), text_rule=False) for m in REAL)
    return (RowClass(None, ((None, head),), text_rule=True),)


def _for_rows(head: QBoundary, rows: Modality) -> Pattern:
    return next((pattern for named, pattern in head.patterns.items() if named.covers(rows)), Dense())


def _key_pairs(head: Boundary2D, rows: Modality) -> tuple[tuple[Modality, Pattern], ...]:
    named = {k: pattern for (q, k), pattern in head.patterns.items() if q.covers(rows)}
    unnamed = [m for m in REAL if not any(k.covers(m) for k in named)]
    return (*named.items(), *((m, Dense()) for m in unnamed))
