"""What a head really visits of sampled rows, and in which order its pattern looks at the tokens."""

from __future__ import annotations

import numpy as np
import torch

from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.boundary import Boundary, HeadPattern, patterns_of

_RANK = {Modality.TEXT: 0, Modality.IMAGE: 1, Modality.VIDEO: 2}


def tile_positions(plan: BlockPlan, tile: int) -> torch.Tensor:
    """int32 [lanes]: positions of all keys a query tile visits; PAD_POSITION for lanes that do not count."""
    number = torch.arange(int(plan.block_indptr[tile + 1] - plan.block_indptr[tile]), device=plan.q_rows.device)
    return plan.visited_positions(torch.full_like(number, tile), number).flatten()


def visited_rows(plan: BlockPlan, head: int, rows: torch.Tensor, kv_len: int) -> torch.Tensor:
    """bool [R, kv_len]: the keys that `head` visits for `rows` (int64 [R], rows of q, of one request)."""
    device = rows.device
    place = torch.full((plan.num_rows,), -1, dtype=torch.int64, device=device)
    place[rows] = torch.arange(len(rows), device=device)
    out = torch.zeros(len(rows), kv_len, dtype=torch.bool, device=device)
    indptr, groups = plan.q_indptr.tolist(), plan.q_heads.tolist()
    where = place[plan.q_rows.long()]
    wanted = torch.nn.functional.pad((where >= 0).long().cumsum(0), (1, 0)).tolist()
    for tile, group in enumerate(groups):
        first, stop = indptr[tile], indptr[tile + 1]
        if wanted[first] == wanted[stop] or head not in plan.head_groups[group]:
            continue
        at, bound = where[first:stop], plan.q_stop[first:stop]
        at, bound = at[at >= 0], bound[at >= 0]
        position = tile_positions(plan, tile)
        position = position[position < kv_len].long()
        row, lane = (position < bound[:, None]).nonzero(as_tuple=True)
        out[at[row], position[lane]] = True
    return out


def order_of(modality_map: ModalityMap, head: HeadPattern) -> tuple[str, np.ndarray]:
    """In which order a head's pattern lays the tokens out: its name, and int64 [length] the positions in that order.

    Boundaries sort by modality. A pattern that reads rasters sorts each image and video by cell, so that it sees
    blocks of it.
    """
    strides = [stride for pattern in patterns_of(head) if (stride := pattern.raster_stride) is not None]
    by_modality = isinstance(head, Boundary)
    segment = modality_map.segment_ids.numpy()
    rank = np.array([_RANK[s.modality] for s in modality_map.segments])[segment] if by_modality else 0 * segment
    cell = modality_map.cells(strides[0]).numpy() if strides else 0 * segment
    order = np.lexsort((np.arange(len(segment)), cell, segment, rank))
    words = [
        *(["modality by modality"] if by_modality else []),
        *(
            [f"each image and video {'cell by cell' if strides[0] == 'frame' else 'column by column'}"]
            if strides
            else []
        ),
    ]
    return ", ".join(words) or "as it is: this pattern moves nothing", order
