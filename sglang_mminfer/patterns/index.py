"""The common form in which every pattern says what it wants, before it is cut into tiles.

`Pattern.index` makes a `PairIndex` for one pair of a row class and a key class; `planning/tiles.py` turns that into
lists of tiles. Neither the tiling nor any executor knows which pattern it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_
from typing import TYPE_CHECKING

from sglang_mminfer.modality.runs import Ints, Runs
from sglang_mminfer.modality.segments import Modality, ModalityMap

if TYPE_CHECKING:
    from sglang_mminfer.patterns.estimated import Estimated

TEXT_AFTER_VISION = "text after vision"
"""The reason why rows see every key that several patterns share."""


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
    def sees_all(self) -> Mapping[str, Runs]:
        """Text rows that have vision before them, for `PairIndex.whole`, unless a boundary says what they see."""
        return {TEXT_AFTER_VISION: self.text_after_vision} if self.text_rule else {}

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

    sink:      the first keys, for every row.
    local:     the last keys up to the row's causal frontier.
    whole:     rows that see every key of the class, by the reason why.
    columns:   int64, ascending absolute positions of keys that every row sees; None for none.
    lines:     through a raster: rows see the keys of their own line; None for none.
    estimated: the pattern itself, where only q and k can tell what more it wants; None for none. Without a window
        (`local` is 0) it picks from all keys, else from those between the sink's tiles and the window's.
    query_rows: the most rows of a query tile, where its rows share what they pick; None: as many as the plan's have.
    """

    sink: int = 0
    local: int = 0
    whole: Mapping[str, Runs] = field(default_factory=dict)
    columns: Ints | None = None
    lines: Lines | None = None
    estimated: Estimated | None = None
    query_rows: int | None = None

    @cached_property
    def whole_rows(self) -> Runs | None:
        """Rows that see every key of the class, for whatever reason; None where no reason is named."""
        return reduce(or_, self.whole.values()) if self.whole else None

    def keys_of_one_more_tile(self, tokens: int) -> int:
        """How many keys one more query tile would visit in a prompt of so many tokens, about; without columns, and
        without what is picked beside a window."""
        return self.estimated.picks(tokens) if self.estimated and not self.local else self.sink + self.local


@dataclass(frozen=True)
class Lines:
    """Lines through the raster of every image and video: one per cell ("frame") or one per column ("row").

    `skip` is the line whose rows need no visit, because its keys are columns or its rows see all; `skip_keys` is
    True if its keys are columns, so that they must not be visited along other lines of the same tile.
    """

    stride: str
    skip: int | None
    skip_keys: bool
