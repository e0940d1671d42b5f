"""The estimate of vertical_slash in one go: the last queries against all keys, for all heads that need it.

MInference (arXiv 2407.02490) algorithm 1 sums the attention of the last queries by column and by diagonal. No
[queries, keys] matrix is written: a first kernel computes each row's LSE; a second kernel computes the weights again,
tile by tile, and sums each tile both ways on chip. There are no atomics, so the sums are the same every time: a tile
adds to the 64 diagonals of its own block and to the 64 of the next block, and the program that walks the tiles
carries the latter along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..torch_gather import LOG2_E
from . import interpreted
from .configurations import Configuration
from .fences import fenced

BLOCK = 64  # rows of the estimate, at most, and keys of a tile
PROGRAMS = 1024  # enough that every multiprocessor has several

# These differ from chunk to chunk. Triton would compile the kernels anew for values that are 1 or multiples of 16.
COUNTS = ["num_rows", "num_keys", "first_frontier", "tiles_each"]


@triton.jit
def _scores(q_tile, k_head, slots, tile, num_keys, stride_k, first_frontier, num_rows, scale, dims, HEAD_DIM, BLOCK_N):
    """[BLOCK_N, BLOCK_N] base-2 scores of the rows against one tile of keys, -inf where a row does not see a key."""
    lanes = tl.arange(0, BLOCK_N)
    key = tile * BLOCK_N + lanes
    in_keys = key < num_keys
    slot = tl.load(slots + key, mask=in_keys, other=0).to(tl.int64)
    offsets = k_head + slot[:, None] * stride_k + dims[None, :]
    k = tl.load(offsets, mask=in_keys[:, None] & (dims < HEAD_DIM)[None, :], other=0.0).to(q_tile.dtype)
    scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale
    rows = tl.arange(0, BLOCK_N)
    visible = (key[None, :] < first_frontier + rows[:, None]) & (rows < num_rows)[:, None]
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _rows(q, heads, stride_q, stride_q_head, num_rows, dims, number, HEAD_DIM, BLOCK_N):
    """The head of this program, and the head's queries [BLOCK_N, BLOCK_D]."""
    head = tl.load(heads + number)
    rows = tl.arange(0, BLOCK_N)
    offsets = q + rows[:, None].to(tl.int64) * stride_q + head.to(tl.int64) * stride_q_head + dims[None, :]
    return head, tl.load(offsets, mask=(rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@fenced
@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["heads"])
def row_lse(
    q,
    k_cache,
    slots,
    heads,
    lse,
    num_rows,
    num_keys,
    first_frontier,
    tiles_each,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (head number, part) writes lse[head number, part, row], base 2, over the keys of this part."""
    number, part = tl.program_id(0), tl.program_id(1)
    dims, rows = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    head, q_tile = _rows(q, heads, stride_q, stride_q_head, num_rows, dims, number, HEAD_DIM, BLOCK_N)
    k_head = k_cache + (head // GROUP).to(tl.int64) * stride_k_head
    running_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_N], tl.float32)
    stop = tl.minimum((part + 1) * tiles_each, tl.cdiv(num_keys, BLOCK_N))
    for tile in range(part * tiles_each, stop):
        # fmt: off
        scores = _scores(
            q_tile, k_head, slots, tile, num_keys, stride_k, first_frontier, num_rows, scale, dims, HEAD_DIM, BLOCK_N
        )
        # fmt: on
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp2(running_max - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        running_max = new_max
    has_keys = running_sum > 0
    value = tl.where(has_keys, running_max + tl.log2(tl.where(has_keys, running_sum, 1.0)), float("-inf"))
    tl.store(lse + (number * tl.num_programs(1) + part) * BLOCK_N + rows, value)


@fenced
@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["heads"])
def masses(
    q,
    k_cache,
    slots,
    heads,
    lse,
    columns,
    diagonals,
    carried,
    num_rows,
    num_keys,
    first_frontier,
    tiles_each,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (head number, part) sums the weights of one part of the keys.

    columns:   [heads, tiles * BLOCK_N], the sum of each column.
    diagonals: [heads, tiles + 1, BLOCK_N], by distance, ascending: block b of the keys, which begins at distance
               first_frontier - 1 - b * BLOCK_N, has row tiles - b.
    carried:   [heads, parts, BLOCK_N], what a part adds to the block after it.
    """
    number, part = tl.program_id(0), tl.program_id(1)
    dims, rows, lanes = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_N)
    head, q_tile = _rows(q, heads, stride_q, stride_q_head, num_rows, dims, number, HEAD_DIM, BLOCK_N)
    k_head = k_cache + (head // GROUP).to(tl.int64) * stride_k_head
    row_lses = tl.load(lse + number * BLOCK_N + rows)
    tiles = tl.cdiv(num_keys, BLOCK_N)
    stop = tl.minimum((part + 1) * tiles_each, tiles)
    # Row i meets entry j of the tile's own block at lane i - j, and entry j of the next block at lane i - j + BLOCK_N.
    own_lane = rows[:, None] - lanes[None, :]
    in_own_block = own_lane >= 0
    skewed_lane = tl.where(in_own_block, own_lane, own_lane + BLOCK_N)
    carry = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(part * tiles_each, stop):
        # fmt: off
        scores = _scores(
            q_tile, k_head, slots, tile, num_keys, stride_k, first_frontier, num_rows, scale, dims, HEAD_DIM, BLOCK_N
        )
        # fmt: on
        weights = tl.exp2(scores - row_lses[:, None])
        tl.store(columns + (number * tiles + tile).to(tl.int64) * BLOCK_N + lanes, tl.sum(weights, 0))
        skewed = tl.gather(weights, skewed_lane, 1)
        block = carry + tl.sum(tl.where(in_own_block, skewed, 0.0), 0)
        tl.store(diagonals + (number * (tiles + 1) + tiles - tile).to(tl.int64) * BLOCK_N + lanes, block)
        carry = tl.sum(tl.where(in_own_block, 0.0, skewed), 0)
    tl.store(carried + (number * tl.num_programs(1) + part) * BLOCK_N + lanes, carry)


def configuration(head_dim: int, capability: int, fp8: bool = False) -> Configuration:
    """How to compile both kernels, for keys of fp8 or not. Not tuned: this compiles without spilling registers."""
    return Configuration(BLOCK, num_warps=8, num_stages=3 if fp8 and capability >= 100 else 2)


def estimate(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    heads: torch.Tensor,
    first_frontier: int,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass of every column and diagonal, from a few successive queries.

    Args:
        q: [rows, Hq, D], at most 64 rows. k_cache: [slots, Hkv, D]; its last dimension has stride 1.
        slots: int32 [keys], the cache row of every key. heads: int32, the query heads to estimate.
        first_frontier: how many keys the first row sees. Each row sees one key more than the row before it, and the
            last row sees all keys.
        sm_scale: factor on q . k.

    Returns:
        float32 [heads, keys] twice: mass by column, and mass by distance back from the causal frontier.

    Raises:
        ValueError: q has more than 64 rows.
    """
    num_rows, num_heads, head_dim = q.shape
    if num_rows > BLOCK:
        raise ValueError(f"q: expected at most {BLOCK} rows, got {num_rows}")
    if q.stride(2) != 1:
        q = q.contiguous()
    device, num_keys, count = q.device, len(slots), len(heads)
    tiles = -(-num_keys // BLOCK)
    tiles_each = max(4, -(-tiles * count // PROGRAMS))
    parts = -(-tiles // tiles_each)
    partial = torch.empty(count, parts, BLOCK, device=device)
    columns = torch.empty(count, tiles * BLOCK, device=device)
    diagonals = torch.empty(count, tiles + 1, BLOCK, device=device)
    carried = torch.empty(count, parts, BLOCK, device=device)
    scalars = (num_rows, num_keys, first_frontier, tiles_each, q.stride(0), q.stride(1), *k_cache.stride()[:2])
    shapes = {
        "GROUP": num_heads // k_cache.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_N": BLOCK,
    }
    options: dict[str, int] = {}
    if not interpreted():
        major, minor = torch.cuda.get_device_capability(device)
        options = configuration(head_dim, 10 * major + minor, k_cache.element_size() == 1).options
    grid = (count, parts)
    row_lse[grid](q, k_cache, slots, heads, partial, *scalars, sm_scale * LOG2_E, **shapes, **options)
    lse = torch.logsumexp(partial / LOG2_E, dim=1) * LOG2_E
    lse = lse.masked_fill(lse.isneginf(), 0)  # rows beyond those of q
    masses[grid](
        q, k_cache, slots, heads, lse, columns, diagonals, carried, *scalars, sm_scale * LOG2_E, **shapes, **options
    )
    # A part's carry belongs to the first block after it.
    diagonals[:, tiles - (parts - 1) * tiles_each : tiles : tiles_each] += carried[:, :-1].flip(1)
    diagonals[:, 0] = carried[:, -1]
    start = tiles * BLOCK + 1 - first_frontier  # distance 0
    return columns[:, :num_keys], diagonals.flatten(1)[:, start : start + num_keys]
