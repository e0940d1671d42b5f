"""Patterns that depend on q and k: estimated anew for every layer and chunk, on the device, without waiting for it.

Tensors that hold what was picked have the same size whatever the estimate says; how much of them counts is known on
the device only. They are small: what a pattern picks from has a value for each key and head, and is let go at once.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sglang_mminfer.kernels.block_plan import pack_lanes
from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.patterns.base import Pattern
from sglang_mminfer.patterns.index import Scope

Picks = tuple[torch.Tensor, ...]


class CachedKeys(Protocol):
    """Where a request's keys so far are. slots, slots32: int64 and int32 [kv_len], the cache row of every position."""

    @property
    def q_start(self) -> int: ...
    @property
    def kv_len(self) -> int: ...
    @property
    def slots(self) -> torch.Tensor: ...
    @property
    def slots32(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Evidence:
    """What an estimate may look at: one request's chunk, some heads, and one scope in which rows are in the chunk.

    heads: the query heads to estimate, ascending. q: [chunk rows, Hq, D]; k_cache: [slots, Hkv, D]. keys: int64,
    positions of the scope's key class on the device; None: all.
    """

    request: CachedKeys
    scope: Scope
    heads: tuple[int, ...]
    q: torch.Tensor
    k_cache: torch.Tensor
    keys: torch.Tensor | None
    sm_scale: float

    def last_rows(self, count: int) -> Ints:
        """int64: positions of the last `count` rows of the scope's row class in the chunk, ascending."""
        rows = self.scope.row_members.clip(self.request.q_start, self.request.kv_len)
        return rows.select(np.arange(max(0, len(rows) - count), len(rows)))


class Crossings(Protocol):
    """Which key tiles of a query tile are crossed by what was picked.

    Attributes:
        keys_of_last_row: int64 [T], keys of the class up to the last row of each query tile.
    """

    keys_of_last_row: torch.Tensor

    def ranges(self, below: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key tiles number 0 to below[t] - 1 that are crossed: start and count, int32 [H, T, S]; starts ascend, no two
        overlap. A range has at most 2 tiles more than lie between a query tile's first row and its last."""
        ...

    def cross(self, blocks: torch.Tensor) -> torch.Tensor:
        """bool [H, T, X]: whether key tile blocks[h, t, x] is crossed (blocks: [H or 1, T or 1, X])."""
        ...


class Estimated(Pattern):
    """A pattern that estimates which keys are worth visiting: columns, and what crosses the tiles otherwise."""

    last_q: int
    """How many of the last rows of its row class it looks at."""

    @abstractmethod
    def picks(self, tokens: int) -> int:
        """How many keys a row of a prompt of so many tokens gets, at most."""

    @abstractmethod
    def estimate(self, evidence: Evidence) -> Picks:
        """What each head picks, in a form of the pattern's own: [heads, ...] each."""

    @abstractmethod
    def select(
        self, picks: Picks, keys_of_first_row: torch.Tensor, keys_of_last_row: torch.Tensor, block_k: int
    ) -> tuple[torch.Tensor, Crossings]:
        """What each head picks, in the form of planning.

        Args:
            picks: what `estimate` gave.
            keys_of_first_row, keys_of_last_row: int64 [T], keys of the class up to that row of each query tile.

        Returns:
            the columns, int64 [H, V], indices in the class, ascending, which every row sees; and the rest.
        """


def column_lanes(columns: torch.Tensor, crossings: Crossings, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Visits of gathered columns: whether each of a head's column tiles is visited, and which lanes do not count.

    Args:
        columns: int64 [H, V], indices in the class, ascending.

    Returns:
        int64 [H, T, C] (1: visited) and int32 [H, T, C, words], packed: a column whose own tile is crossed is visited
        there.
    """
    heads, tiles, lanes = len(columns), len(crossings.keys_of_last_row), -(-columns.shape[1] // block_k) * block_k
    excluded = crossings.cross(columns[:, None] // block_k) | (columns[:, None] >= crossings.keys_of_last_row[:, None])
    excluded = torch.nn.functional.pad(excluded, (0, lanes - columns.shape[1]), value=True)
    excluded = excluded.view(heads, tiles, -1, block_k)
    return (~excluded).any(dim=3).long(), pack_lanes(excluded)
