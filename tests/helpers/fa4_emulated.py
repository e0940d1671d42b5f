"""FlashAttention-4's block-sparse forward in float64, over exactly the arguments that the executor gives it."""

import math
from dataclasses import dataclass

import torch

from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.fa4.arguments import CallArguments, call_arguments, keys_of, queries_of
from sglang_mminfer.kernels.work_items import DIRECT, WorkItems, work_items

LN_2 = math.log(2)


@dataclass(frozen=True)
class Emulated:
    """An executor. `gathered` and `padded` are forms of arguments: sm_90 takes neither or the first, sm_100 both."""

    pairs: int = 128
    most_visits: int | None = None
    gathered: bool = False
    padded: bool = False

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: BlockPlan,
        sm_scale: float,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        num_kv_heads = k_cache.shape[1]
        group = q.shape[1] // num_kv_heads
        if not work_items(plan, group, self.pairs, self.most_visits).num_items:
            out.zero_()
            lse.fill_(-torch.inf)
            return
        arguments = call_arguments(plan, group, num_kv_heads, self.pairs, self.gathered, self.most_visits)
        join(arguments.items, *self.slots(q, k_cache, v_cache, arguments, sm_scale), out, lse)

    def slots(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, arguments: CallArguments, sm_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the items say: o [slots, P, D] and lse [slots, P], base 2."""
        k, v = (keys_of(cache, arguments, self.gathered) for cache in (k_cache, v_cache))
        if not self.gathered:  # the page table: pages of one key
            k, v = (x[arguments.kv_slots.long(), 0][None] for x in (k, v))
        o, lse = forward(queries_of(q, arguments), k[0], v[0], arguments, sm_scale, self.padded)
        return o, lse / LN_2


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    arguments: CallArguments,
    sm_scale: float,
    padded: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel writes: o [H * M, P, D] and natural lse [H * M, P], float64, from q [H, M * P, D] and k, v
    [keys, H, D].

    Masked key tiles go through the mask, full ones do not, and 0 x NaN is NaN. A row without keys gives 0 and -inf.
    """
    items = arguments.items
    block_k, pos = items.plan.block_k, arguments.kv_pos.view(-1, items.plan.block_k)
    heads, per_head = arguments.lists.shape[:2]
    q = q.double().view(heads, per_head, items.pairs, -1)
    stop = arguments.q_stop.view(heads, per_head, items.pairs)
    o = torch.full(q.shape, torch.nan, dtype=torch.float64)
    lse = torch.full(q.shape[:3], torch.nan, dtype=torch.float64)
    for head in range(heads):
        by_tile = [x[:, head].double().view(-1, block_k, x.shape[2]) for x in (k, v)]
        for m in range(per_head):
            masked, full = (x.long() for x in lists_of(arguments, head, m, padded))
            tiles = torch.cat([masked, full])
            keys, values = (x[tiles].flatten(0, 1) for x in by_tile)
            scores = q[head, m] @ keys.T * sm_scale
            hidden = pos[masked].flatten() >= stop[head, m][:, None]
            scores[:, : hidden.shape[1]].masked_fill_(hidden, -torch.inf)
            lse[head, m] = scores.logsumexp(dim=1) if len(tiles) else -torch.inf
            o[head, m] = (scores - lse[head, m].nan_to_num(neginf=0)[:, None]).exp() @ values
    return o.flatten(0, 1), lse.flatten(0, 1)


def lists_of(arguments: CallArguments, head: int, m: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The masked and the full key tiles of an item, as the kernels read them."""
    if padded:
        masked_count, masked, full_count, full = (x[0, head, m] for x in arguments.padded_lists)
        return masked[: int(masked_count)], full[: int(full_count)]
    first, num_full, num_masked = arguments.lists[head, m].tolist()
    return arguments.tiles[first + num_full : first + num_full + num_masked], arguments.tiles[first : first + num_full]


def join(
    items: WorkItems, slots_out: torch.Tensor, slots_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """What `kernels.triton.merge.merge` computes where every item writes to a slot: the parts of each pair by LSE."""
    flat_out, flat_lse = slots_out.double().flatten(0, 1), slots_lse.double().flatten()
    found: list[list[int]] = [[] for _ in range(lse.numel())]
    for of_pass in items.first_slot.tolist():
        for pair, first in enumerate(of_pass):
            assert first != DIRECT
            if first >= 0:
                found[pair] += [first + part * items.pairs for part in range(int(items.parts[first // items.pairs]))]
    for pair, places in enumerate(found):
        part_lse = flat_lse[places] * LN_2
        total = part_lse.logsumexp(dim=0) if places else torch.tensor(-torch.inf, dtype=torch.float64)
        weights = (part_lse - total.nan_to_num(neginf=0)).exp()
        out.view(-1, out.shape[2])[pair] = (weights @ flat_out[places]).to(out.dtype)
        lse.view(-1)[pair] = total / LN_2
