"""The torch executor: gathers only the visited key tiles of each query tile. The CPU's engine; runs anywhere.

Its cost follows density: a query tile costs one gather of its keys and one attention over them, done once for
all heads that share the tile. On the CPU the attention itself is torch's fused flash kernel; elsewhere, or
where that is missing, three torch operations.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .block_plan import CausalRun, PrefillPlan, TileBatch
from .threads import for_each

LOG2_E = 1 / math.log(2)
_FUSED: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write the attention of `plan` into `out` and `lse`. Rows that no pass visits get 0 and -inf.

    Args:
        q: [tokens, Hq, D]. k_cache, v_cache: [slots, Hkv, D]. out: [tokens, Hq, D], lse: float32
        [tokens, Hq], base 2; both are written whole, whatever they held.
        sm_scale: factor on q . k.
    """
    group = q.shape[1] // k_cache.shape[1]
    out.zero_()
    lse.fill_(-torch.inf)
    for number, block_plan in enumerate(plan.passes):
        layouts = {heads: _HeadLayout(heads, group, q.shape[1], q.device) for heads in block_plan.head_groups}

        def run_tiles(tiles: TileBatch, layouts: dict = layouts, merge: bool = number > 0) -> None:
            _run_tiles(q, k_cache, v_cache, tiles, layouts[tiles.heads], sm_scale, out, lse, merge)

        if q.device.type != "cpu":
            for tiles in block_plan.batches:
                run_tiles(tiles)
            continue
        for run in block_plan.causal_runs if _FUSED is not None else []:
            _run_causal(q, k_cache, v_cache, run, layouts[run.heads], sm_scale, out, lse, number > 0)
        for_each(run_tiles, block_plan.scattered if _FUSED is not None else block_plan.batches)


def _run_causal(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    run: CausalRun,
    heads: _HeadLayout,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    merge: bool,
) -> None:
    """Plain causal attention of many rows at once, which is what the fused kernel does best."""
    m, slots = run.q_rows.stop - run.q_rows.start, run.kv_slots[None]
    prefix = slots.shape[1] - m
    rows = torch.arange(run.q_rows.start, run.q_rows.stop, device=q.device)[None]
    packed = heads.take_q(q, rows)  # [1, kv, per_kv * m, D]
    k, v = heads.take_kv(k_cache, slots).to(q.dtype), heads.take_kv(v_cache, slots).to(q.dtype)
    by_head = packed.unflatten(2, (heads.per_kv, m)).flatten(1, 2)  # [1, heads, m, D]
    own = [t[:, :, prefix:].repeat_interleave(heads.per_kv, dim=1) for t in (k, v)]
    o, s = _FUSED(by_head, *own, 0.0, True, attn_mask=None, scale=sm_scale)
    o, s = o.reshape(packed.shape), s.float().reshape(packed.shape[:3]) * LOG2_E
    if prefix:
        o, s = merge_state(o, s, *_attend(packed, k[:, :, :prefix], v[:, :, :prefix], None, sm_scale))
    heads.write(heads.give_back(o, m), heads.give_back(s, m), rows, out, lse, merge)


class _HeadLayout:
    """How the heads of a tile lie over the KV heads: `kv` rows of `per_kv` query heads each.

    Where every KV head in use serves the same number of the tile's heads, they are computed together, so that
    K and V are gathered once for a group; otherwise each query head brings its own copy of its KV head.
    """

    def __init__(self, heads: tuple[int, ...], group: int, num_heads: int, device: torch.device) -> None:
        kv_of = [head // group for head in heads]
        distinct = sorted(set(kv_of))
        per_kv = len(heads) // len(distinct)
        if any(kv_of.count(kv) != per_kv for kv in distinct):
            distinct, per_kv = kv_of, 1
        self.per_kv = per_kv
        self.q_heads = None if len(heads) == num_heads else torch.tensor(heads, device=device)
        self.kv_heads = (
            None if len(distinct) == num_heads // group and per_kv == group else torch.tensor(distinct, device=device)
        )

    def take_q(self, q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """rows [B, m] -> [B, kv, per_kv * m, D]: heads that share K and V as further rows over them."""
        tile = q[rows] if self.q_heads is None else q[rows[:, :, None], self.q_heads]
        return tile.unflatten(2, (-1, self.per_kv)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def give_back(self, packed: torch.Tensor, m: int) -> torch.Tensor:
        """[B, kv, per_kv * m, ...] -> [B, m, heads, ...], the inverse of `take_q`."""
        return packed.unflatten(2, (self.per_kv, m)).movedim(3, 1).flatten(2, 3)

    def write(
        self, o: torch.Tensor, s: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, merge: bool
    ) -> None:
        """o [B, m, heads, D] and s [B, m, heads] into the rows of out and lse, joined to what stands there."""
        at = rows if self.q_heads is None else (rows[:, :, None], self.q_heads)
        if merge:
            o, s = merge_state(out[at], lse[at], o, s)
        out[at] = o.to(out.dtype)
        lse[at] = s

    def take_kv(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """slots [B, n] -> [B, kv, n, D]"""
        if self.kv_heads is None:
            first, last = int(slots[0, 0]), int(slots[0, -1])
            if len(slots) == 1 and last - first == slots.shape[1] - 1 and bool((slots.diff() == 1).all()):
                return cache[None, first : last + 1].transpose(1, 2)  # side by side in the pool: nothing to gather
            return cache.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)
        return cache[slots[:, :, None], self.kv_heads].transpose(1, 2)


def _run_tiles(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tiles: TileBatch,
    heads: _HeadLayout,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    merge: bool,
) -> None:
    packed = heads.take_q(q, tiles.q_rows)
    full, masked = tiles.kv_slots[:, : tiles.num_unmasked], tiles.kv_slots[:, tiles.num_unmasked :]
    parts = []
    if full.shape[1]:
        k, v = heads.take_kv(k_cache, full), heads.take_kv(v_cache, full)
        parts.append(_attend(packed, k, v, None, sm_scale))
    if masked.shape[1]:
        k, v = heads.take_kv(k_cache, masked), heads.take_kv(v_cache, masked)
        mask = tiles.additive_mask.repeat(1, heads.per_kv, 1)[:, None]
        o, s = _attend(packed, k, v, mask, sm_scale)
        if (empty := tiles.empty_rows) is not None:
            empty = empty.repeat(1, heads.per_kv)[:, None]
            o, s = o.masked_fill(empty[..., None], 0), s.masked_fill(empty, -torch.inf)
        parts.append((o, s))
    if not parts:
        return
    o, s = parts[0] if len(parts) == 1 else merge_state(*parts[0], *parts[1])
    m = tiles.q_rows.shape[1]
    heads.write(heads.give_back(o, m), heads.give_back(s, m), tiles.q_rows, out, lse, merge)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, m, D]; k, v [B, H, n, D]; mask additive [B, 1, m, n] -> o like q and lse float32 [B, H, m], base 2."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if _FUSED is not None and q.device.type == "cpu":
        mask = None if mask is None else mask.to(q.dtype)
        o, s = _FUSED(q, k, v, 0.0, False, attn_mask=mask, scale=sm_scale)
        return o, s.float() * LOG2_E
    scores = torch.matmul(q.float() * (sm_scale * LOG2_E), k.float().transpose(-1, -2))
    if mask is not None:
        scores = scores + mask
    top = scores.amax(dim=-1, keepdim=True).clamp_min(-1e30)  # finite, so that an empty row gives no NaN
    weights = torch.exp2(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    o = torch.matmul(weights.to(v.dtype), v).float() / total
    return o, (top + total.log2()).squeeze(-1)


def merge_state(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join two partial attentions over disjoint keys. o [..., D], lse [...] base 2; as FlashInfer's merge_state."""
    lse = torch.logaddexp2(lse_a, lse_b)
    finite = lse.masked_fill(lse.isneginf(), 0)
    weight_a, weight_b = torch.exp2(lse_a - finite)[..., None], torch.exp2(lse_b - finite)[..., None]
    return o_a * weight_a + o_b * weight_b, lse
