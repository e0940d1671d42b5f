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
from sglang_mminfer.planning import checks as check
from sglang_mminfer.planning.paged_batch import paged_batch
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
        check.expect(kv_layout in ("NHD", "HND"), "kv_layout", '"NHD" or "HND"', repr(kv_layout))
        check.expect(backend in executors.CHOICES, "backend", "one of " + ", ".join(executors.CHOICES), repr(backend))
        for name, value in (("block_q", block_q), ("block_k", block_k)):
            check.integer(name, value, least=1)
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
        shape = check.head_shape(num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        num_qo_heads, num_kv_heads, head_dim_qk, page_size = shape
        dense_below = check.integer("dense_below", dense_below, least=0)
        patterns = check.head_patterns(head_patterns, num_qo_heads)
        check.basis(basis, num_qo_heads, num_kv_heads, head_dim_qk)
        sm_scale = head_dim_qk**-0.5 if sm_scale is None else check.number("sm_scale", sm_scale)
        dtypes = (
            check.dtype("q_data_type", q_data_type, check.QUERIES),
            check.dtype("kv_data_type", q_data_type if kv_data_type is None else kv_data_type, check.CACHES),
        )
        batch = paged_batch(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, modality_maps
        )
        self._batch, self._patterns, self._shape = batch, patterns, shape
        self._sm_scale, self._dtypes = sm_scale, dtypes
        with_rows = [request for request in batch.requests if request.num_rows]
        self._planner = BatchPlanner(
            with_rows, batch.num_rows, dense_below=dense_below, block_q=self._block_q, block_k=self._block_k
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
        check.tensor("q", q, (self._batch.num_rows, num_qo_heads, head_dim), self._dtypes[0], "planned ")
        sm_scale = self._sm_scale * check.number("k_scale", k_scale)
        v_scale = check.number("v_scale", v_scale)
        k_cache, v_cache = self._flat_caches(paged_kv_cache)
        if out is None:
            out = q.new_empty(q.shape)
        if lse is None:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        check.tensor("out", out, q.shape, q.dtype)
        check.tensor("lse", lse, q.shape[:2], torch.float32)
        if sm_scale <= 0:  # executors compare scores before they scale them, so theirs is above 0
            q, sm_scale = (-q, -sm_scale) if sm_scale else (torch.zeros_like(q), 1.0)
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
        causal = sum(request.causal_pairs for request in self._batch.requests)
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
        request = check.index("request", request, len(self._batch.requests))
        head = check.index("head", head, self._shape[0])
        chunk = self._batch.requests[request]
        rows = slice(chunk.row_start, chunk.row_start + chunk.num_rows)
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
        name, expected = "paged_kv_cache", "a 5-D tensor [pages, 2, ...] or a tuple (k, v)"
        caches: Any = paged_kv_cache
        if isinstance(caches, torch.Tensor):
            check.expect(caches.ndim == 5 and caches.shape[1] == 2, name, expected, str(tuple(caches.shape)))
            caches = (caches[:, 0], caches[:, 1])
        check.expect(isinstance(caches, Sequence), name, expected, type(caches).__name__)
        check.expect(len(caches) == 2, name, expected, str(len(caches)))
        for cache in caches:
            check.expect(isinstance(cache, torch.Tensor), name, "tensors of k and of v", type(cache).__name__)
        pages, needed = len(caches[0]), self._batch.num_pages
        check.expect(pages >= needed, name, f"at least {needed} pages (paged_kv_indices)", str(pages))
        flat = []
        for cache in caches:
            if self._kv_layout == "HND" and cache.ndim == 4:
                cache = cache.transpose(1, 2)
            check.expect(
                cache.ndim == 4 and tuple(cache.shape[1:]) == (page_size, num_kv_heads, head_dim),
                name,
                f"pages of (page_size={page_size}, Hkv={num_kv_heads}, D={head_dim}) in {self._kv_layout} layout",
                str(tuple(cache.shape)),
            )
            check.expect(len(cache) == pages, name, f"{pages} pages of k and of v", str(len(cache)))
            check.expect(cache.dtype == self._dtypes[1], name, f"the planned dtype {self._dtypes[1]}", str(cache.dtype))
            flat.append(cache.reshape(-1, num_kv_heads, head_dim))
        return flat[0], flat[1]
