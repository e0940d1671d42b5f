"""The sparse prefill wrapper: FlashInfer's plan/run contract, plus a modality map and a pattern for each head.

It works without SGLang. Shapes, names and the base-2 LSE are those of FlashInfer's
BatchPrefillWithPagedKVCacheWrapper, so FlashInfer's `merge_state` can merge what `run` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sglang_mminfer.kernels import executors, reference
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.executors import EXECUTORS
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.basis import Basis
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.planning.tiles import BLOCK_K, BLOCK_Q


class SparsePrefillWithPagedKVCacheWrapper:
    """Prefill attention of a ragged batch over a paged KV cache, with a sparse pattern for each query head.

    The method is MMInference's modality-aware permuted sparse attention (ICML 2025, arXiv 2504.16083).

    Args:
        float_workspace_buffer: as in FlashInfer; no executor uses it.
        kv_layout: "NHD": pages of [page_size, Hkv, D]; or "HND": pages of [Hkv, page_size, D].
        backend: "torch" (any device), "fa4" (flash-attn-4's kernels, on Hopper and Blackwell), "triton" (NVIDIA
            GPUs), "flashinfer" (the same plan on FlashInfer's own wrappers: a cross-check), "reference" (float64, the
            oracle), or "auto": on a GPU fa4 if it has kernels for the case, else triton; torch elsewhere.
        block_q, block_k: rows of a query tile and keys of a key tile.

    Raises:
        ValueError: if there is no such layout or backend, or a block has no rows.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor | None = None,
        kv_layout: str = "NHD",
        backend: str = "auto",
        *,
        block_q: int = BLOCK_Q,
        block_k: int = BLOCK_K,
    ) -> None:
        _expect(kv_layout in ("NHD", "HND"), "kv_layout", '"NHD" or "HND"', repr(kv_layout))
        _expect(backend in executors.CHOICES, "backend", "one of " + ", ".join(executors.CHOICES), repr(backend))
        for name, value in (("block_q", block_q), ("block_k", block_k)):
            _expect(isinstance(value, int) and value >= 1, name, "an integer >= 1", repr(value))
        self.backend = backend
        self._kv_layout, self._block_q, self._block_k = kv_layout, block_q, block_k
        self._planner: BatchPlanner | None = None
        self._last_plan: BlockPlan | None = None

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        modality_maps: Sequence[ModalityMap],
        head_patterns: Sequence[HeadPattern] | HeadPattern,
        sm_scale: float | None = None,
        q_data_type: torch.dtype | str = torch.float16,
        kv_data_type: torch.dtype | str | None = None,
        dense_below: int = 0,
        basis: Basis | None = None,
    ) -> None:
        """Plan one batch. The rows of request i are the last of its keys (bottom-right causal).

        Args:
            qo_indptr: int32 [batch + 1], where the rows of each request begin in q.
            paged_kv_indptr: int32 [batch + 1]; paged_kv_indices: int32 [pages in use];
                paged_kv_last_page_len: int32 [batch]. The page table in CSR form.
            num_qo_heads, num_kv_heads, head_dim_qk, page_size: shapes of q and of the cache.
            modality_maps: one for each request, at least as long as its keys.
            head_patterns: one for each query head; a single pattern, or a list of one, applies to all heads.
            sm_scale: the factor on q . k. Default: 1 / sqrt(head_dim_qk).
            q_data_type, kv_data_type: checked against the tensors given to `run`; kv defaults to q's.
            dense_below: rows at absolute positions below this see every key.
            basis: low-rank forms of q . k, for patterns that choose keys by them. Default: they choose by q . k.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        row_starts = _int_vector("qo_indptr", qo_indptr)
        page_starts = _int_vector("paged_kv_indptr", paged_kv_indptr)
        last_page_len = _int_vector("paged_kv_last_page_len", paged_kv_last_page_len)
        batch = len(row_starts) - 1
        _expect(batch >= 0 and row_starts[0] == 0, "qo_indptr", "batch + 1 values from 0 on", str(row_starts[:8]))
        _expect(row_starts == sorted(row_starts), "qo_indptr", "values that do not decrease", str(row_starts[:8]))
        _expect(len(page_starts) == batch + 1, "paged_kv_indptr", f"{batch + 1} values", str(len(page_starts)))
        _expect(
            page_starts[0] == 0 and page_starts == sorted(page_starts),
            "paged_kv_indptr",
            "values from 0 on that do not decrease",
            str(page_starts[:8]),
        )
        _expect_int_vector("paged_kv_indices", paged_kv_indices)
        _expect(
            len(paged_kv_indices) >= page_starts[-1],
            "paged_kv_indices",
            f"at least {page_starts[-1]} values",
            str(len(paged_kv_indices)),
        )
        lowest, highest = map(int, paged_kv_indices[: page_starts[-1]].aminmax()) if page_starts[-1] else (0, -1)
        _expect(lowest >= 0, "paged_kv_indices", "values >= 0", str(lowest))
        _expect(len(last_page_len) == batch, "paged_kv_last_page_len", f"{batch} values", str(len(last_page_len)))
        for name, value in (("page_size", page_size), ("num_kv_heads", num_kv_heads), ("head_dim_qk", head_dim_qk)):
            _expect(isinstance(value, int) and value >= 1, name, "an integer >= 1", repr(value))
        _expect(
            num_qo_heads >= 1 and num_qo_heads % num_kv_heads == 0,
            "num_qo_heads",
            f"a multiple of num_kv_heads={num_kv_heads}",
            repr(num_qo_heads),
        )
        _expect(dense_below >= 0, "dense_below", "an integer >= 0", repr(dense_below))
        _expect(
            len(modality_maps) == batch,
            "modality_maps",
            f"{batch} maps, one for each request",
            str(len(modality_maps)),
        )
        is_list = isinstance(head_patterns, Sequence) and not isinstance(head_patterns, str)
        patterns: list[Any] = list(head_patterns) if is_list else [head_patterns]  # type: ignore[arg-type]
        for i, pattern in enumerate(patterns):
            name = f"head_patterns[{i}]"
            _expect(isinstance(pattern, HeadPattern), name, "a pattern or a boundary", repr(pattern))
        if len(patterns) == 1:
            patterns = patterns * num_qo_heads
        _expect(
            len(patterns) == num_qo_heads,
            "head_patterns",
            f"{num_qo_heads} patterns (or one for all)",
            str(len(patterns)),
        )
        if basis is not None:
            expected = f"forms for {num_kv_heads} or {num_qo_heads} heads of {head_dim_qk} dimensions"
            fits = len(basis.keys) in (num_kv_heads, num_qo_heads) and basis.keys.shape[2] == head_dim_qk
            _expect(fits, "basis", expected, str(list(basis.keys.shape)))
        sm_scale = head_dim_qk**-0.5 if sm_scale is None else sm_scale
        _expect(isinstance(sm_scale, int | float), "sm_scale", "a number", repr(sm_scale))
        dtypes = _dtype("q_data_type", q_data_type), _dtype("kv_data_type", kv_data_type or q_data_type)

        requests = []
        lane = torch.arange(page_size, device=paged_kv_indices.device)
        for i in range(batch):
            pages = paged_kv_indices[page_starts[i] : page_starts[i + 1]].long()
            rows = row_starts[i + 1] - row_starts[i]
            if len(pages):
                _expect(
                    1 <= last_page_len[i] <= page_size,
                    f"paged_kv_last_page_len[{i}]",
                    f"1 to {page_size}",
                    str(last_page_len[i]),
                )
            kv_len = (len(pages) - 1) * page_size + last_page_len[i] if len(pages) else 0
            _expect(
                rows <= kv_len,
                f"qo_indptr[{i + 1}]",
                f"at most {kv_len} rows (the request's keys)",
                str(rows),
            )
            name, modality_map = f"modality_maps[{i}]", modality_maps[i]
            _expect(isinstance(modality_map, ModalityMap), name, "a ModalityMap", repr(modality_map))
            expected = f"a length of at least {kv_len} (the request's keys)"
            _expect(modality_map.length >= kv_len, name, expected, str(modality_map.length))
            slots = (pages[:, None] * page_size + lane).flatten()[:kv_len]
            if rows:
                requests.append(RequestChunk(modality_map, kv_len - rows, kv_len, row_starts[i], slots))
        self._requests = {r.row_start: r for r in requests}
        self._row_starts = row_starts
        self._patterns = patterns
        self._shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._sm_scale, self._dtypes, self._num_pages = sm_scale, dtypes, highest + 1
        self._planner = BatchPlanner(
            requests, row_starts[-1], dense_below=dense_below, block_q=self._block_q, block_k=self._block_k
        )
        self._basis = basis
        self._last_plan = None

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        *,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned batch.

        Args:
            q: [tokens, Hq, D].
            paged_kv_cache: (k, v), each [pages, page_size, Hkv, D], or one tensor [pages, 2, page_size, Hkv, D]. For
                HND the page_size and Hkv axes swap. An fp8 cache is converted to the dtype of q as it is read.
            k_scale, v_scale: factors by which keys and values are greater than what the cache holds.
            out: [tokens, Hq, D], optional; the answer is written into it.
            lse: float32 [tokens, Hq], optional; the LSE is written into it.

        Returns:
            out, or (out, lse) if return_lse. lse is base 2. A row without keys gives 0 and -inf.

        Raises:
            RuntimeError: before `plan`.
            ValueError: for a shape or dtype that differs from the plan's.
        """
        if self._planner is None:
            raise RuntimeError("SparsePrefillWithPagedKVCacheWrapper.run: call plan() first")
        num_qo_heads, _, head_dim, _ = self._shape
        expected = (self._row_starts[-1], num_qo_heads, head_dim)
        _expect(tuple(q.shape) == expected, "q", f"the shape {expected}", str(tuple(q.shape)))
        _expect(q.dtype == self._dtypes[0], "q", f"the planned dtype {self._dtypes[0]}", str(q.dtype))
        k_cache, v_cache = self._flat_caches(paged_kv_cache)
        if out is None:
            out = q.new_empty(q.shape)
        if lse is None:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        _expect(out.shape == q.shape, "out", f"the shape {tuple(q.shape)}", str(tuple(out.shape)))
        _expect(out.dtype == q.dtype, "out", f"the dtype {q.dtype}", str(out.dtype))
        _expect(lse.shape == q.shape[:2], "lse", f"the shape {tuple(q.shape[:2])}", str(tuple(lse.shape)))
        _expect(lse.dtype == torch.float32, "lse", "the dtype torch.float32", str(lse.dtype))
        sm_scale = self._sm_scale * k_scale
        self._last_plan = self._planner.plan(self._patterns, q, k_cache, sm_scale, self._basis)
        # Executors write contiguous outputs; the caller's tensors may be views of larger ones.
        outputs = [t if t.is_contiguous() else t.new_empty(t.shape) for t in (out, lse)]
        name = executors.name_for(self.backend, q.device, q.shape[2], self._block_k, q.dtype)
        EXECUTORS[name](q, k_cache, v_cache, self._last_plan, sm_scale, *outputs)
        if v_scale != 1.0:
            outputs[0] *= v_scale
        for target, contiguous in zip((out, lse), outputs):
            if contiguous is not target:
                target.copy_(contiguous)
        return (out, lse) if return_lse else out

    @property
    def density(self) -> torch.Tensor:
        """float64 [Hq]: visited pairs over causal pairs of the batch, for each head. 1 is dense.

        A pair (row, key) is visited if it lies at or below the diagonal in a visited tile, whether the pattern asks
        for it or not. The density of estimated patterns is known only after `run`.

        Raises:
            RuntimeError: before `plan`.
        """
        plan = self._current_plan()
        causal = sum(r.causal_pairs for r in self._requests.values())
        if causal == 0:
            return torch.ones(self._shape[0], dtype=torch.float64)
        return plan.visited_by_row.sum(dim=0).double() / causal

    def visited_mask(self, request: int, head: int) -> torch.Tensor:
        """bool [Lq, Lk]: the pairs that `head` visits in request number `request`. For small inputs: Lq * Lk bytes.

        Raises:
            RuntimeError: before `plan`.
            ValueError: if there is no such request or head.
        """
        plan = self._current_plan()
        for name, value, count in (("request", request, len(self._row_starts) - 1), ("head", head, self._shape[0])):
            _expect(0 <= value < count, name, f"0 to {count - 1}", repr(value))
        rows = slice(self._row_starts[request], self._row_starts[request + 1])
        chunk = self._requests.get(rows.start) if rows.stop > rows.start else None
        if chunk is None:
            return torch.zeros(0, 0, dtype=torch.bool)
        return reference.visited_mask(plan, head, rows, chunk.kv_len)

    def _current_plan(self) -> BlockPlan:
        if self._planner is None:
            raise RuntimeError("SparsePrefillWithPagedKVCacheWrapper: call plan() first")
        return self._last_plan or self._planner.plan(self._patterns)

    def _flat_caches(
        self, paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v as [slots, Hkv, D]."""
        _, num_kv_heads, head_dim, page_size = self._shape
        if isinstance(paged_kv_cache, torch.Tensor):
            _expect(
                paged_kv_cache.ndim == 5 and paged_kv_cache.shape[1] == 2,
                "paged_kv_cache",
                "a 5-D tensor [pages, 2, ...] or a tuple (k, v)",
                str(tuple(paged_kv_cache.shape)),
            )
            paged_kv_cache = (paged_kv_cache[:, 0], paged_kv_cache[:, 1])
        name, got = "paged_kv_cache", str(len(paged_kv_cache))
        _expect(len(paged_kv_cache) == 2, name, "a 5-D tensor [pages, 2, ...] or a tuple (k, v)", got)
        pages = len(paged_kv_cache[0])
        _expect(pages >= self._num_pages, name, f"at least {self._num_pages} pages (paged_kv_indices)", str(pages))
        flat = []
        for cache in paged_kv_cache:
            if self._kv_layout == "HND" and cache.ndim == 4:
                cache = cache.transpose(1, 2)
            _expect(
                cache.ndim == 4 and tuple(cache.shape[1:]) == (page_size, num_kv_heads, head_dim),
                "paged_kv_cache",
                f"pages of (page_size={page_size}, Hkv={num_kv_heads}, D={head_dim}) in {self._kv_layout} layout",
                str(tuple(cache.shape)),
            )
            _expect(len(cache) == pages, name, f"{pages} pages of k and of v", str(len(cache)))
            _expect(cache.dtype == self._dtypes[1], name, f"the planned dtype {self._dtypes[1]}", str(cache.dtype))
            flat.append(cache.reshape(-1, num_kv_heads, head_dim))
        return flat[0], flat[1]


def _expect(condition: bool, name: str, expected: str, got: str) -> None:
    if not condition:
        raise ValueError(f"SparsePrefillWithPagedKVCacheWrapper: {name}: expected {expected}, got {got}")


def _expect_int_vector(name: str, values: torch.Tensor) -> None:
    _expect(
        isinstance(values, torch.Tensor) and values.ndim == 1 and not values.is_floating_point(),
        name,
        "a 1-D integer tensor",
        f"{type(values).__name__} {getattr(values, 'dtype', '')} {list(getattr(values, 'shape', []))}",
    )


def _int_vector(name: str, values: torch.Tensor) -> list[int]:
    _expect_int_vector(name, values)
    return values.tolist()


def _dtype(name: str, value: torch.dtype | str) -> torch.dtype:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    _expect(isinstance(dtype, torch.dtype), name, "a torch dtype or its name", repr(value))
    return dtype  # type: ignore[return-value]
