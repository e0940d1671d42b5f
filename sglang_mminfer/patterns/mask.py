"""The exact meaning of every pattern as a boolean mask (DESIGN section 3), written straight from its words.

Deliberately shares nothing with the index builders: it is what they are tested against. Quadratic; for small
inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.spec import (
    AShape,
    Boundary2D,
    Dense,
    Grid,
    HeadPattern,
    Pattern,
    QBoundary,
    TriShape,
    VerticalSlash,
)


def pattern_mask(
    modality_map: ModalityMap,
    pattern: HeadPattern,
    q_start: int,
    q_stop: int,
    kv_stop: int,
    q: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    *,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """The keys that each row of one chunk may see under one head's pattern.

    Args:
        modality_map: the whole conversation; at least `kv_stop` long.
        pattern: a pattern or a boundary.
        q_start, q_stop: absolute positions of the chunk's rows.
        kv_stop: number of keys so far; normally q_stop.
        q: [q_stop - q_start, D], the head's queries; k: [kv_stop, D], its keys. Needed by vertical_slash only,
            which is estimated from them.
        sm_scale: factor on q . k in that estimate. Default: 1 / sqrt(D).

    Returns:
        bool [q_stop - q_start, kv_stop].

    Raises:
        ValueError: positions out of range, or q and k missing where the pattern is estimated.
    """
    if not 0 <= q_start <= q_stop <= kv_stop <= modality_map.length:
        raise ValueError(
            f"pattern_mask: expected 0 <= q_start <= q_stop <= kv_stop <= {modality_map.length} (the map's length), "
            f"got q_start={q_start}, q_stop={q_stop}, kv_stop={kv_stop}"
        )
    chunk = _Chunk(modality_map, q_start, q_stop, kv_stop, q, k, sm_scale)
    everything = torch.ones(kv_stop, dtype=torch.bool)
    if isinstance(pattern, QBoundary):
        mask = torch.zeros_like(chunk.causal)
        for modality in (Modality.TEXT, Modality.IMAGE, Modality.VIDEO):
            rows = chunk.row_modality(modality)
            own = _named(pattern.patterns, modality) or Dense()
            mask[rows] = _pair_mask(chunk, own, rows, everything, text_rule=True)[rows]
        return mask & chunk.causal
    if isinstance(pattern, Boundary2D):
        mask = torch.zeros_like(chunk.causal)
        for q_modality in (Modality.TEXT, Modality.IMAGE, Modality.VIDEO):
            rows = chunk.row_modality(q_modality)
            if _named_pair(pattern, q_modality, Modality.VISION) is not None:
                key_classes = [Modality.TEXT, Modality.VISION]
            else:
                key_classes = [Modality.TEXT, Modality.IMAGE, Modality.VIDEO]
            for k_modality in key_classes:
                own = _named_pair(pattern, q_modality, k_modality) or Dense()
                keys = modality_map.members(k_modality)[:kv_stop]
                pair = _pair_mask(chunk, own, rows, keys, text_rule=False)
                mask[rows] |= pair[rows] & keys
        return mask & chunk.causal
    all_rows = torch.ones(q_stop - q_start, dtype=torch.bool)
    return _pair_mask(chunk, pattern, all_rows, everything, text_rule=True) & chunk.causal


class _Chunk:
    def __init__(
        self,
        modality_map: ModalityMap,
        q_start: int,
        q_stop: int,
        kv_stop: int,
        q: torch.Tensor | None,
        k: torch.Tensor | None,
        sm_scale: float | None,
    ) -> None:
        self.map, self.kv_stop, self.q, self.k, self.sm_scale = modality_map, kv_stop, q, k, sm_scale
        self.q_pos = torch.arange(q_start, q_stop)
        self.k_pos = torch.arange(kv_stop)
        self.causal = self.k_pos[None, :] <= self.q_pos[:, None]

    def row_modality(self, modality: Modality) -> torch.Tensor:
        return self.map.members(modality)[self.q_pos]


def _named(patterns: Mapping[Modality, Pattern], modality: Modality) -> Pattern | None:
    return next((p for m, p in patterns.items() if m.covers(modality)), None)


def _named_pair(boundary: Boundary2D, q_modality: Modality, k_modality: Modality) -> Pattern | None:
    return next((p for (q, k), p in boundary.patterns.items() if q.covers(q_modality) and k is k_modality), None)


def _pair_mask(
    chunk: _Chunk, pattern: Pattern, rows: torch.Tensor, keys: torch.Tensor, text_rule: bool
) -> torch.Tensor:
    """bool [Lq, Lk], right for the rows in `rows` and the keys in `keys`; not yet causal."""
    if isinstance(pattern, Dense):
        return torch.ones_like(chunk.causal)
    # Positions as this pair counts them: a key's rank among `keys`, and the rank of the last key a row may see.
    key_rank = keys.cumsum(0) - 1
    row_rank = key_rank[chunk.q_pos]
    distance = row_rank[:, None] - key_rank[None, :]
    if isinstance(pattern, VerticalSlash):
        columns, diagonals = _estimate(chunk, pattern, rows, keys, distance)
        on_diagonal = torch.zeros_like(chunk.causal)
        within = (distance >= 0) & keys
        on_diagonal[within] = diagonals[distance[within]]
        return on_diagonal | columns[None, :]
    mask = (key_rank[None, :] < pattern.sink) | (distance < pattern.local)
    sees_all = torch.zeros(len(chunk.q_pos), dtype=torch.bool)
    text_after_vision = chunk.row_modality(Modality.TEXT) & (chunk.q_pos > chunk.map.first_vision)
    if isinstance(pattern, TriShape):
        sees_all |= text_after_vision | (chunk.q_pos >= chunk.map.length - pattern.tail)
    elif isinstance(pattern, Grid):
        q_cell = chunk.map.cells(pattern.stride)[chunk.q_pos]
        k_cell = chunk.map.cells(pattern.stride)[chunk.k_pos]
        if text_rule:
            sees_all |= text_after_vision
        if pattern.h:
            sees_all |= q_cell == pattern.phase
        if pattern.v:
            mask = mask | (k_cell == pattern.phase)[None, :]
        if pattern.s:
            shape = torch.tensor([[0, 0] if s.grid is None else [s.grid.rows, s.grid.cols] for s in chunk.map.segments])
            of = shape[chunk.map.segment_ids.long()]
            same_shape = (of[chunk.q_pos][:, None] == of[chunk.k_pos][None, :]).all(dim=-1)
            mask = mask | ((q_cell[:, None] == k_cell[None, :]) & (k_cell >= 0)[None, :] & same_shape)
    else:
        assert isinstance(pattern, AShape)
    return mask | sees_all[:, None]


def _estimate(
    chunk: _Chunk, pattern: VerticalSlash, rows: torch.Tensor, keys: torch.Tensor, distance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heaviest columns (bool over key positions) and diagonals (bool over distances) of the last rows."""
    columns = torch.zeros(chunk.kv_stop, dtype=torch.bool)
    diagonals = torch.zeros(chunk.kv_stop + 1, dtype=torch.bool)
    last = rows.nonzero().flatten()[-pattern.last_q :]
    if len(last) == 0 or not bool(keys.any()):
        return columns, diagonals
    if chunk.q is None or chunk.k is None:
        raise ValueError("pattern_mask: vertical_slash is estimated, so it needs q [rows, D] and k [kv_stop, D]")
    q, k = chunk.q.flatten(1).float(), chunk.k.flatten(1).float()
    if q.shape[0] != len(chunk.q_pos) or k.shape[0] != chunk.kv_stop or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"pattern_mask: expected q [{len(chunk.q_pos)}, D] and k [{chunk.kv_stop}, D] of one head, "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    scale = q.shape[1] ** -0.5 if chunk.sm_scale is None else chunk.sm_scale
    scores = (q[last] @ k.T) * scale
    weights = torch.softmax(scores.masked_fill(~chunk.causal[last], -torch.inf), dim=-1)
    weights = weights * keys
    key_positions = keys.nonzero().flatten()
    column_mass = weights.sum(dim=0)[key_positions]
    column_mass[: pattern.forced_columns] = torch.inf
    best = column_mass.topk(min(pattern.vertical, len(key_positions))).indices
    columns[key_positions[best]] = True
    within = (distance[last] >= 0) & keys
    diagonal_mass = torch.zeros(len(key_positions))
    diagonal_mass.index_add_(0, distance[last][within], weights[within])
    diagonal_mass[: pattern.forced_diagonals] = torch.inf
    diagonals[diagonal_mass.topk(min(pattern.slash, len(key_positions))).indices] = True
    return columns, diagonals
