"""Joins the results of work items by LSE, as FlashInfer's merge_state does, for any number of parts at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..work_items import WorkItems

BLOCK = 16  # (row, head) pairs of a program


@triton.jit(do_not_specialize=["num_pairs"])
def merge_slots(
    out,
    lse,
    slots_out,
    slots_lse,
    first_slot,
    parts,
    num_pairs,
    PASSES: tl.constexpr,
    ITEM_PAIRS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i writes the pairs i * BLOCK and following of out [pairs, D] and lse [pairs].

    slots_out [slots, ITEM_PAIRS, D] and slots_lse [slots, ITEM_PAIRS] are float32; first_slot [PASSES, pairs] and
    parts [slots] are those of `WorkItems`. Pairs that some item wrote itself stay as they are.
    """
    pair, dims = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    in_pairs, in_head = pair < num_pairs, dims < HEAD_DIM
    running_max = tl.full([BLOCK], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    wanted = in_pairs
    for number in tl.static_range(PASSES):
        first = tl.load(first_slot + number * num_pairs + pair, mask=in_pairs, other=-1)
        wanted = wanted & (first != -2)
        there = first >= 0
        count = tl.load(parts + tl.where(there, first // ITEM_PAIRS, 0), mask=there, other=0)
        for part in range(tl.max(count, 0)):
            live = part < count
            place = first.to(tl.int64) + part * ITEM_PAIRS
            part_lse = tl.load(slots_lse + place, mask=live, other=float("-inf"))
            values = tl.load(
                slots_out + place[:, None] * HEAD_DIM + dims[None, :], mask=live[:, None] & in_head[None, :], other=0.0
            )
            new_max = tl.maximum(running_max, part_lse)
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            decay, weight = tl.exp2(running_max - shift), tl.exp2(part_lse - shift)
            running_sum = running_sum * decay + weight
            acc = acc * decay[:, None] + values * weight[:, None]
            running_max = new_max
    has_keys = running_sum > 0
    divisor = tl.where(has_keys, running_sum, 1.0)
    value = tl.where(has_keys, running_max + tl.log2(divisor), float("-inf"))
    offsets = out + pair.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(offsets, (acc / divisor[:, None]).to(out.dtype.element_ty), mask=wanted[:, None] & in_head[None, :])
    tl.store(lse + pair, value, mask=wanted)


def merge(
    items: WorkItems, slots_out: torch.Tensor, slots_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Write what no item has written of out [tokens, Hq, D] and lse [tokens, Hq], both contiguous. Rows without keys
    get 0 and -inf.

    Args:
        slots_out: float32 [slots, items.pairs, D]. slots_lse: float32 [slots, items.pairs], base 2.
    """
    pairs, head_dim = lse.numel(), out.shape[2]
    if not pairs or not items.merges:
        return
    merge_slots[(triton.cdiv(pairs, BLOCK),)](
        out,
        lse,
        slots_out,
        slots_lse,
        items.first_slot,
        items.parts,
        pairs,
        PASSES=len(items.first_slot),
        ITEM_PAIRS=items.pairs,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK=BLOCK,
        num_warps=4,
    )
