"""The Triton executor: runs a BlockPlan with one launch for all of its work items, and one that joins their parts."""

from __future__ import annotations

import torch
import triton

from ..block_plan import BlockPlan
from ..torch_gather import LOG2_E
from ..work_items import work_items
from . import interpreted
from .configurations import Configuration, configuration
from .merge import merge
from .tile_attention import tile_attention

INTERPRETED = Configuration(rows=16, num_warps=4, num_stages=1)  # few rows: small tests cover tiles of several items


def configuration_on(device: torch.device, head_dim: int) -> Configuration:
    """How the kernel is compiled for a GPU, and so how many pairs an item has.

    Raises:
        ValueError: the kernel does not support this head dim.
    """
    if interpreted():
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return configuration(head_dim, 10 * major + minor)


def run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: BlockPlan,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    chosen: Configuration | None = None,
    most_visits: int | None = None,
) -> None:
    """Write the attention of `plan` into `out` and `lse`. Rows that no pass visits get 0 and -inf.

    Args:
        q: [tokens, Hq, D], float16, bfloat16 or float32. k_cache, v_cache: [slots, Hkv, D], of these or an fp8
        dtype; the last dimension of each has stride 1. out: [tokens, Hq, D], lse: float32 [tokens, Hq], base 2;
        both are contiguous and fully overwritten.
        sm_scale: factor on q . k.
        chosen: how to compile the kernel. Default: what `configurations.py` has for the GPU.
        most_visits: see `work_items`.

    Raises:
        ValueError: q is not on a GPU (outside Triton's interpreter), or the head dim or the size of the key tiles
        does not compile.
    """
    if not (q.is_cuda or interpreted()):
        raise ValueError(f"q: the triton executor needs a GPU (or TRITON_INTERPRET=1 to check it), got {q.device}")
    if sm_scale <= 0:  # the kernel's maximum is that of raw scores
        q, sm_scale = q * sm_scale, 1.0
    if q.stride(2) != 1:
        q = q.contiguous()
    num_heads, head_dim = q.shape[1:]
    if plan.block_k < 16 and not interpreted():
        raise ValueError(f"block_k: expected at least 16 keys a tile for the triton executor, got {plan.block_k}")
    chosen = chosen or configuration_on(q.device, head_dim)
    pairs = chosen.rows
    group = num_heads // k_cache.shape[1]
    items = work_items(plan, group, pairs, most_visits)
    slots_out = q.new_empty(items.num_slots, pairs, head_dim, dtype=torch.float32)
    slots_lse = q.new_empty(items.num_slots, pairs, dtype=torch.float32)
    if items.num_items:
        table, heads = items.on_device
        tile_attention[(items.num_items,)](
            q,
            k_cache,
            v_cache,
            out,
            lse,
            slots_out,
            slots_lse,
            table,
            heads,
            plan.q_rows,
            plan.q_stop,
            plan.q_indptr,
            plan.block_indptr,
            plan.block_indices,
            plan.num_full,
            plan.num_gathered,
            plan.gathered_start,
            plan.excluded_lanes,
            plan.keys.kv_slots,
            plan.keys.kv_pos,
            q.stride(0),
            q.stride(1),
            k_cache.stride(0),
            k_cache.stride(1),
            v_cache.stride(0),
            v_cache.stride(1),
            out.stride(0),
            out.stride(1),
            sm_scale * LOG2_E,
            GROUP=group,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_M=pairs,
            BLOCK_N=max(16, triton.next_power_of_2(plan.block_k)),
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_K=plan.block_k,
            WORDS=plan.excluded_lanes.shape[1],
            **({} if interpreted() else chosen.options),
        )
    merge(items, slots_out, slots_lse, out, lse)
