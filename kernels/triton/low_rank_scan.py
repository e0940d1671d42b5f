"""Which keys any row of a query tile asks for by a low-rank score, decided for all heads and query tiles at once.

A row asks for a key if (A q) . (B k) lies above the row's bound: the log-mass of what the row sees anyway, times a
factor. Four kernels decide and collect, and the host waits for none of them:

* `low_rank_keys` writes B k, once for all rows.
* `low_rank_queries` finds the bound of each row from its exact scores, and writes A q and the bound.
* `any_row_above` multiplies both on the matrix unit, and says of each key whether any row of a tile asks for it.
* `asked_side_by_side` writes the numbers of these keys where a plan wants them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from ..indexing import to_device
from . import interpreted
from .low_rank_kernels import any_row_above, asked_side_by_side, low_rank_keys, low_rank_queries

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


def configuration(capability: int) -> ScanConfiguration:
    """How to compile for a GPU of compute capability `capability` (80 means 8.0). Not tuned: these have the fewest
    instructions for a score of those that spill no registers."""
    if 100 <= capability < 120:
        return ScanConfiguration(64, keys=128, heads=4, span=2048, num_warps=4, num_stages=2)
    if capability == 90:
        return ScanConfiguration(64, keys=64, heads=4, span=2048, num_warps=4, num_stages=3)
    return ScanConfiguration(64, keys=128, heads=2, span=2048, num_warps=4, num_stages=2)


def configuration_on(device: torch.device, most_rows: int) -> ScanConfiguration:
    """The same for a device, and for query tiles of at most so many rows."""
    chosen = INTERPRETED
    if not interpreted():
        major, minor = torch.cuda.get_device_capability(device)
        chosen = configuration(10 * major + minor)
    if most_rows <= chosen.rows:
        return chosen
    return replace(chosen, rows=triton.next_power_of_2(most_rows), heads=1)


def width_of(rank: int) -> int:
    """Columns of a key, of 2 bytes each: what a token takes in what `project_keys` gives."""
    return max(16, triton.next_power_of_2(3 * rank + 2))


def parts_of(dtype: torch.dtype) -> int:
    """Into how many numbers of a dtype the basis is cut, so that products with queries and keys lose nothing. Keys of
    an fp8 dtype are multiplied as float16."""
    return {torch.float32: 1, torch.bfloat16: 3}.get(dtype, 2)


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
        float16 [len(forms), more than N, width_of(rank)], see `low_rank_kernels.py`. What is behind the last key means
        nothing.
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
    chosen = configuration_on(device, int(tiles.num_rows.max(initial=1)))
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
