"""grid: sink and local window, with vertical, horizontal and same-cell lines through the raster."""

from __future__ import annotations

import numpy as np

from sglang_mminfer.modality.runs import Runs
from sglang_mminfer.modality.segment_table import codes_of
from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.patterns.index import Lines, PairIndex, Scope
from sglang_mminfer.patterns.spec import Grid


def pair_index(pattern: Grid, scope: Scope) -> PairIndex:
    needs_phase = pattern.v or pattern.h
    on_phase = scope.map.on_phase(pattern.stride, pattern.phase) if needs_phase else Runs.span(0, 0)
    # A row cannot be placed on a raster that nobody knows, nor can it pick that raster's keys: see all of it.
    dense_rows = Runs.span(_first_without_cells(pattern.stride, scope), scope.kv_len)
    if scope.text_rule:
        dense_rows |= scope.text_after_vision
    if pattern.h:
        dense_rows |= on_phase
    skip = pattern.phase if needs_phase else None
    return PairIndex(
        sink=pattern.sink,
        local=pattern.local,
        dense_rows=dense_rows,
        columns=(on_phase & scope.key_members).members() if pattern.v else None,
        lines=Lines(pattern.stride, skip, skip_keys=pattern.v) if pattern.s else None,
    )


def _first_without_cells(stride: str, scope: Scope) -> int:
    """Start of the first image or video among the scope's keys whose raster is not known, or has no such stride."""
    table = scope.map.table
    vision = codes_of(Modality.VISION)
    unplaced = np.isin(table.code, [code for code in codes_of(scope.keys) if code in vision]) & ~table.has_cells(stride)
    return int(table.start[unplaced.argmax()]) if unplaced.any() else scope.map.length
