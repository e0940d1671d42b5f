"""The plan of a layer from the tiles of its requests and patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from sglang_mminfer.kernels.block_plan import BlockPlan, KeyTable, TileSizes, nothing
from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.planning.device_tiles import Tiles


@dataclass(frozen=True)
class Part:
    """Tiles of one pass, and who runs them.

    head_groups: the query heads of each copy of the tiles; the copies follow each other.
    request: the number of their request. alone: whether no other pass has any (row, head) of these tiles.
    """

    head_groups: tuple[tuple[int, ...], ...]
    tiles: Tiles
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
    all_parts = [part for parts in passes for part in parts]
    parts = [part.tiles for part in all_parts]
    if not parts:
        return nothing(num_rows, num_heads, block_q, block_k, keys.kv_pos.device)
    groups: dict[tuple[int, ...], int] = {}
    numbers = [[groups.setdefault(heads, len(groups)) for heads in part.head_groups] for part in all_parts]
    copies = [np.repeat(own, tiles.num_tiles // len(own)) for own, tiles in zip(numbers, parts)]
    counts_of_tiles = [tiles.num_tiles for tiles in parts]
    sizes = TileSizes(
        rows=np.concatenate([tiles.rows for tiles in parts]),
        visits=np.concatenate([tiles.room for tiles in parts]),
        group=np.concatenate(copies),
        request=np.repeat([part.request for part in all_parts], counts_of_tiles),
        alone=np.repeat([part.alone for part in all_parts], counts_of_tiles),
    )
    device = parts[0].q_rows.device
    (q_heads,) = to_device(device, sizes.group)

    start, count = torch.cat([t.start for t in parts]), torch.cat([t.count for t in parts])
    first_range = np.cumsum([0, *(len(t.start) for t in parts)])
    ends = torch.cat([t.ends + int(first) for t, first in zip(parts, first_range)])
    room = int(sizes.visits.sum())
    # One more range takes what is left of the room, so that the host knows the length of what follows.
    reach = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    start = torch.nn.functional.pad(start - reach[:-1], (0, 1))
    count = torch.cat([count, room - reach[-1:]])
    blocks = torch.repeat_interleave(start, count, output_size=room) + torch.arange(room, device=device)
    at = reach[ends]

    excluded = torch.cat([t.excluded for t in parts])
    if any(t.gathered_count is not None for t in parts):
        counts = [torch.ones_like(t.excluded[:, 0]) if t.gathered_count is None else t.gathered_count for t in parts]
        visited = torch.cat(counts).bool()
        row = (visited.cumsum(0) - 1).where(visited, len(excluded))  # those not visited: all to a row at the end
        excluded = excluded.new_zeros(len(excluded) + 1, excluded.shape[1]).index_copy_(0, row, excluded)
    return BlockPlan(
        keys=keys,
        q_rows=torch.cat([t.q_rows for t in parts]),
        q_stop=torch.cat([t.q_stop for t in parts]),
        q_indptr=_indptr(torch.cat([t.rows_per_tile for t in parts])),
        q_heads=q_heads,
        block_indptr=_indptr(at[:, 3] - at[:, 0]),
        block_indices=blocks.to(torch.int32),
        num_full=(at[:, 1] - at[:, 0]).to(torch.int32),
        num_gathered=(at[:, 3] - at[:, 2]).to(torch.int32),
        excluded_lanes=excluded,
        head_groups=tuple(groups),
        num_rows=num_rows,
        num_heads=num_heads,
        block_q=block_q,
        block_k=block_k,
        pass_indptr=(0, *accumulate(sum(part.tiles.num_tiles for part in parts) for parts in passes)),
        known_sizes=sizes,
        once=once,
    )


def _indptr(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
