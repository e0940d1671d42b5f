"""Which keys any row of a query tile asks for by a low-rank score, decided for all heads and query tiles at once.

A row asks for a key if (A q) . (B k) lies above the row's bound: the log-mass of what the row sees anyway, times a
factor. Four kernels decide and collect, and the host waits for none of them:

* `low_rank_keys` writes B k, once for all rows.
* `low_rank_queries` finds the bound of each row from its exact scores, and writes A q and the bound.
* `any_row_above` multiplies both on the matrix unit, and says of each key whether any row of a tile asks for it.
* `asked_side_by_side` writes the numbers of these keys where a plan wants them.

The matrix unit multiplies halves. So a number is cut into two of them, high and low, with 22 bits together, and three
products of the four are summed in float32: what is left out is as small as float32's own rounding. The bound is two
more products, with 1. A row's columns are negated, so that the sum is bound minus score and has its sign bit set where
the row asks: what is left to do for a score is a minimum over the rows.

    columns of a key:     high    low     high   1            1           0 ...
    columns of a query:  -high   -high   -low    bound, high  bound, low  0 ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from ..indexing import to_device
from . import interpreted

# ---- how it is compiled --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScanConfiguration:
    """How the kernels are compiled.

    rows:  what a query tile is filled up to.
    keys:  keys that a program of the scan takes at a time. heads: query heads for which it takes them.
    span:  keys of a program of the scan.
    The other fields are Triton's compiler options, of the scan.
    """

    rows: int
    keys: int
    heads: int
    span: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


INTERPRETED = ScanConfiguration(rows=16, keys=16, heads=2, span=48, num_warps=4, num_stages=1)
"""Little of everything, so that small tests have several."""

KEYS = 64  # keys that the kernels beside the scan take at a time
OPTIONS = {"num_warps": 8, "num_stages": 2}  # their compiler options


def configuration(rank: int, capability: int) -> ScanConfiguration:
    """How to compile for a GPU of compute capability `capability` (80 means 8.0). Not tuned: these have the fewest
    instructions for a score of those that spill no registers."""
    if capability >= 100 and capability < 120:
        return ScanConfiguration(128, keys=128, heads=2, span=2048, num_warps=4, num_stages=2)
    if capability == 90:
        return ScanConfiguration(128, keys=64, heads=2, span=2048, num_warps=4, num_stages=3)
    return ScanConfiguration(128, keys=64, heads=1, span=2048, num_warps=4, num_stages=2)


def configuration_on(device: torch.device, rank: int, most_rows: int) -> ScanConfiguration:
    """The same for a device, and for query tiles of at most so many rows."""
    chosen = INTERPRETED
    if not interpreted():
        major, minor = torch.cuda.get_device_capability(device)
        chosen = configuration(rank, 10 * major + minor)
    if most_rows <= chosen.rows:
        return chosen
    return replace(chosen, rows=triton.next_power_of_2(most_rows), heads=1)


def width_of(rank: int) -> int:
    """Columns of a key, of 2 bytes each: what a token takes in what `project_keys` gives."""
    return max(16, triton.next_power_of_2(3 * rank + 2))


def parts_of(dtype: torch.dtype) -> int:
    """Into how many numbers of a dtype the basis is cut, so that products with queries and keys lose nothing."""
    return {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}[dtype]


# ---- kernels -------------------------------------------------------------------------------------------------


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


# ---- launches ------------------------------------------------------------------------------------------------

Ints = NDArray[np.integer]


class ScannedTiles(NamedTuple):
    """T query tiles, on the host, integers [T].

    first_row, num_rows:        the rows of a tile among those of all tiles.
    window_start, window_stop:  the keys that hold the windows of all of its rows.
    first_key, num_keys:        the keys that its rows may ask for; all lie behind the sink and before the windows. A
                                tile without any is left out.
    place:                      where these keys begin in a row of `Asked.keys`.
    """

    first_row: Ints
    num_rows: Ints
    window_start: Ints
    window_stop: Ints
    first_key: Ints
    num_keys: Ints
    place: Ints


@dataclass(frozen=True)
class Asked:
    """What query tiles ask for.

    keys: int8 [H, N], of all query tiles one after the other, 1: it is asked for. counts: int32 [H, T, S], how many of
    each span. tiles: `ScannedTiles` on the device.
    """

    keys: torch.Tensor
    counts: torch.Tensor
    tiles: torch.Tensor
    span: int


def project_keys(
    k_cache: torch.Tensor, slots: torch.Tensor, forms: Sequence[tuple[int, int]], basis: torch.Tensor, rank: int
) -> torch.Tensor:
    """B k for some pairs of KV head and B.

    Args:
        k_cache: [slots, Hkv, D]; its last dimension has stride 1. slots: int32 [N], the cache row of every key.
        forms: KV heads and numbers in the basis. basis: float32 [n, R, D], contiguous. rank: how many of the R rows.

    Returns:
        float16 [len(forms), more than N, width_of(rank)], see above; whatever is behind the last key means nothing.
    """
    num_keys, (head_dim, width) = len(slots), (k_cache.shape[2], width_of(rank))
    low = k_cache.new_empty(len(forms), num_keys + 128, width, dtype=torch.float16)  # a tile of the scan, at most
    (table,) = to_device(k_cache.device, np.array(forms))
    low_rank_keys[(triton.cdiv(num_keys, KEYS), len(forms))](
        k_cache,
        slots,
        table,
        basis,
        low,
        num_keys,
        k_cache.stride(0),
        k_cache.stride(1),
        basis.stride(0),
        low.stride(0),
        PARTS=parts_of(k_cache.dtype),
        KEYS=KEYS,
        **sizes_of(head_dim, rank),
        **({} if interpreted() else OPTIONS),
    )
    return low


def scan(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    low_keys: torch.Tensor,
    forms: Sequence[tuple[int, int]],
    heads: Sequence[Sequence[int]],
    basis: tuple[torch.Tensor, torch.Tensor],
    rank: int,
    rows: torch.Tensor,
    keys_of_row: torch.Tensor,
    tiles: ScannedTiles,
    sink: int,
    local: int,
    sm_scale: float,
    extra: float,
) -> Asked:
    """What query tiles ask for: every key whose score lies above the log-mass of sink and window plus `extra`.

    Args:
        q: [rows of the chunk, Hq, D]; its last dimension has stride 1. k_cache, slots, forms: as in `project_keys`,
            which gave low_keys.
        heads: the query heads of each form, H in all; results are in this order.
        basis: A and B, float32 [n, R, D] each, contiguous.
        rows: int64 [R], numbers in q, tile by tile. keys_of_row: int32 [R], keys of the class up to each.
        sink, local: how many keys every row sees at the beginning, and up to itself.
        sm_scale: factor on q . k.
    """
    device, (head_dim, num_tiles) = q.device, (q.shape[2], len(tiles.num_rows))
    chosen = configuration_on(device, rank, int(tiles.num_rows.max(initial=1)))
    if max(map(len, heads)) == 1:
        chosen = replace(chosen, heads=1)
    of_heads = np.array([(head, *form) for form, own in zip(forms, heads) for head in own])
    firsts = np.cumsum([0, *map(len, heads)])
    groups = np.array(
        [
            (number, firsts[number] + at, min(chosen.heads, len(own) - at))
            for number, own in enumerate(heads)
            for at in range(0, len(own), chosen.heads)
        ]
    )
    table, head_table, group_table = to_device(device, np.stack(tiles), of_heads, groups)
    sizes, num_heads, options = sizes_of(head_dim, rank), len(of_heads), {} if interpreted() else OPTIONS
    low_queries = q.new_empty(num_heads, num_tiles, chosen.rows, sizes["WIDTH"], dtype=torch.float16)
    low_rank_queries[(num_tiles, num_heads)](
        q,
        k_cache,
        slots,
        rows,
        keys_of_row,
        table,
        head_table,
        *basis,
        low_queries,
        num_tiles,
        sink,
        local,
        sm_scale,
        extra,
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        basis[0].stride(0),
        PARTS=parts_of(q.dtype),
        ROWS=chosen.rows,
        KEYS=KEYS,
        **sizes,
        **options,
    )
    num_asked, spans = int(tiles.num_keys.sum()), max(1, triton.cdiv(int(tiles.num_keys.max(initial=0)), chosen.span))
    asked = torch.empty(num_heads, num_asked, dtype=torch.int8, device=device)
    counts = torch.zeros(num_heads, num_tiles, spans, dtype=torch.int32, device=device)
    any_row_above[(num_tiles, spans, len(groups))](
        low_keys,
        low_queries,
        table,
        group_table,
        asked,
        counts,
        num_tiles,
        num_asked,
        low_keys.stride(0),
        ROWS=chosen.rows,
        KEYS=chosen.keys,
        HEADS=chosen.heads,
        SPAN=chosen.span,
        WIDTH=sizes["WIDTH"],
        **({} if interpreted() else chosen.options),
    )
    return Asked(asked, counts, table, chosen.span)


def side_by_side(asked: Asked, first_lanes: torch.Tensor, taken: torch.Tensor, lanes: torch.Tensor) -> None:
    """Write the numbers of the keys that are asked for into `lanes`, those of each head and query tile ascending.

    Args:
        first_lanes: int64 [H, T], where those of each begin. taken: bool [H, T], False: none of them.
        lanes: int32, with room for all that are taken.
    """
    (num_heads, num_tiles, spans), num_asked = asked.counts.shape, asked.keys.shape[1]
    before = asked.counts.cumsum(2) - asked.counts
    at = (before + first_lanes[..., None]).masked_fill(~taken[..., None], -1)
    asked_side_by_side[(num_tiles, spans, num_heads)](
        asked.keys,
        asked.tiles,
        at,
        lanes,
        num_tiles,
        num_asked,
        SPAN=asked.span,
        BLOCK=min(1024, triton.next_power_of_2(asked.span)),
        **({} if interpreted() else {"num_warps": 4}),
    )


def sizes_of(head_dim: int, rank: int) -> dict[str, int]:
    """Constants of the kernels that project."""
    return {
        "RANK": rank,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_R": max(16, triton.next_power_of_2(rank)),
        "WIDTH": width_of(rank),
    }
