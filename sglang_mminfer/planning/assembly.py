"""The plan of a layer from the tiles of its requests and patterns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.kernels.block_plan import BlockPlan, KeyTable, TileSizes, nothing
from sglang_mminfer.kernels.compiled import compiled
from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.planning.device_tiles import Tiles
from sglang_mminfer.planning.estimated import EstimatedTiles


class Part(NamedTuple):
    """Tiles of one pass, and who runs them.

    head_groups: the query heads of each copy of the tiles; the copies follow each other.
    request: the number of their request. alone: whether no other pass has any (row, head) of these tiles.
    """

    head_groups: tuple[tuple[int, ...], ...]
    tiles: Tiles | EstimatedTiles
    request: int
    alone: bool


def assemble(
    passes: Sequence[Sequence[Part]],
    keys: KeyTable,
    *,
    num_rows: int,
    num_heads: int,
    block_q: int,
    block_k: int,
    once: bool,
) -> BlockPlan:
    """The plan of a layer. Sizes are the host's; what the device knows better only indexes into them."""
    parts = [part for parts in passes for part in parts]
    tiles = [part.tiles for part in parts]
    if not tiles:
        return nothing(num_rows, num_heads, block_q, block_k, keys.kv_pos.device)
    groups: dict[tuple[int, ...], int] = {}
    numbers = [groups.setdefault(heads, len(groups)) for part in parts for heads in part.head_groups]
    num_tiles = [len(own.rows_per_tile) for own in tiles]
    copies = [count // len(part.head_groups) for part, count in zip(parts, num_tiles) for _ in part.head_groups]
    on_host, table = _by_tile(
        np.concatenate([own.rows_per_tile for own in tiles]),
        np.concatenate([own.visits for own in tiles]),
        np.array(numbers),
        np.array(copies),
    )
    sizes = TileSizes(
        rows=on_host[0],
        visits=on_host[1],
        group=on_host[2],
        request=np.repeat([part.request for part in parts], num_tiles),
        alone=np.repeat([part.alone for part in parts], num_tiles),
    )
    rows, ranges = torch.cat([own.rows for own in tiles], dim=1), torch.cat([own.ranges for own in tiles], dim=1)
    excluded = torch.cat([own.excluded for own in tiles])
    device, room, (start, count) = rows.device, int(table[2, -1]), ranges.unbind()
    shift = start - (count.cumsum(0, dtype=torch.int32) - count)
    q_heads, q_indptr, block_indptr, *by_tile = to_device(device, table)[0].unbind()
    if not all(isinstance(own, Tiles) for own in tiles):
        block_indptr, *by_tile = _counted_on_device(tiles, count)
        excluded = _without_unvisited(tiles, excluded)
        # One more range takes what is left of the room, so that the host knows the length of what follows.
        count = torch.cat([count, room - count.sum(0, keepdim=True)])
        shift = torch.nn.functional.pad(shift, (0, 1))
    q_heads, num_full, num_gathered, gathered_start = (own[: table.shape[1] - 1] for own in (q_heads, *by_tile))
    blocks = torch.repeat_interleave(shift, count, output_size=room) + torch.arange(
        room, dtype=torch.int32, device=device
    )
    return BlockPlan(
        keys=keys,
        q_rows=rows[0],
        q_stop=rows[1],
        q_indptr=q_indptr,
        q_heads=q_heads,
        block_indptr=block_indptr,
        block_indices=blocks.to(torch.int32),
        num_full=num_full,
        num_gathered=num_gathered,
        gathered_start=gathered_start,
        excluded_lanes=excluded,
        head_groups=tuple(groups),
        num_rows=num_rows,
        num_heads=num_heads,
        block_q=block_q,
        block_k=block_k,
        pass_indptr=(0, *accumulate(sum(len(part.tiles.rows_per_tile) for part in own) for own in passes)),
        known_sizes=sizes,
        once=once,
    )


@compiled
def _by_tile(
    rows_per_tile: NDArray[np.int32], visits: NDArray[np.int32], numbers: Ints, copies: Ints
) -> tuple[Ints, NDArray[np.int32]]:
    """int64 [3, T], `rows`, `visits` and `group` of `TileSizes`. And int32 [6, T + 1], `q_heads`, `q_indptr`,
    `block_indptr`, `num_full`, `num_gathered` and `gathered_start`, right where `visits` are no mere bounds.

    Args:
        visits: int32 [T, 3]. numbers, copies: the head groups, and how many tiles each has.
    """
    num_tiles = len(rows_per_tile)
    sizes = np.empty((3, num_tiles), dtype=np.int64)
    table = np.zeros((6, num_tiles + 1), dtype=np.int32)
    t = 0
    for number, count in zip(numbers, copies):
        for _ in range(count):
            full, partial, gathered = visits[t]
            sizes[0, t], sizes[1, t], sizes[2, t] = rows_per_tile[t], full + partial + gathered, number
            table[0, t], table[3, t], table[4, t] = number, full, gathered
            table[1, t + 1], table[2, t + 1] = table[1, t] + sizes[0, t], table[2, t] + sizes[1, t]
            table[5, t + 1] = table[5, t] + gathered
            t += 1
    return sizes, table


def _counted_on_device(tiles: Sequence[Tiles | EstimatedTiles], count: torch.Tensor) -> list[torch.Tensor]:
    """What only the device knows where patterns are estimated, int32: `block_indptr`, `num_full`, `num_gathered` and
    `gathered_start`.

    Args:
        count: int [E], key tiles of all ranges.
    """
    first = [0, *accumulate(own.ranges.shape[1] for own in tiles)]
    known = [own.placed.ends + at for own, at in zip(tiles, first) if isinstance(own, Tiles)]
    uploaded = iter(to_device(count.device, *known) if known else ())
    ends = torch.cat([next(uploaded) if isinstance(own, Tiles) else own.ends + at for own, at in zip(tiles, first)])
    at = torch.nn.functional.pad(count.cumsum(0), (1, 0))[ends.long()]
    visits, full, gathered = at[:, 3] - at[:, 0], at[:, 1] - at[:, 0], at[:, 3] - at[:, 2]
    indptr = torch.nn.functional.pad(visits.cumsum(0), (1, 0))
    return [x.to(torch.int32) for x in (indptr, full, gathered, gathered.cumsum(0) - gathered)]


def _without_unvisited(tiles: Sequence[Tiles | EstimatedTiles], excluded: torch.Tensor) -> torch.Tensor:
    """The rows of `excluded` of key tiles that are visited, and then as many rows as are left."""
    counts = [torch.ones_like(own.excluded[:, 0]) if isinstance(own, Tiles) else own.gathered_count for own in tiles]
    visited = torch.cat(counts).bool()
    row = (visited.cumsum(0) - 1).where(visited, len(excluded))  # those not visited: all to a row at the end, cut off
    return excluded.new_zeros(len(excluded) + 1, excluded.shape[1]).index_copy_(0, row, excluded)[:-1]
