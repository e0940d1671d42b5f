"""The common form in which every pattern says what it wants, before it is cut into tiles.

A pattern file turns its pattern into a `PairIndex` for one pair of a row class and a key class; `tiles.py`
turns that into lists of tiles. Adding a pattern is one function here's shape, and neither the tiling nor any
executor hears of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sglang_mminfer.modality.runs import Ints, Runs
from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.spec import VerticalSlash


@dataclass(frozen=True)
class Scope:
    """Where a pattern applies: rows of modality `rows` over keys of modality `keys` (None: all), in one prompt.

    `text_rule` is False where a boundary gives every (row, key) pair its own pattern, so that the rule "a text
    row with vision before it sees all" does not hold by itself.
    """

    map: ModalityMap
    kv_len: int
    rows: Modality | None = None
    keys: Modality | None = None
    text_rule: bool = True

    @cached_property
    def text_after_vision(self) -> Runs:
        """Text rows that have an image or a video before them."""
        return self.map.runs(Modality.TEXT).clip(self.map.first_vision, self.kv_len)

    @cached_property
    def row_members(self) -> Runs:
        """Positions that belong to the row class."""
        return self._members(self.rows)

    @cached_property
    def key_members(self) -> Runs:
        """Positions that belong to the key class."""
        return self._members(self.keys)

    def _members(self, modality: Modality | None) -> Runs:
        everything = Runs.span(0, self.kv_len)
        return everything if modality is None else self.map.runs(modality).clip(0, self.kv_len)


@dataclass
class PairIndex:
    """What one pattern asks for in one scope. Counts and offsets are in the compact order of the key class.

    sink:       the first keys, for every row.
    local:      the last keys up to the row's causal frontier.
    dense_rows: rows that see every key of the class; None for no row.
    columns:    int64, ascending absolute positions of keys that every row sees; None for none.
    lines:      through a raster: rows see the keys of their own line; None for none.
    estimated:  columns and diagonals that only q and k can tell; None for none.
    """

    sink: int = 0
    local: int = 0
    dense_rows: Runs | None = None
    columns: Ints | None = None
    lines: Lines | None = None
    estimated: VerticalSlash | None = None

    @property
    def reach(self) -> int:
        """Keys that one more query tile would visit, about; columns apart."""
        found = self.estimated.vertical + self.estimated.slash if self.estimated else 0
        return self.sink + self.local + found


@dataclass(frozen=True)
class Lines:
    """Lines through the raster of every image and video: one per cell ("frame") or one per column ("row").

    `skip` is the line whose rows need no visit, because its keys are columns or its rows see all; `skip_keys` is
    True if its keys are columns, so that they must not be visited along other lines of the same tile.
    """

    stride: str
    skip: int | None
    skip_keys: bool
