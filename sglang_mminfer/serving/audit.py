"""Audit in production: for a share of requests, sampled query rows are computed again densely, layer by layer.

What it tells is how far the sparse attention's output is from the dense one given the same q, K and V, and how much
of the dense attention's mass lies in what was visited. The rows are spread over all modalities and positions of a
chunk, middle rows as well as last ones, because damage to the middle of a video shows in no last row.

It runs beside the request and never changes an answer. Memory is bounded: keys are taken slab by slab.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.serving.observe import LayerView, RequestView
from sglang_mminfer.serving.trace import AuditMetrics, LayerAudit, PrefillRecord

logger = logging.getLogger(__name__)

ROWS = 64
"""Rows of a chunk that are computed again, at most."""

SLAB_SCORES = 1 << 22
"""Scores [rows, heads, keys] that are held at a time: 16 MB of them, and as much again for their weights."""


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


def dense_rows(
    q: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    sm_scale: float,
    slab_scores: int = SLAB_SCORES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain causal attention of some rows over the paged keys of their request.

    Args:
        q: [R, Hq, D], the rows; positions: int64 [R], each sees the keys up to its own position.
        k_cache, v_cache: [slots, Hkv, D]. slots: int64 [keys], the cache row of every position that is needed.
        slab_scores: how many scores to hold at a time.

    Returns:
        o float32 [R, Hq, D] and lse float32 [R, Hq], base 2.
    """
    rows, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    by_kv = (q.float() * (sm_scale * math.log2(math.e))).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    packed = by_kv.flatten(1, 2)  # [Hkv, group * R, D]
    bound = positions.repeat(heads // kv_heads)[:, None]
    top = packed.new_full((*packed.shape[:2], 1), -torch.inf)
    total, o = torch.zeros_like(top), torch.zeros_like(packed)
    size = max(1, slab_scores // (rows * heads))
    for first in range(0, len(slots), size):
        some = slots[first : first + size]
        k, v = (cache[some].float().transpose(0, 1) for cache in (k_cache, v_cache))
        scores = packed @ k.transpose(1, 2)
        key = torch.arange(first, first + len(some), device=slots.device)
        scores.masked_fill_(key > bound, -torch.inf)
        new_top = torch.maximum(top, scores.amax(dim=-1, keepdim=True))  # finite: every row sees the first key
        weights = scores.sub_(new_top).exp2_()
        fade = torch.exp2(top - new_top)
        total = total * fade + weights.sum(dim=-1, keepdim=True)
        o = o * fade + weights @ v
        top = new_top
    shape = (kv_heads, heads // kv_heads, rows)
    o = (o / total).view(*shape, dim).permute(2, 0, 1, 3).reshape(rows, heads, dim)
    return o, (top + total.log2()).view(shape).permute(2, 0, 1).reshape(rows, heads)


@dataclass(frozen=True)
class Finding:
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


def examine(view: LayerView, request: RequestView, positions: np.ndarray) -> Finding:
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
    return Finding(view.layer_id, view.first_head, len(positions), error, recall)


class Audit:
    """The observer: audits a share `rate` of the sparse requests, in the layers that run sparse.

    Args:
        metrics: where the figures are counted too, every rank its own heads; None: nowhere.
    """

    def __init__(self, rate: float, metrics: AuditMetrics | None = None) -> None:
        self.rate, self.metrics = rate, metrics
        self._findings: dict[str, list[Finding]] = {}
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
