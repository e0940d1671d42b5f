"""Loops over index arrays in machine code (numba): numpy would need many passes, and the host has no time for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """`function`, compiled at its first call and kept on disk, so that later processes only load it.

    Other threads run Python while it runs. Numba keeps what it compiles beside the source or, where it may not write
    there, in the user's cache folder; where neither can be written, every process compiles for itself.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)
