"""The exact meaning of a head's pattern or boundary as a boolean mask. Patterns say theirs in `Pattern.visible`.

Deliberately shares nothing with planning: it is what plans are tested against. Quadratic; for small inputs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.base import Pattern
from sglang_mminfer.patterns.basis import HeadBasis
from sglang_mminfer.patterns.boundary import UNNAMED, HeadPattern, QBoundary
from sglang_mminfer.patterns.pair import Pair


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
    basis: HeadBasis | None = None,
) -> torch.Tensor:
    """The keys that each row of one chunk may see under one head's pattern.

    Args:
        modality_map: the whole conversation; at least `kv_stop` long.
        pattern: a pattern or a boundary.
        q_start, q_stop: absolute positions of the chunk's rows.
        kv_stop: number of keys so far; normally q_stop.
        q: [q_stop - q_start, D], the head's queries; k: [kv_stop, D], its keys. Needed by patterns that are
            estimated from them.
        sm_scale: factor on q . k in that estimate. Default: 1 / sqrt(D).
        basis: A [rank, D] and B [rank, D] of the head, for patterns that choose by (A q) . (B k). Default: by q . k.

    Returns:
        bool [q_stop - q_start, kv_stop].

    Raises:
        ValueError: an argument of another type, positions out of range, or q and k missing where the pattern is
            estimated.
    """
    if not isinstance(modality_map, ModalityMap):
        raise ValueError(f"pattern_mask: modality_map: expected a ModalityMap, got {modality_map!r}")
    if not isinstance(pattern, HeadPattern):
        raise ValueError(f"pattern_mask: pattern: expected a pattern or a boundary, got {pattern!r}")
    for name, position in (("q_start", q_start), ("q_stop", q_stop), ("kv_stop", kv_stop)):
        if not isinstance(position, int):
            raise ValueError(f"pattern_mask: {name}: expected an integer, got {position!r}")
    for name, rows in (("q", q), ("k", k)):
        if rows is not None and not isinstance(rows, torch.Tensor):
            raise ValueError(f"pattern_mask: {name}: expected a tensor or None, got {rows!r}")
    if sm_scale is not None and not isinstance(sm_scale, int | float):
        raise ValueError(f"pattern_mask: sm_scale: expected a number or None, got {sm_scale!r}")
    if not 0 <= q_start <= q_stop <= kv_stop <= modality_map.length:
        raise ValueError(
            f"pattern_mask: expected 0 <= q_start <= q_stop <= kv_stop <= {modality_map.length} (the map's length), "
            f"got q_start={q_start}, q_stop={q_stop}, kv_stop={kv_stop}"
        )
    chunk = Pair(
        modality_map,
        q_start,
        q_stop,
        kv_stop,
        rows=torch.ones(q_stop - q_start, dtype=torch.bool),
        keys=torch.ones(kv_stop, dtype=torch.bool),
        text_rule=True,
        q=q,
        k=k,
        sm_scale=sm_scale,
        basis=basis,
    )
    if isinstance(pattern, Pattern):
        return pattern.visible(chunk) & chunk.causal
    mask = torch.zeros_like(chunk.causal)
    for row_class in (Modality.TEXT, Modality.IMAGE, Modality.VIDEO):
        rows = modality_map.members(row_class)[chunk.q_pos]
        if isinstance(pattern, QBoundary):
            own = next((p for named, p in pattern.patterns.items() if named.covers(row_class)), UNNAMED)
            mask[rows] = own.visible(replace(chunk, rows=rows))[rows]
            continue
        named = {keys: p for (named_rows, keys), p in pattern.patterns.items() if named_rows.covers(row_class)}
        if Modality.VISION in named:
            key_classes = [Modality.TEXT, Modality.VISION]
        else:
            key_classes = [Modality.TEXT, Modality.IMAGE, Modality.VIDEO]
        for key_class in key_classes:
            own, keys = named.get(key_class, UNNAMED), modality_map.members(key_class)[:kv_stop]
            mask[rows] |= own.visible(replace(chunk, rows=rows, keys=keys, text_rule=False))[rows] & keys
    return mask & chunk.causal
