"""The FlashInfer executor: the same plan on FlashInfer's own paged prefill kernels. A cross-check and a fallback.

A page of FlashInfer is here one key of one KV head. So every (query tile, KV head) can be a request of its own: the
request's rows are the rows of the tile, once for each query head of the tile over that KV head. A pass runs as two
batches of such requests, which FlashInfer's `merge_state` joins:

    shared  the keys that all rows of the tile see; no mask (fa3 on Hopper, else fa2)
    masked  the keys that only some rows of the tile see, with a custom mask (fa2, because fa3 has no masks)

A key that no row sees is in neither batch, and a row that sees none of the keys in `masked` is not in that batch. So
no request has an empty row, and nothing depends on what FlashInfer makes of one.

This is not the fast path. FlashInfer plans on the host, so every new `BlockPlan` waits for the device a few times
(all layers that run the plan share the result). At page size 1 the index takes 4 bytes for each key that a tile
visits and each KV head, and each join rounds the output to its dtype once more. All runs on a device share one
workspace, so they belong on one stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

from .block_plan import PAD_POSITION, BlockPlan

BACKENDS = ("auto", "fa2", "fa3")
HEAD_DIMS = (64, 128, 256)  # FlashInfer compiles both fa2 and fa3 for these
DTYPES = (torch.float16, torch.bfloat16)
WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends for its split-k results
ALIGNMENT = 16  # bytes: FlashInfer loads keys and values in units of this size

MAX_INDEX = 1 << 28  # entries of a pass's kv_indices: 1 GiB, and a few times that while the index is made
MAX_MASK = (1 << 31) - 1  # (row, key) pairs under a mask in a pass: 256 MiB of bits
# FlashInfer has 8 MiB of work lists, with an entry for each tile of rows; it counts mask bits in int32, and packs the
# bits from booleans. A batch beyond these limits is cut into several.
MAX_REQUESTS, MAX_ROWS, MAX_MASK_AT_ONCE = 1 << 17, 1 << 22, 1 << 27


def run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: BlockPlan,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Write the attention of `plan` into `out` and `lse`. Rows that no pass visits get 0 and -inf.

    The first run of a plan waits for the device, because FlashInfer plans on the host.

    Args:
        q: [tokens, Hq, D], float16 or bfloat16. k_cache, v_cache: [slots, Hkv, D] of q's dtype or an fp8 dtype,
        and of equal strides. out: [tokens, Hq, D] of q's dtype, lse: float32 [tokens, Hq], base 2; both are
        contiguous and fully overwritten.
        sm_scale: factor on q . k.
        backend: FlashInfer's kernel for the batch without a mask: "fa2", "fa3" (Hopper only) or "auto" (fa3 on
        Hopper, else fa2). A cache of fp8 takes fa2, the only one that converts.

    Raises:
        ValueError: FlashInfer's kernels cannot run this: no GPU, a dtype or head dim that they lack, caches whose
        rows they cannot address, or a plan whose index or mask is beyond the limits above.
        ImportError: FlashInfer is not installed.
    """
    _check_tensors(q, k_cache, v_cache)
    kernel = kernel_of(backend, q.device)
    if k_cache.dtype != q.dtype:
        kernel = "fa2"
    pages = KeyPages.of(k_cache, v_cache)
    q = q.contiguous()
    out.zero_()
    lse.fill_(-torch.inf)
    merge = False
    for block_plan in plan.passes:
        for batch in _planned(block_plan, pages, q, sm_scale, kernel):
            batch.run(q, pages, out, lse, merge)
            merge = True


# ---- the cache, key by key and head by head ----------------------------------------------------------------


@dataclass(frozen=True)
class KeyPages:
    """k and v as pages of one key of one KV head: (slot, head) is page slot * per_slot + head * per_head.

    k, v: views [pages, 1, 1, D]. Pages may overlap, and some pages may hold no key: no index names those.
    """

    k: torch.Tensor
    v: torch.Tensor
    per_slot: int
    per_head: int
    num_heads: int

    @staticmethod
    def of(k_cache: torch.Tensor, v_cache: torch.Tensor) -> KeyPages:
        """The pages of caches [slots, Hkv, D].

        Raises:
            ValueError: k and v differ in shape or strides, their rows are not contiguous and aligned, or 32 bits do
            not suffice to number the pages.
        """
        _expect(k_cache.dim() == 3, "k_cache", "the shape [slots, Hkv, D]", str(tuple(k_cache.shape)))
        _expect(v_cache.shape == k_cache.shape, "v_cache", f"the shape {_shape(k_cache)} of k", _shape(v_cache))
        slots, heads, head_dim = k_cache.shape
        strides = [_strides(cache) for cache in (k_cache, v_cache)]
        _expect(strides[0] == strides[1], "v_cache", f"the strides {strides[0]} of k", str(strides[1]))
        of_slot, of_head, of_dim = strides[0]
        _expect(of_dim == 1, "k_cache", "contiguous rows (a last stride of 1)", f"strides {strides[0]}")
        # The distance between two pages must divide both strides. In a contiguous cache it is the head dim.
        step = math.gcd(of_slot, of_head) or head_dim
        aligned = step * k_cache.element_size() % ALIGNMENT == 0
        _expect(aligned, "k_cache", f"rows that begin every {ALIGNMENT} bytes", f"strides {strides[0]}")
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            begin = cache.data_ptr() % ALIGNMENT
            _expect(begin == 0, name, f"memory that begins at a multiple of {ALIGNMENT} bytes", f"{begin} beyond one")
        per_slot, per_head = of_slot // step, of_head // step
        pages = (slots - 1) * per_slot + (heads - 1) * per_head + 1 if slots and heads else 0
        most = torch.iinfo(torch.int32).max
        _expect(pages <= most, "k_cache", f"at most {most} (slot, KV head) pairs, counted in int32", str(pages))
        shape, strides_of_pages = (pages, 1, 1, head_dim), (step, head_dim, head_dim, 1)
        k, v = (cache.as_strided(shape, strides_of_pages) for cache in (k_cache, v_cache))
        return KeyPages(k, v, per_slot, per_head, heads)


def _strides(cache: torch.Tensor) -> tuple[int, ...]:
    """The strides of a tensor, but 0 for an axis of one element (except the last axis), whose stride means nothing."""
    strides = [0 if size == 1 else stride for size, stride in zip(cache.shape, cache.stride())]
    return (*strides[:-1], cache.stride(-1))


# ---- from a plan to FlashInfer's arguments -----------------------------------------------------------------


@dataclass(frozen=True)
class PagedVisits:
    """One batch as FlashInfer's paged prefill takes it, at page size 1 with one query head and one KV head.

    q_index:    int64 [rows]: row i of the batch is row q_index[i] of q viewed as [tokens * Hq, D].
    qo_indptr:  int32 [requests + 1]: where the rows of each request begin.
    kv_indptr:  int32 [requests + 1]: where the keys of each request begin in kv_indices.
    kv_indices: int32 [keys]: pages of `KeyPages`.
    seen:       int32 [rows]: row i sees the first seen[i] keys of its request. None: every row sees all keys.

    Every request has rows and keys, every row sees at least one key, and no row of q occurs twice.
    """

    q_index: torch.Tensor
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    seen: torch.Tensor | None

    @property
    def num_requests(self) -> int:
        return len(self.qo_indptr) - 1

    @property
    def last_page_len(self) -> torch.Tensor:
        """int32 [requests]: all 1, because a page holds one key."""
        return torch.ones_like(self.qo_indptr[1:])

    def custom_mask(self) -> torch.Tensor | None:
        """bool [pairs]: the [rows, keys] of each request, row by row; True where a row sees a key. None: no mask.

        The mask is not packed here. Given `packed_custom_mask`, FlashInfer 0.7.2 passes its kernel the bit at which
        a request's mask begins, but the kernel expects the byte (FlashInfer's pull request 2201). Given booleans,
        FlashInfer packs them itself, correctly.
        """
        if self.seen is None:
            return None
        keys = torch.repeat_interleave(self.kv_indptr.diff(), self.qo_indptr.diff(), output_size=len(self.seen))
        end = keys.cumsum(0)
        # The pairs of a row begin at b = end - keys, and the row sees the pairs i < b + seen.
        bound = torch.repeat_interleave((end - keys + self.seen).int(), keys)
        return torch.arange(len(bound), dtype=torch.int32, device=bound.device) < bound

    def cut(self) -> Iterator[PagedVisits]:
        """The same requests in batches that fit into FlashInfer's own arrays.

        Raises:
            ValueError: the masks of all requests together are beyond MAX_MASK.
        """
        rows, keys = self.qo_indptr.tolist(), self.kv_indptr.tolist()
        pairs = [0] * len(rows)  # (row, key) pairs under a mask, before each request
        if self.seen is not None:
            sizes = (self.qo_indptr.diff().long() * self.kv_indptr.diff()).tolist()
            pairs = list(accumulate(sizes, initial=0))
        _expect(
            pairs[-1] <= MAX_MASK,
            "plan",
            f"at most {MAX_MASK} (row, key) pairs under a mask (a bit each, for each query head)",
            str(pairs[-1]),
        )

        def fits(first: int, last: int) -> bool:
            return (
                last - first <= MAX_REQUESTS
                and rows[last] - rows[first] <= MAX_ROWS
                and pairs[last] - pairs[first] <= MAX_MASK_AT_ONCE
            )

        first = 0
        for last in range(1, self.num_requests + 1):
            if last == self.num_requests or not fits(first, last + 1):
                yield self._requests(first, last, slice(rows[first], rows[last]), slice(keys[first], keys[last]))
                first = last

    def _requests(self, first: int, last: int, rows: slice, keys: slice) -> PagedVisits:
        return PagedVisits(
            self.q_index[rows],
            self.qo_indptr[first : last + 1] - rows.start,
            self.kv_indptr[first : last + 1] - keys.start,
            self.kv_indices[keys],
            None if self.seen is None else self.seen[rows],
        )


@dataclass(frozen=True)
class _TileLists:
    """The rows and the keys of all query tiles, one tile after the other.

    rows, slots:            int32, rows of q and rows of the cache.
    row_indptr, key_indptr: int64 [T + 1], where the rows and the keys of each tile begin.
    seen:                   int32, one for each row, as in `PagedVisits`.
    """

    rows: torch.Tensor
    row_indptr: torch.Tensor
    slots: torch.Tensor
    key_indptr: torch.Tensor
    seen: torch.Tensor | None


@dataclass(frozen=True)
class _HeadTable:
    """The query heads of each head group by their KV head. An entry is a (group, KV head) pair. All int64.

    entries:  [groups + 1], where the entries of each group begin.
    kv_head:  [entries], the KV head of each entry.
    heads_at: [entries + 1], where the query heads of each entry begin in `heads`.
    heads:    the query heads of all entries.
    """

    entries: torch.Tensor
    kv_head: torch.Tensor
    heads_at: torch.Tensor
    heads: torch.Tensor

    @staticmethod
    def of(head_groups: tuple[tuple[int, ...], ...], per_kv_head: int, device: torch.device) -> _HeadTable:
        by_group = [
            [
                (kv, [head for head in heads if head // per_kv_head == kv])
                for kv in sorted({h // per_kv_head for h in heads})
            ]
            for heads in head_groups
        ]
        entries = [entry for group in by_group for entry in group]
        lists = (
            accumulate((len(group) for group in by_group), initial=0),
            (kv for kv, _ in entries),
            accumulate((len(heads) for _, heads in entries), initial=0),
            (head for _, heads in entries for head in heads),
        )
        return _HeadTable(*(torch.tensor(list(x), dtype=torch.int64, device=device) for x in lists))


def paged_visits(
    plan: BlockPlan, num_heads: int, num_kv_heads: int, per_slot: int, per_head: int
) -> tuple[PagedVisits, PagedVisits]:
    """The batches `shared` and `masked` of a pass; the module's docstring says which keys and rows are in each.

    Args:
        plan: one pass. num_heads, num_kv_heads: Hq and Hkv.
        per_slot, per_head: how `KeyPages` numbers its pages.

    Raises:
        ValueError: the index would have more than MAX_INDEX entries.
    """
    table = _HeadTable.of(plan.head_groups, num_heads // num_kv_heads, plan.q_rows.device)
    entries = table.entries.diff()[plan.q_heads.long()]
    visited = int((plan.block_indptr.diff().long() * entries).sum()) * plan.block_k
    _expect(
        visited <= MAX_INDEX,
        "plan",
        f"at most {MAX_INDEX} visited keys (4 bytes each, over all query tiles and their KV heads)",
        str(visited),
    )
    shared, masked = (
        _requests_of(plan, lists, table, num_heads, per_slot, per_head) for lists in _shared_and_masked(plan)
    )
    return shared, masked


def _shared_and_masked(plan: BlockPlan) -> tuple[_TileLists, _TileLists]:
    """For each tile: the keys that all rows see, with all rows; the keys that only some rows see, with those rows."""
    tiles = torch.arange(plan.num_tiles, device=plan.q_rows.device)
    tile_of_row = torch.repeat_interleave(tiles, plan.q_indptr.diff(), output_size=len(plan.q_rows))
    blank = torch.zeros(plan.num_tiles, dtype=torch.int32, device=tiles.device)
    lowest = blank.scatter_reduce(0, tile_of_row, plan.q_stop, "amin", include_self=False)
    highest = blank.scatter_reduce(0, tile_of_row, plan.q_stop, "amax", include_self=False)

    tile, slots, position = _visited_lanes(plan)
    by_any = position < highest[tile][:, None]
    by_all = by_any & (position < lowest[tile][:, None])
    lane_tile = tile[:, None].expand(position.shape)
    shared = _TileLists(
        plan.q_rows, plan.q_indptr.long(), slots[by_all], _indptr(lane_tile[by_all], plan.num_tiles), None
    )

    by_some = by_any & ~by_all
    tile_of_key = lane_tile[by_some]
    # With the keys of a tile sorted by position, a row sees the first keys. Their number is the index at which the
    # row's bound would be inserted.
    in_order, order = (tile_of_key * PAD_POSITION + position[by_some]).sort()
    key_indptr = _indptr(tile_of_key, plan.num_tiles)
    seen = torch.searchsorted(in_order, tile_of_row * PAD_POSITION + plan.q_stop) - key_indptr[tile_of_row]
    sees = seen > 0
    masked = _TileLists(
        plan.q_rows[sees],
        _indptr(tile_of_row[sees], plan.num_tiles),
        slots[by_some][order],
        key_indptr,
        seen[sees].to(torch.int32),
    )
    return shared, masked


def _visited_lanes(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each visit: the query tile, int64 [nnz], and the slots and positions of the keys, int32 [nnz, block_k].

    An excluded lane has the position of padding, which no row sees.
    """
    tile, number = plan.visits()
    slots = plan.keys.kv_slots.view(-1, plan.block_k)[plan.visited_blocks(tile, number)]
    return tile, slots, plan.visited_positions(tile, number)


def _requests_of(
    plan: BlockPlan, lists: _TileLists, table: _HeadTable, num_heads: int, per_slot: int, per_head: int
) -> PagedVisits:
    """One request for each tile that has rows and keys and each of its KV heads; query heads become further rows."""
    rows, keys = lists.row_indptr.diff(), lists.key_indptr.diff()
    tile = (rows * keys).nonzero().flatten()
    group = plan.q_heads[tile].long()
    count = table.entries.diff()[group]
    entry, tile = _ranges(table.entries[group], count), torch.repeat_interleave(tile, count)

    heads = table.heads_at.diff()[entry]
    head, tile_of_head = table.heads[_ranges(table.heads_at[entry], heads)], torch.repeat_interleave(tile, heads)
    row = _ranges(lists.row_indptr[tile_of_head], rows[tile_of_head])
    head = torch.repeat_interleave(head, rows[tile_of_head])

    slot = lists.slots[_ranges(lists.key_indptr[tile], keys[tile])]
    offset = torch.repeat_interleave((table.kv_head[entry] * per_head).int(), keys[tile])
    return PagedVisits(
        lists.rows[row].long() * num_heads + head,
        _from_counts(rows[tile] * heads).int(),
        _from_counts(keys[tile]).int(),
        slot * per_slot + offset,
        None if lists.seen is None else lists.seen[row],
    )


def _from_counts(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _indptr(owners: torch.Tensor, number: int) -> torch.Tensor:
    """int64 [number + 1]: where the elements of each owner begin in `owners`, which is ascending."""
    return torch.searchsorted(owners, torch.arange(number + 1, device=owners.device))


def _ranges(starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """int32: starts[0], starts[0] + 1, ... (counts[0] of them), then starts[1], and so on."""
    shift = (starts - (counts.cumsum(0) - counts)).int()
    shift = torch.repeat_interleave(shift, counts)
    return shift + torch.arange(len(shift), dtype=torch.int32, device=shift.device)


# ---- FlashInfer --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """A planned FlashInfer wrapper, and the rows that it computes of q viewed as [tokens * Hq, D]."""

    wrapper: Any
    q_index: torch.Tensor

    def run(self, q: torch.Tensor, pages: KeyPages, out: torch.Tensor, lse: torch.Tensor, merge: bool) -> None:
        """Write the batch's rows of `out` and `lse`. With `merge`, join them with what `out` and `lse` hold."""
        import flashinfer

        index = self.q_index
        rows, rows_out, rows_lse = q.view(-1, q.shape[-1]), out.view(-1, q.shape[-1]), lse.view(-1)
        o, s = self.wrapper.run(rows[index][:, None], (pages.k, pages.v), return_lse=True)
        if merge:
            o, s = flashinfer.merge_state(rows_out[index][:, None], rows_lse[index][:, None], o, s)
        rows_out[index] = o[:, 0]
        rows_lse[index] = s[:, 0]


def _planned(plan: BlockPlan, pages: KeyPages, q: torch.Tensor, sm_scale: float, kernel: str) -> list[_Batch]:
    """The batches of a pass, in any order. They are planned once and kept with the plan for all layers of one shape."""
    num_heads, head_dim = q.shape[1:]
    key = (
        "flashinfer",
        num_heads,
        pages.num_heads,
        pages.per_slot,
        pages.per_head,
        head_dim,
        q.dtype,
        pages.k.dtype,
        sm_scale,
        kernel,
    )
    if key not in plan.derived:
        shared, masked = paged_visits(plan, num_heads, pages.num_heads, pages.per_slot, pages.per_head)
        plan.derived[key] = [
            _Batch(_planned_wrapper(part, head_dim, (q.dtype, pages.k.dtype), sm_scale, name), part.q_index)
            for visits, name in ((shared, kernel), (masked, "fa2"))
            for part in visits.cut()
        ]
    return plan.derived[key]


def _planned_wrapper(
    visits: PagedVisits, head_dim: int, dtypes: tuple[torch.dtype, torch.dtype], sm_scale: float, kernel: str
) -> Any:
    import flashinfer

    workspace = _workspace(visits.q_index.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=kernel)
    wrapper.plan(
        visits.qo_indptr,
        visits.kv_indptr,
        visits.kv_indices,
        visits.last_page_len,
        num_qo_heads=1,
        num_kv_heads=1,
        head_dim_qk=head_dim,
        page_size=1,
        custom_mask=visits.custom_mask(),
        causal=False,
        sm_scale=sm_scale,
        q_data_type=dtypes[0],
        kv_data_type=dtypes[1],
    )
    return wrapper


@lru_cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def kernel_of(backend: str, device: torch.device) -> str:
    """ "fa2" or "fa3": the kernel for the batch without a mask."""
    _expect(backend in BACKENDS, "backend", "one of " + ", ".join(BACKENDS), repr(backend))
    _expect(device.type == "cuda", "q", "a tensor on a GPU", str(device))
    capability = torch.cuda.get_device_capability(device)
    hopper = capability == (9, 0)
    got = f"{backend!r} on {capability[0]}.{capability[1]}"
    _expect(backend != "fa3" or hopper, "backend", "fa2 or auto on a card that is no Hopper (9.0)", got)
    return ("fa3" if hopper else "fa2") if backend == "auto" else backend


def _check_tensors(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    _expect(q.dtype in DTYPES, "q", "one of the dtypes " + ", ".join(map(str, DTYPES)), str(q.dtype))
    _expect(q.shape[-1] in HEAD_DIMS, "q", f"one of the head dims {HEAD_DIMS}", str(q.shape[-1]))
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        fits = cache.dtype == k_cache.dtype and cache.dtype in (q.dtype, torch.float8_e4m3fn, torch.float8_e5m2)
        _expect(fits, name, f"the dtype {q.dtype} of q, or both of one fp8 dtype", str(cache.dtype))


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def _expect(condition: bool, name: str, expected: str, got: str) -> None:
    if not condition:
        raise ValueError(f"flashinfer executor: {name}: expected {expected}, got {got}")
