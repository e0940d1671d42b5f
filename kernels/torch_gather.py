"""The torch executor: gathers only the visited key tiles of each query tile. Runs anywhere; the default on a CPU.

Its cost follows density: a query tile costs one gather of its keys and one attention over them, for all heads that
share the tile. On the CPU the attention is torch's fused flash kernel. Elsewhere, and where torch has no such kernel,
the attention is a few torch operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .block_plan import BlockPlan
from .host_tiles import CausalRun, TileBatch, host_tiles
from .threads import for_each, one_thread

LN_2 = math.log(2)
LOG2_E = 1 / LN_2
Part = TileBatch | tuple[CausalRun, int]  # what a thread takes: tiles, or a run with one query head
FUSED: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: BlockPlan,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write the attention of `plan` into `out` and `lse`. Rows that no pass visits get 0 and -inf.

    Args:
        q: [tokens, Hq, D]. k_cache, v_cache: [slots, Hkv, D], of any float dtype; what is read of them is converted
        to that of q. out: [tokens, Hq, D], lse: float32 [tokens, Hq], base 2; both are contiguous and fully
        overwritten.
        sm_scale: factor on q . k.
    """
    with one_thread():  # a pass shares out its work by itself
        q = q.contiguous()
        out.zero_()
        lse.fill_(-torch.inf)
        for number, block_plan in enumerate(plan.passes):
            _Pass(block_plan, plan.once, q, k_cache, v_cache, sm_scale, out, lse, merge=number > 0).run()


@dataclass(frozen=True)
class _Pass:
    """One pass of a plan: what it visits, what it reads, and where it writes.

    once:  whether the plan runs in one layer only, so that nothing made of it is kept.
    merge: whether `out` and `lse` hold what earlier passes have found.
    """

    plan: BlockPlan
    once: bool
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    sm_scale: float
    out: torch.Tensor
    lse: torch.Tensor
    merge: bool

    @cached_property
    def group(self) -> int:
        """How many query heads share a KV head."""
        return self.q.shape[1] // self.k_cache.shape[1]

    @cached_property
    def layouts(self) -> dict[tuple[int, ...], _HeadLayout]:
        num_heads, device = self.q.shape[1], self.q.device
        return {heads: _HeadLayout(heads, self.group, num_heads, device) for heads in self.plan.head_groups}

    def run(self) -> None:
        walk = host_tiles(self.plan)
        if self.q.device.type != "cpu":
            for tiles in walk.batches:
                self.run_tiles(tiles)
        elif FUSED is None:
            for_each(self.run_tiles, walk.batches)
        else:
            parts: list[Part] = [(run, head) for run in walk.causal_runs for head in run.heads]
            for_each(self.run_part, [*parts, *walk.scattered])

    def run_part(self, part: Part) -> None:
        if isinstance(part, TileBatch):
            self.run_tiles(part)
        else:
            self.run_causal(*part)

    def run_causal(self, run: CausalRun, head: int) -> None:
        """Plain causal attention of many rows at once with one query head, which the fused kernel does best.

        Each query head takes the keys again: that is about 1% of the work, and heads together are too few parts for
        many threads. The kernel's causal mask is aligned at the first row, so the keys before the run's first row are
        a second call.
        """
        rows, kv_head = run.q_rows, head // self.group
        q = self.q[None, None, rows, head]  # [1, 1, m, D]
        caches = self.k_cache, self.v_cache
        k, v = (take_kv(cache, run, slice(kv_head, kv_head + 1)).to(q.dtype) for cache in caches)
        prefix = k.shape[2] - q.shape[2]
        o, s = FUSED(q, k[:, :, prefix:], v[:, :, prefix:], 0.0, True, attn_mask=None, scale=self.sm_scale)
        s = s.float() * LOG2_E
        if prefix:
            o, s = merge_state(o, s, *attend(q, k[:, :, :prefix], v[:, :, :prefix], None, self.sm_scale))
        o, s = o[0, 0], s[0, 0]
        if self.merge:
            o, s = merge_state(self.out[rows, head], self.lse[rows, head], o, s)
        self.out[rows, head], self.lse[rows, head] = o.to(self.out.dtype), s

    def run_tiles(self, tiles: TileBatch) -> None:
        if tiles.kv_slots.shape[1]:
            self._attend_tiles(tiles)
        if self.once:
            tiles.forget()

    def _attend_tiles(self, tiles: TileBatch) -> None:
        heads, q = self.layouts[tiles.heads], self.q
        index = heads.index(tiles.q_rows)
        packed = q.view(-1, q.shape[2]).index_select(0, index.flatten()).view(*index.shape, -1)
        k, v = (take_kv(cache, tiles, heads.kv_heads) for cache in (self.k_cache, self.v_cache))
        num_unmasked, parts = tiles.num_unmasked, []
        if num_unmasked:
            parts.append(attend(packed, k[:, :, :num_unmasked], v[:, :, :num_unmasked], None, self.sm_scale))
        if k.shape[2] > num_unmasked:
            mask = tiles.additive_mask.repeat(1, heads.per_kv, 1)[:, None]
            o, s = attend(packed, k[:, :, num_unmasked:], v[:, :, num_unmasked:], mask, self.sm_scale)
            if (empty := tiles.empty_rows) is not None:
                empty = empty.repeat(1, heads.per_kv)[:, None]
                o, s = o.masked_fill(empty[..., None], 0), s.masked_fill(empty, -torch.inf)
            parts.append((o, s))
        o, s = parts[0] if len(parts) == 1 else merge_state(*parts[0], *parts[1])
        index, o, s = index.flatten(), o.reshape(-1, o.shape[-1]), s.flatten()
        rows_out, rows_lse = self.out.view(-1, o.shape[-1]), self.lse.view(-1)
        if self.merge:
            o, s = merge_state(rows_out[index], rows_lse[index], o, s)
        rows_out.index_copy_(0, index, o.to(rows_out.dtype))
        rows_lse.index_copy_(0, index, s)


class _HeadLayout:
    """How the query heads of a tile share KV heads: the KV heads `kv_heads`, each for `per_kv` query heads.

    If every KV head serves the same number of the tile's query heads, these are computed together, so that K and V
    are gathered once for a GQA group. Otherwise each query head brings its own copy of its KV head.
    """

    def __init__(self, heads: tuple[int, ...], group: int, num_heads: int, device: torch.device) -> None:
        kv_of = [head // group for head in heads]
        distinct = sorted(set(kv_of))
        per_kv = len(heads) // len(distinct)
        if any(kv_of.count(kv) != per_kv for kv in distinct):
            distinct, per_kv = kv_of, 1
        self.per_kv = per_kv
        self.num_heads = num_heads
        self.q_heads = torch.tensor(heads, device=device)
        side_by_side = distinct == list(range(distinct[0], distinct[0] + len(distinct)))
        self.kv_heads = slice(distinct[0], distinct[-1] + 1) if side_by_side else distinct

    def index(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [B, m] -> int64 [B, kv, per_kv * m], rows of q viewed as [tokens * heads, D].

        Query heads that share a KV head become further rows over it.
        """
        index = rows[:, None, :] * self.num_heads + self.q_heads[:, None]
        return index.view(len(rows), -1, self.per_kv * rows.shape[1])


def take_kv(cache: torch.Tensor, keys: TileBatch | CausalRun, kv_heads: slice | list[int]) -> torch.Tensor:
    """The keys or values at `keys.kv_slots`: [B, kv, n, D]. A view of the cache if they lie side by side in it."""
    slots = keys.kv_slots
    if isinstance(kv_heads, list):
        taken = cache.new_empty(len(kv_heads), slots.numel(), cache.shape[2])
        for own, head in zip(taken, kv_heads):  # whole rows, which an index over slots and heads does not copy
            torch.index_select(cache[:, head], 0, slots.flatten(), out=own)
        return taken.unflatten(1, slots.shape).transpose(0, 1)
    cache = cache[:, kv_heads]
    if keys.kv_slice is not None:
        return cache[None, keys.kv_slice].transpose(1, 2)
    return cache.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, m, D]; k, v [B, H, n, D]; mask additive [B, 1, m, n] -> o like q and lse float32 [B, H, m], base 2."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if FUSED is not None and q.device.type == "cpu":
        mask = None if mask is None else mask.to(q.dtype)
        o, s = FUSED(q, k, v, 0.0, False, attn_mask=mask, scale=sm_scale)
        return o, s.float() * LOG2_E
    scores = torch.matmul(q.float() * (sm_scale * LOG2_E), k.float().transpose(-1, -2))
    if mask is not None:
        scores = scores + mask
    # The maximum stays finite, so that an empty row gives no NaN.
    row_max = scores.amax(dim=-1, keepdim=True).clamp_min(-1e30)
    weights = torch.exp2(scores - row_max)
    row_sum = weights.sum(dim=-1, keepdim=True)
    o = torch.matmul(weights.to(v.dtype), v).float() / row_sum
    return o, (row_max + row_sum.log2()).squeeze(-1)


def merge_state(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join two partial attentions over disjoint keys: o [..., D], lse [...] base 2, as in FlashInfer's merge_state."""
    weight_b = torch.sigmoid((lse_b - lse_a) * LN_2).nan_to_num_(nan=0.0)  # NaN where both are empty
    wide_dtype = torch.promote_types(o_a.dtype, torch.float32)
    o = torch.lerp(o_a.to(wide_dtype), o_b.to(wide_dtype), weight_b[..., None].to(wide_dtype))
    return o, torch.logaddexp2(lse_a, lse_b)
