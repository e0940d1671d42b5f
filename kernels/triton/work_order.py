"""The order in which the kernel's programs take up their work.

Two goals conflict: neighbouring programs should share keys (L2), and long programs should start first (no tail).
So programs of about one length (within a factor of two) go together, the longest first. Among those, the heads of
one KV head go together, then tiles in the plan's own order (by phase, then by position), then the heads of a tile.
"""

from __future__ import annotations

import torch

from ..block_plan import BlockPlan


def work_order(plan: BlockPlan, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The query tile and the head of each piece of work, int32 [work] each: every head of every tile once.

    The order is made once for a plan. Only if `plan.num_work` is None does the host wait for the device.

    Args:
        group: how many query heads share a KV head.
    """
    key = ("work_order", group)
    if key not in plan.derived:
        plan.derived[key] = _ordered(plan, group)
    return plan.derived[key]


def _ordered(plan: BlockPlan, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    device = plan.q_rows.device
    sizes, group_start, heads = plan.group_arrays
    group_of_tile = plan.q_heads.long()
    shared_by = sizes[group_of_tile].long()
    num_work = plan.num_work if plan.num_work is not None else int(shared_by.sum())
    tile = torch.repeat_interleave(torch.arange(plan.num_tiles, device=device), shared_by, output_size=num_work)
    begin = shared_by.cumsum(0) - shared_by
    head = heads[(group_start[group_of_tile[tile]] + torch.arange(num_work, device=device) - begin[tile])].long()
    blocks = plan.block_indptr.diff()[tile]
    length_class = torch.frexp(blocks.float()).exponent  # blocks < 2 ** length_class
    num_heads = max((head for heads in plan.head_groups for head in heads), default=0) + 1
    key = ((32 - length_class).long() * num_heads + head // group) * plan.num_tiles + tile
    order = (key * num_heads + head).argsort()
    return tile[order].to(torch.int32), head[order].to(torch.int32)
