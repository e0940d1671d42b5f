"""Measures candidate patterns on one layer's attention: the error of the output and its cost, head by head.

Candidates run through the executor that will serve them, over all rows of the calibration prompt, on the layer's own
Q, K and V, in place. So the error is that of the output (MMInference, appendix A), not of the attention mass that a
mask keeps, and it covers all rows instead of a sample.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.executors import Executor
from sglang_mminfer.kernels.rows import causal_weights
from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.basis import Basis
from sglang_mminfer.patterns.boundary import HeadPattern, row_classes
from sglang_mminfer.patterns.dense import Dense
from sglang_mminfer.patterns.estimated import Estimated
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.planning.row_loops import FULL
from sglang_mminfer.planning.tiles import BLOCK_K, BLOCK_Q

MODALITIES = (Modality.TEXT, Modality.IMAGE, Modality.VIDEO)
STRETCHES = 3  # the early, middle and late rows of a modality count equally
SHARPNESS = 8
"""The exponent of the power mean over rows. A few rows that read something far away decide answers, and most rows read
nothing in particular. With this exponent the mean lies near the worst rows, but does not depend on a single row."""


@dataclass
class Measured:
    """One candidate on one layer.

    error: float32 [heads, modalities], the error in rows of each modality, relative to the head's root-mean-square
        output; NaN for a modality that the prompt lacks.
    visited: float64 [heads, modalities], visited (row, key) pairs, including those of the estimate.
    visits: float64 [heads, modalities, kinds], tile visits by `tile_times.KINDS`. The pairs of the estimate count as
        full visits. A query tile with rows of several modalities counts for each by its share of the rows.
    ms: milliseconds of the executor's run of all heads.
    """

    error: torch.Tensor
    visited: torch.Tensor
    visits: torch.Tensor
    ms: float


class LayerProbe:
    """Measures candidates on one layer of one prompt.

    Args:
        chunk: the whole prompt as one chunk. q: [tokens, Hq, D]. k_cache, v_cache: [slots, Hkv, D].
        sm_scale: factor on q . k. execute: the executor. basis: low-rank forms for candidates that choose keys by them.

    Raises:
        ValueError: the chunk has no modality map.
    """

    def __init__(
        self,
        chunk: RequestChunk,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        sm_scale: float,
        execute: Executor,
        basis: Basis | None = None,
    ) -> None:
        if chunk.map is None:
            raise ValueError("chunk: expected a request with a modality map, got none")
        self.chunk, self.sm_scale, self._execute, self._basis = chunk, sm_scale, execute, basis
        self._tensors = (q, k_cache, v_cache)
        self.strata = row_strata(chunk.map, chunk.q_start, chunk.kv_len).to(q.device)
        self.dense, self.dense_ms = self._run(self.plan([Dense()] * q.shape[1]))
        norm = torch.linalg.vector_norm(self.dense, dim=(0, 2)) / len(q) ** 0.5
        self._unit = norm.clamp_min(torch.finfo(torch.float32).tiny)

    @property
    def causal(self) -> torch.Tensor:
        """float64 [modalities]: (row, key) pairs at or below the diagonal, by the row's modality."""
        rows = torch.arange(self.chunk.q_start, self.chunk.kv_len, device=self.strata.device) + 1
        pairs = torch.zeros(len(MODALITIES), dtype=torch.float64, device=self.strata.device)
        return pairs.index_add_(0, self.strata // STRETCHES, rows.double()).cpu()

    def measure(self, heads: Sequence[HeadPattern], dense_below: int = 0) -> Measured:
        """Measure one candidate: a pattern for each head."""
        plan = self.plan(heads, dense_below)
        out, ms = self._run(plan)
        distance = torch.linalg.vector_norm(out.sub_(self.dense), dim=2) / self._unit  # [rows, heads]
        size = len(MODALITIES) * STRETCHES
        power_sums = distance.new_zeros(size, distance.shape[1]).index_add_(0, self.strata, distance.pow(SHARPNESS))
        count = torch.bincount(self.strata, minlength=size)[:, None]
        error = (power_sums / count).pow(1 / SHARPNESS).view(len(MODALITIES), STRETCHES, -1).nanmean(dim=1)
        visited = torch.zeros(len(MODALITIES), distance.shape[1], dtype=torch.float64, device=distance.device)
        visited.index_add_(0, self.strata // STRETCHES, plan.visited_by_row.double())
        estimates = torch.stack([self._estimate_pairs(head) for head in heads])
        visits = visits_by_modality(plan, self.strata // STRETCHES)
        visits[..., FULL] += estimates / (BLOCK_Q * BLOCK_K)
        return Measured(error.T.cpu(), visited.T.cpu() + estimates, visits, ms)

    def plan(self, heads: Sequence[HeadPattern], dense_below: int = 0) -> BlockPlan:
        """A plan of its own planner, because a planner that lives on would hold the orders of all candidates."""
        q, k_cache, _ = self._tensors
        planner = BatchPlanner([self.chunk], len(q), dense_below=dense_below, keep=False)
        return planner.plan(heads, q, k_cache, self.sm_scale, self._basis)

    def _estimate_pairs(self, head: HeadPattern) -> torch.Tensor:
        """float64 [modalities]: what the estimate costs for rows of a modality, in (row, key) pairs."""
        pairs = torch.zeros(len(MODALITIES), dtype=torch.float64)
        for row_class in row_classes(head):
            sizes = self.chunk.num_rows, self.chunk.kv_len, self._tensors[0].shape[2]
            cost = sum(p.looks_at(*sizes) for _, p in row_class.pairs if isinstance(p, Estimated))
            rows = [m for m, modality in enumerate(MODALITIES) if row_class.rows in (None, modality)]
            present = [m for m in rows if bool((self.strata // STRETCHES == m).any())]
            for m in present:  # all rows of the class share one estimate
                pairs[m] += cost / len(present)
        return pairs

    def _run(self, plan: BlockPlan) -> tuple[torch.Tensor, float]:
        """The float32 output of a plan, and the milliseconds of its run."""
        q, k_cache, v_cache = self._tensors
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        wait = torch.cuda.synchronize if q.is_cuda else lambda: None
        wait()
        start = time.perf_counter()
        self._execute(q, k_cache, v_cache, plan, self.sm_scale, out, lse)
        wait()
        return out.float(), (time.perf_counter() - start) * 1e3


def visits_by_modality(plan: BlockPlan, modality_of_row: torch.Tensor) -> torch.Tensor:
    """`Measured.visits` of a plan: float64 [heads, modalities, kinds], on the host. modality_of_row: int64 [rows]."""
    device = modality_of_row.device
    visits = torch.zeros(plan.num_heads, len(MODALITIES), 3, dtype=torch.float64, device=device)
    rows = plan.q_indptr.diff().long()
    tile = torch.repeat_interleave(torch.arange(plan.num_tiles, device=device), rows)
    share = torch.zeros(plan.num_tiles, len(MODALITIES), dtype=torch.float64, device=device)
    share.index_put_((tile, modality_of_row[plan.q_rows.long()]), 1 / rows[tile].double(), accumulate=True)
    all_visits, full, gathered = plan.block_indptr.diff(), plan.num_full, plan.num_gathered
    kinds = torch.stack([full, all_visits - full - gathered, gathered], dim=1).double()  # FULL, PARTIAL, GATHERED
    of_group = visits.new_zeros(len(plan.head_groups), len(MODALITIES), 3)
    of_group.index_add_(0, plan.q_heads.long(), share[:, :, None] * kinds[:, None])
    for group, heads in enumerate(plan.head_groups):
        visits[list(heads)] += of_group[group]
    return visits.cpu()


def row_strata(modality_map: ModalityMap, start: int, stop: int) -> torch.Tensor:
    """int64 [rows]: modality * STRETCHES + stretch of each row. The rows of a modality are cut into equal stretches."""
    strata = torch.zeros(stop - start, dtype=torch.int64)
    for number, modality in enumerate(MODALITIES):
        rows = modality_map.members(modality)[start:stop].nonzero().flatten()
        strata[rows] = number * STRETCHES + torch.arange(len(rows)) * STRETCHES // max(len(rows), 1)
    return strata


def cell_masses(
    modality_map: ModalityMap, q: torch.Tensor, k: torch.Tensor, sm_scale: float, stride: str, rows: int = 64
) -> torch.Tensor:
    """Attention mass by cell, from some rows of the prompt. Heavy cells are the phases that a head's columns may have.

    Args:
        q: [tokens, Hq, D], k: [tokens, Hkv, D], of a whole prompt. sm_scale: factor on q . k.
        stride: as in `Grid`.
        rows: how many rows to take, evenly spread over the second half of the prompt.

    Returns:
        float32 [Hq, cells]: the mean mass that a row gives to one cell, over all frames before the row; empty if the
        prompt has no raster.
    """
    cells = modality_map.cells(stride)[: len(q)].to(q.device)
    num_cells = int(cells.max()) + 1 if len(cells) else 0
    if num_cells <= 0:
        return q.new_zeros(q.shape[1], 0, dtype=torch.float32)
    positions = torch.linspace(len(q) // 2, len(q) - 1, min(rows, len(q)), device=q.device).long().unique()
    group, masses = q.shape[1] // k.shape[1], []
    for kv in range(k.shape[1]):
        queries = q[positions, kv * group : (kv + 1) * group].transpose(0, 1)
        weights = causal_weights(queries, k[:, kv], positions, sm_scale).mean(dim=1)
        mass = weights.new_zeros(group, num_cells)
        masses.append(mass.index_add_(1, cells.clamp_min(0).long(), weights * (cells >= 0)))
    return torch.cat(masses)
