"""The attention kernel. A program computes one work item: some (row, query head) pairs, a part of a list of key tiles.

The kernel is the forward pass of FlashAttention-2 (Dao 2023, algorithm 1) over the key tiles that the plan lists for
the item's query tile. The plan's slot table finds the keys, so permutation and page table together cost one lookup.
Full tiles run without a mask, partial tiles compare positions, and gathered tiles leave out excluded lanes as well.
There are no atomics: an item that is not all there is of its pairs writes to slots of its own, and `merge.py` joins
them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fences import fenced


@triton.jit
def load_tile(cache, slots, stride_slot, dims, in_tile, in_head, ALL_LANES: tl.constexpr, ALL_DIMS: tl.constexpr):
    """[BLOCK_N, BLOCK_D]: rows of one head of the cache. Lanes beyond the tile and dims beyond the head are 0."""
    offsets = cache + slots[:, None] * stride_slot + dims[None, :]
    if ALL_LANES and ALL_DIMS:
        return tl.load(offsets)
    return tl.load(offsets, mask=in_tile[:, None] & in_head[None, :], other=0.0)


@triton.jit
def online_softmax(scores, running_max, running_sum, acc, v, scale, MAY_BE_EMPTY: tl.constexpr):
    """One step over raw scores [BLOCK_M, BLOCK_N]: the new maximum (raw), sum and accumulator of each row.

    `scale` makes a raw score one of base 2. It is applied inside the exponent, where it costs nothing: scale > 0, so
    the greatest raw score is the greatest scaled one.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    shift = new_max * scale
    # The maximum of a row that has seen no key yet is -inf, and -inf - (-inf) would be NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, shift) if MAY_BE_EMPTY else shift
    weights = tl.exp2(scores * scale - shift[:, None])
    decay = tl.exp2(running_max * scale - shift)
    running_sum = running_sum * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_max, running_sum, acc


@triton.jit
def visit(
    block,
    lanes_row,
    q,
    q_stop,
    running_max,
    running_sum,
    acc,
    k_head,
    v_head,
    stride_k,
    stride_v,
    kv_slots,
    kv_pos,
    excluded_lanes,
    scale,
    lanes,
    dims,
    in_tile,
    in_head,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr,
    MASKED: tl.constexpr,
    GATHERED: tl.constexpr,
    ALL_LANES: tl.constexpr,
    ALL_DIMS: tl.constexpr,
):
    """One key tile: q [BLOCK_M, BLOCK_D] against the keys `block * BLOCK_K + lane` of the plan's table.

    lanes_row: the row of `excluded_lanes` for this visit, used only if the tile is gathered.
    """
    key = block * BLOCK_K + lanes
    slots = (tl.load(kv_slots + key) if ALL_LANES else tl.load(kv_slots + key, mask=in_tile, other=0)).to(tl.int64)
    k = load_tile(k_head, slots, stride_k, dims, in_tile, in_head, ALL_LANES, ALL_DIMS).to(q.dtype)
    v = load_tile(v_head, slots, stride_v, dims, in_tile, in_head, ALL_LANES, ALL_DIMS).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        pos = tl.load(kv_pos + key) if ALL_LANES else tl.load(kv_pos + key, mask=in_tile, other=2147483647)
        visible = pos[None, :] < q_stop[:, None]
        if GATHERED:
            word = tl.load(excluded_lanes + lanes_row * WORDS + lanes // 32, mask=in_tile, other=0)
            visible = visible & (((word >> (lanes % 32)) & 1) == 0)[None, :]
        scores = tl.where(visible, scores, float("-inf"))
    elif not ALL_LANES:
        scores = tl.where(in_tile[None, :], scores, float("-inf"))
    return online_softmax(scores, running_max, running_sum, acc, v, scale, MASKED)


# The plan's arrays are parts of larger ones and begin anywhere; a kernel for each of their alignments would be many.
_ANYWHERE = [
    "item_heads",
    "q_rows",
    "q_stops",
    "q_indptr",
    "block_indptr",
    "block_indices",
    "num_full",
    "num_gathered",
    "gathered_start",
    "excluded_lanes",
]


@fenced
@triton.jit(do_not_specialize_on_alignment=_ANYWHERE)
def tile_attention(
    q,
    k_cache,
    v_cache,
    out,
    lse,
    slots_out,
    slots_lse,
    items,
    item_heads,
    q_rows,
    q_stops,
    q_indptr,
    block_indptr,
    block_indices,
    num_full,
    num_gathered,
    gathered_start,
    excluded_lanes,
    kv_slots,
    kv_pos,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_o,
    stride_o_head,
    scale,
    GROUP: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program i computes the item items[i], whose pairs are at most BLOCK_M.

    q, out [tokens, Hq, D]; caches [slots, Hkv, D]; lse float32 [tokens, Hq] base 2, contiguous; slots_out float32
    [slots, BLOCK_M, D] and slots_lse float32 [slots, BLOCK_M], contiguous; the last dimension of every tensor has
    stride 1. `work_items.py` documents the items' eight columns, `BlockPlan` the plan's arrays.
    """
    item = items + tl.program_id(0).to(tl.int64) * 8
    tile, first_pair, first_head, num_heads = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    part, num_parts, slot, num_pairs = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)

    lane = tl.arange(0, BLOCK_M)
    in_pairs = lane < num_pairs
    pair = first_pair + lane
    row = tl.load(q_indptr + tile) + pair // num_heads
    rows = tl.load(q_rows + row, mask=in_pairs, other=0).to(tl.int64)
    q_stop = tl.load(q_stops + row, mask=in_pairs, other=0)
    heads = tl.load(item_heads + first_head + pair % num_heads, mask=in_pairs, other=0)
    lanes, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    in_tile, in_head = lanes < BLOCK_K, dims < HEAD_DIM
    ALL_LANES: tl.constexpr = BLOCK_N == BLOCK_K
    ALL_DIMS: tl.constexpr = BLOCK_D == HEAD_DIM

    q_offsets = q + rows[:, None] * stride_q + heads.to(tl.int64)[:, None] * stride_q_head + dims[None, :]
    in_out = in_pairs[:, None] & in_head[None, :]
    q_tile = tl.load(q_offsets, mask=in_out, other=0.0)
    kv_head = (tl.load(item_heads + first_head) // GROUP).to(tl.int64)
    k_head, v_head = k_cache + kv_head * stride_k_head, v_cache + kv_head * stride_v_head

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tile_begin, tile_end = tl.load(block_indptr + tile), tl.load(block_indptr + tile + 1)
    masked_from = tile_begin + tl.load(num_full + tile)
    gathered_from = tile_end - tl.load(num_gathered + tile)
    first_excluded = tl.load(gathered_start + tile)
    begin = tile_begin + (tile_end - tile_begin) * part // num_parts
    end = tile_begin + (tile_end - tile_begin) * (part + 1) // num_parts

    for kind in tl.static_range(3):  # full, partial, gathered: three loops, each compiled with its own masks
        start = begin if kind == 0 else tl.maximum(begin, masked_from if kind == 1 else gathered_from)
        stop = end if kind == 2 else tl.minimum(end, masked_from if kind == 0 else gathered_from)
        for i in range(start, stop):
            # fmt: off
            running_max, running_sum, acc = visit(
                tl.load(block_indices + i), first_excluded + i - gathered_from, q_tile, q_stop,
                running_max, running_sum, acc, k_head, v_head, stride_k, stride_v,
                kv_slots, kv_pos, excluded_lanes, scale, lanes, dims, in_tile, in_head,
                BLOCK_K, WORDS, kind > 0, kind == 2, ALL_LANES, ALL_DIMS,
            )
            # fmt: on

    has_keys = running_sum > 0
    divisor = tl.where(has_keys, running_sum, 1.0)
    acc = acc / divisor[:, None]
    value = tl.where(has_keys, running_max * scale + tl.log2(divisor), float("-inf"))
    if slot < 0:
        out_offsets = out + rows[:, None] * stride_o + heads.to(tl.int64)[:, None] * stride_o_head + dims[None, :]
        tl.store(out_offsets, acc.to(out.dtype.element_ty), mask=in_out)
        tl.store(lse + rows * NUM_HEADS + heads, value, mask=in_pairs)
    else:
        place = slot.to(tl.int64) * BLOCK_M + lane
        tl.store(slots_out + place[:, None] * HEAD_DIM + dims[None, :], acc, mask=in_out)
        tl.store(slots_lse + place, value, mask=in_pairs)
