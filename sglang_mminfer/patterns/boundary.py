"""What a head may be asked to do: one pattern, or several under one of the two modality boundaries.

`row_classes` says what a boundary makes of its patterns: for each class of rows, the pairs it runs and their patterns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, ClassVar

from sglang_mminfer.modality.segments import Modality, modality_named
from sglang_mminfer.patterns.a_shape import AShape
from sglang_mminfer.patterns.base import Pattern
from sglang_mminfer.patterns.dense import Dense
from sglang_mminfer.patterns.grid import Grid
from sglang_mminfer.patterns.ladder import SINK, Prompt
from sglang_mminfer.patterns.vertical_slash import VerticalSlash

REAL = (Modality.TEXT, Modality.IMAGE, Modality.VIDEO)

UNNAMED: Pattern = Dense()
"""What rows and pairs run that a boundary does not name, and requests without a map."""


@dataclass(frozen=True)
class QBoundary:
    """Queries permuted by modality; each modality runs its own pattern over ALL keys (algorithms 2 and 6).

    A modality that is not named runs dense.
    """

    kind: ClassVar[str] = "q"
    title: ClassVar[str] = "Q-Boundary"
    colour: ClassVar[str] = "#b279a2"
    patterns: Mapping[Modality, Pattern] = field(hash=False)

    def __post_init__(self) -> None:
        named = _checked("QBoundary.patterns", self.patterns)
        patterns = {modality_named("a key of QBoundary.patterns", key): pattern for key, pattern in named.items()}
        object.__setattr__(self, "patterns", patterns)
        if Modality.VISION in patterns and {Modality.IMAGE, Modality.VIDEO} & set(patterns):
            raise ValueError("QBoundary.patterns: vision and image or video name the same rows twice")

    @cached_property
    def _hash(self) -> int:
        return hash(frozenset(self.patterns.items()))

    def __hash__(self) -> int:
        return self._hash  # planning asks for it in every layer

    @property
    def label(self) -> str:
        """A few characters for a cell of a report."""
        return "\n".join(f"{rows.value[0]}:{pattern.label}" for rows, pattern in self.patterns.items())


@dataclass(frozen=True)
class Boundary2D:
    """One pattern per (query modality, key modality) pair, keys permuted by modality (algorithms 3 and 7).

    Sink, local window, columns and diagonals of a pair count in the compacted order of its key modality, up
    to the row's causal frontier in it. A pair that is not named runs dense. IMAGE and VIDEO may share the key
    Modality.VISION.
    """

    kind: ClassVar[str] = "2d"
    title: ClassVar[str] = "2D-Boundary"
    colour: ClassVar[str] = "#f58518"
    patterns: Mapping[tuple[Modality, Modality], Pattern] = field(hash=False)

    def __post_init__(self) -> None:
        named = _checked("Boundary2D.patterns", self.patterns)
        patterns = {_pair(key): pattern for key, pattern in named.items()}
        object.__setattr__(self, "patterns", patterns)
        pairs = list(patterns)
        for i, (q1, k1) in enumerate(pairs):
            for q2, k2 in pairs[i + 1 :]:
                if (q1.covers(q2) or q2.covers(q1)) and (k1.covers(k2) or k2.covers(k1)):
                    raise ValueError(f"Boundary2D.patterns: {(q1, k1)} and {(q2, k2)} name the same pair twice")

    @cached_property
    def _hash(self) -> int:
        return hash(frozenset(self.patterns.items()))

    def __hash__(self) -> int:
        return self._hash  # planning asks for it in every layer

    @property
    def label(self) -> str:
        """A few characters for a cell of a report."""
        return "\n".join(f"{q.value[0]}{k.value[0]}:{pattern.label}" for (q, k), pattern in self.patterns.items())

    @classmethod
    def ladder(cls, prompt: Prompt) -> Iterator[tuple[str, Boundary2D]]:
        """What a search tries: vision rows see vision through a raster, and text in another way; and the other way
        round."""
        text, vision = Modality.TEXT, Modality.VISION
        small = AShape(SINK, prompt.windows[0])
        for stride in prompt.strides:
            raster = Grid(stride, True, False, True, prompt.phase(stride, 0), SINK, small.local)
            for to_text in (UNNAMED, small):
                pairs = {(vision, vision): raster, (vision, text): to_text}
                yield f"2d vision grid {stride}, text {to_text.kind}", cls(pairs)
        for to_vision in (small, VerticalSlash(256, 64)) if prompt.strides else ():
            yield (
                f"2d vision {to_vision.kind}, text dense",
                cls({(vision, vision): to_vision, (vision, text): UNNAMED}),
            )
            yield f"2d text to vision {to_vision.kind}", cls({(text, vision): to_vision})


HeadPattern = Pattern | QBoundary | Boundary2D
Boundary = QBoundary | Boundary2D


def _checked(name: str, patterns: Any) -> Mapping[Any, Pattern]:
    if not isinstance(patterns, Mapping):
        raise ValueError(f"{name}: expected a dict, got {patterns!r}")
    for key, pattern in patterns.items():
        if not isinstance(pattern, Pattern):
            raise ValueError(f"{name}[{key!r}]: expected a pattern, got {pattern!r}")
    return patterns


def _pair(key: Any) -> tuple[Modality, Modality]:
    name = "a key of Boundary2D.patterns"
    if not isinstance(key, tuple) or len(key) != 2:
        raise ValueError(f"{name}: expected (query modality, key modality), got {key!r}")
    return modality_named(name, key[0]), modality_named(name, key[1])


def boundary_of(head: HeadPattern) -> str:
    """The kind of a head's boundary: "none", "q" or "2d"."""
    return head.kind if isinstance(head, Boundary) else "none"


def patterns_of(head: HeadPattern) -> tuple[Pattern, ...]:
    """The patterns that a head names."""
    return tuple(head.patterns.values()) if isinstance(head, Boundary) else (head,)


@dataclass(frozen=True)
class RowClass:
    """Rows of one modality (None: all) and their pairs. The key classes (None: all) part the keys."""

    rows: Modality | None
    pairs: tuple[tuple[Modality | None, Pattern], ...]
    text_rule: bool

    @cached_property
    def _hash(self) -> int:
        return hash((self.rows, self.pairs, self.text_rule))

    def __hash__(self) -> int:
        return self._hash


@cache
def row_classes(head: HeadPattern) -> tuple[RowClass, ...]:
    """The row classes of one head's pattern; they part the rows."""
    if isinstance(head, QBoundary):
        return tuple(RowClass(m, ((None, _for_rows(head, m)),), text_rule=True) for m in REAL)
    if isinstance(head, Boundary2D):
        return tuple(RowClass(m, _key_pairs(head, m), text_rule=False) for m in REAL)
    return (RowClass(None, ((None, head),), text_rule=True),)


def _for_rows(head: QBoundary, rows: Modality) -> Pattern:
    return next((pattern for named, pattern in head.patterns.items() if named.covers(rows)), UNNAMED)


def _key_pairs(head: Boundary2D, rows: Modality) -> tuple[tuple[Modality, Pattern], ...]:
    named = {k: pattern for (q, k), pattern in head.patterns.items() if q.covers(rows)}
    unnamed = [m for m in REAL if not any(k.covers(m) for k in named)]
    return (*named.items(), *((m, UNNAMED) for m in unnamed))
