"""What a head may be asked to do: the patterns of DESIGN section 3 and the two modality boundaries.

Pure data with checked ranges; what a pattern sees is in `mask.py` (exact) and `index.py` (tiles).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sglang_mminfer.modality.segments import Modality


def _at_least(pattern: object, **minimum: int) -> None:
    for name, low in minimum.items():
        value = getattr(pattern, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{type(pattern).__name__}.{name}: expected an integer >= {low}, got {value!r}")


@dataclass(frozen=True)
class Dense:
    """Every key k <= q."""

    kind: ClassVar[str] = "dense"


@dataclass(frozen=True)
class AShape:
    """The first `sink` tokens and the last `local` ones (q - k < local). StreamingLLM; MMInference table 4."""

    kind: ClassVar[str] = "a_shape"
    sink: int
    local: int

    def __post_init__(self) -> None:
        _at_least(self, sink=0, local=1)


@dataclass(frozen=True)
class TriShape:
    """A-shape, plus all keys for text rows that have vision before them and for the prompt's last `tail` rows.

    MMInference table 3. `tail` is the one rule that looks ahead: it holds for one prompt cut in any way, not
    for a prompt that grows by a turn.
    """

    kind: ClassVar[str] = "tri_shape"
    sink: int
    local: int
    tail: int

    def __post_init__(self) -> None:
        _at_least(self, sink=0, local=1, tail=0)


@dataclass(frozen=True)
class VerticalSlash:
    """The heaviest `vertical` columns and `slash` diagonals of the attention of the last `last_q` queries.

    MInference (2407.02490) algorithm 1. The estimate is made anew for every chunk. The first columns and the
    nearest diagonals are always kept, inside the budget: at most 30 and 100, at most half of it.
    """

    kind: ClassVar[str] = "vertical_slash"
    vertical: int
    slash: int
    last_q: int = 64

    FORCED_COLUMNS: ClassVar[int] = 30
    FORCED_DIAGONALS: ClassVar[int] = 100

    def __post_init__(self) -> None:
        _at_least(self, vertical=0, slash=1, last_q=1)

    @property
    def forced_columns(self) -> int:
        """How many of the first columns are kept whatever they weigh."""
        return min(self.FORCED_COLUMNS, (self.vertical + 1) // 2)

    @property
    def forced_diagonals(self) -> int:
        """How many of the nearest diagonals are kept whatever they weigh."""
        return min(self.FORCED_DIAGONALS, (self.slash + 1) // 2)


@dataclass(frozen=True)
class Grid:
    """Sink and local window, plus lines through the raster of images and videos (MMInference algorithm 1).

    `stride` "frame": a token's cell is its index in the frame; "row": its column.
    v: keys whose cell is `phase`; h: rows whose cell is `phase` see all; s: keys of the row's own cell, in all
    segments of the same rows x cols. A text row that has vision before it sees all, unless a boundary says
    otherwise.
    """

    kind: ClassVar[str] = "grid"
    stride: Literal["frame", "row"]
    v: bool
    h: bool
    s: bool
    phase: int
    sink: int
    local: int

    def __post_init__(self) -> None:
        if self.stride not in ("frame", "row"):
            raise ValueError(f'Grid.stride: expected "frame" or "row", got {self.stride!r}')
        for name in ("v", "h", "s"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Grid.{name}: expected true or false, got {getattr(self, name)!r}")
        _at_least(self, phase=0, sink=0, local=1)


Pattern = Dense | AShape | TriShape | VerticalSlash | Grid
PATTERNS: dict[str, type] = {p.kind: p for p in (Dense, AShape, TriShape, VerticalSlash, Grid)}


def _frozen(owner: str, patterns: Mapping) -> dict:
    for key, pattern in patterns.items():
        if not isinstance(pattern, Dense | AShape | TriShape | VerticalSlash | Grid):
            raise TypeError(f"{owner}.patterns[{key!r}]: expected a pattern, got {type(pattern).__name__}")
    return dict(patterns)


@dataclass(frozen=True)
class QBoundary:
    """Queries permuted by modality; each modality runs its own pattern over ALL keys (algorithms 2 and 6).

    A modality that is not named runs dense.
    """

    kind: ClassVar[str] = "q"
    patterns: Mapping[Modality, Pattern] = field(hash=False)

    def __post_init__(self) -> None:
        patterns = {Modality(m): p for m, p in _frozen("QBoundary", self.patterns).items()}
        object.__setattr__(self, "patterns", patterns)
        _no_overlap("QBoundary", list(patterns))

    def __hash__(self) -> int:
        return hash(frozenset(self.patterns.items()))


@dataclass(frozen=True)
class Boundary2D:
    """One pattern per (query modality, key modality) pair, keys permuted by modality (algorithms 3 and 7).

    Sink, local window, columns and diagonals of a pair count in the compacted order of its key modality, up
    to the row's causal frontier in it. A pair that is not named runs dense. IMAGE and VIDEO may share the key
    Modality.VISION.
    """

    kind: ClassVar[str] = "2d"
    patterns: Mapping[tuple[Modality, Modality], Pattern] = field(hash=False)

    def __post_init__(self) -> None:
        patterns = {(Modality(q), Modality(k)): p for (q, k), p in _frozen("Boundary2D", self.patterns).items()}
        object.__setattr__(self, "patterns", patterns)
        pairs = list(patterns)
        for i, (q1, k1) in enumerate(pairs):
            for q2, k2 in pairs[i + 1 :]:
                if (q1.covers(q2) or q2.covers(q1)) and (k1.covers(k2) or k2.covers(k1)):
                    raise ValueError(f"Boundary2D.patterns: {(q1, k1)} and {(q2, k2)} name the same pair twice")

    def __hash__(self) -> int:
        return hash(frozenset(self.patterns.items()))


def _no_overlap(owner: str, modalities: list[Modality]) -> None:
    if Modality.VISION in modalities and {Modality.IMAGE, Modality.VIDEO} & set(modalities):
        raise ValueError(f"{owner}.patterns: vision and image or video name the same rows twice")


HeadPattern = Pattern | QBoundary | Boundary2D
