"""The keys that an estimate picked, as key tiles of a plan: their positions and cache rows, behind all others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import interpreted

BLOCK = 1024  # keys of a program


@triton.jit(
    do_not_specialize=["num_lanes", "first_lane", "first_picked"],
    do_not_specialize_on_alignment=["lanes", "kv_pos", "kv_slots"],
)
def picked_keys(
    lanes,
    kv_pos,
    kv_slots,
    num_lanes,
    first_lane,
    first_picked,
    PAD_POSITION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i writes kv_pos and kv_slots at first_picked + i * BLOCK and following, from what they hold further in
    front: for lane l of the picked ones the key first_lane + lanes[l]."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_lanes = lane < num_lanes
    number = tl.load(lanes + lane, mask=in_lanes, other=-1).to(tl.int32)
    nearest = tl.load(lanes + lane // BLOCK_K * BLOCK_K, mask=in_lanes, other=0).to(tl.int32)
    is_real = number >= 0
    key = tl.where(is_real, number, tl.maximum(nearest, 0)) + first_lane
    position = tl.load(kv_pos + key, mask=in_lanes, other=0)
    slot = tl.load(kv_slots + key, mask=in_lanes, other=0)
    tl.store(kv_pos + first_picked + lane, tl.where(is_real, position, PAD_POSITION), mask=in_lanes)
    tl.store(kv_slots + first_picked + lane, slot, mask=in_lanes)


def with_picked(
    kv_pos: torch.Tensor,
    kv_slots: torch.Tensor,
    lanes: torch.Tensor,
    first_lane: int,
    block_k: int,
    pad_position: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The arrays of a `KeyTable` and, after them, those of picked keys.

    Args:
        lanes: int32 or int64, whole key tiles: for each lane the number of a key, from first_lane on. Below 0 is
            padding, which gets pad_position, and the cache row of its tile's first key, so that it points at something.
    """
    first_picked, num_lanes = len(kv_pos), len(lanes)
    tables = []
    for table in (kv_pos, kv_slots):
        longer = table.new_empty(first_picked + num_lanes)
        longer[:first_picked] = table
        tables.append(longer)
    picked_keys[(triton.cdiv(num_lanes, BLOCK),)](
        lanes,
        *tables,
        num_lanes,
        first_lane,
        first_picked,
        PAD_POSITION=pad_position,
        BLOCK_K=block_k,
        BLOCK=BLOCK,
        **({} if interpreted() else {"num_warps": 4}),
    )
    return tables[0], tables[1]
