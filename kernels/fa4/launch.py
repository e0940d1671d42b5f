"""The FlashAttention-4 executor: runs a BlockPlan with one launch for all work items, and one that joins them."""

from __future__ import annotations

import torch

from ..block_plan import BlockPlan
from ..torch_gather import LOG2_E
from ..triton.merge import merge
from ..work_items import work_items
from .arguments import call_arguments, keys_of, queries_of
from .forward import DTYPES, Kind, call


def run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: BlockPlan,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    most_visits: int | None = None,
    gathered: bool | None = None,
) -> None:
    """Write the attention of `plan` into `out` and `lse`. Rows that no pass visits get 0 and -inf.

    What each item says is rounded to the dtype of q before it is joined with others.

    Args:
        q: [tokens, Hq, D], float16 or bfloat16. k_cache, v_cache: [slots, Hkv, D]. Where they have the dtype of q,
        their last dimension has stride 1, and their rows begin at multiples of 16 bytes. out: [tokens, Hq, D], lse:
        float32 [tokens, Hq], base 2; both are contiguous and fully overwritten.
        sm_scale: factor on q . k.
        most_visits: see `work_items`.
        gathered: copy the visited key tiles first, in the dtype of q. Default: only where the kernel cannot read them
            from the cache.

    Raises:
        ValueError: the kernels do not support the tensors, their sizes, or the size of the key tiles.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[1]
    if k_cache.dtype != q.dtype or v_cache.dtype != q.dtype:
        gathered = True  # what the kernel reads from the cache it cannot convert
    kind = kind_for(q, plan.block_k, gathered)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check(name, cache, kind)
    if sm_scale <= 0:  # the kernel's maximum is that of raw scores
        q, sm_scale = q * sm_scale, 1.0
    if not work_items(plan, num_heads // num_kv_heads, kind.pairs, most_visits).num_items:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    arguments = call_arguments(plan, num_heads // num_kv_heads, num_kv_heads, kind.pairs, kind.gathered, most_visits)
    rows = queries_of(q, arguments)
    k, v = (keys_of(cache, arguments, kind.gathered).to(q.dtype) for cache in (k_cache, v_cache))
    rows_out = torch.empty_like(rows)
    rows_lse = torch.empty(rows.shape[:2], dtype=torch.float32, device=q.device)
    call(kind, rows, k, v, arguments, sm_scale, rows_out, rows_lse)
    slots = (-1, kind.pairs)
    merge(arguments.items, rows_out.view(*slots, head_dim), rows_lse.view(slots).mul_(LOG2_E), out, lse)


def kind_for(q: torch.Tensor, block_k: int, gathered: bool | None = None) -> Kind:
    """The kind of call for queries like q, on their GPU."""
    major, minor = torch.cuda.get_device_capability(q.device)
    if gathered is None:  # with 256 dims, loading through the page table leaves the products too few registers
        gathered = major >= 10 or q.shape[2] > 128
    if q.dtype not in DTYPES:
        raise ValueError(f"q: expected float16 or bfloat16 for the fa4 executor, got {q.dtype}")
    return Kind(10 * major + minor, q.dtype, q.shape[2], block_k, gathered)


def _check(name: str, cache: torch.Tensor, kind: Kind) -> None:
    if kind.gathered:
        return  # copied
    aligned = cache.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in cache.stride()[:2])
    if cache.stride(2) != 1 or not aligned:
        raise ValueError(f"{name}: expected rows at multiples of 16 bytes, got strides of {cache.stride()}")
