"""Patterns that depend on q and k: decided anew for every layer and chunk, on the device, without waiting for it.

Tensors that hold what was picked have the same size whatever q and k say; how much of them counts is known on the
device only. On a CPU the host knows all values, and they are no larger than what was picked.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.kernels.block_plan import pack_lanes
from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.patterns.base import Pattern
from sglang_mminfer.patterns.basis import Basis
from sglang_mminfer.patterns.index import Scope

Findings = tuple[torch.Tensor, ...]


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
    positions of the scope's key class on the device; None: all. basis: low-rank forms of the layer's q . k; None: there
    are none.
    """

    request: CachedKeys
    scope: Scope
    heads: tuple[int, ...]
    q: torch.Tensor
    k_cache: torch.Tensor
    keys: torch.Tensor | None
    sm_scale: float
    basis: Basis | None = None

    def last_rows(self, count: int) -> Ints:
        """int64: positions of the last `count` rows of the scope's row class in the chunk, ascending."""
        rows = self.scope.row_members.clip(self.request.q_start, self.request.kv_len)
        return rows.select(np.arange(max(0, len(rows) - count), len(rows)))

    @cached_property
    def key_slots(self) -> torch.Tensor:
        """int64: the cache row of every key of the class."""
        return self.request.slots if self.keys is None else self.request.slots[self.keys]

    @property
    def on_host(self) -> bool:
        """Whether reading a value costs nothing."""
        return self.q.device.type == "cpu"


@dataclass(frozen=True)
class QueryTiles:
    """Query tiles of one scope, T of them with R rows of the chunk, of at most `block_q` rows each.

    rows: int64 [R] on the device, numbers in the chunk, tile by tile. rows_per_tile: int32 [T].
    keys_of_first_row, keys_of_last_row: int64 [T], keys of the class up to that row of a tile, whose first row may lie
    before the chunk; full_tiles: int64 [T], the first so many key tiles of the class are visible to all of its rows.
    `on_device` has these three.
    """

    rows: torch.Tensor
    rows_per_tile: NDArray[np.int32]
    keys_of_first_row: Ints
    keys_of_last_row: Ints
    full_tiles: Ints
    on_device: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    block_k: int

    def parts(self, sizes: Ints, most: int) -> Iterator[QueryTiles]:
        """These tiles in stretches of at most so much in all, or of one tile. sizes: int64 [T]."""
        first_row = np.concatenate([[0], self.rows_per_tile.cumsum()])
        begin, size = 0, 0
        for t in range(len(sizes) + 1):
            if t == len(sizes) or (t > begin and size + sizes[t] > most):
                own = slice(begin, t)
                yield QueryTiles(
                    self.rows[first_row[begin] : first_row[t]],
                    self.rows_per_tile[own],
                    self.keys_of_first_row[own],
                    self.keys_of_last_row[own],
                    self.full_tiles[own],
                    (self.on_device[0][own], self.on_device[1][own], self.on_device[2][own]),
                    self.block_k,
                )
                begin, size = t, 0
            size += sizes[t] if t < len(sizes) else 0


@dataclass(frozen=True)
class Added:
    """Visits that an estimate adds to query tiles: ranges of key tiles, for H heads and T query tiles.

    kind:     as in a `BlockPlan`.
    picked:   False: of the order of the key class. True: of `Picked.lanes`.
    start, count: int64 [H, T, S], the first key tile of each range, and how many; one each, of gathered ones.
    most:     int64 [T], a bound on the key tiles of all ranges of a query tile.
    excluded: int32 [H, T, S, words], of gathered ones: the packed lanes that do not count.
    """

    kind: Literal["full", "partial", "gathered"]
    picked: bool
    start: torch.Tensor
    count: torch.Tensor
    most: Ints
    excluded: torch.Tensor | None = None


@dataclass(frozen=True)
class Picked:
    """What an estimate adds to the tiles of a scope.

    lanes: int32 or int64, whole key tiles of picked keys by their index in the class, ascending in each tile; -1 for
    padding, which lies behind the keys. overflow: int64 scalar, query tiles of a head that see everything because their
    rows ask for too much.
    """

    added: tuple[Added, ...]
    lanes: torch.Tensor
    overflow: torch.Tensor | None = None


class Estimated(Pattern):
    """A pattern whose keys only q and k can tell."""

    @abstractmethod
    def picks(self, tokens: int) -> int:
        """How many keys a row of a prompt of so many tokens gets by the estimate, at most."""

    @abstractmethod
    def expected(self, keys: Ints) -> NDArray[np.float64]:
        """About how many keys rows that may see so many visit by the estimate, before q and k are known."""

    @abstractmethod
    def looks_at(self, rows: int, keys: int, head_dim: int) -> float:
        """What the estimate costs for so many rows that end at so many keys, in (row, key) pairs of attention."""

    @abstractmethod
    def estimate(self, evidence: Evidence) -> Findings:
        """What `select` needs of all heads, in a form of the pattern's own: computed once for each scope. It is kept
        while a layer is planned, so it is small: what a pattern picks from is let go at once."""

    @abstractmethod
    def select(self, evidence: Evidence, findings: Findings, tiles: QueryTiles) -> Picked:
        """What each head picks for each query tile."""


# ---- columns, and what crosses tiles -----------------------------------------------------------------------


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


def crossed(columns: torch.Tensor, crossings: Crossings, tiles: QueryTiles) -> Picked:
    """Key tiles that are crossed, and single columns that every row sees.

    Args:
        columns: int64 [H, V], indices in the class, ascending.
    """
    heads, num_tiles, block_k = len(columns), len(tiles.rows_per_tile), tiles.block_k
    full_tiles = tiles.on_device[2]
    start, count = crossings.ranges(full_tiles)
    each = (tiles.keys_of_last_row - tiles.keys_of_first_row) // block_k + 2
    added = [Added("full", False, start, count, np.minimum(start.shape[2] * each, tiles.full_tiles))]
    most = int((-(-tiles.keys_of_last_row // block_k) - tiles.full_tiles).max())
    blocks = (full_tiles[:, None] + torch.arange(most, device=full_tiles.device))[None]
    is_crossed = crossings.cross(blocks).long()
    added.append(Added("partial", False, blocks.expand_as(is_crossed), is_crossed, np.full(num_tiles, most)))
    column_tiles = -(-columns.shape[1] // block_k)
    lanes = torch.nn.functional.pad(columns, (0, column_tiles * block_k - columns.shape[1]), value=-1)
    if column_tiles:
        visited, excluded = column_lanes(columns, crossings, block_k)
        start = torch.arange(heads * column_tiles, device=lanes.device).view(heads, 1, -1).expand_as(visited)
        added.append(Added("gathered", True, start, visited, np.full(num_tiles, column_tiles), excluded))
    return Picked(tuple(added), lanes.flatten())


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
