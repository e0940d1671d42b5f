"""Whether an executor's answer is right on the shapes that are timed: some rows against softmax attention in float64.

The keys of a row are read off the plan, tile by tile, without anything that an executor uses. That plans visit what
patterns say is shown by the tests, on smaller prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_mminfer.benchmarks.inputs import Inputs
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.reference import masked_attention

WITHIN = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""The largest allowed `Difference.out`. A row that lost one key tile of 2,048 differs by 2e-2."""

LSE_WITHIN = 5e-3
SAMPLED = 8


@dataclass(frozen=True)
class Difference:
    """The largest differences of some rows and all heads from float64.

    out: the norm of the difference of one (row, head) over the norm of what is right.
    lse: of the base-2 LSE.
    """

    out: float
    lse: float

    def is_within(self, dtype: torch.dtype) -> bool:
        return self.out <= WITHIN[dtype] and self.lse <= LSE_WITHIN


def difference(inputs: Inputs, plan: BlockPlan, rows: list[int] | None = None) -> Difference:
    """How far `inputs.out` and `inputs.lse` are from the attention of a plan.

    Args:
        rows: which rows to look at. Default: the first, the last, and others by chance, `SAMPLED` in all.
    """
    out_difference = lse_difference = 0.0
    for row in rows if rows is not None else _sampled(len(inputs.q)):
        for head, slots in enumerate(_slots(plan, row)):
            o, lse = _attention(inputs, row, head, slots)
            got, got_lse = inputs.out[row, head].double(), inputs.lse[row, head].double()
            # Rows without keys are 0 and -inf.
            error = (got - o).norm() / o.norm().clamp_min(torch.finfo(torch.float32).tiny)
            lse_error = torch.zeros_like(lse) if torch.equal(got_lse, lse) else (got_lse - lse).abs()
            out_difference = max(out_difference, _number(error))
            lse_difference = max(lse_difference, _number(lse_error))
    return Difference(out_difference, lse_difference)


def _number(x: torch.Tensor) -> float:
    """Infinity for a NaN, which must not pass as a small difference."""
    return float(torch.where(x.isnan(), torch.inf, x))


def _sampled(num_rows: int) -> list[int]:
    some = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))[:SAMPLED].tolist()
    return sorted({0, num_rows - 1, *some[2:]})


def _attention(inputs: Inputs, row: int, head: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """o float64 [D] and lse float64, base 2, of one (row, head) over the keys in some slots."""
    kv_head = head // (inputs.q.shape[1] // inputs.k_cache.shape[1])
    k, v = inputs.k_cache[slots, kv_head], inputs.v_cache[slots, kv_head]
    all_keys = torch.ones(1, len(slots), dtype=torch.bool, device=slots.device)
    o, lse = masked_attention(inputs.q[row, head][None], k, v, all_keys, inputs.scale)
    return o[0], lse[0]


def _slots(plan: BlockPlan, row: int) -> list[torch.Tensor]:
    """For each head the slots of the keys that a row sees, int64."""
    slots: list[list[torch.Tensor]] = [[] for _ in range(plan.num_heads)]
    kv_slots = plan.keys.kv_slots.view(-1, plan.block_k).long()
    places = (plan.q_rows == row).nonzero().flatten()
    tiles = torch.searchsorted(plan.q_indptr, places.to(plan.q_indptr.dtype), right=True) - 1
    visits = plan.block_indptr.diff()
    for place, tile in zip(places.tolist(), tiles.tolist()):
        number = torch.arange(int(visits[tile]), device=visits.device)
        which = torch.full_like(number, tile)
        visible = plan.visited_positions(which, number) < plan.q_stop[place]
        seen = kv_slots[plan.visited_blocks(which, number)][visible]
        for head in plan.head_groups[int(plan.q_heads[tile])]:
            slots[head].append(seen)
    return [torch.cat(of_head) if of_head else kv_slots.new_empty(0) for of_head in slots]
