"""The report of a search: one HTML page with its pictures inside, and a table that a terminal can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_mminfer.patterns.base import kinds
from sglang_mminfer.patterns.boundary import Boundary2D, HeadPattern, QBoundary
from sglang_mminfer.tools.page import Page
from sglang_mminfer.tools.search.run import Scores, SearchResult


def rows_of(scores: Scores) -> list[tuple[str, float, float, float]]:
    """(name, density, error, ms of all layers) of each config."""
    every = range(len(scores.names))
    return [(scores.names[c], scores.density(c), scores.mean_error(c), float(scores.ms[c].sum())) for c in every]


def page(result: SearchResult) -> str:
    """One self-contained HTML page."""
    provenance = result.config.provenance
    out = Page(f"Head config {result.config.name}")
    calibration, budget, date = (text or "" for text in (provenance.calibration, provenance.budget, provenance.date))
    out.note(f"{provenance.note} Calibration: {calibration}. Budget: {budget}. {date}.")
    for doubt in result.doubts:
        out.warning(doubt)
    if result.held_out is not None:
        out.heading("On the held-out input")
        out.table(_COLUMNS, _cells(result.held_out))
    out.heading("On the calibration input")
    out.table(_COLUMNS, _cells(result.calibration))
    out.note(
        "Error: difference of a head's attention output from dense, in units of the head's root-mean-square output; "
        "near the worst rows of each modality, summed over modalities, the mean of all heads. Density: visited over "
        "causal pairs, estimates included. Time: the executor's, all layers, on the machine of the search."
    )
    out.note(result.cost_words)
    for heading, figure in (
        ("What each head does", mosaic(result.allocation.heads)),
        ("Error and density of each head", by_head(result)),
        ("What a budget buys", pareto(result)),
    ):
        out.heading(heading)
        out.picture(figure, heading)
    return out.html()


_COLUMNS = ("config", "density", "error", "time, ms")


def _cells(scores: Scores) -> list[tuple[str, float, float, int]]:
    return [(name, density, error, round(ms)) for name, density, error, ms in rows_of(scores)]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height))


def mosaic(heads: Sequence[Sequence[HeadPattern]]) -> Any:
    """Layers x heads, coloured by pattern; cells are labelled where there is room."""
    from matplotlib.patches import Patch

    layers, count = len(heads), len(heads[0])
    figure, axes = _figure(max(5.0, min(18.0, 1.6 * count if count <= 8 else 0.5 * count)), max(2.5, 0.55 * layers + 1))
    for layer, row in enumerate(heads):
        for head, pattern in enumerate(row):
            axes.add_patch(_square(head, layer, pattern.colour))
            if count <= 16:
                axes.text(
                    head,
                    layer,
                    pattern.label,
                    ha="center",
                    va="center",
                    fontsize=7 if count <= 8 else 5,
                    color="white",
                )
    axes.set(xlim=(-0.5, count - 0.5), ylim=(layers - 0.5, -0.5), xlabel="head", ylabel="layer")
    axes.set_xticks(range(0, count, 1 if count <= 32 else 4))
    axes.set_yticks(range(0, layers, 1 if layers <= 32 else 4))
    legend = [(kind, kind, pattern.colour) for kind, pattern in kinds().items()]
    legend += [(boundary.kind, boundary.title, boundary.colour) for boundary in (QBoundary, Boundary2D)]
    present = {pattern.kind for row in heads for pattern in row}
    axes.legend(
        handles=[Patch(color=colour, label=title) for kind, title, colour in legend if kind in present],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
    )
    return figure


def _square(x: int, y: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, color=colour)


def by_head(result: SearchResult) -> Any:
    """Two maps, layers x heads: error and density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers, count = result.allocation.by_head.shape[:2]
    figure, pair = pyplot.subplots(1, 2, figsize=(max(8.0, min(18.0, 0.9 * count)), max(2.6, 0.4 * layers + 1.2)))
    for axes, values, title in zip(pair, np.moveaxis(result.allocation.by_head, 2, 0), ("error", "density")):
        shown = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
        axes.set(xlabel="head", ylabel="layer", title=title)
        axes.set_xticks(range(0, count, 1 if count <= 16 else 4))
        axes.set_yticks(range(0, layers, 1 if layers <= 16 else 4))
        figure.colorbar(shown, ax=axes)
    figure.tight_layout()
    return figure


def pareto(result: SearchResult) -> Any:
    """Mean error over mean density: what the allocation can buy, and where the finalists stand."""
    figure, axes = _figure(8, 4.5)
    density, error = zip(*result.curve)
    axes.plot(density, error, "-", color="#4c78a8", label="allocation over all heads")
    marks = ["o", "s", "^", "v", "D", "P", "X", "*", "<", ">"]
    for mark, (name, its_density, its_error, _) in zip(marks, rows_of(result.calibration)):
        axes.plot([its_density], [its_error], mark, markersize=8, linestyle="none", label=name)
    axes.set(xlabel="density: visited over causal pairs", ylabel="mean error of a head", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
