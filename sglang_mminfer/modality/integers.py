"""What is an integer in arguments of the API."""

from __future__ import annotations

import operator
from typing import Any


def plain_int(value: Any) -> int | None:
    """The value as a plain int, None if it is none. An integer of NumPy or torch is one, a bool is not."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
