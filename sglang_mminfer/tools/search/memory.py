"""How much memory measuring one layer may take, and how many heads at a time fit into it.

Heads do not mix, so they can be measured in pieces: the scores are the same up to rounding, and the memory shrinks with
the number of heads. Candidates are measured one after the other, and each leaves only its scores.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from sglang_mminfer.patterns.boundary import HeadPattern, row_classes
from sglang_mminfer.patterns.estimated import Estimated
from sglang_mminfer.planning.tiles import BLOCK_K, BLOCK_Q

GIB = 1 << 30
SHARE_OF_HOST, SHARE_OF_GPU = 1 / 4, 1 / 20  # SGLang's pool and the weights take nearly all of a GPU
ESTIMATE_ROWS = 64


def default_limit(device: torch.device, ranks: int) -> int:
    """Bytes for measuring: a share of the machine's total memory. Free memory would make each run another search."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * SHARE_OF_GPU)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * SHARE_OF_HOST / ranks)


@dataclass(frozen=True)
class Footprint:
    """The sizes that memory depends on.

    tokens, dim: of q.
    itemsize:    bytes of an element of q and of the cache.
    threads:     how many threads run tiles at a time.
    picked:      the most keys that any candidate picks by estimate.
    """

    tokens: int
    dim: int
    itemsize: int
    threads: int
    picked: int

    def bytes(self, heads: int, kv_heads: int) -> int:
        """An upper bound on the memory for so many heads at a time."""
        tokens, tiles = self.tokens, -(-self.tokens // BLOCK_Q)
        outputs = (
            heads * tokens * self.dim * (2 * self.itemsize + 3 * 4)
        )  # q, out, and the dense output, the measured output, their difference
        rows = heads * tokens * 8 * 4  # visits and errors by row
        scores = heads * ESTIMATE_ROWS * tokens * 4 * 5
        picks = heads * tiles * self.picked * 100
        visits = heads * tiles * (tokens // BLOCK_K) * 150
        gathered = (1 + self.threads) * kv_heads * tokens * self.dim * self.itemsize * 3
        return outputs + rows + scores + picks + visits + gathered


def most_picked(patterns: Iterable[HeadPattern], tokens: int) -> int:
    """The most keys that any of the patterns picks by estimate."""

    def picked_by(head: HeadPattern) -> int:
        return sum(p.picks(tokens) for c in row_classes(head) for _, p in c.pairs if isinstance(p, Estimated))

    return max(map(picked_by, set(patterns)), default=0)


@dataclass(frozen=True)
class Piece:
    """Some query heads, and the KV heads that they share."""

    heads: slice
    kv_heads: slice


def pieces(heads: int, kv_heads: int, footprint: Footprint, limit: int) -> list[Piece]:
    """All heads in as few pieces as fit into `limit` bytes: whole GQA groups, or parts of one group.

    Raises:
        MemoryError: not even one head fits; the message says how many GiB it takes.
    """
    group = heads // kv_heads
    fitting_kv_heads = [n for n in range(1, kv_heads + 1) if footprint.bytes(n * group, n) <= limit]
    if fitting_kv_heads:
        return [
            Piece(slice(first * group, stop * group), slice(first, stop))
            for first, stop in _cut(kv_heads, fitting_kv_heads[-1])
        ]
    fitting_heads = [n for n in range(1, group) if footprint.bytes(n, 1) <= limit]
    if not fitting_heads:
        least = footprint.bytes(1, 1) / GIB
        raise MemoryError(
            f"--max-memory: expected at least {least + 0.005:.2f} GiB for one head of {footprint.tokens:,} tokens, "
            f"got {limit / GIB:.2f}"
        )
    return [
        Piece(slice(kv * group + first, kv * group + stop), slice(kv, kv + 1))
        for kv in range(kv_heads)
        for first, stop in _cut(group, fitting_heads[-1])
    ]


def _cut(count: int, most: int) -> Sequence[tuple[int, int]]:
    """The range from 0 to `count` in parts of at most `most`."""
    return [(first, min(first + most, count)) for first in range(0, count, most)]
