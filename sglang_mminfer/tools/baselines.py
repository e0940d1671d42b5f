"""The baselines of the paper (MMInference, table 3) as head configs in which every head has the same pattern.

There are two ways to size a baseline. `published(name)` has the paper's numbers, for real models and long prompts;
head_configs/ has the same as baseline_*.json, so that a server takes them by name. `at_density(name, density, map)`
sizes a baseline to a given density on one prompt, so that small models compare patterns at equal density.

Our patterns cannot express every baseline to the letter:

* sparse_fixed: the last `local` keys and one column of each frame (Sparse Transformer, "fixed"), for text rows, too:
  a 2D boundary keeps text rows from seeing everything, and counts windows in the tokens of one modality.
* sparse_strided: the last `local` keys and the row's own cell in every frame ("strided"). A text row has no cell, so
  it sees everything.
* swin: a window of `local` keys that slides with the row, instead of fixed windows that shift from layer to layer.
  The sliding window contains both.
* wrong_phase (no published numbers): lines through an arbitrary cell. It shows what a grid is worth if its phase is
  not the model's.
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
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner, is_static
from sglang_mminfer.tools.figures import plan_of

FRAME = 256
"""Tokens of a frame, for published numbers that depend on it: 256 is a frame of 448 x 448 pixels in Qwen2.5-VL;
LLaVA-Video has 182 tokens and LongVILA 257."""

PUBLISHED: dict[str, tuple[HeadPattern, str]] = {}
"""Name -> the pattern, and the source of its numbers."""


def _columns(sink: int, local: int, phase: int, h: bool = False) -> Boundary2D:
    """Every row sees a window and one cell of every frame, whatever the row's modality."""
    vision, text = Modality.VISION, Modality.TEXT
    window = AShape(sink, local)
    return Boundary2D(
        {
            (text, text): window,
            (text, vision): Grid("frame", True, False, False, phase, 0, local),
            (vision, text): window,
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
"""The sink of baselines that are sized by density: one key tile."""

# (budget in tokens, cells of a frame) -> pattern. A larger budget visits more.
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
        ValueError: no baseline with published numbers has this name.
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
    """Visited over causal pairs if the whole prompt is prefilled at once. Rows below `dense_below` are dense.

    An estimated pattern is planned for random queries and keys, whose heavy diagonals lie far apart. In a real
    model they lie closer together, so a server visits less.
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
    """A baseline whose budget brings its density on a prompt as near as possible to `density`.

    A baseline may visit more than that with the smallest budget already (text rows of a tri-shape see everything). It
    gets the smallest budget then, and the note in its provenance says what it visits.

    Raises:
        ValueError: the name does not exist, or the density is not between 0 and 1.
    """
    return sized_for(name, density, modality_map)[0]


def sized_for(name: str, density: float, modality_map: ModalityMap) -> tuple[HeadConfig, int]:
    """The baseline of `at_density`, and its budget in tokens."""
    if name not in _SIZED:
        raise ValueError(f"no baseline is named {name!r}; there are: {', '.join(_SIZED)}")
    if not 0 < density < 1:
        raise ValueError(f"density: expected a number between 0 and 1, got {density!r}")
    low, high = 1, max(2, modality_map.length)
    densities = {low: density_of(_pattern(name, low, modality_map), modality_map)}
    while high - low > 1 and densities[low] < density:
        middle = (low + high) // 2
        densities[middle] = density_of(_pattern(name, middle, modality_map), modality_map)
        if densities[middle] <= density:
            low = middle
        else:
            high = middle
    budget = min(densities, key=lambda b: (abs(densities[b] - density), b))
    return with_budget(name, budget, modality_map), budget


def with_budget(name: str, budget: int, modality_map: ModalityMap) -> HeadConfig:
    """A baseline with a budget in tokens: the size of its window, or the number of its columns and of its diagonals."""
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
