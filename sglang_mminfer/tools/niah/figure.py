"""The heat map of `mminfer niah`: a panel for each server and task, with depth from top to bottom, length across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sglang_mminfer.tools.niah.ask import Cell, Settings

TITLES = {
    "v-niah": "V-NIAH",
    "mm-niah": "MM-NIAH",
    "v-relay": "V-NIAH, relays",
    "mm-relay": "MM-NIAH, relays",
}


def draw(results: Mapping[str, Mapping[str, Sequence[Sequence[Cell]]]], settings: Settings, path: Path) -> Path:
    """Write a PNG file and return its path.

    Args:
        results: label of a server -> task -> [lengths][depths] cells.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    rows, columns = len(results), len(settings.tasks)
    width = max(3.4, 1.2 + 0.75 * len(settings.lengths))
    height = 1.35 + 0.36 * settings.depths
    figure = Figure(figsize=(columns * width + 1.4, rows * height + 0.9), layout="constrained", dpi=130)
    axes = figure.subplots(rows, columns, squeeze=False)
    colours = ScalarMappable(Normalize(0, 100), "cividis")  # readable with any colour vision
    for i, (label, tasks) in enumerate(results.items()):
        for j, task in enumerate(settings.tasks):
            ax, grid = axes[i][j], tasks[task]
            all_cells = [cell for row in grid for cell in row]
            share = _percent(sum(cell.right for cell in all_cells), sum(cell.answered for cell in all_cells))
            values = np.array([[np.nan if c.share is None else 100 * c.share for c in row] for row in grid]).T
            ax.imshow(values, aspect="auto", cmap=colours.cmap, norm=colours.norm)
            ax.set_facecolor("#d9d9d9")
            for y, x in np.ndindex(values.shape):
                cell = grid[x][y]
                words = f"{values[y, x]:.0f}" if cell.answered else ("error" if cell.errors else "–")
                if cell.answered and cell.errors:
                    words += f"\n{cell.errors} err."
                colour = "white" if values[y, x] < 50 else "black"
                ax.text(x, y, words, ha="center", va="center", fontsize=8, color=colour)
            ax.hlines(np.arange(1, settings.depths) - 0.5, -0.5, len(grid) - 0.5, "white", linewidth=0.8)
            ax.vlines(np.arange(1, len(grid)) - 0.5, -0.5, settings.depths - 0.5, "white", linewidth=0.8)
            ax.set_xticks(range(len(settings.lengths)), [_tokens(length) for length in settings.lengths])
            ax.set_yticks(range(settings.depths), [f"{100 * settings.depth(d):.0f}" for d in range(settings.depths)])
            ax.set_title(f"{label}\n{TITLES[task]}: {share}", fontsize=9)
            if j == 0:
                ax.set_ylabel("depth of the needle (%)", fontsize=9)
            if i == rows - 1:
                ax.set_xlabel("length (tokens)", fontsize=9)
            ax.tick_params(labelsize=8, length=0)
    bar = figure.colorbar(colours, ax=axes, shrink=min(1.0, 2.2 / (rows * height)), aspect=14)
    bar.set_label("right answers (%)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    answers_of_a_cell = settings.seeds
    figure.suptitle(
        f"Needles found, by length and depth ({answers_of_a_cell} answer{'s' if answers_of_a_cell > 1 else ''} a cell)",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _percent(right: int, answered: int) -> str:
    return f"{100 * right / answered:.1f} % of {answered}" if answered else "no answers"


def _tokens(length: int) -> str:
    return f"{length / 1024:g}K" if length % 256 == 0 and length >= 1024 else f"{length:,}"
