"""Dense attention of chosen rows over the keys of their request. Audits, pictures and searches compare with it."""

from __future__ import annotations

import math

import torch

SLAB_SCORES = 1 << 22
"""How many scores [rows, heads, keys] are held at a time: 16 MB, and as much again for their weights."""


def dense_rows(
    q: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    sm_scale: float,
    slab_scores: int = SLAB_SCORES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain causal attention of some rows over the paged keys of their request, a slab of keys at a time.

    Args:
        q: [R, Hq, D], the rows. positions: int64 [R]; a row sees the keys up to its own position.
        k_cache, v_cache: [slots, Hkv, D]. slots: int64 [keys], the cache row of every position from 0 on.
        sm_scale: factor on q . k.
        slab_scores: how many scores to hold at a time.

    Returns:
        o float32 [R, Hq, D] and lse float32 [R, Hq], base 2.
    """
    rows, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    by_kv = (q.float() * (sm_scale * math.log2(math.e))).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    packed = by_kv.flatten(1, 2)  # [Hkv, group * R, D]
    bound = positions.repeat(heads // kv_heads)[:, None]
    running_max = packed.new_full((*packed.shape[:2], 1), -torch.inf)
    running_sum, o = torch.zeros_like(running_max), torch.zeros_like(packed)
    slab_keys = max(1, slab_scores // (rows * heads))
    for first in range(0, len(slots), slab_keys):
        slab = slots[first : first + slab_keys]
        k, v = (cache[slab].float().transpose(0, 1) for cache in (k_cache, v_cache))
        scores = packed @ k.transpose(1, 2)
        key = torch.arange(first, first + len(slab), device=slots.device)
        scores.masked_fill_(key > bound, -torch.inf)
        new_max = torch.maximum(running_max, scores.amax(dim=-1, keepdim=True))  # finite: every row sees the first key
        weights = scores.sub_(new_max).exp2_()
        decay = torch.exp2(running_max - new_max)
        running_sum = running_sum * decay + weights.sum(dim=-1, keepdim=True)
        o = o * decay + weights @ v
        running_max = new_max
    shape = (kv_heads, heads // kv_heads, rows)
    o = (o / running_sum).view(*shape, dim).permute(2, 0, 1, 3).reshape(rows, heads, dim)
    return o, (running_max + running_sum.log2()).view(shape).permute(2, 0, 1).reshape(rows, heads)


def causal_weights(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, sm_scale: float) -> torch.Tensor:
    """Softmax weights of plain causal attention.

    Args:
        q: [..., R, D], rows of heads that share a KV head. k: [keys, D], from position 0 on.
        positions: int64 [R]; a row sees the keys up to its own position. sm_scale: factor on q . k.

    Returns:
        float32 [..., R, keys].
    """
    future = torch.arange(len(k), device=k.device) > positions[:, None]
    scores = q.float() @ k.float().T * sm_scale
    return scores.masked_fill_(future, -torch.inf).softmax(dim=-1)
