"""The trace: one record for each prefill batch and request, in a file of JSON lines."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from sglang_mminfer import settings

if TYPE_CHECKING:
    from sglang_mminfer.modality.segments import ModalityMap

logger = logging.getLogger(__name__)


class LayerAudit(msgspec.Struct, kw_only=True):
    """How far one layer's sparse attention was from dense attention on sampled rows; see audit.py.

    Attributes:
        layer: the layer's number.
        rows: sampled rows.
        error_mean, error_max: |o - o_dense| / |o_dense| over a head's rows; mean and maximum over heads.
        worst_head: the head of error_max, counted over the whole model.
        recall_mean, recall_min: the share of the dense attention's mass that was visited, mean over a head's rows; mean
            and minimum over heads.
        first_head, num_heads: the heads that this covers, counted over the whole model: in a file the heads of one
            rank, in what `read_trace` returns the heads of all ranks.
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
        """The figures over the heads of both: `other` has the same layer and rows on another rank."""
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


class GuardedHead(msgspec.Struct, kw_only=True):
    """A head that the guard made dense; see guard.py.

    Attributes:
        layer, head: the head, counted over the whole model.
        error: its output error, the mean over the audited requests that decided it; None if that is no finite number.
    """

    layer: int
    head: int
    error: float | None


class MapEntry(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One segment of a modality map.

    Attributes:
        start, stop: tokens [start, stop).
        grid: (frames, rows, cols) in tokens; None if unknown.
        apart: other tokens, such as timestamps, lie between the frames, so the positions of frames are not recorded.
        raster: False if the tokens of a frame have no rows and columns.
    """

    modality: str
    start: int
    stop: int
    grid: tuple[int, int, int] | None = None
    apart: bool = False
    raster: bool = True


def map_entries(modality_map: ModalityMap) -> list[MapEntry]:
    """A map's segments as trace entries."""
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
    """The map of trace entries. Segments whose frames lie apart get no grid."""
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
    """One request in one prefill batch. Lengths are in tokens; times are in milliseconds, for the whole batch.

    On a GPU without a trace nobody waits for the device. Then `attn_ms`, `forward_ms` and `overflowing_tiles` are 0,
    and `density` is that of the visited tiles by their area, which is a little more.

    Attributes:
        segments: segments of the request's modality map; 0 without a map.
        sparse_layers: layers that ran sparse.
        density: visited over causal pairs, mean over those layers and this rank's heads; None if the request ran dense.
        dense_reason: why the request ran dense; None if it ran sparse.
        plan_ms, attn_ms: time in planning, and in attention.
        forward_ms: from the start of planning to the end of the last attention layer: all of the model except its last
            MLP and its head, with the audit, and with the vision tower unless SGLang had the embeddings cached.
        map: the request's modality map, only with the last chunk of its prompt.
        audit: one entry for each sparse layer, if the request is audited.
        audit_ms: time in audits, not part of attn_ms.
        audit_failures: audits of a request's layer that failed.
        encode_ms: time in the vision encoder, part of forward_ms.
        encoded_again: media that the vision encoder ran on again, because SGLang's embedding cache had refused them;
            see encoder_watch.py.
        encoded_again_ms: the time that took, part of forward_ms.
        overflowing_tiles: query tiles of a head, in the whole batch, that saw everything because their rows asked for
            more keys than their pattern's budget.
        guarded_heads: heads of this rank that ran dense because of the guard.
        guard: heads that run dense for requests that begin after this one's prompt was complete, by what its audit
            showed.
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
    encode_ms: float = 0.0
    encoded_again: int = 0
    encoded_again_ms: float = 0.0
    overflowing_tiles: int = 0
    guarded_heads: int = 0
    guard: list[GuardedHead] | None = None


def density_of_records(records: Iterable[PrefillRecord]) -> float | None:
    """Visited over causal pairs of all rows that some chunks computed; a dense chunk counts as 1. None without chunks,
    or if a sparse one does not tell."""
    visited = causal = 0.0
    for record in records:
        density = 1.0 if record.dense_reason else record.density
        if density is None:
            return None
        pairs = (record.prefix_len + 1 + record.seq_len) * record.chunk_len / 2
        causal += pairs
        visited += pairs * density
    return visited / causal if causal else None


def rank_path(path: str | os.PathLike[str], rank: int, data_rank: int = 0) -> str:
    """The trace file of one rank.

    Args:
        path: the file of rank 0.
        rank: in the attention's tensor parallelism.
        data_rank: its group of data-parallel attention.
    """
    return f"{os.fspath(path)}{f'.dp{data_rank}' if data_rank else ''}{f'.rank{rank}' if rank else ''}"


class TraceFile:
    """Appends records to a file. If the file cannot be written, that is logged once and tracing stops.

    Args:
        path: the file; None: no trace.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    @classmethod
    def from_environment(cls, rank: int = 0, data_rank: int = 0) -> TraceFile:
        """The file that SGLANG_MMINFER_TRACE names, for one rank.

        Rank 0 records everything. The other ranks record the audits of their own heads, and what the guard did with
        these, in FILE.rank1 and so on: ranks that sent each other their figures would have to wait for each other, and
        one that failed would stop them all.
        With data-parallel attention each group has requests of its own; the second group writes FILE.dp1.
        """
        path = settings.TRACE.read()
        return cls(rank_path(path, rank, data_rank) if path else None)

    @property
    def enabled(self) -> bool:
        """Whether there is a file to write to."""
        return self.path is not None

    def append(self, records: list[PrefillRecord]) -> None:
        """Appends the records, a line each."""
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


def read_trace(path: str | os.PathLike[str]) -> list[PrefillRecord]:
    """The records of a trace file and of the other data-parallel groups' files, with audits and guarded heads of all
    ranks joined.

    Raises:
        ValueError: naming the file and the line that is no record.
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
        # By request and chunk, the latest first: `pop` takes the oldest, in the order of rank 0's records.
        records_of_rank: dict[tuple[str, int, int], list[PrefillRecord]] = {}
        for record in reversed(_read(rank_path(path, rank))):
            records_of_rank.setdefault((record.rid, record.prefix_len, record.chunk_len), []).append(record)
        for record in records:
            if queue := records_of_rank.get((record.rid, record.prefix_len, record.chunk_len)):
                other = queue.pop()
                other_heads = {audit.layer: audit for audit in other.audit or []}
                if record.audit:
                    record.audit = [
                        audit.joined(other_heads[audit.layer]) if audit.layer in other_heads else audit
                        for audit in record.audit
                    ]
                record.guard = [*(record.guard or []), *(other.guard or [])] or None
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
