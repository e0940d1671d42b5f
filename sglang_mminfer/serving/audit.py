"""Audit in production: for a share of requests, sampled query rows are computed again densely, layer by layer.

It measures how far the sparse output is from the dense output for the same q, K and V, and how much of the dense
attention's mass lies in the visited tiles. The sampled rows are spread over all modalities and positions of a chunk,
because damage to the middle of a video shows in none of the last rows.

The audit runs beside the request and never changes an answer. Its memory is bounded: it takes keys slab by slab.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.kernels.rows import dense_rows
from sglang_mminfer.serving.guard import Guard
from sglang_mminfer.serving.metrics import AuditMetrics
from sglang_mminfer.serving.observe import LayerView, RequestView
from sglang_mminfer.serving.trace import LayerAudit, PrefillRecord

logger = logging.getLogger(__name__)

ROWS = 64
"""The most rows of a chunk that are computed again."""


def chosen(rid: str, rate: float) -> bool:
    """Whether a request is audited. All ranks decide alike, and so do all chunks of the request.

    Args:
        rate: the share of requests, 0 to 1.
    """
    return _number(rid) < rate * 2.0**64


def _number(name: str) -> int:
    """64 bits of a hash of `name`, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def sample_rows(request: RequestView, most: int = ROWS) -> np.ndarray:
    """int64, ascending: positions among the chunk's prompt rows to audit; the same for all layers and ranks.

    Modalities share `most` evenly, so a short text between two videos is sampled too. The rows of a modality are cut
    into equal stretches, and one row of each is drawn. The last row is always in the sample.
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
    modalities = sorted((np.concatenate(parts) for parts in by_modality.values()), key=len)
    sample, remaining = [np.array([stop - 1])], most - 1
    for i, positions in enumerate(modalities):  # the smallest first: the others share what it leaves
        count = min(len(positions), remaining // (len(modalities) - i))
        remaining -= count
        edges = np.linspace(0, len(positions), count + 1).astype(np.int64)
        sample.append(positions[draw.integers(edges[:-1], edges[1:])] if count else positions[:0])
    return np.unique(np.concatenate(sample))


@dataclass(frozen=True)
class AuditedRows:
    """How one layer treated the sampled rows of one request. Tensors are on the device.

    Attributes:
        layer_id: the layer.
        first_head: the model's number of the first head here; a rank holds a part of the heads.
        rows: sampled rows.
        error: float32 [Hq], |o - o_dense| / |o_dense| over the rows of each head.
        recall: float32 [Hq], the share of the dense attention's mass in visited tiles, mean over the rows.
    """

    layer_id: int
    first_head: int
    rows: int
    error: torch.Tensor
    recall: torch.Tensor

    def on_host(self) -> AuditedRows:
        """The same on the host. Waits for the device."""
        return replace(self, error=self.error.cpu(), recall=self.recall.cpu())

    def summary(self) -> LayerAudit:
        """The figures as a LayerAudit, on the host. Waits for the device."""
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
    """Compares sampled rows of a sparse layer with dense attention.

    Args:
        view: the layer; its LSE must be there.
        request: a request of the batch.
        positions: int64, ascending: absolute positions in the request's chunk.
    """
    assert view.lse is not None
    (row_positions,) = to_device(view.q.device, positions)
    row_positions = row_positions.long()
    rows = row_positions - request.prefix_len + request.row_start
    slots = request.slots[: int(positions[-1]) + 1]
    o, lse = dense_rows(view.q[rows], row_positions, view.k_cache, view.v_cache, slots, view.sm_scale)
    o *= view.v_scale
    norm = o.norm(dim=(0, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    recall = torch.exp2(view.lse[rows] - lse).clamp_max(1.0).mean(dim=0)
    for head in view.stock_heads:  # the stock backend gives no LSE, and its heads are dense
        recall[head : head + 1] = 1.0  # to assign to an element would make the host wait
    error = (view.out[rows].float() - o).norm(dim=(0, 2)) / norm
    return AuditedRows(view.layer_id, view.first_head, len(positions), error, recall)


class Audit:
    """The observer that audits sparse layers.

    Args:
        rate: the share of sparse requests to audit, 0 to 1.
        metrics: counts the figures too, on every rank for its own heads; None: no metrics.
        guard: is told the error of every head; None: there is no guard.
    """

    def __init__(self, rate: float, metrics: AuditMetrics | None = None, guard: Guard | None = None) -> None:
        self.rate, self.metrics, self.guard = rate, metrics, guard
        self._findings: dict[str, list[AuditedRows]] = {}
        self._seconds = 0.0
        self._failures = 0
        self._logged = False

    def layer(self, view: LayerView) -> None:
        """Audits the chosen sparse requests of one layer."""
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
        """Adds the batch's figures to its records and to the metrics."""
        findings, self._findings = self._findings, {}
        failures, self._failures = self._failures, 0
        seconds, self._seconds = self._seconds, 0.0
        start, layer_audits = time.perf_counter(), []
        for record in records:
            audited: list[AuditedRows] = []
            try:
                audited = [finding.on_host() for finding in findings.get(record.rid, [])]
                record.audit = [finding.summary() for finding in audited] or None
            except Exception:  # errors of a GPU show up where the host waits for it
                self._failed()
            layer_audits += record.audit or []
            if self.guard is not None:
                for finding in audited:
                    self.guard.add(
                        record.rid, finding.layer_id, finding.first_head, finding.error.tolist(), finding.rows
                    )
                if record.map is not None:
                    record.guard = self.guard.prompt_done(record.rid) or None
        failures, self._failures = failures + self._failures, 0
        seconds += time.perf_counter() - start
        for record in records:
            if record.audit or failures:
                record.audit_ms, record.audit_failures = seconds * 1e3, failures
        if self.metrics is not None:
            self.metrics.add(layer_audits, seconds * 1e3 if layer_audits else 0.0, failures)

    def _failed(self) -> None:
        self._failures += 1
        if not self._logged:
            self._logged = True
            logger.exception("mminfer: the audit failed; answers are not affected, further failures are only counted")
