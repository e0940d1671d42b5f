"""Where a head config comes from, and what holds for all of its heads."""

from __future__ import annotations

from datetime import date
from typing import Any, Literal

import msgspec

from sglang_mminfer.patterns.base import LARGEST

NEEDED = {"handwritten": (), "search": ("calibration", "budget", "date"), "calibration": ("calibration", "date")}
"""What must be told beside the note, by how it came about."""


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a config or a basis came about. The note of a handwritten config says why it is as it is.

    A search also names its calibration input, its budget and the date, and what comes from a calibration alone (a
    basis) the input and the date. They keep whatever else they like in `details`, which nothing reads.
    """

    how: Literal["handwritten", "search", "calibration"]
    note: str
    calibration: str | None = None
    budget: str | None = None
    date: str | None = None
    details: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.note.strip():
            raise ValueError("note: expected some words, got none")
        for name in NEEDED[self.how]:
            if not getattr(self, name):
                raise ValueError(f'{name}: expected a value, as `how` is "{self.how}"')
        if self.date is not None:
            try:
                date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f'date: expected YYYY-MM-DD, got "{self.date}"') from None


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What holds for all heads. Rows at absolute positions below `dense_below` see everything."""

    dense_below: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.dense_below <= LARGEST:
            raise ValueError(f"dense_below: expected an integer of 0 .. {LARGEST}, got {self.dense_below}")


NO_DEFAULTS = Defaults()
