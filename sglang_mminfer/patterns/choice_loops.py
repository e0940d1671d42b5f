"""The loop of `choice.py` on a CPU: scores are compared as they come up, and never stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_mminfer.kernels.compiled import compiled

DIMENSIONS = 8
"""Dimensions are multiplied by so many at a time, so that sums stay in registers."""

KEYS = 256
"""Keys of a block, which stays in the cache for all rows: 8 KiB for 8 dimensions."""


@compiled
def any_row_above(
    low: NDArray[np.float32],
    queries: NDArray[np.float32],
    bound: NDArray[np.float32],
    key: int,
    stop: int,
    out: NDArray[np.bool_],
) -> None:
    """Which keys have a score above a row's bound.

    Args:
        low: [r, keys], r a multiple of DIMENSIONS, at least one. queries: [heads, m, r]. bound: [heads, m].
        key, stop: the keys to look at.
        out: [heads, stop - key], whether any of a head's m rows asks for a key.
    """
    heads, rows, dimensions = queries.shape
    block = np.zeros((dimensions, KEYS), np.float32)
    score, best = np.empty(KEYS, np.float32), np.empty(KEYS, np.float32)
    for begin in range(key, stop, KEYS):
        count = min(KEYS, stop - begin)
        for j in range(dimensions):
            for i in range(count):
                block[j, i] = low[j, begin + i]
        for h in range(heads):
            for i in range(KEYS):
                best[i] = 0
            for row in range(rows):
                q, least = queries[h, row], bound[h, row]
                a, b, c, d = q[0], q[1], q[2], q[3]
                e, f, g, o = q[4], q[5], q[6], q[7]
                for i in range(KEYS):
                    score[i] = (
                        (a * block[0, i] + b * block[1, i])
                        + (c * block[2, i] + d * block[3, i])
                        + (e * block[4, i] + f * block[5, i])
                        + (g * block[6, i] + o * block[7, i])
                    ) - least
                for j in range(DIMENSIONS, dimensions, DIMENSIONS):
                    a, b, c, d = q[j], q[j + 1], q[j + 2], q[j + 3]
                    e, f, g, o = q[j + 4], q[j + 5], q[j + 6], q[j + 7]
                    for i in range(KEYS):
                        score[i] += (
                            (a * block[j, i] + b * block[j + 1, i])
                            + (c * block[j + 2, i] + d * block[j + 3, i])
                            + (e * block[j + 4, i] + f * block[j + 5, i])
                            + (g * block[j + 6, i] + o * block[j + 7, i])
                        )
                for i in range(KEYS):
                    best[i] = max(best[i], score[i])
            for i in range(count):
                out[h, begin - key + i] = best[i] > 0
