"""grid: sink and local window, with vertical, horizontal and same-cell lines through the raster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from sglang_mminfer.modality.runs import Runs
from sglang_mminfer.modality.segment_table import codes_of
from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.patterns.base import Count, Pattern, Size
from sglang_mminfer.patterns.index import TEXT_AFTER_VISION, Lines, PairIndex, Scope
from sglang_mminfer.patterns.ladder import SINK, Prompt
from sglang_mminfer.patterns.pair import Pair

ON_PHASE = "grid row on the phase (h)"
NO_RASTER = "no raster known"
COMBINATIONS = ("v", "h", "s", "vh", "vs", "vhs")


@dataclass(frozen=True)
class Grid(Pattern, kind="grid", colour="#54a24b"):
    """As `a_shape`, plus lines through the raster of images and videos. `stride` "frame": a token's cell is its index
    in the frame; "row": its column. `v`: keys whose cell is `phase`; `h`: rows whose cell is `phase` see all; `s`: keys
    of the row's own cell, in all segments of the same rows x cols. A text row that has vision before it sees all,
    unless a boundary says otherwise.

    MMInference algorithm 1.
    """

    reasons: ClassVar[tuple[str, ...]] = (TEXT_AFTER_VISION, ON_PHASE, NO_RASTER)
    stride: Literal["frame", "row"]
    v: bool
    h: bool
    s: bool
    phase: Count
    sink: Count
    local: Size

    def visible(self, pair: Pair) -> torch.Tensor:
        mask = pair.window(self.sink, self.local)
        cells = pair.map.cells(self.stride)
        q_cell, k_cell = cells[pair.q_pos], cells[pair.k_pos]
        whole = pair.sees_all
        if self.h:
            whole = whole | (q_cell == self.phase)
        if self.v:
            mask = mask | (k_cell == self.phase)[None, :]
        if self.s:
            shape = torch.tensor([[0, 0] if s.grid is None else [s.grid.rows, s.grid.cols] for s in pair.map.segments])
            of = shape[pair.map.segment_ids.long()]
            same_shape = (of[pair.q_pos][:, None] == of[pair.k_pos][None, :]).all(dim=-1)
            mask = mask | ((q_cell[:, None] == k_cell[None, :]) & (k_cell >= 0)[None, :] & same_shape)
        return mask | whole[:, None]

    def index(self, scope: Scope) -> PairIndex:
        needs_phase = self.v or self.h
        on_phase = scope.map.on_phase(self.stride, self.phase) if needs_phase else Runs.span(0, 0)
        # A row cannot be placed on a raster that nobody knows, nor can it pick that raster's keys: see all of it.
        whole = {NO_RASTER: Runs.span(_first_without_cells(self.stride, scope), scope.kv_len), **scope.sees_all}
        if self.h:
            whole[ON_PHASE] = on_phase
        skip = self.phase if needs_phase else None
        return PairIndex(
            sink=self.sink,
            local=self.local,
            whole=whole,
            columns=(on_phase & scope.key_members).members() if self.v else None,
            lines=Lines(self.stride, skip, skip_keys=self.v) if self.s else None,
        )

    @classmethod
    def ladder(cls, prompt: Prompt) -> Iterator[tuple[str, Pattern]]:
        for stride in prompt.strides:
            for lines in COMBINATIONS:
                v, h, s = (line in lines for line in "vhs")
                for rank in range(2 if v or h else 1):  # the head's best phase, and its second
                    for local in prompt.windows[: 2 - rank]:
                        pattern = cls(stride, v, h, s, prompt.phase(stride, rank), SINK, local)
                        yield f"grid {stride} {lines} {local} phase #{rank + 1}", pattern

    @property
    def label(self) -> str:
        lines = "".join(line for line in "vhs" if getattr(self, line))
        return f"{self.stride[0]} {lines} {self.phase}" if self.v or self.h else f"{self.stride[0]} {lines}"

    @property
    def raster_stride(self) -> str:
        return self.stride

    @property
    def line_stride(self) -> str | None:
        return self.stride if self.s else None


def _first_without_cells(stride: str, scope: Scope) -> int:
    """Start of the first image or video among the scope's keys whose raster is not known, or has no such stride."""
    table = scope.map.table
    vision = codes_of(Modality.VISION)
    unplaced = np.isin(table.code, [code for code in codes_of(scope.keys) if code in vision]) & ~table.has_cells(stride)
    return int(table.start[unplaced.argmax()]) if unplaced.any() else scope.map.length
