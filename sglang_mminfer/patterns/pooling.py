"""Rows that choose keys together, for patterns that pool what single rows ask for.

A group is what lies between two multiples of a size, in absolute positions, and chooses among the keys before its first
position. So which rows share a group, and what it chooses from, does not depend on how a prompt is cut; only a group
that is itself cut is decided in parts, each by its own rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.patterns.choice import HeadsOfKeys
from sglang_mminfer.patterns.estimated import Evidence, QueryTiles


@dataclass(frozen=True)
class Groups:
    """The groups that have rows in a chunk, G of them.

    size: positions of a group. number: int64 [G], ascending; group n begins at position n * size. rows_per_group: int64
    [G], how many of its rows choose in this chunk: all of the class but those that see everything. keys_before: int64
    [G], keys of the class before its first position. rows: int64 [sum of rows_per_group], numbers in the chunk, group
    by group, on the device.
    """

    size: int
    number: Ints
    rows_per_group: Ints
    keys_before: Ints
    rows: torch.Tensor
    q_start: int

    @classmethod
    def of(cls, evidence: Evidence, size: int) -> Groups:
        scope, request = evidence.scope, evidence.request
        members = scope.row_members - scope.text_after_vision if scope.text_rule else scope.row_members
        positions = members.clip(request.q_start, request.kv_len).members()
        number, rows_per_group = np.unique(positions // size, return_counts=True)
        (rows,) = to_device(evidence.q.device, positions - request.q_start)
        keys_before = scope.key_members.rank(number * size)
        return cls(size, number, rows_per_group.astype(np.int64), keys_before, rows.long(), request.q_start)

    def queries(self, evidence: Evidence, heads: HeadsOfKeys) -> tuple[torch.Tensor, ...]:
        """float32 [heads, rows of the group, D] for each group, times the scale of q . k."""
        (index,) = to_device(evidence.q.device, np.array(heads.heads))
        q = evidence.q[self.rows[:, None], index].transpose(0, 1).float() * evidence.sm_scale
        return q.split(self.rows_per_group.tolist(), dim=1)

    def of_tiles(self, tiles: QueryTiles) -> torch.Tensor:
        """float32 [T, G]: 1 where a query tile has rows of a group, else 0."""
        tile = np.repeat(np.arange(len(tiles.rows_per_tile)), tiles.rows_per_tile)
        number, tile_of_row = (x.long() for x in to_device(tiles.rows.device, self.number, tile))
        group = torch.searchsorted(number, (tiles.rows + self.q_start) // self.size)
        share = torch.zeros(len(tiles.rows_per_tile), len(number), device=tiles.rows.device)
        share[tile_of_row, group] = share.new_ones(())  # a number of the host would make it wait for the device
        return share


def any_group(of_tiles: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """bool [H, T, n]: what any group with rows in a query tile asks for.

    Args:
        of_tiles: see `Groups.of_tiles`. asked: bool [H, G, n].
    """
    return of_tiles @ asked.float() > 0
