"""The common form in which every pattern says what it wants, before it is cut into tiles.

A pattern file turns its pattern into a `PairIndex` for one pair of a row class and a key class; `tiles.py`
turns that into lists of tiles. Adding a pattern is one function here's shape, and neither the tiling nor any
executor hears of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from sglang_mminfer.modality.segments import Modality, ModalityMap


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
    def positions(self) -> torch.Tensor:
        return torch.arange(self.kv_len)

    @cached_property
    def text_after_vision(self) -> torch.Tensor:
        """bool [kv_len]: text rows that have an image or a video before them."""
        return self.map.members(Modality.TEXT)[: self.kv_len] & (self.positions > self.map.first_vision)

    @cached_property
    def key_members(self) -> torch.Tensor:
        """bool [kv_len]: positions that belong to the key class."""
        if self.keys is None:
            return torch.ones(self.kv_len, dtype=torch.bool)
        return self.map.members(self.keys)[: self.kv_len]


@dataclass
class PairIndex:
    """What one pattern asks for in one scope. Counts and offsets are in the compact order of the key class.

    sink:       the first keys, for every row.
    local:      the last keys up to the row's causal frontier.
    dense_rows: bool [kv_len], rows that see every key of the class; None for no row.
    columns:    int64, ascending absolute positions of keys that every row sees; None for none.
    diagonals:  int64, offsets back from the frontier that every row sees; None for none.
    lines:      through a raster: rows see the keys of their own line; None for none.
    """

    sink: int = 0
    local: int = 0
    dense_rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    diagonals: torch.Tensor | None = None
    lines: Lines | None = None


@dataclass(frozen=True)
class Lines:
    """Lines through the raster of every image and video: one per cell ("frame") or one per column ("row").

    `skip` is the line that needs no visit of its own, because its keys are columns or its rows see all.
    """

    stride: str
    skip: int | None
