"""Audit in production: for a share of requests, sampled query rows are computed again densely, layer by layer.

What it tells is how far the sparse attention's output is from the dense one given the same q, K and V, and how much
of the dense attention's mass lies in what was visited. The rows are spread over all modalities and positions of a
chunk, middle rows as well as last ones, because damage to the middle of a video shows in no last row.

It runs beside the request and never changes an answer. Memory is bounded: keys are taken slab by slab.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.kernels.rows import dense_rows
from sglang_mminfer.serving.metrics import AuditMetrics
from sglang_mminfer.serving.observe import LayerView, RequestView
from sglang_mminfer.serving.trace import LayerAudit, PrefillRecord

logger = logging.getLogger(__name__)

ROWS = 64
"""Rows of a chunk that are computed again, at most."""


def chosen(rid: str, rate: float) -> bool:
    """Whether a request is audited. All ranks, and all chunks of the request, agree."""
    return _number(rid) < rate * 2.0**64


def _number(name: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def sample_rows(request: RequestView, most: int = ROWS) -> np.ndarray:
    """int64, ascending: positions to audit among the chunk's prompt rows; the same for all layers and ranks.

    Modalities share `most` evenly, so a short text between two videos is looked at too. Those of a modality are
    drawn one from each of as many equal stretches. The last row is always among them.
    """
    start, stop = request.prefix_len, min(request.seq_len, request.prompt_stop)
    if start >= stop or request.map is None:
        return np.zeros(0, dtype=np.int64)
    draw = np.random.default_rng(_number(f"{request.rid}/{start}"))
    by_modality: dict[str, list[np.ndarray]] = {}
    for segment in request.map.segments:
        first, end = max(segment.start, start), min(segment.stop, stop)
        if first < end:
            by_modality.setdefault(segment.modality.value, []).append(np.arange(first, end))
    members = sorted((np.concatenate(parts) for parts in by_modality.values()), key=len)
    picked, left = [np.array([stop - 1])], most - 1
    for number, positions in enumerate(members):  # the smallest first: what it leaves is shared by the others
        count = min(len(positions), left // (len(members) - number))
        left -= count
        edges = np.linspace(0, len(positions), count + 1).astype(np.int64)
        picked.append(positions[draw.integers(edges[:-1], edges[1:])] if count else positions[:0])
    return np.unique(np.concatenate(picked))


@dataclass(frozen=True)
class AuditedRows:
    """What one layer did with the sampled rows of a request, on the device.

    error: float32 [Hq], |o - o_dense| / |o_dense| over the rows of each head. recall: float32 [Hq], the share of
    the dense attention's mass that was visited, mean over the rows.
    """

    layer_id: int
    first_head: int
    rows: int
    error: torch.Tensor
    recall: torch.Tensor

    def summary(self) -> LayerAudit:
        """On the host; waits for the device."""
        error, recall = self.error.tolist(), self.recall.tolist()
        return LayerAudit(
            layer=self.layer_id,
            rows=self.rows,
            error_mean=sum(error) / len(error),
            error_max=max(error),
            worst_head=self.first_head + error.index(max(error)),
            recall_mean=sum(recall) / len(recall),
            recall_min=min(recall),
            first_head=self.first_head,
            num_heads=len(error),
        )


def examine(view: LayerView, request: RequestView, positions: np.ndarray) -> AuditedRows:
    """Compare rows `positions` (of the chunk, absolute) of a sparse layer with dense attention."""
    assert view.lse is not None
    (where,) = to_device(view.q.device, positions)
    where = where.long()
    rows = where - request.prefix_len + request.row_start
    slots = request.slots[: int(positions[-1]) + 1]
    o, lse = dense_rows(view.q[rows], where, view.k_cache, view.v_cache, slots, view.sm_scale)
    norm = o.norm(dim=(0, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    recall = torch.exp2(view.lse[rows] - lse).clamp_max(1.0).mean(dim=0)
    for head in view.stock_heads:  # dense, by somebody who gives no lse
        recall[head] = 1.0
    error = (view.out[rows].float() - o).norm(dim=(0, 2)) / norm
    return AuditedRows(view.layer_id, view.first_head, len(positions), error, recall)


class Audit:
    """The observer: audits a share `rate` of the sparse requests, in the layers that run sparse.

    Args:
        metrics: where the figures are counted too, every rank its own heads; None: nowhere.
    """

    def __init__(self, rate: float, metrics: AuditMetrics | None = None) -> None:
        self.rate, self.metrics = rate, metrics
        self._findings: dict[str, list[AuditedRows]] = {}
        self._seconds = 0.0
        self._failures = 0
        self._said = False

    def layer(self, view: LayerView) -> None:
        if view.plan is None or view.lse is None:
            return
        for request in view.requests:
            if request.dense_reason is None and chosen(request.rid, self.rate):
                start = time.perf_counter()
                try:
                    positions = sample_rows(request)
                    if len(positions):
                        self._findings.setdefault(request.rid, []).append(examine(view, request, positions))
                except Exception:
                    self._failed()
                self._seconds += time.perf_counter() - start

    def batch_done(self, records: Sequence[PrefillRecord]) -> None:
        findings, self._findings = self._findings, {}
        failures, self._failures = self._failures, 0
        seconds, self._seconds = self._seconds, 0.0
        start, audited = time.perf_counter(), []
        for record in records:
            try:
                record.audit = [finding.summary() for finding in findings.get(record.rid, [])] or None
            except Exception:  # an error of the device comes to light where it is waited for
                self._failed()
            audited += record.audit or []
        failures, self._failures = failures + self._failures, 0
        seconds += time.perf_counter() - start
        for record in records:
            if record.audit or failures:
                record.audit_ms, record.audit_failures = seconds * 1e3, failures
        if self.metrics is not None:
            self.metrics.add(audited, seconds * 1e3 if audited else 0.0, failures)

    def _failed(self) -> None:
        self._failures += 1
        if not self._said:
            self._said = True
            logger.exception("mminfer: the audit failed; answers are not affected, further failures are only counted")
