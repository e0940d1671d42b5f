"""The loops of `choice.py` on a CPU: scores are compared as they come up, and never stored."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sglang_mminfer.kernels.compiled import compiled

DIMENSIONS = 8
"""Dimensions are multiplied by so many at a time, so that sums stay in registers."""

KEYS = 256
"""Keys of a block, which stays in the cache for all rows: 8 KiB for 8 dimensions."""

ONE, HALF, LOG2_E, LOWEST = np.float32(1), np.float32(0.5), np.float32(1 / math.log(2)), np.float32(-1e30)
SMALLEST = np.float32(-126)
"""The least power of 2 that a float32 has in full."""
C1, C2, C3, C4, C5, C6 = (np.float32(math.log(2) ** n / math.factorial(n)) for n in range(1, 7))
"""Coefficients of the series of 2^x, from -1/2 to 1/2 within 1.2e-7."""


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


@compiled
def side_by_side(
    chosen: NDArray[np.bool_],
    before: NDArray[np.int64],
    keys: NDArray[np.int64],
    takes: NDArray[np.bool_],
    lane: NDArray[np.int64],
    lanes: NDArray[np.int64],
) -> None:
    """Write the indices of a head's chosen keys into `lanes`, those of a query tile from its first lane on.

    Args:
        chosen: [N], the keys of all query tiles one after the other. before: [T + 1], where those of each begin.
        keys: [T], the index of each query tile's first key. takes: [T], whether it takes any. lane: [T].
    """
    for t in range(len(keys)):
        if takes[t]:
            at, shift = lane[t], keys[t] - before[t]
            for place in range(before[t], before[t + 1]):
                if chosen[place]:
                    lanes[at] = place + shift
                    at += 1


@compiled
def log_masses(
    scores: NDArray[np.float32],
    sink: int,
    keys_of_row: NDArray[np.int32],
    local: int,
    out: NDArray[np.float32],
) -> None:
    """The log of what each row gives to the sink and to the last `local` keys together.

    The exponential is a series, which vectorizes as calls of a library do not. Rows stand side by side.

    Args:
        scores: [heads, sink + n, m], of the sink, and of n keys that hold the windows of all rows. Overwritten.
        keys_of_row: [m], how many of the n keys come up to each row, at least one.
        out: [heads, m].
    """
    heads, keys, rows = scores.shape
    largest, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    weight, exponent = np.empty(rows, np.float32), np.empty(rows, np.int32)
    power = exponent.view(np.float32)
    for h in range(heads):
        for row in range(rows):
            largest[row], total[row] = LOWEST, 0
        for key in range(keys):
            score = scores[h, key]
            if key >= sink:
                for row in range(rows):
                    seen = (key - sink < keys_of_row[row]) & (key - sink >= keys_of_row[row] - local)
                    score[row] = score[row] if seen else LOWEST
            for row in range(rows):
                largest[row] = max(largest[row], score[row])
        for key in range(keys):
            score = scores[h, key]
            for row in range(rows):
                x = max((score[row] - largest[row]) * LOG2_E, SMALLEST)
                whole = np.floor(x + HALF)
                x -= whole
                exponent[row] = (np.int32(whole) + np.int32(127)) << np.int32(23)  # the bits of 2^whole
                weight[row] = ONE + x * (C1 + x * (C2 + x * (C3 + x * (C4 + x * (C5 + x * C6)))))
            for row in range(rows):
                total[row] += weight[row] * power[row]
        for row in range(rows):
            out[h, row] = np.log(total[row]) + largest[row]
