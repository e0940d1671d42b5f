"""What candidate patterns do to one layer's attention: the error of the output and what it costs, head by head.

Candidates run through the executor that will serve them, over all rows of the calibration prompt, on the layer's own
Q, K and V, which stay where they are. So the error is that of the output (MMInference appendix A), not of the mass
that a mask keeps, and no row is left out because nobody sampled it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_mminfer.kernels.block_plan import PrefillPlan
from sglang_mminfer.kernels.executors import Executor
from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.boundary import HeadPattern, row_classes
from sglang_mminfer.patterns.dense import Dense
from sglang_mminfer.patterns.estimated import Estimated
from sglang_mminfer.planning.planner import BLOCK_K, BLOCK_Q, BatchPlanner, RequestChunk
from sglang_mminfer.planning.tiles import FULL

MODALITIES = (Modality.TEXT, Modality.IMAGE, Modality.VIDEO)
STRETCHES = 3  # the early, middle and late rows of a modality count the same
SHARPNESS = 8
"""Of the mean over rows. A few rows that read something far away decide answers; most read nothing in particular. The
power mean with this exponent lies near the worst rows without hanging on a single one."""


@dataclass
class Measured:
    """One candidate on one layer.

    error: float32 [heads, modalities], of rows of each modality, in units of the head's root-mean-square output;
        NaN where the prompt has no such rows.
    visited: float64 [heads, modalities], (row, key) pairs visited, those of an estimate included.
    visits: float64 [heads, modalities, kinds], visits of tiles by `tile_times.KINDS`, an estimate's pairs as full
        ones; a query tile with rows of several modalities counts for each by its share of the rows.
    ms: time of the executor's run, all heads.
    """

    error: torch.Tensor
    visited: torch.Tensor
    visits: torch.Tensor
    ms: float


class LayerProbe:
    """Measures candidates on one layer of one prompt.

    Args:
        chunk: the whole prompt as one chunk. q: [tokens, Hq, D], k_cache, v_cache: [slots, Hkv, D].
    """

    def __init__(
        self,
        chunk: RequestChunk,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        sm_scale: float,
        execute: Executor,
    ) -> None:
        if chunk.map is None:
            raise ValueError("chunk: expected a request with a modality map, got none")
        self.chunk, self.sm_scale, self._execute = chunk, sm_scale, execute
        self._tensors = (q, k_cache, v_cache)
        self.strata = row_strata(chunk.map, chunk.q_start, chunk.kv_len).to(q.device)
        self.dense, self.dense_ms = self._run(self._plan([Dense()] * q.shape[1]))
        norm = torch.linalg.vector_norm(self.dense, dim=(0, 2)) / len(q) ** 0.5
        self._unit = norm.clamp_min(torch.finfo(torch.float32).tiny)

    @property
    def causal(self) -> torch.Tensor:
        """float64 [modalities]: (row, key) pairs at or below the diagonal."""
        rows = torch.arange(self.chunk.q_start, self.chunk.kv_len, device=self.strata.device) + 1
        pairs = torch.zeros(len(MODALITIES), dtype=torch.float64, device=self.strata.device)
        return pairs.index_add_(0, self.strata // STRETCHES, rows.double()).cpu()

    def measure(self, heads: Sequence[HeadPattern], dense_below: int = 0) -> Measured:
        """One candidate: a pattern for each head."""
        plan = self._plan(heads, dense_below)
        out, ms = self._run(plan)
        off = torch.linalg.vector_norm(out.sub_(self.dense), dim=2) / self._unit  # [rows, heads]
        size = len(MODALITIES) * STRETCHES
        total = off.new_zeros(size, off.shape[1]).index_add_(0, self.strata, off.pow(SHARPNESS))
        count = torch.bincount(self.strata, minlength=size)[:, None]
        error = (total / count).pow(1 / SHARPNESS).view(len(MODALITIES), STRETCHES, -1).nanmean(dim=1)
        visited = torch.zeros(len(MODALITIES), off.shape[1], dtype=torch.float64, device=off.device)
        visited.index_add_(0, self.strata // STRETCHES, plan.visited_by_row.double())
        estimates = torch.stack([self._estimate_pairs(head) for head in heads])
        visits = visits_by_modality(plan, self.strata // STRETCHES)
        visits[..., FULL] += estimates / (BLOCK_Q * BLOCK_K)
        return Measured(error.T.cpu(), visited.T.cpu() + estimates, visits, ms)

    def _plan(self, heads: Sequence[HeadPattern], dense_below: int = 0) -> PrefillPlan:
        """Of a planner that is gone with the plan: one that is kept would hold the orders of all candidates."""
        q, k_cache, _ = self._tensors
        planner = BatchPlanner([self.chunk], len(q), dense_below=dense_below, keep=False)
        return planner.plan(heads, q, k_cache, self.sm_scale)

    def _estimate_pairs(self, head: HeadPattern) -> torch.Tensor:
        """float64 [modalities]: pairs computed, twice, to pick keys for the rows of a modality."""
        pairs = torch.zeros(len(MODALITIES), dtype=torch.float64)
        for row_class in row_classes(head):
            last = [p.last_q for _, p in row_class.pairs if isinstance(p, Estimated)]
            rows = [m for m, modality in enumerate(MODALITIES) if row_class.rows in (None, modality)]
            present = [m for m in rows if bool((self.strata // STRETCHES == m).any())]
            for m in present:  # one estimate for all rows of the class
                pairs[m] += 2.0 * sum(last) * self.chunk.kv_len / len(present)
        return pairs

    def _run(self, plan: PrefillPlan) -> tuple[torch.Tensor, float]:
        """float32 output of a plan, and the milliseconds it took."""
        q, k_cache, v_cache = self._tensors
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        wait = torch.cuda.synchronize if q.is_cuda else lambda: None
        wait()
        start = time.perf_counter()
        self._execute(q, k_cache, v_cache, plan, self.sm_scale, out, lse)
        wait()
        return out.float(), (time.perf_counter() - start) * 1e3


def visits_by_modality(plan: PrefillPlan, modality_of_row: torch.Tensor) -> torch.Tensor:
    """float64 [heads, modalities, kinds], on the host: see `Measured.visits`. modality_of_row: int64 [rows]."""
    device = modality_of_row.device
    total = torch.zeros(plan.num_heads, len(MODALITIES), 3, dtype=torch.float64, device=device)
    for own in plan.passes:
        rows = own.q_indptr.diff().long()
        tile = torch.repeat_interleave(torch.arange(own.num_tiles, device=device), rows)
        share = torch.zeros(own.num_tiles, len(MODALITIES), dtype=torch.float64, device=device)
        share.index_put_((tile, modality_of_row[own.q_rows.long()]), 1 / rows[tile].double(), accumulate=True)
        every, full, picked = own.block_indptr.diff(), own.num_full, own.num_picked
        kinds = torch.stack([full, every - full - picked, picked], dim=1).double()  # FULL, PARTIAL, PICKED
        of_group = total.new_zeros(len(own.head_groups), len(MODALITIES), 3)
        of_group.index_add_(0, own.q_heads.long(), share[:, :, None] * kinds[:, None])
        for group, heads in enumerate(own.head_groups):
            total[list(heads)] += of_group[group]
    return total.cpu()


def row_strata(modality_map: ModalityMap, start: int, stop: int) -> torch.Tensor:
    """int64 [rows]: modality * STRETCHES + stretch of each row; the rows of a modality are cut into equal stretches."""
    strata = torch.zeros(stop - start, dtype=torch.int64)
    for number, modality in enumerate(MODALITIES):
        rows = modality_map.members(modality)[start:stop].nonzero().flatten()
        strata[rows] = number * STRETCHES + torch.arange(len(rows)) * STRETCHES // max(len(rows), 1)
    return strata


def cell_masses(
    modality_map: ModalityMap, q: torch.Tensor, k: torch.Tensor, sm_scale: float, stride: str, rows: int = 64
) -> torch.Tensor:
    """Attention mass by cell, from some vision and text rows: which phases a head's columns may have.

    Args:
        q: [tokens, Hq, D], k: [tokens, Hkv, D], of a whole prompt. stride: as in `Grid`.
        rows: how many rows to look at, evenly spread over the second half of the prompt.

    Returns:
        float32 [Hq, cells], mean mass that a row gives to one cell of all frames so far; empty without a raster.
    """
    cells = modality_map.cells(stride)[: len(q)].to(q.device)
    most = int(cells.max()) + 1 if len(cells) else 0
    if most <= 0:
        return q.new_zeros(q.shape[1], 0, dtype=torch.float32)
    at = torch.linspace(len(q) // 2, len(q) - 1, min(rows, len(q)), device=q.device).long().unique()
    future = torch.arange(len(k), device=q.device) > at[:, None]
    group, masses = q.shape[1] // k.shape[1], []
    for kv in range(k.shape[1]):
        some = q[at, kv * group : (kv + 1) * group].float()
        scores = torch.einsum("rhd,kd->hrk", some, k[:, kv].float()) * sm_scale
        weights = scores.masked_fill_(future, -torch.inf).softmax(dim=-1).mean(dim=1)
        mass = weights.new_zeros(group, most)
        masses.append(mass.index_add_(1, cells.clamp_min(0).long(), weights * (cells >= 0)))
    return torch.cat(masses)
