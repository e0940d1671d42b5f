"""One pass of a plan from the tiles of its requests and patterns."""

from __future__ import annotations

import numpy as np
import torch

from sglang_mminfer.kernels.block_plan import BlockPlan, KeyTable
from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.planning.device_tiles import Tiles

HeadTiles = tuple[tuple[int, ...], ...]  # the head groups that run some tiles, each a copy, one after the other


def assemble(level: list[tuple[HeadTiles, Tiles]], keys: KeyTable, block_q: int, block_k: int) -> BlockPlan:
    """One pass from its items. Sizes are the host's; what the device knows better only indexes into them."""
    parts = [tiles for _, tiles in level]
    groups: dict[tuple[int, ...], int] = {}
    numbers = [[groups.setdefault(heads, len(groups)) for heads in head_tiles] for head_tiles, _ in level]
    copies = [np.repeat(own, tiles.num_tiles // len(own)) for own, tiles in zip(numbers, parts)]
    device = parts[0].q_rows.device
    (q_heads,) = to_device(device, np.concatenate(copies))

    start, count = torch.cat([t.start for t in parts]), torch.cat([t.count for t in parts])
    first_range = np.cumsum([0, *(len(t.start) for t in parts)])
    ends = torch.cat([t.ends + int(first) for t, first in zip(parts, first_range)])
    room = sum(t.room for t in parts)
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
        block_q=block_q,
        block_k=block_k,
        num_work=sum(t.num_tiles // len(own) * sum(map(len, own)) for own, t in level),
    )


def _indptr(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
