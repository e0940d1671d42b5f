"""The kernels that choose keys by low-rank scores; `low_rank_scan.py` says what they do together, and launches them.

The matrix unit multiplies halves. So a number is cut into two of them, high and low, with 22 bits together, and three
products of the four are summed in float32: what is left out is as small as float32's own rounding. The bound is two
more products, with 1. A row's columns are negated, so that the sum is bound minus score and has its sign bit set where
the row asks: what is left to do for a score is a minimum over the rows.

    columns of a key:     high    low     high   1            1           0 ...
    columns of a query:  -high   -high   -low    bound, high  bound, low  0 ...
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fences import fenced


@triton.jit
def _form(basis, number, stride_form, ranks, dims, RANK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """float32 [BLOCK_R, BLOCK_D]: the rows of A or B, and 0 beside them."""
    inside = (ranks < RANK)[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = basis + number.to(tl.int64) * stride_form + ranks[:, None] * HEAD_DIM + dims[None, :]
    return tl.load(offsets, mask=inside, other=0.0)


@triton.jit
def _lengths(form):
    """float32 [BLOCK_R]: the lengths of the rows of B, 1 for those of 0. Keys are divided by them and queries are
    multiplied, so that both are numbers that halves can hold, however the basis is scaled."""
    squares = tl.sum(form * form, 1)
    return tl.where(squares > 0, tl.sqrt(squares), 1.0)


@triton.jit
def _product(x, form, PARTS: tl.constexpr):
    """float32 [rows, BLOCK_R]: x times the rows of a form, which is cut into numbers of the dtype of x."""
    part = form.to(x.dtype)
    low = tl.dot(x, tl.trans(part), input_precision="ieee")
    for _ in tl.static_range(PARTS - 1):
        form -= part.to(tl.float32)
        part = form.to(x.dtype)
        low = tl.dot(x, tl.trans(part), low, input_precision="ieee")
    return low


@triton.jit
def _halves(x):
    """float32 -> two of float16 whose sum it is, nearly."""
    x = tl.minimum(tl.maximum(x, -60000.0), 60000.0)
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@fenced
@triton.jit(do_not_specialize=["num_keys"], do_not_specialize_on_alignment=["slots", "forms", "basis_keys"])
def low_rank_keys(
    k_cache,
    slots,
    forms,
    basis_keys,
    low_keys,
    num_keys,
    stride_k,
    stride_k_head,
    stride_form,
    stride_low_keys,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (i, f) writes the keys i * KEYS and following of low_keys[f]."""
    form_row = forms + 2 * tl.program_id(1)
    kv_head, number = tl.load(form_row), tl.load(form_row + 1)
    key, dims = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    in_keys = key < num_keys
    slot = tl.load(slots + key, mask=in_keys, other=0).to(tl.int64)
    offsets = k_cache + kv_head.to(tl.int64) * stride_k_head + slot[:, None] * stride_k + dims[None, :]
    k = tl.load(offsets, mask=in_keys[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if k.dtype.is_fp8():
        k = k.to(tl.float16)  # which has all of fp8's numbers
    ranks, columns = tl.arange(0, BLOCK_R), tl.arange(0, WIDTH)
    form = _form(basis_keys, number, stride_form, ranks, dims, RANK, HEAD_DIM)
    high, low = _halves(_product(k, form / _lengths(form)[:, None], PARTS))
    row = low_keys + tl.program_id(1).to(tl.int64) * stride_low_keys + key.to(tl.int64)[:, None] * WIDTH
    inside = in_keys[:, None] & (ranks < RANK)[None, :]
    tl.store(row + ranks[None, :], high, mask=inside)
    tl.store(row + RANK + ranks[None, :], low, mask=inside)
    tl.store(row + 2 * RANK + ranks[None, :], high, mask=inside)
    ones = tl.where(columns < 3 * RANK + 2, 1.0, 0.0).to(tl.float16)
    rest = in_keys[:, None] & (columns >= 3 * RANK)[None, :]
    tl.store(row + columns[None, :], tl.broadcast_to(ones[None, :], KEYS, WIDTH), mask=rest)


@fenced
@triton.jit(
    do_not_specialize=["num_tiles", "sink", "local"],
    do_not_specialize_on_alignment=["slots", "rows", "keys_of_row", "tiles", "heads", "basis_queries", "basis_keys"],
)
def low_rank_queries(
    q,
    k_cache,
    slots,
    rows,
    keys_of_row,
    tiles,
    heads,
    basis_queries,
    basis_keys,
    low_queries,
    num_tiles,
    sink,
    local,
    scale,
    extra,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_form,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (t, h) writes low_queries[h, t], [ROWS, WIDTH]. Rows that the tile lacks ask for nothing."""
    tile, head_row = tl.program_id(0), heads + 3 * tl.program_id(1)
    of_tile = tiles + tile
    first_row, num_rows = tl.load(of_tile), tl.load(of_tile + num_tiles)
    window_start, window_stop = tl.load(of_tile + 2 * num_tiles), tl.load(of_tile + 3 * num_tiles)
    if tl.load(of_tile + 5 * num_tiles) == 0:
        return
    head, kv_head, number = tl.load(head_row), tl.load(head_row + 1), tl.load(head_row + 2)
    lane, lanes, dims = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    in_tile, in_head = lane < num_rows, dims < HEAD_DIM
    row = tl.load(rows + first_row + lane, mask=in_tile, other=0).to(tl.int64)
    window_end = tl.load(keys_of_row + first_row + lane, mask=in_tile, other=0)
    q_offsets = q + row[:, None] * stride_q + head.to(tl.int64) * stride_q_head + dims[None, :]
    q_tile = tl.load(q_offsets, mask=in_tile[:, None] & in_head[None, :], other=0.0)

    # The log-mass of sink and window, base 2.
    k_head = k_cache + kv_head.to(tl.int64) * stride_k_head
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    sink_steps = tl.cdiv(sink, KEYS)
    for step in range(0, sink_steps + tl.cdiv(window_stop - window_start, KEYS)):
        in_sink = step < sink_steps
        key = lanes + (step * KEYS if in_sink else window_start + (step - sink_steps) * KEYS)
        in_keys = key < (sink if in_sink else window_stop)
        slot = tl.load(slots + key, mask=in_keys, other=0).to(tl.int64)
        k_offsets = k_head + slot[:, None] * stride_k + dims[None, :]
        k = tl.load(k_offsets, mask=in_keys[:, None] & in_head[None, :], other=0.0).to(q_tile.dtype)
        scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        in_window = (key[None, :] < window_end[:, None]) & (key[None, :] >= window_end[:, None] - local)
        scores = tl.where(in_keys[None, :] & (in_window | in_sink), scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp2(running_max - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        running_max = new_max
    bound = (running_max + tl.log2(tl.where(in_tile, running_sum, 1.0))) * 0.6931471805599453 + extra
    bound_high, bound_low = _halves(tl.where(in_tile, bound, 60000.0))

    ranks, columns = tl.arange(0, BLOCK_R), tl.arange(0, WIDTH)
    lengths = _lengths(_form(basis_keys, number, stride_form, ranks, dims, RANK, HEAD_DIM))
    form = _form(basis_queries, number, stride_form, ranks, dims, RANK, HEAD_DIM)
    high, low = _halves(_product(q_tile, form * (lengths * -scale)[:, None], PARTS))
    out = low_queries + ((tl.program_id(1) * num_tiles + tile).to(tl.int64) * ROWS + lane[:, None]) * WIDTH
    inside = tl.broadcast_to((ranks < RANK)[None, :], ROWS, BLOCK_R)
    tl.store(out + ranks[None, :], high, mask=inside)
    tl.store(out + RANK + ranks[None, :], high, mask=inside)
    tl.store(out + 2 * RANK + ranks[None, :], low, mask=inside)
    rest = tl.where((columns == 3 * RANK)[None, :], bound_high[:, None], bound_low[:, None])
    rest = tl.where((columns < 3 * RANK + 2)[None, :], rest, 0.0)
    tl.store(out + columns[None, :], rest, mask=tl.broadcast_to((columns >= 3 * RANK)[None, :], ROWS, WIDTH))


@fenced
@triton.jit(do_not_specialize=["num_tiles", "num_asked"], do_not_specialize_on_alignment=["tiles", "groups"])
def any_row_above(
    low_keys,
    low_queries,
    tiles,
    groups,
    asked,
    counts,
    num_tiles,
    num_asked,
    stride_low_keys,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (t, s, g) decides the keys s * SPAN and following of query tile t, for the heads of group g.

    It writes them into asked [H, num_asked], and how many are asked for into counts [H, T, spans].
    """
    tile, span, of_tile = tl.program_id(0), tl.program_id(1), tiles + tl.program_id(0)
    first_key, num_keys = tl.load(of_tile + 4 * num_tiles), tl.load(of_tile + 5 * num_tiles)
    place, begin = tl.load(of_tile + 6 * num_tiles), span * SPAN
    if begin >= num_keys:
        return
    group = groups + 3 * tl.program_id(2)
    form, first_head, num_heads = tl.load(group), tl.load(group + 1), tl.load(group + 2)
    lanes, columns, row, number = (
        tl.arange(0, KEYS),
        tl.arange(0, WIDTH),
        tl.arange(0, HEADS * ROWS),
        tl.arange(0, HEADS),
    )
    in_group = (number < num_heads)[None, :]
    head = first_head + tl.minimum(row // ROWS, num_heads - 1)
    q_row = (head * num_tiles + tile).to(tl.int64) * ROWS + row % ROWS
    q = tl.load(low_queries + q_row[:, None] * WIDTH + columns[None, :])
    keys = low_keys + form.to(tl.int64) * stride_low_keys + (first_key + begin).to(tl.int64) * WIDTH
    out = asked + (first_head + number).to(tl.int64)[None, :] * num_asked + place + begin
    stop = tl.minimum(num_keys - begin, SPAN)
    count = tl.zeros([KEYS, HEADS], tl.int32)
    for start in range(0, stop, KEYS):
        lane = start + lanes
        k = tl.load(keys + lane[:, None] * WIDTH + columns[None, :])  # there is room behind the last key
        below = tl.reshape(tl.dot(k, tl.trans(q)), [KEYS, HEADS, ROWS])
        # The sign bit is that of an integer, too, and a minimum of integers takes fewer instructions.
        is_asked = (tl.min(below.to(tl.int32, bitcast=True), 2) < 0) & (lane < stop)[:, None]
        tl.store(out + lane[:, None], is_asked.to(tl.int8), mask=(lane < stop)[:, None] & in_group)
        count += is_asked.to(tl.int32)
    at = ((first_head + number) * num_tiles + tile) * tl.num_programs(1) + span
    tl.store(counts + at, tl.sum(count, 0), mask=number < num_heads)


@triton.jit(do_not_specialize=["num_tiles", "num_asked"], do_not_specialize_on_alignment=["tiles"])
def asked_side_by_side(asked, tiles, first_lanes, lanes, num_tiles, num_asked, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Program (t, s, h) writes the numbers of the keys that `any_row_above` found in one span, from
    lanes[first_lanes[h, t, s]] on; none, if that is negative."""
    tile, span, head, of_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2), tiles + tl.program_id(0)
    first_key, num_keys = tl.load(of_tile + 4 * num_tiles), tl.load(of_tile + 5 * num_tiles)
    begin = span * SPAN
    at = tl.load(first_lanes + (head * num_tiles + tile) * tl.num_programs(1) + span)
    if (begin >= num_keys) | (at < 0):
        return
    row = asked + head.to(tl.int64) * num_asked + tl.load(of_tile + 6 * num_tiles) + begin
    stop = tl.minimum(num_keys - begin, SPAN)
    for start in range(0, stop, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        is_asked = tl.load(row + lane, mask=lane < stop, other=0).to(tl.int32)
        upto = tl.cumsum(is_asked, 0)
        tl.store(lanes + at + upto - 1, (first_key + begin + lane).to(lanes.dtype.element_ty), mask=is_asked > 0)
        at += tl.sum(is_asked, 0)
