"""The attention kernel. A program computes one query tile, or a strip of it, for one of the heads that share the tile.

The kernel is the forward pass of FlashAttention-2 (Dao 2023, algorithm 1) over the key tiles that the plan lists for
the query tile. The plan's slot table finds the keys, so permutation and page table together cost one lookup. Full
tiles run without a mask, partial tiles compare positions, and gathered tiles leave out excluded lanes as well. There
are no atomics: a pass visits a (row, head) once, and later passes join their result by LSE with what `out` holds.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(cache, slots, stride_slot, dims, in_tile, in_head, ALL_LANES: tl.constexpr, ALL_DIMS: tl.constexpr):
    """[BLOCK_N, BLOCK_D]: rows of one head of the cache. Lanes beyond the tile and dims beyond the head are 0."""
    offsets = cache + slots[:, None] * stride_slot + dims[None, :]
    if ALL_LANES and ALL_DIMS:
        return tl.load(offsets)
    return tl.load(offsets, mask=in_tile[:, None] & in_head[None, :], other=0.0)


@triton.jit
def online_softmax(scores, running_max, running_sum, acc, v, MAY_BE_EMPTY: tl.constexpr):
    """One step over scores [BLOCK_M, BLOCK_N], base 2 and scaled: the new maximum, sum and accumulator of each row."""
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    # The maximum of a row that has seen no key yet is -inf, and -inf - (-inf) would be NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MAY_BE_EMPTY else new_max
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(running_max - shift)
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
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        pos = tl.load(kv_pos + key) if ALL_LANES else tl.load(kv_pos + key, mask=in_tile, other=2147483647)
        visible = pos[None, :] < q_stop[:, None]
        if GATHERED:
            word = tl.load(excluded_lanes + lanes_row * WORDS + lanes // 32, mask=in_tile, other=0)
            visible = visible & (((word >> (lanes % 32)) & 1) == 0)[None, :]
        scores = tl.where(visible, scores, float("-inf"))
    elif not ALL_LANES:
        scores = tl.where(in_tile[None, :], scores, float("-inf"))
    return online_softmax(scores, running_max, running_sum, acc, v, MASKED)


@triton.jit
def tile_attention(
    q,
    k_cache,
    v_cache,
    out,
    lse,
    work_tiles,
    work_heads,
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
    STRIPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Program work * STRIPS + strip: BLOCK_M rows of the query tile work_tiles[work], for the head work_heads[work].

    q, out [tokens, Hq, D]; caches [slots, Hkv, D]; lse float32 [tokens, Hq] base 2, contiguous; the last dimension of
    every tensor has stride 1. `BlockPlan` documents the plan's arrays, `work_order.py` the order of the work.
    """
    work, strip = tl.program_id(0) // STRIPS, tl.program_id(0) % STRIPS
    tile, head = tl.load(work_tiles + work), tl.load(work_heads + work)
    first_row, end_row = tl.load(q_indptr + tile) + strip * BLOCK_M, tl.load(q_indptr + tile + 1)
    if first_row >= end_row:
        return

    row_offsets = first_row + tl.arange(0, BLOCK_M)
    in_rows = row_offsets < end_row
    rows = tl.load(q_rows + row_offsets, mask=in_rows, other=0).to(tl.int64)
    q_stop = tl.load(q_stops + row_offsets, mask=in_rows, other=0)
    lanes, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    in_tile, in_head = lanes < BLOCK_K, dims < HEAD_DIM
    ALL_LANES: tl.constexpr = BLOCK_N == BLOCK_K
    ALL_DIMS: tl.constexpr = BLOCK_D == HEAD_DIM

    q_offsets = q + rows[:, None] * stride_q + head.to(tl.int64) * stride_q_head + dims[None, :]
    q_tile = tl.load(q_offsets, mask=in_rows[:, None] & in_head[None, :], other=0.0)
    kv_head = (head // GROUP).to(tl.int64)
    k_head, v_head = k_cache + kv_head * stride_k_head, v_cache + kv_head * stride_v_head

    lse_offsets = lse + rows * NUM_HEADS + head
    out_offsets = out + rows[:, None] * stride_o + head.to(tl.int64) * stride_o_head + dims[None, :]
    in_out = in_rows[:, None] & in_head[None, :]
    if MERGE:  # the result of earlier passes counts as one more key tile, already summed, of weight exp2(lse)
        running_max = tl.load(lse_offsets, mask=in_rows, other=float("-inf"))
        running_sum = tl.where(running_max == float("-inf"), 0.0, 1.0)
        acc = tl.load(out_offsets, mask=in_out, other=0.0).to(tl.float32)
    else:
        running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        running_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, end = tl.load(block_indptr + tile), tl.load(block_indptr + tile + 1)
    masked_from = begin + tl.load(num_full + tile)
    gathered_from = end - tl.load(num_gathered + tile)
    first_excluded = tl.load(gathered_start + tile)

    for kind in tl.static_range(3):  # full, partial, gathered: three loops, each compiled with its own masks
        start = begin if kind == 0 else (masked_from if kind == 1 else gathered_from)
        stop = masked_from if kind == 0 else (gathered_from if kind == 1 else end)
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
    tl.store(out_offsets, (acc / divisor[:, None]).to(out.dtype.element_ty), mask=in_out)
    tl.store(lse_offsets, tl.where(has_keys, running_max + tl.log2(divisor), float("-inf")), mask=in_rows)
