"""The Triton executor: runs a PrefillPlan with one launch of the kernel for each pass."""

from __future__ import annotations

import torch
import triton

from ..block_plan import BlockPlan, PrefillPlan
from ..torch_gather import LOG2_E
from . import interpreted
from .configurations import Configuration, configuration
from .tile_attention import tile_attention
from .work_order import work_order


def run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    chosen: Configuration | None = None,
) -> None:
    """Write the attention of `plan` into `out` and `lse`. Rows that no pass visits get 0 and -inf.

    Args:
        q: [tokens, Hq, D]. k_cache, v_cache: [slots, Hkv, D], float16, bfloat16 or float32; the last dimension
        of each has stride 1. out: [tokens, Hq, D], lse: float32 [tokens, Hq], base 2; both are contiguous and
        fully overwritten.
        sm_scale: factor on q . k.
        chosen: how to compile the kernel. Default: what `configurations.py` has for the GPU.

    Raises:
        ValueError: q is not on a GPU (outside Triton's interpreter), or the head dim or the size of the key tiles
        does not compile.
    """
    if not (q.is_cuda or interpreted()):
        raise ValueError(f"q: the triton executor needs a GPU (or TRITON_INTERPRET=1 to check it), got {q.device}")
    if q.stride(2) != 1:
        q = q.contiguous()
    out.zero_()
    lse.fill_(-torch.inf)
    for number, block_plan in enumerate(plan.passes):
        if block_plan.num_tiles:
            _launch(q, k_cache, v_cache, block_plan, sm_scale, out, lse, number > 0, chosen)


def _launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: BlockPlan,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    merge: bool,
    chosen: Configuration | None,
) -> None:
    num_heads, head_dim = q.shape[1:]
    options: dict[str, int] = {}
    block_m = max(16, triton.next_power_of_2(plan.block_q))
    if interpreted():
        block_m = max(16, block_m // 2)  # two strips, so that the tests cover strips
    else:
        major, minor = torch.cuda.get_device_capability(q.device)
        chosen = chosen or configuration(head_dim, 10 * major + minor)
        block_m = min(block_m, chosen.rows)
        options = chosen.options
        if plan.block_k < 16:
            raise ValueError(f"block_k: expected at least 16 keys a tile for the triton executor, got {plan.block_k}")
    strips = -(-plan.block_q // block_m)
    group = num_heads // k_cache.shape[1]
    work_tiles, work_heads = work_order(plan, group)
    tile_attention[(len(work_tiles) * strips,)](
        q,
        k_cache,
        v_cache,
        out,
        lse,
        work_tiles,
        work_heads,
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
        BLOCK_M=block_m,
        STRIPS=strips,
        BLOCK_N=max(16, triton.next_power_of_2(plan.block_k)),
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_K=plan.block_k,
        WORDS=plan.excluded_lanes.shape[1],
        MERGE=merge,
        **options,
    )
