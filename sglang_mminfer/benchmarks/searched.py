"""A head config of the kind that `mminfer search` finds for a 7B model, drawn by chance from what a search tries.

No search has run on real weights where this is measured, so which candidate wins is drawn; what the candidates are,
and what the winners of a head's modalities become, is the search's own code. Patterns that are estimated are left out:
they are planned from q, layer by layer, and are no matter of this benchmark.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.base import Pattern, kinds
from sglang_mminfer.patterns.boundary import Boundary2D, HeadPattern, QBoundary
from sglang_mminfer.patterns.ladder import STRIDES, Prompt
from sglang_mminfer.planning.planner import is_static

LAYERS, HEADS, DISTINCT = 28, 28, 160
"""Qwen2.5-VL-7B, and how many patterns its config has."""

FAVOURITES = 0.85
"""How much more the first of the patterns occur than the last: at 0.85 a layer has about 22.6 different ones."""


def searched_config(modality_map: ModalityMap, seed: int = 0) -> list[tuple[HeadPattern, ...]]:
    """[LAYERS][HEADS]: `DISTINCT` patterns in all. Three of five heads do different things for text and for video."""
    draw = random.Random(seed)
    pool: dict[HeadPattern, None] = {}
    while len(pool) < DISTINCT:
        pool[_head(draw, modality_map)] = None
    weights = [1 / (rank + 1) ** FAVOURITES for rank in range(DISTINCT)]
    heads = draw.choices(list(pool), weights, k=LAYERS * HEADS - DISTINCT) + list(pool)
    draw.shuffle(heads)
    return [tuple(heads[layer * HEADS : (layer + 1) * HEADS]) for layer in range(LAYERS)]


def _head(draw: random.Random, modality_map: ModalityMap) -> HeadPattern:
    prompt = _prompt(draw, modality_map)
    singles = [pattern for kind in kinds().values() for _, pattern in kind.ladder(prompt) if is_static(pattern)]
    if draw.random() < 0.6:
        text, video = (_one(draw, singles).plain(rows) for rows in (Modality.TEXT, Modality.VIDEO))
        return text if text == video else QBoundary({Modality.TEXT: text, Modality.VIDEO: video})
    boundaries = [boundary for _, boundary in Boundary2D.ladder(prompt) if is_static(boundary)]
    return _one(draw, singles) if draw.random() < 0.8 else draw.choice(boundaries)


def _one(draw: random.Random, patterns: Sequence[Pattern]) -> Pattern:
    """Each kind as often as any other but grids, which are as often as all others together."""
    grids = draw.random() < 0.5
    chosen = draw.choice(sorted({p.kind for p in patterns if (p.kind == "grid") == grids}))
    return draw.choice([p for p in patterns if p.kind == chosen])


def _prompt(draw: random.Random, modality_map: ModalityMap) -> Prompt:
    """What the attention of one head suggests: any phases."""
    grid = next(segment.grid for segment in modality_map.segments if segment.grid is not None)
    cells: dict[str, int] = {"frame": grid.cells, "row": grid.cols}
    phases: dict[str, list[int]] = {stride: [draw.randrange(cells[stride]) for _ in range(2)] for stride in STRIDES}
    return Prompt(modality_map.length, STRIDES, phases)
