"""The oracle: a boolean mask and a softmax in float64. Slow, memory-hungry, and obviously right."""

from __future__ import annotations

import math

import torch

from .block_plan import BlockPlan
from .host_tiles import host_tiles


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of one head under a boolean mask, in float64.

    Args:
        q: [Lq, D]; k, v: [Lk, D]; mask: bool [Lq, Lk], True where a key counts.
        sm_scale: factor on q . k.

    Returns:
        o float64 [Lq, D] and lse float64 [Lq], base 2. A row that sees nothing gives 0 and -inf.
    """
    scores = (q.double() @ k.double().T) * sm_scale
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0)[:, None])
    return weights @ v.double(), lse / math.log(2)


def visited_mask(plan: BlockPlan, head: int, rows: slice, kv_len: int) -> torch.Tensor:
    """bool [rows, kv_len]: the keys that each row of one request really sees with `head`.

    Raises:
        AssertionError: the plan visits a (row, key) twice.
    """
    visits = torch.zeros(rows.stop - rows.start, kv_len, dtype=torch.int32)
    for block_plan in plan.passes:
        for tiles in host_tiles(block_plan).batches:
            if head not in tiles.heads:
                continue
            for q_rows, kv_pos, visible in zip(tiles.q_rows.cpu(), tiles.kv_pos.cpu(), tiles.visible.cpu()):
                if rows.start <= int(q_rows[0]) < rows.stop:
                    seen = torch.ones(len(q_rows), len(kv_pos), dtype=torch.bool)
                    seen[:, tiles.num_unmasked :] = visible
                    row, key = seen.nonzero(as_tuple=True)
                    ones = torch.ones(len(row), dtype=torch.int32)
                    visits.index_put_((q_rows[row] - rows.start, kv_pos[key].long()), ones, accumulate=True)
    assert not bool((visits > 1).any()), "a plan visits one (row, key) twice"
    return visits.bool()


def run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: BlockPlan,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Execute a plan in float64, row by row, over exactly the keys that the row sees.

    The shapes are those of `torch_gather.run`. Unlike the fast executors this one holds all keys of a row at once, so
    it has no partial results to join.
    """
    group = q.shape[1] // k_cache.shape[1]
    visits: dict[tuple[int, int], list[torch.Tensor]] = {}
    for block_plan in plan.passes:
        for tiles in host_tiles(block_plan).batches:
            for q_rows, kv_slots, visible in zip(tiles.q_rows, tiles.kv_slots, tiles.visible):
                full, masked = kv_slots[: tiles.num_unmasked], kv_slots[tiles.num_unmasked :]
                for row, sees in zip(q_rows.tolist(), visible):
                    for head in tiles.heads:
                        visits.setdefault((row, head), []).append(torch.cat([full, masked[sees]]))
    out.zero_()
    lse.fill_(-torch.inf)
    for (row, head), slot_lists in visits.items():
        slots = torch.cat(slot_lists)
        k, v = k_cache[slots, head // group], v_cache[slots, head // group]
        all_keys = torch.ones(1, len(slots), dtype=torch.bool, device=q.device)
        o, s = masked_attention(q[row, head][None], k, v, all_keys, sm_scale)
        out[row, head], lse[row, head] = o[0].to(out.dtype), s[0].to(lse.dtype)
