"""What the plugin tells about its work: one record per prefill batch and request, as JSON lines and as metrics."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import msgspec

from sglang_mminfer import settings

if TYPE_CHECKING:
    from sglang_mminfer.modality.segments import ModalityMap

logger = logging.getLogger(__name__)


class LayerAudit(msgspec.Struct, kw_only=True):
    """How far one layer's sparse attention was from dense on sampled rows; see audit.py.

    first_head, num_heads: the heads that it is about, counted over the whole model: in a file those of one rank, in
    what `read_trace` gives those of all ranks.
    error_mean, error_max: |o - o_dense| / |o_dense| over the rows of a head, mean and worst over heads.
    worst_head: the head of error_max, counted over the whole model. recall_mean, recall_min: share of the dense
    attention's mass that was visited, mean over a head's rows, mean and worst over heads.
    """

    layer: int
    rows: int
    error_mean: float
    error_max: float
    worst_head: int
    recall_mean: float
    recall_min: float
    first_head: int = 0
    num_heads: int = 0

    def joined(self, other: LayerAudit) -> LayerAudit:
        """Of the heads of both: the same layer and rows on another rank."""
        share = other.num_heads / max(self.num_heads + other.num_heads, 1)
        worst = self if self.error_max >= other.error_max else other
        return LayerAudit(
            layer=self.layer,
            rows=self.rows,
            error_mean=self.error_mean + share * (other.error_mean - self.error_mean),
            error_max=worst.error_max,
            worst_head=worst.worst_head,
            recall_mean=self.recall_mean + share * (other.recall_mean - self.recall_mean),
            recall_min=min(self.recall_min, other.recall_min),
            first_head=min(self.first_head, other.first_head),
            num_heads=self.num_heads + other.num_heads,
        )


class MapEntry(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A segment of a modality map: tokens [start, stop); grid: [frames, rows, cols] in tokens, if known.

    apart: the frames do not follow one another (timestamps between them), so where each begins is not told.
    raster: False where the tokens of a frame have an order, and no rows and columns.
    """

    modality: str
    start: int
    stop: int
    grid: tuple[int, int, int] | None = None
    apart: bool = False
    raster: bool = True


def map_entries(modality_map: ModalityMap) -> list[MapEntry]:
    """A map as the trace has it."""
    entries = []
    for segment in modality_map.segments:
        grid, entry = segment.grid, MapEntry(modality=segment.modality.value, start=segment.start, stop=segment.stop)
        if grid is not None:
            entry.grid = (grid.frames, grid.rows, grid.cols)
            entry.raster = grid.raster
            entry.apart = (
                grid.frame_starts[0] != segment.start or grid.frames * grid.cells != segment.stop - segment.start
            )
        entries.append(entry)
    return entries


def map_of_entries(entries: Sequence[MapEntry]) -> ModalityMap:
    """The map again, without the rasters whose frames stand apart."""
    from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid

    segments = []
    for entry in entries:
        grid = None
        if entry.grid is not None and not entry.apart:
            frames, rows, cols = entry.grid
            starts = tuple(entry.start + i * rows * cols for i in range(frames))
            grid = VisionGrid(frames, rows, cols, starts, entry.raster)
        segments.append(Segment(Modality(entry.modality), entry.start, entry.stop, grid))
    return ModalityMap(segments)


class PrefillRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request in one prefill batch. Lengths in tokens; times in milliseconds, of the whole batch.

    segments: segments of the request's modality map, 0 without one. sparse_layers: layers that ran sparse.
    density: visited over causal pairs, mean over those layers and this rank's heads; None where dense.
    dense_reason: why the request ran dense; None where it ran sparse.
    density, attn_ms, forward_ms: None and 0 on a GPU without a trace, where nobody waits for the device to know.
    forward_ms: from the start of planning to the end of the last attention layer, so all of the model but its
    last MLP and head; the vision tower too, unless SGLang had the embeddings cached, and the audit.
    map: the request's modality map, with the last chunk of its prompt only.
    audit: one entry for each sparse layer, if the request is audited. audit_ms: what that took, of the whole
    batch; not in attn_ms. audit_failures: (request, layer) audits of the batch that failed.
    encoded_again: media of the batch that the vision encoder ran on once more, because SGLang's embedding cache
    had refused them; see encoder_watch.py. encoded_again_ms: how long that took, part of forward_ms.
    """

    rid: str
    prefix_len: int
    chunk_len: int
    seq_len: int
    segments: int
    sparse_layers: int
    density: float | None
    dense_reason: str | None
    plan_ms: float
    attn_ms: float
    forward_ms: float
    map: list[MapEntry] | None = None
    audit: list[LayerAudit] | None = None
    audit_ms: float = 0.0
    audit_failures: int = 0
    encoded_again: int = 0
    encoded_again_ms: float = 0.0


def rank_path(path: str | os.PathLike[str], rank: int, data_rank: int = 0) -> str:
    """The file of a rank of the attention's tensor parallelism, in a group of its data parallelism."""
    return f"{os.fspath(path)}{f'.dp{data_rank}' if data_rank else ''}{f'.rank{rank}' if rank else ''}"


class TraceFile:
    """Appends records to the file that SGLANG_MMINFER_TRACE names. A file that cannot be written is said once."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    @classmethod
    def from_environment(cls, rank: int = 0, data_rank: int = 0) -> TraceFile:
        """Rank 0 tells of everything, the others of the audits of their own heads, in FILE.rank1 and so on: ranks
        that told each other would have to wait for each other, and one that failed would stop them all. With
        data-parallel attention each group has requests of its own, and those of the second are in FILE.dp1."""
        path = settings.TRACE.read()
        return cls(rank_path(path, rank, data_rank) if path else None)

    @property
    def enabled(self) -> bool:
        return self.path is not None

    def append(self, records: list[PrefillRecord]) -> None:
        if self.path is None:
            return
        try:
            with open(self.path, "ab") as file:
                file.write(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
        except OSError as error:
            logger.error(
                "mminfer: %s=%s cannot be written, tracing stops: %s", settings.TRACE.variable, self.path, error
            )
            self.path = None


class Metrics:
    """The same figures for SGLang's Prometheus endpoint. Made only where SGLang's metrics are on."""

    def __init__(self) -> None:
        # Imported late: prometheus_client reads SGLang's multiprocess directory when it is first imported.
        from prometheus_client import Counter

        self._requests = Counter(
            "sglang:mminfer_prefill_requests",
            "Requests in prefill batches by how they ran: sparse, or the reason for dense.",
            labelnames=("ran",),
        )
        self._tokens = Counter(
            "sglang:mminfer_prefill_tokens",
            "New tokens in prefill batches by how they ran: sparse, or the reason for dense.",
            labelnames=("ran",),
        )
        self._density_tokens = Counter(
            "sglang:mminfer_density_tokens",
            "Density times new tokens of sparse prefills: over the sparse tokens it is the mean density. On a GPU only "
            "with a trace, which waits for it.",
        )
        self._plan_ms = Counter("sglang:mminfer_plan_ms", "Milliseconds spent on plans of sparse prefills.")
        self._attn_ms = Counter(
            "sglang:mminfer_attn_ms",
            "Milliseconds spent in attention of prefill batches; on a GPU only with a trace, which waits for it.",
        )
        self._again = Counter(
            "sglang:mminfer_encoded_again",
            "Media that the vision encoder ran on once more, because SGLang's embedding cache had refused them.",
        )
        self._again_ms = Counter("sglang:mminfer_encoded_again_ms", "Milliseconds that the encoder spent so.")

    def add(self, records: list[PrefillRecord]) -> None:
        for record in records:
            ran = record.dense_reason or "sparse"
            self._requests.labels(ran).inc()
            self._tokens.labels(ran).inc(record.chunk_len)
            if record.density is not None:
                self._density_tokens.inc(record.density * record.chunk_len)
        if records:
            self._plan_ms.inc(records[0].plan_ms)
            self._attn_ms.inc(records[0].attn_ms)
            self._again.inc(records[0].encoded_again)
            self._again_ms.inc(records[0].encoded_again_ms)


class AuditMetrics:
    """The audit's figures for the Prometheus endpoint, by layer. With tensor parallelism every rank adds its own."""

    def __init__(self) -> None:
        from prometheus_client import Counter  # late: see Metrics

        self._rows, self._error, self._lost = (
            Counter(f"sglang:mminfer_audit_{name}", text, labelnames=("layer",))
            for name, text in (
                ("rows", "Query rows of sparse prefills that were computed again densely, by layer."),
                ("error_rows", "Relative output error times audited rows: over the rows it is the mean error."),
                ("lost_rows", "Attention mass not visited times audited rows: 1 minus this over the rows is recall."),
            )
        )
        self._ms = Counter("sglang:mminfer_audit_ms", "Milliseconds spent on audits.")
        self._failures = Counter("sglang:mminfer_audit_failures", "Audits of a request's layer that failed.")

    def add(self, audited: list[LayerAudit], milliseconds: float, failures: int) -> None:
        for finding in audited:
            layer = str(finding.layer)
            self._rows.labels(layer).inc(finding.rows)
            self._error.labels(layer).inc(finding.error_mean * finding.rows)
            self._lost.labels(layer).inc((1.0 - finding.recall_mean) * finding.rows)
        self._ms.inc(milliseconds)
        self._failures.inc(failures)


@cache
def metrics() -> Metrics:
    """This process's. Two-batch overlap makes three attention backends of a process, and a name counts once."""
    return Metrics()


@cache
def audit_metrics() -> AuditMetrics:
    """This process's."""
    return AuditMetrics()


def read_trace(path: str | os.PathLike[str]) -> list[PrefillRecord]:
    """The records of a trace file, and of the groups of data-parallel attention that wrote beside it, with the audits
    of all ranks.

    Raises:
        ValueError: naming the file and line that is not a record.
    """
    records, data_rank = _read_group(path), 1
    while os.path.exists(rank_path(path, 0, data_rank)):
        records += _read_group(rank_path(path, 0, data_rank))
        data_rank += 1
    return records


def _read_group(path: str | os.PathLike[str]) -> list[PrefillRecord]:
    records = _read(path)
    rank = 1
    while os.path.exists(rank_path(path, rank)):
        others: dict[tuple[str, int, int], list[list[LayerAudit]]] = {}
        for record in reversed(_read(rank_path(path, rank))):
            others.setdefault((record.rid, record.prefix_len, record.chunk_len), []).append(record.audit or [])
        for record in records:
            if record.audit and (same := others.get((record.rid, record.prefix_len, record.chunk_len))):
                beside = {audit.layer: audit for audit in same.pop()}
                record.audit = [own.joined(beside[own.layer]) if own.layer in beside else own for own in record.audit]
        rank += 1
    return records


def _read(path: str | os.PathLike[str]) -> list[PrefillRecord]:
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                records.append(msgspec.json.decode(line, type=PrefillRecord))
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}, line {number}: expected a trace record: {error}") from None
    return records
