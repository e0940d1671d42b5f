"""Static patterns that the paper compares with (MMInference, table 3), as head configs: every head does the same.

Two ways to get one. `published(name)` has the paper's numbers, for real models and long prompts; the same stand in
head_configs/ as baseline_*.json, so that a server takes them by name. `at_density(name, density, map)` gives a
baseline as much as anything else gets for one prompt, so that small models compare at equal density.

Said in our patterns, some are not to the letter what their papers have:

* sparse_fixed: the last `local` keys and one column of each frame (Sparse Transformer, "fixed"). Text rows, too: a 2D
  boundary keeps them from seeing everything, and counts windows in the tokens of one modality.
* sparse_strided: the last `local` keys and the row's own cell in every frame ("strided"). A text row has no cell; it
  sees everything.
* swin: a window of `local` keys that slides with the row, in place of fixed windows that shift from layer to layer.
  It holds what both of those hold.
* wrong_phase (no published numbers): lines through a cell that nobody asked for. What a grid is worth when its phase
  is not the model's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_mminfer.head_config import HeadConfig, Provenance
from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.a_shape import AShape
from sglang_mminfer.patterns.boundary import Boundary2D, HeadPattern
from sglang_mminfer.patterns.grid import Grid
from sglang_mminfer.patterns.tri_shape import TriShape
from sglang_mminfer.patterns.vertical_slash import VerticalSlash
from sglang_mminfer.planning.planner import BatchPlanner, RequestChunk, is_static
from sglang_mminfer.tools.figures import plan_of

FRAME = 256
"""Tokens of a frame, where published numbers depend on them: 182 (LLaVA-Video), 257 (LongVILA), 256 (448 x 448
pixels in Qwen2.5-VL)."""

PUBLISHED: dict[str, tuple[HeadPattern, str]] = {}
"""Name -> pattern and where its numbers come from."""


def _columns(sink: int, local: int, phase: int, h: bool = False) -> Boundary2D:
    """A window, and one cell of every frame, for rows of every modality."""
    vision, text = Modality.VISION, Modality.TEXT
    near = AShape(sink, local)
    return Boundary2D(
        {
            (text, text): near,
            (text, vision): Grid("frame", True, False, False, phase, 0, local),
            (vision, text): near,
            (vision, vision): Grid("frame", True, h, False, phase, 0, local),
        }
    )


PUBLISHED["a_shape"] = AShape(128, 4096), "StreamingLLM's A-shape: sink 128, local 4,096"
PUBLISHED["tri_shape"] = TriShape(128, 4096, 128), "Tri-shape: sink 128, local 4,096, bottom 128"
PUBLISHED["sparse_fixed"] = _columns(0, FRAME, 0), "Sparse Transformer, fixed: local and stride one frame"
PUBLISHED["sparse_strided"] = (
    Grid("frame", False, False, True, 0, 0, FRAME),
    "Sparse Transformer, strided: local and stride one frame",
)
PUBLISHED["swin"] = AShape(0, 4096), "Swin-like windows of 4,096 (as many as the A-shape has)"
PUBLISHED["minference"] = (
    VerticalSlash(1000, 6144, 64),
    "MInference's vertical-slash: of the searched sizes those nearest to MInference's own default (1,000 and 6,096)",
)

SMALL_SINK = 64
"""Where density is given: a key tile."""

# What a budget of so many tokens buys; every one visits more with more. `cells`: of a frame.
_SIZED: dict[str, Callable[[int, int], HeadPattern]] = {
    "a_shape": lambda budget, cells: AShape(SMALL_SINK, budget),
    "tri_shape": lambda budget, cells: TriShape(SMALL_SINK, budget, 64),
    "sparse_fixed": lambda budget, cells: _columns(0, budget, 0),
    "sparse_strided": lambda budget, cells: Grid("frame", False, False, True, 0, 0, budget),
    "swin": lambda budget, cells: AShape(0, budget),
    "minference": lambda budget, cells: VerticalSlash(budget, budget),
    "wrong_phase": lambda budget, cells: _columns(SMALL_SINK, budget, cells // 2 + 1, h=True),
}
NAMES = tuple(_SIZED)


def published(name: str) -> HeadConfig:
    """A baseline with the paper's numbers.

    Raises:
        ValueError: for a name that has none.
    """
    if name not in PUBLISHED:
        raise ValueError(f"no baseline with published numbers is named {name!r}; there are: {', '.join(PUBLISHED)}")
    pattern, words = PUBLISHED[name]
    note = (
        f"A baseline, not a recommendation: {words}. Numbers of MMInference (arXiv 2504.16083), table 3, the same in "
        "every head; no search produced it."
    )
    return HeadConfig(f"baseline_{name}", Provenance("handwritten", note), "all", ((pattern,),))


def density_of(pattern: HeadPattern, modality_map: ModalityMap, dense_below: int = 0) -> float:
    """Visited over causal pairs when the whole prompt is prefilled at once, rows below `dense_below` densely.

    An estimated pattern is asked with random queries and keys, whose diagonals lie apart: real ones lie closer, so
    that a server visits less.
    """
    length = modality_map.length
    if is_static(pattern):
        plan = plan_of(modality_map, [pattern], dense_below)
    else:
        random = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, length, 1, 16, generator=random)
        chunk = RequestChunk(modality_map, 0, length, 0, torch.arange(length))
        plan = BatchPlanner([chunk], length, dense_below=dense_below).plan([pattern], q, k, 0.25)
    return float(plan.visited_by_row.sum()) / (length * (length + 1) / 2)


def at_density(name: str, density: float, modality_map: ModalityMap) -> HeadConfig:
    """A baseline of the density that is nearest to `density` for a prompt, what its window is being what is free.

    A baseline that visits more with the smallest window already (text rows of a tri-shape see everything) is given
    with that one; the note in its provenance says what it visits.

    Raises:
        ValueError: for a name that does not exist, or a density outside 0 .. 1.
    """
    return sized_for(name, density, modality_map)[0]


def sized_for(name: str, density: float, modality_map: ModalityMap) -> tuple[HeadConfig, int]:
    """`at_density` and the budget that it found, in tokens."""
    if name not in _SIZED:
        raise ValueError(f"no baseline is named {name!r}; there are: {', '.join(_SIZED)}")
    if not 0 < density < 1:
        raise ValueError(f"density: expected a number between 0 and 1, got {density!r}")
    low, high = 1, max(2, modality_map.length)
    found = {low: density_of(_pattern(name, low, modality_map), modality_map)}
    while high - low > 1 and found[low] < density:
        middle = (low + high) // 2
        found[middle] = density_of(_pattern(name, middle, modality_map), modality_map)
        if found[middle] <= density:
            low = middle
        else:
            high = middle
    budget = min(found, key=lambda b: (abs(found[b] - density), b))
    return with_budget(name, budget, modality_map), budget


def with_budget(name: str, budget: int, modality_map: ModalityMap) -> HeadConfig:
    """A baseline of so many tokens: of its window, or of its columns and of its diagonals."""
    pattern = _pattern(name, budget, modality_map)
    note = (
        f"A baseline for comparisons, not a recommendation: {name}, budget {budget}, planned density "
        f"{density_of(pattern, modality_map):.3f} for a prompt of {modality_map.length} tokens; no search produced it."
    )
    return HeadConfig(f"baseline_{name}", Provenance("handwritten", note), "all", ((pattern,),))


def _pattern(name: str, budget: int, modality_map: ModalityMap) -> HeadPattern:
    rasters = [s.grid for s in modality_map.segments if s.grid is not None]
    cells = max(rasters, key=lambda grid: grid.frames * grid.cells).cells if rasters else 1
    return _SIZED[name](budget, cells)
