"""A ragged batch over a paged KV cache in FlashInfer's form, as chunks of requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.planning.checks import expect, int_tensor, integers
from sglang_mminfer.planning.chunk import RequestChunk


@dataclass(frozen=True)
class PagedBatch:
    """requests: one chunk for each request, those without rows included. num_pages: how many pages the cache needs."""

    requests: tuple[RequestChunk, ...]
    num_rows: int
    num_pages: int


def paged_batch(
    qo_indptr: torch.Tensor,
    paged_kv_indptr: torch.Tensor,
    paged_kv_indices: torch.Tensor,
    paged_kv_last_page_len: torch.Tensor,
    page_size: int,
    modality_maps: Sequence[ModalityMap],
) -> PagedBatch:
    """The arguments are those of `SparsePrefillWithPagedKVCacheWrapper.plan`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    row_starts = integers("qo_indptr", qo_indptr)
    page_starts = integers("paged_kv_indptr", paged_kv_indptr)
    last_page_len = integers("paged_kv_last_page_len", paged_kv_last_page_len)
    batch = len(row_starts) - 1
    expect(batch >= 0 and row_starts[0] == 0, "qo_indptr", "batch + 1 values from 0 on", str(row_starts[:8]))
    expect(row_starts == sorted(row_starts), "qo_indptr", "values that do not decrease", str(row_starts[:8]))
    expect(len(page_starts) == batch + 1, "paged_kv_indptr", f"{batch + 1} values", str(len(page_starts)))
    expect(
        page_starts[0] == 0 and page_starts == sorted(page_starts),
        "paged_kv_indptr",
        "values from 0 on that do not decrease",
        str(page_starts[:8]),
    )
    indices = int_tensor("paged_kv_indices", paged_kv_indices)
    expect(len(indices) >= page_starts[-1], "paged_kv_indices", f"at least {page_starts[-1]} values", str(len(indices)))
    lowest, highest = map(int, indices[: page_starts[-1]].aminmax()) if page_starts[-1] else (0, -1)
    expect(lowest >= 0, "paged_kv_indices", "values >= 0", str(lowest))
    expect(len(last_page_len) == batch, "paged_kv_last_page_len", f"{batch} values", str(len(last_page_len)))
    maps = _maps(modality_maps, batch)

    requests = []
    lane = torch.arange(page_size, device=indices.device)
    for i in range(batch):
        pages = indices[page_starts[i] : page_starts[i + 1]].long()
        if len(pages):
            name, length = f"paged_kv_last_page_len[{i}]", last_page_len[i]
            expect(1 <= length <= page_size, name, f"1 to {page_size}", str(length))
        kv_len = (len(pages) - 1) * page_size + last_page_len[i] if len(pages) else 0
        rows = row_starts[i + 1] - row_starts[i]
        expect(rows <= kv_len, f"qo_indptr[{i + 1}]", f"at most {kv_len} rows (the request's keys)", str(rows))
        expected = f"a length of at least {kv_len} (the request's keys)"
        expect(maps[i].length >= kv_len, f"modality_maps[{i}]", expected, str(maps[i].length))
        slots = (pages[:, None] * page_size + lane).flatten()[:kv_len]
        requests.append(RequestChunk(maps[i], kv_len - rows, kv_len, row_starts[i], slots))
    return PagedBatch(tuple(requests), row_starts[-1], highest + 1)


def _maps(values: Any, batch: int) -> Sequence[ModalityMap]:
    name, expected = "modality_maps", f"{batch} maps, one for each request"
    expect(isinstance(values, Sequence), name, f"a list of {expected}", repr(values))
    expect(len(values) == batch, name, expected, str(len(values)))
    for i, value in enumerate(values):
        expect(isinstance(value, ModalityMap), f"{name}[{i}]", "a ModalityMap", repr(value))
    return values
