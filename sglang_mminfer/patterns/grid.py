"""grid: sink and local window, with vertical, horizontal and same-cell lines through the raster."""

from __future__ import annotations

import torch

from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.patterns.index import Lines, PairIndex, Scope
from sglang_mminfer.patterns.spec import Grid


def pair_index(pattern: Grid, scope: Scope) -> PairIndex:
    cells = scope.map.cells(pattern.stride)[: scope.kv_len]
    on_phase = cells == pattern.phase
    # A row cannot be placed on a raster that nobody knows, nor can it pick that raster's keys: see all of it.
    dense_rows = scope.positions >= _first_without_grid(scope)
    if scope.text_rule:
        dense_rows |= scope.text_after_vision
    if pattern.h:
        dense_rows |= on_phase
    return PairIndex(
        sink=pattern.sink,
        local=pattern.local,
        dense_rows=dense_rows,
        columns=torch.nonzero(on_phase & scope.key_members).flatten() if pattern.v else None,
        lines=Lines(pattern.stride, pattern.phase if pattern.v or pattern.h else None) if pattern.s else None,
    )


def _first_without_grid(scope: Scope) -> int:
    """Start of the first image or video among the scope's keys whose raster is not known."""
    for segment in scope.map.segments:
        if segment.modality is Modality.TEXT or segment.grid is not None:
            continue
        if scope.keys is None or scope.keys.covers(segment.modality):
            return segment.start
    return scope.map.length
